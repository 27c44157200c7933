"""The only code that adds hooks: edits and recordings during whole forward passes.

This is the slow, exact path. It works for every architecture that TransformerLens hooks, and it is
what `tvlens.lens.replay` is tested against.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens.errors import InterventionError, ShapeError
from tvlens.lens.edits import Edit, QueryEdit, act_on
from tvlens.lens.engine import Engine, Reading, require_columns, require_layers
from tvlens.lens.sites import Site, SiteKind, require_sites
from tvlens.lens.taps import is_inert, tapped_sites, taps
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch
from tvlens.models.interrupts import surely, uninterrupted

# Bridges may show these and read others.
_MAYBE_INERT = ("q", "k", "v", "pattern")


@contextmanager
def counted_hooks(
    backend: Backend, functions: Mapping[str, Callable[[Tensor], Tensor | None]]
) -> Iterator[Counter[str]]:
    """Attach one function per hook point name; yields the firings counted so far.

    Hooks are removed on exit, also after an exception.

    Raises:
        InterventionError: on a clean exit, where a hook has never fired.
    """
    fired: Counter[str] = Counter()

    def call(name: str, activation: Tensor, hook: Any) -> Tensor | None:
        fired[name] += 1
        return functions[name](activation)

    attached = ExitStack()
    with surely(attached.close):
        with uninterrupted():
            attached.enter_context(
                backend.hooks([(name, partial(call, name)) for name in functions])
            )
        yield fired
    silent = [name for name in functions if not fired[name]]
    if silent:
        raise InterventionError(
            f"{len(silent)} of {len(functions)} hooks on {backend.name!r} never fired "
            f"({', '.join(silent[:3])}{', …' if len(silent) > 3 else ''}): either the model "
            "was not run inside the context or it has no such hook points"
        )


@contextmanager
def intervene(backend: Backend, edit: Edit, query: Int[Tensor, " batch"]) -> Iterator[Counter[str]]:
    """Make `edit` act on forward passes of the model inside the `with` block.

    The model must be given `batch * variant` rows, the variants of one prompt next to each other.

    Args:
        backend: the model.
        edit: what to change.
        query: query position of each prompt.

    Raises:
        UnknownNameError: the model lacks a site.
        ShapeError: `edit` is for a model with another number of layers, or the rows or columns do
            not fit.
        InterventionError: a hook never fired.
    """
    require_layers(edit, backend)
    require_sites(backend.name, tapped_sites(backend), edit.sites)
    home, n_batch, n_variant = backend.device, query.shape[0], edit.n_variant
    columns = edit.columns(query).to(home).expand(n_batch, n_variant, -1)

    def change(site: Site, activation: Tensor) -> Tensor:
        if activation.shape[0] != n_batch * n_variant:
            raise ShapeError(
                f"the model was run on {activation.shape[0]} rows, the edit is for {n_batch} "
                f"prompts x {n_variant} variants = {n_batch * n_variant} rows"
            )
        require_columns(edit, columns, activation.shape[1])
        here = activation.to(home).unflatten(0, (n_batch, n_variant))
        return act_on(edit, site, here, columns).flatten(0, 1).to(activation.device)

    with counted_hooks(backend, taps(backend, edit.sites, change)) as fired:
        yield fired


@dataclass(frozen=True)
class Attended:
    """What attention did at chosen positions, one of every prompt if no others were asked for.

    Attributes:
        z: `hook_z` of every head; zero in layers without heads, as all that follows.
        added: what attention adds to the residual stream, bias included.
        projected: what its output projection gives, before a block scales it; None where the
            backend cannot say.
    """

    z: Float[Tensor, "asked layer head d_head"]
    added: Float[Tensor, "asked layer d_model"]
    projected: Float[Tensor, "asked layer d_model"] | None

    @property
    def factor(self) -> Float[Tensor, "asked layer d_model"] | None:
        """What the blocks multiply `projected` by to make `added`."""
        if self.projected is None:
            return None
        return (self.added / self.projected).where(self.projected != 0, 0.0)


def record_attention(
    backend: Backend,
    inputs: Tensor,
    mask: Bool[Tensor, "batch pos"],
    query: Int[Tensor, " asked"],
    *,
    rows: Int[Tensor, " asked"] | None = None,
    change_z: Callable[[int, Tensor], Tensor | None] | None = None,
) -> Attended:
    """What attention does at the query positions of one forward pass.

    Args:
        backend: the model.
        inputs: what it reads.
        mask: which columns are no padding.
        query: the positions that are asked.
        rows: the prompt of each; by default every prompt is asked once, in order.
        change_z: gives `hook_z` of a layer in place of what it is, or None to leave it.
    """
    found: dict[str, Tensor] = {}
    of = torch.arange(len(query), device=inputs.device) if rows is None else rows

    def keep(name: str, activation: Tensor) -> None:
        here = activation.device
        # A view would keep the whole activation alive.
        found[name] = activation[of.to(here), query.to(here)].clone().to(inputs.device)

    def keep_z(layer: int, activation: Tensor) -> Tensor | None:
        z = backend.as_heads(activation)
        changed = None if change_z is None else change_z(layer, z)
        keep(backend.z_hook(layer), z if changed is None else changed)
        return None if changed is None else changed.reshape(activation.shape)

    layers = backend.attention_layers
    products = {n: backend.projected_hooks(n) for n in layers}
    functions: dict[str, Callable[[Tensor], Tensor | None]] = {
        name: partial(keep, name) for n in layers for name in (backend.added_hook(n), *products[n])
    }
    functions |= {backend.z_hook(n): partial(keep_z, n) for n in layers}
    with counted_hooks(backend, functions):
        backend.forward(inputs, mask)

    def stacked(names: Callable[[int], Iterable[str]]) -> Tensor:
        by_layer = {n: reduce(torch.mul, [found[name] for name in names(n)]) for n in layers}
        zero = torch.zeros_like(by_layer[layers[0]])
        return torch.stack([by_layer.get(n, zero) for n in range(backend.n_layer)], dim=1)

    return Attended(
        stacked(lambda n: [backend.z_hook(n)]),
        stacked(lambda n: [backend.added_hook(n)]),
        stacked(products.__getitem__) if all(products.values()) else None,
    )


@dataclass(frozen=True)
class WholePrompts(Reading):
    """Prompts kept as tokens, to be run whole each time."""

    batch: Batch
    heads: Float[Tensor, "batch layer head d_head"]
    factor: Float[Tensor, "batch layer d_model"] | None = None

    @property
    def z(self) -> Float[Tensor, "batch layer head d_head"]:
        return self.heads

    def rows(self, index: slice | Int[Tensor, " chosen"]) -> "WholePrompts":
        factor = None if self.factor is None else self.factor[index]
        return WholePrompts(self.batch.take(index), self.heads[index], factor)


class WholePassEngine(Engine[WholePrompts]):
    """Runs every edited prompt as a whole forward pass: slow, and exact for any architecture."""

    name = "whole passes"

    def __init__(self, backend: Backend, *, scaled: bool = False) -> None:
        super().__init__(backend, scaled=scaled)
        self._inert: dict[SiteKind, bool] = {}

    @property
    def sites(self) -> Mapping[SiteKind, tuple[int, ...]]:
        tapped = tapped_sites(self.backend)
        return {kind: () if self._is_inert(kind) else layers for kind, layers in tapped.items()}

    def require_sites(self, sites: Collection[Site]) -> None:
        there = tapped_sites(self.backend)
        inert = {site.kind for site in sites if self._is_inert(site.kind)}
        require_sites(self.backend.name, there | dict.fromkeys(inert, ()), sites)

    def _is_inert(self, kind: SiteKind) -> bool:
        if kind not in _MAYBE_INERT or not tapped_sites(self.backend)[kind]:
            return False
        if kind not in self._inert:
            batch = self.backend.short_prompts()
            with torch.no_grad(), self.backend.frozen():
                self._inert[kind] = is_inert(
                    self.backend, kind, lambda: self.backend.forward(batch.inputs, batch.mask)
                )
        return self._inert[kind]

    def record(
        self, batch: Batch, sites: Collection[Site]
    ) -> dict[Site, Float[Tensor, "batch pos *rest"]]:
        self.require_sites(sites)
        batch = batch.to(self.backend.device)
        found: dict[Site, Tensor] = {}

        def keep(site: Site, activation: Tensor) -> Tensor:
            found[site] = activation.clone().to(batch.inputs.device)
            return activation

        with torch.no_grad(), counted_hooks(self.backend, taps(self.backend, sites, keep)):
            self.backend.forward(batch.inputs, batch.mask)
        return found

    def read(self, batch: Batch) -> WholePrompts:
        batch = batch.to(self.backend.device)
        with torch.no_grad():
            found = record_attention(self.backend, batch.inputs, batch.mask, batch.query)
        return WholePrompts(batch, found.z, found.factor if self.scaled else None)

    def join(self, readings: Sequence[WholePrompts]) -> WholePrompts:
        batch = Batch.join([reading.batch for reading in readings])
        factors = [reading.factor for reading in readings if reading.factor is not None]
        return WholePrompts(
            batch,
            torch.cat([reading.heads for reading in readings]),
            torch.cat(factors) if factors else None,
        )

    def run(
        self, reading: WholePrompts, edit: Edit
    ) -> Float[Tensor, "batch variant *read d_vocab"]:
        return self.run_batch(reading.batch, edit)

    def final(
        self, reading: WholePrompts, edit: Edit
    ) -> Float[Tensor, "batch variant *read d_model"]:
        last = Site("resid_post", self.backend.n_layer - 1)
        kept: list[Tensor] = []

        def keep(_: Site, activation: Tensor) -> Tensor:
            kept.append(activation)
            return activation

        self.require_sites([last])
        # Taps of one place act in the order they were put there: this one behind the edit's.
        self._run(reading.batch, edit, taps(self.backend, [last], keep))
        return self._read_off(reading.batch, kept[0], edit.n_variant)

    def run_batch(self, batch: Batch, edit: Edit) -> Float[Tensor, "batch variant *read d_vocab"]:
        """As `run`, of prompts that were not read: their unedited heads are not asked for."""
        return self._read_off(batch, self._run(batch, edit), edit.n_variant)

    def _run(
        self,
        batch: Batch,
        edit: Edit,
        also: Mapping[str, Callable[[Tensor], Tensor | None]] = MappingProxyType({}),
    ) -> Float[Tensor, "row pos d_vocab"]:
        """Logits of every variant of every prompt, with further taps."""
        inputs = batch.inputs.repeat_interleave(edit.n_variant, dim=0)
        mask = batch.mask.repeat_interleave(edit.n_variant, dim=0)
        self.require_sites(edit.sites)
        acting = intervene(self.backend, edit.over(batch.answer_columns), batch.query)
        with acting, counted_hooks(self.backend, also):
            return self.backend.forward(inputs, mask)

    def _read_off(
        self, batch: Batch, found: Float[Tensor, "row pos *rest"], n: int
    ) -> Float[Tensor, "batch variant *read_and_rest"]:
        """What stands at the columns that are read off."""
        rows = torch.arange(len(found), device=found.device)[:, None]
        read = batch.read_columns.to(found.device).repeat_interleave(n, dim=0)
        at = found[rows, read].to(batch.inputs.device).unflatten(0, (len(batch), n))
        return at[:, :, 0] if batch.following is None else at

    def generate(
        self, reading: WholePrompts, edit: Edit, n_tokens: int, steps: range | None = None
    ) -> Int[Tensor, "batch variant n_tokens"]:
        return self.generate_batch(reading.batch, edit, n_tokens, steps)

    def generate_batch(
        self, batch: Batch, edit: Edit, n_tokens: int, steps: range | None = None
    ) -> Int[Tensor, "batch variant n_tokens"]:
        """As `generate`, of prompts that were not read."""
        n = edit.n_variant
        steps = edit.steps(n_tokens) if steps is None else steps
        batch.require_query_last()
        inputs = batch.inputs.repeat_interleave(n, dim=0)
        mask = batch.mask.repeat_interleave(n, dim=0)
        width = inputs.shape[1]
        with torch.no_grad():
            for step in range(n_tokens):
                acting = [width - 1 + s for s in range(step + 1) if s in steps]
                with self._acting(edit, acting, len(batch)):
                    chosen = self.backend.forward(inputs, mask)[:, -1].argmax(dim=-1, keepdim=True)
                inputs = torch.cat([inputs, chosen.to(inputs.device)], dim=1)
                mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return inputs[:, width:].unflatten(0, (len(batch), n))

    def _acting(
        self, edit: Edit, columns: list[int], n_prompts: int
    ) -> AbstractContextManager[Any]:
        """The edit at these columns, the same for all prompts; nothing where there are none."""
        if not columns:
            return nullcontext()
        if not isinstance(edit, QueryEdit):
            raise ShapeError(
                f"{type(edit).__name__} acts at columns of its own, and generated tokens have "
                "others; generate with edits of the query"
            )
        query = torch.full((n_prompts,), columns[0], device=self.backend.device)
        return intervene(self.backend, edit.and_at(columns[1:]), query)
