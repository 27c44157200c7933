"""Exact replay of the ends of prompts: edits at any site and any position.

An edit at position p of layer l changes only positions from p on, in layers from l on. A *row* is
one variant of the columns from p to the query; it branches off the unedited run at its layer and
attends to the prompt's stored keys and values before p and, causally, to its own. The last layer
runs the query position only. The numbers are those of whole forward passes to float precision.
`tvlens.lens.replay` is the case of one column.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tvlens.lens.blocks import (
    Act,
    attend_all,
    attend_rows,
    causal,
    factor,
    project,
    unchanged,
    write,
)
from tvlens.lens.edits import Edit, act_on, put
from tvlens.lens.engine import FIRST, Engine, Reading, require_columns
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.sites import SEEN_BY_LATER, SITE_KINDS, Site, SiteKind
from tvlens.models.anatomy import Anatomy
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch

# Neighbouring positions are run as suffixes of one length while that costs at most so much more.
_WASTE = 1.15


@dataclass(frozen=True)
class Passage(Reading):
    """Prompts read once, at all columns.

    Attributes:
        batch: the prompts.
        keys: keys of every layer, ready to attend, each where the layer's block is.
        values: values of every layer, alike.
        position: index of every column among the real tokens of its prompt.
        residual: unedited residual streams before each block and at the end.
        heads: unedited `hook_z` of every layer.
        factors: what blocks multiply the output of attention by at the query, or None.
    """

    batch: Batch
    keys: tuple[Float[Tensor, "batch kv_head pos d_head"], ...]
    values: tuple[Float[Tensor, "batch kv_head pos d_head"], ...]
    position: Int[Tensor, "batch pos"]
    residual: tuple[Float[Tensor, "batch pos d_model"], ...]
    heads: tuple[Float[Tensor, "batch pos head d_head"], ...]
    factors: Float[Tensor, "batch layer d_model"] | None = None

    @property
    def z(self) -> Float[Tensor, "batch layer head d_head"]:
        rows = torch.arange(len(self), device=self.position.device)
        return torch.stack([z[rows, self.batch.query] for z in self.heads], dim=1)

    @property
    def factor(self) -> Float[Tensor, "batch layer d_model"] | None:  # type: ignore[override]
        return self.factors

    def rows(self, index: slice | Int[Tensor, " chosen"]) -> "Passage":
        def chosen(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(
                t[index if isinstance(index, slice) else index.to(t.device)] for t in tensors
            )

        return Passage(
            self.batch.take(index),
            chosen(self.keys),
            chosen(self.values),
            self.position[index],
            chosen(self.residual),
            chosen(self.heads),
            None if self.factors is None else self.factors[index],
        )


class SuffixEngine(Engine[Passage]):
    """Replays prompts from the first column that an edit changes.

    Attributes:
        max_tokens: tokens of suffixes that are run at once; bounds memory.
    """

    name = "suffix replay"

    def __init__(
        self, backend: Backend, anatomy: Anatomy, *, scaled: bool = False, max_tokens: int = 2048
    ) -> None:
        super().__init__(backend, scaled=scaled)
        self.anatomy = anatomy
        self.max_tokens = max_tokens

    @property
    def sites(self) -> Mapping[SiteKind, tuple[int, ...]]:
        every = tuple(range(self.backend.n_layer))
        found: dict[SiteKind, tuple[int, ...]] = dict.fromkeys(SITE_KINDS, every)
        blocks = self.anatomy.blocks
        found["resid_mid"] = tuple(n for n in every if not blocks[n].parallel)
        found["mlp_out"] = tuple(n for n in every if blocks[n].mlp is not None)
        return found

    def read(self, batch: Batch) -> Passage:
        return self._read(batch, {})

    def record(
        self, batch: Batch, sites: Collection[Site]
    ) -> dict[Site, Float[Tensor, "batch pos *rest"]]:
        found: dict[Site, Tensor | None] = dict.fromkeys(sites)
        self.require_sites(sites)
        self._read(batch, found)
        return {site: x for site, x in found.items() if x is not None}

    def _read(self, batch: Batch, kept: dict[Site, Tensor | None]) -> Passage:
        batch = batch.to(self.backend.device)
        mask, home = batch.mask, self.backend.device
        position = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        rows = torch.arange(len(batch), device=home)
        keys, values, residuals, heads, factors = [], [], [], [], []
        with torch.no_grad():
            allowed = self._allowed(mask)
            x = self.backend.embed(batch.inputs, mask)
            for layer, block in enumerate(self.anatomy.blocks):
                keep = partial(_keep, kept, layer, home)
                residuals.append(keep("resid_pre", x).to(home))
                q, k, v = project(self.anatomy, block, x, position, keep)
                pattern = partial(keep, "pattern") if Site("pattern", layer) in kept else None
                z = attend_all(
                    self.anatomy, block, q, k, v, allowed[block.window], position, pattern
                )
                keys.append(k.transpose(1, 2))
                values.append(v.transpose(1, 2))
                heads.append(z.to(home))
                if self.scaled:
                    factors.append(
                        factor(block, heads[-1][rows, batch.query].to(block.device)).to(home)
                    )
                x = write(block, x, z, keep)
            residuals.append(x.to(home))
        return Passage(
            batch,
            tuple(keys),
            tuple(values),
            position,
            tuple(residuals),
            tuple(heads),
            torch.stack(factors, dim=1) if factors else None,
        )

    def join(self, readings: Sequence[Passage]) -> Passage:
        width = max(reading.position.shape[1] for reading in readings)

        def columns(tensors: list[Tensor], axis_after: int) -> Tensor:
            after = (0, 0) * axis_after
            widened = [pad(t, (*after, width - t.shape[-1 - axis_after], 0)) for t in tensors]
            return torch.cat(widened)

        def layers(parts: list[tuple[Tensor, ...]], axis_after: int) -> tuple[Tensor, ...]:
            return tuple(columns([*of], axis_after) for of in zip(*parts, strict=True))

        factors = [reading.factors for reading in readings if reading.factors is not None]
        return Passage(
            Batch.join([reading.batch for reading in readings]),
            layers([reading.keys for reading in readings], 1),
            layers([reading.values for reading in readings], 1),
            columns([reading.position for reading in readings], 0),
            layers([reading.residual for reading in readings], 1),
            layers([reading.heads for reading in readings], 2),
            torch.cat(factors) if factors else None,
        )

    def run(self, reading: Passage, edit: Edit) -> Float[Tensor, "batch variant d_vocab"]:
        self.require_fit(edit)
        columns = edit.columns(reading.batch.query)
        columns = columns.expand(len(reading), edit.n_variant, -1)
        require_columns(edit, columns, reading.batch.inputs.shape[1])
        end = int(reading.batch.query.max()) + 1
        # What acts behind the query, or in no layer, changes nothing.
        acts = (columns >= 0) & (columns <= reading.batch.query[:, None, None])
        acts = acts & (edit.first_layer < self.backend.n_layer).to(acts.device)[None, :, None]
        starts = columns.where(acts, end).amin(dim=(0, 2)).tolist()
        found, order = [], []
        for index, start in self._groups(starts, edit.first_layer.tolist(), end, len(reading)):
            chosen = torch.tensor(index, device=columns.device)
            where = columns[:, chosen].where(acts[:, chosen], -1)
            found.append(self._run(reading, edit.of_variants(chosen.cpu()), where, start, end))
            order += index
        there = torch.tensor(order, device=found[0].device).argsort()
        return torch.cat(found, dim=1)[:, there]

    def _groups(
        self, starts: list[int], layers: list[int], end: int, n_prompts: int
    ) -> Iterator[tuple[list[int], int]]:
        """Variants that are run together, those of earlier layers first, and where they start."""
        most = max(1, self.max_tokens // n_prompts)
        group: list[int] = []
        needed = 0
        for variant in sorted(range(len(starts)), key=lambda v: (-starts[v], layers[v])):
            start = starts[variant]
            needed += end - start
            cost = (len(group) + 1) * (end - start)
            if group and (cost > _WASTE * needed or cost > most):
                yield sorted(group, key=layers.__getitem__), starts[group[-1]]
                group, needed = [], end - start
            group.append(variant)
        yield sorted(group, key=layers.__getitem__), starts[group[-1]]

    def _run(
        self,
        reading: Passage,
        edit: Edit,
        columns: Int[Tensor, "batch variant at"],
        start: int,
        end: int,
    ) -> Float[Tensor, "batch variant d_vocab"]:
        """Logits of variants in the order of their first layers, from column `start` on."""
        home, n_layer = self.backend.device, self.backend.n_layer
        start = min(start, int(reading.batch.query.min()))
        query = reading.batch.query[:, None, None] - start
        rows = torch.arange(len(reading), device=home)[:, None, None]
        allowed = self._allowed(reading.batch.mask)
        joining = edit.first_layer.bincount(minlength=n_layer + 1).tolist()
        acting = edit.acting
        seen_at_once = any(site.kind in SEEN_BY_LATER for site in edit.sites)
        x = reading.residual[0].new_empty(len(reading), 0, end - start, self.backend.d_model)
        for layer, block in enumerate(self.anatomy.blocks):
            last = layer == n_layer - 1
            n, new = x.shape[1], joining[layer]
            if seen_at_once:
                x = _append(x, reading.residual[layer][:, start:end], new)
                n, new = n + new, 0
            behind = reading.residual[layer + 1]
            if n:
                here = bool(acting[:n, layer].any())
                act = _Acting(edit, layer, columns[:, :n] - start, home) if here else unchanged
                seen = allowed[block.window][:, :, start:end, :end]
                x = self._step(reading, layer, act, x, start, seen, query if last else None)
                x = x.to(home)
            elif last:
                x = x[:, :, :1]
            if new:
                joined = edit.of_variants(torch.arange(n, n + new))
                of = columns[:, n : n + new]
                after = self._branch(reading, layer, joined, of, allowed[block.window])
                clean, there = behind[:, None, start:end], of - start
                if last:
                    clean = behind[rows, reading.batch.query[:, None, None]]
                    there = torch.where(there == query, 0, -1)
                x = torch.cat([x, put(clean.expand(-1, new, -1, -1), there, after)], dim=1)
        if joining[-1]:
            clean = reading.residual[-1][rows[:, :, 0], reading.batch.query[:, None]]
            x = torch.cat([x, clean[:, None].expand(-1, joining[-1], -1, -1)], dim=1)
        return self.backend.unembed(x[:, :, 0]).to(home)

    def _step(
        self,
        reading: Passage,
        layer: int,
        act: Act,
        x: Float[Tensor, "batch variant suffix d_model"],
        start: int,
        allowed: Bool[Tensor, "batch 1 suffix key"],
        query: Int[Tensor, "batch 1 1"] | None,
    ) -> Float[Tensor, "batch variant token d_model"]:
        """The suffixes behind one block; of a last one their query position alone."""
        block = self.anatomy.blocks[layer]
        x = act("resid_pre", x)
        position = reading.position[:, None, start : start + x.shape[2]]
        q, k, v = project(self.anatomy, block, x, position, act)
        if query is not None:
            rows = torch.arange(len(x), device=x.device)[:, None, None]
            variants = torch.arange(x.shape[1], device=x.device)[None, :, None]
            x, q = (t[rows.to(t.device), variants.to(t.device), query.to(t.device)] for t in (x, q))
            allowed = allowed[:, 0][rows, query]
            act = act.only_at(query) if isinstance(act, _Acting) else act
        z = self._attend(reading, layer, q, (k, v), start, allowed, act)
        return write(block, x, z, act)

    def _branch(
        self,
        reading: Passage,
        layer: int,
        edit: Edit,
        columns: Int[Tensor, "batch variant at"],
        allowed: Bool[Tensor, "batch 1 pos pos"],
    ) -> Float[Tensor, "batch variant at d_model"]:
        """Residual streams behind a block at the columns that are changed in it, and in it first.

        Nothing else of the layer changes: later positions see it in the next one.
        """
        block, home = self.anatomy.blocks[layer], self.backend.device
        rows = torch.arange(len(reading), device=home)[:, None, None]
        at = columns.clamp(min=0)
        every = torch.arange(columns.shape[2], device=home).expand(columns.shape)
        act = _Acting(edit, layer, every.where(columns >= 0, -1), home)
        if all(site.kind == "resid_post" for site in edit.sites):
            return act("resid_post", reading.residual[layer + 1][rows, at])
        x = reading.residual[layer][rows, at]
        if any(site.kind in ("q", "pattern") for site in edit.sites):
            q, _, _ = project(self.anatomy, block, x, reading.position[rows, at], act)
            seen = allowed[:, 0][rows, at]
            z = self._attend(reading, layer, q, None, seen.shape[-1], seen, act)
        else:
            z = reading.heads[layer][rows, at].to(block.device)
        return write(block, x, z, act).to(home)

    def _attend(
        self,
        reading: Passage,
        layer: int,
        q: Float[Tensor, "batch variant token head d_head"],
        own: tuple[Tensor, Tensor] | None,
        start: int,
        allowed: Bool[Tensor, "batch variants token key"],
        act: Act,
    ) -> Float[Tensor, "batch variant token head d_head"]:
        """Attention to the prompts' columns before `start`, and to own keys and values."""
        shared = [kept[layer][:, :, :start] for kept in (reading.keys, reading.values)]
        return attend_rows(
            self.anatomy.blocks[layer],
            q,
            (shared[0], shared[1]),
            own,
            allowed,
            reading.position[:, : allowed.shape[-1]],
            None if act is unchanged else partial(act, "pattern"),
        )

    def _allowed(self, mask: Bool[Tensor, "batch pos"]) -> dict[int | None, Tensor]:
        return {w: causal(mask, w) for w in {block.window for block in self.anatomy.blocks}}

    def generate(
        self, reading: Passage, edit: Edit, n_tokens: int, steps: range = FIRST
    ) -> Int[Tensor, "batch variant n_tokens"]:
        whole = WholePassEngine(self.backend, scaled=self.scaled)
        return whole.generate_batch(reading.batch, edit, n_tokens, steps)


def _keep(
    kept: dict[Site, Tensor | None],
    layer: int,
    home: torch.device,
    kind: SiteKind,
    activation: Tensor,
) -> Tensor:
    if Site(kind, layer) in kept:
        kept[Site(kind, layer)] = activation.to(home)
    return activation


class _Acting:
    """Makes an edit act on rows of tokens.

    Attributes:
        index: which token each variant's columns are, below 0 for none of these.
    """

    def __init__(
        self, edit: Edit, layer: int, index: Int[Tensor, "batch variant at"], home: torch.device
    ) -> None:
        self.edit, self.layer, self.index, self.home = edit, layer, index, home
        self.sites = edit.sites

    def __call__(self, kind: SiteKind, activation: Tensor) -> Tensor:
        site = Site(kind, self.layer)
        if site not in self.sites:
            return activation
        return act_on(self.edit, site, activation.to(self.home), self.index).to(activation.device)

    def only_at(self, token: Int[Tensor, "batch 1 1"]) -> "_Acting":
        """The same for rows of this one token."""
        index = torch.where(self.index == token, 0, -1)
        return _Acting(self.edit, self.layer, index, self.home)


def _append(
    rows: Float[Tensor, "batch variant suffix d_model"],
    clean: Float[Tensor, "batch suffix d_model"],
    n: int,
) -> Float[Tensor, "batch more suffix d_model"]:
    """`n` copies of unedited suffixes behind the rows."""
    return torch.cat([rows, clean[:, None].expand(-1, n, -1, -1)], dim=1)
