"""Exact last-position replay: run each prompt once, then only its query position for every edit.

Edits that act at the query position alone change nothing before it: causal attention lets nothing
there depend on it. So the prefix's keys and values are computed once; a *row* is one variant of the
query position, attending to the shared prefix and to itself. Rows of one prompt never see each
other. A variant branches off the unedited row at the first layer it changes. The numbers are those
of whole forward passes to float precision.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tvlens.errors import ShapeError
from tvlens.lens.blocks import (
    attend_all,
    capped,
    causal,
    factor,
    project,
    weights,
    write,
)
from tvlens.lens.edits import Edit
from tvlens.lens.engine import Engine, Reading
from tvlens.lens.sites import Site, SiteKind
from tvlens.lens.suffix import SuffixEngine
from tvlens.models.anatomy import Anatomy
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch


@dataclass(frozen=True)
class Prefix(Reading):
    """Prompts read once: keys and values before the query, and the unedited query row.

    Attributes:
        batch: the prompts.
        keys: rotated keys of every layer, each where the layer's block is; rows of the batch that
            share a prompt share them.
        values: values of every layer, alike.
        visible: columns that the query position attends to besides itself.
        position: index of the query among the real tokens of its prompt.
        key_position: index of every column among the real tokens of its prompt.
        residual: unedited residual stream at the query position, before each block and at the end.
        heads: unedited `hook_z` at the query position.
        factors: what blocks multiply the output of attention by, layer by layer, or None.
    """

    batch: Batch
    keys: tuple[Float[Tensor, "prompt kv_head pos d_head"], ...]
    values: tuple[Float[Tensor, "prompt kv_head pos d_head"], ...]
    visible: Bool[Tensor, "batch pos"]
    position: Int[Tensor, " batch"]
    key_position: Int[Tensor, "batch pos"]
    residual: Float[Tensor, "layer_and_end batch d_model"]
    heads: Float[Tensor, "layer batch head d_head"]
    factors: Float[Tensor, "layer batch d_model"] | None = None

    @property
    def z(self) -> Float[Tensor, "batch layer head d_head"]:
        return self.heads.transpose(0, 1)

    @property
    def factor(self) -> Float[Tensor, "batch layer d_model"] | None:  # type: ignore[override]
        return None if self.factors is None else self.factors.transpose(0, 1)

    def rows(self, index: slice | Int[Tensor, " chosen"]) -> "Prefix":
        whole = self.batch.whole_prompts(index) if isinstance(index, slice) else None
        prompts = self.batch.prompt_of_row[index] if whole is None else whole
        return Prefix(
            self.batch.take(index),
            tuple(_chosen(keys, prompts) for keys in self.keys),
            tuple(_chosen(values, prompts) for values in self.values),
            self.visible[index],
            self.position[index],
            self.key_position[index],
            self.residual[:, index],
            self.heads[:, index],
            None if self.factors is None else self.factors[:, index],
        )


class ReplayEngine(Engine[Prefix]):
    """Replays the query position of prompts that were read once.

    Raises:
        UnknownArchitectureError: the model has a part that replay does not know.
    """

    name = "replay"

    def __init__(self, backend: Backend) -> None:
        self.anatomy: Anatomy = backend.anatomy()
        scales = [block.scale_output is not None for block in self.anatomy.blocks]
        super().__init__(backend, scaled=any(scales))
        self._suffix = SuffixEngine(backend, self.anatomy, scaled=self.scaled)

    @property
    def sites(self) -> Mapping[SiteKind, tuple[int, ...]]:
        every = tuple(range(self.backend.n_layer))
        return {"resid_post": every, "z": every}

    @property
    def anywhere(self) -> SuffixEngine:
        return self._suffix

    def runs(self, edit: Edit) -> bool:
        return edit.at_query_only and all(site.kind in self.sites for site in edit.sites)

    def record(
        self, batch: Batch, sites: Collection[Site]
    ) -> dict[Site, Float[Tensor, "batch pos *rest"]]:
        return self._suffix.record(batch, sites)

    def read(self, batch: Batch) -> Prefix:
        batch = batch.to(self.backend.device)
        rows = batch.prompt_of_row
        inputs, mask = batch.inputs[:: batch.shared], batch.mask[:: batch.shared]
        position = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        home = self.backend.device
        keys, values, residuals, heads, factors = [], [], [], [], []
        with torch.no_grad():
            allowed = {w: causal(mask, w) for w in {b.window for b in self.anatomy.blocks}}
            x = self.backend.embed(inputs, mask)
            for block in self.anatomy.blocks:
                residuals.append(x.to(home)[rows, batch.query])
                q, k, v = project(self.anatomy, block, x, position)
                z = attend_all(self.anatomy, block, q, k, v, allowed[block.window], position)
                keys.append(k.transpose(1, 2))
                values.append(v.transpose(1, 2))
                heads.append(z.to(home)[rows, batch.query])
                if self.scaled:
                    factors.append(factor(block, heads[-1].to(block.device)).to(home))
                x = write(block, x, z)
            residuals.append(x.to(home)[rows, batch.query])
        columns = torch.arange(batch.inputs.shape[1], device=home)
        return Prefix(
            batch,
            tuple(keys),
            tuple(values),
            batch.mask & (columns[None] < batch.query[:, None]),
            position[rows, batch.query],
            position[rows],
            torch.stack(residuals),
            torch.stack(heads),
            torch.stack(factors) if factors else None,
        )

    def heads_of(
        self, layer: int, x: Float[Tensor, "batch pos d_model"], mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        """`hook_z` of one layer at every position, of the residual streams before its block."""
        block, position = self.anatomy.blocks[layer], (mask.long().cumsum(dim=1) - 1).clamp(min=0)
        q, k, v = project(self.anatomy, block, x, position)
        return attend_all(self.anatomy, block, q, k, v, causal(mask, block.window), position)

    def write(
        self,
        layer: int,
        x: Float[Tensor, "*rows d_model"],
        z: Float[Tensor, "*rows head d_head"],
    ) -> Float[Tensor, "*rows d_model"]:
        """The residual streams behind one block, of those before it and the heads' `hook_z`."""
        return write(self.anatomy.blocks[layer], x, z)

    def join(self, readings: Sequence[Prefix]) -> Prefix:
        if len({reading.batch.shared for reading in readings}) > 1:
            every = [torch.arange(len(r), device=self.backend.device) for r in readings]
            readings = [r.rows(rows) for r, rows in zip(readings, every, strict=True)]
        width = max(reading.visible.shape[1] for reading in readings)

        def columns(tensors: list[Tensor], axis_after: int, at: int) -> Tensor:
            after = (0, 0) * axis_after
            widened = [pad(t, (*after, width - t.shape[-1 - axis_after], 0)) for t in tensors]
            return torch.cat(widened, dim=at)

        keys = [reading.keys for reading in readings]
        values = [reading.values for reading in readings]
        return Prefix(
            Batch.join([reading.batch for reading in readings]),
            tuple(columns([*of_layer], 1, at=0) for of_layer in zip(*keys, strict=True)),
            tuple(columns([*of_layer], 1, at=0) for of_layer in zip(*values, strict=True)),
            columns([reading.visible for reading in readings], 0, at=0),
            torch.cat([reading.position for reading in readings]),
            columns([reading.key_position for reading in readings], 0, at=0),
            torch.cat([reading.residual for reading in readings], dim=1),
            torch.cat([reading.heads for reading in readings], dim=1),
            torch.cat([r.factors for r in readings if r.factors is not None], dim=1)
            if self.scaled
            else None,
        )

    def run(self, reading: Prefix, edit: Edit) -> Float[Tensor, "batch variant d_vocab"]:
        return self.backend.unembed(self.final(reading, edit)).to(self.backend.device)

    def final(self, reading: Prefix, edit: Edit) -> Float[Tensor, "batch variant d_model"]:
        self._require_fit(edit)
        order = edit.first_layer.argsort(stable=True)
        edit = edit.of_variants(order)
        joining = edit.first_layer.bincount(minlength=self.backend.n_layer + 1).tolist()
        sites = edit.sites
        position, home = reading.position[:, None], self.backend.device
        x = reading.residual.new_empty(len(reading), 0, self.backend.d_model)
        for layer, block in enumerate(self.anatomy.blocks):
            x = x.to(block.device)
            z = x.new_empty(len(reading), 0, *reading.heads.shape[2:])
            if x.shape[1]:
                q, k, v = project(self.anatomy, block, x, position)
                z = self._attend_rows(reading, layer, q, k[:, :, None], v[:, :, None])
            if joining[layer]:
                z = _append(z, reading.heads[layer], joining[layer])
                x = _append(x, reading.residual[layer], joining[layer])
            if not x.shape[1]:
                continue
            z = _changed(edit, sites, Site("z", layer), z, home)
            x = _changed(edit, sites, Site("resid_post", layer), write(block, x, z), home)
        x = _append(x, reading.residual[-1], joining[-1])
        return x[:, order.argsort().to(x.device)]

    def generate(
        self, reading: Prefix, edit: Edit, n_tokens: int, steps: range | None = None
    ) -> Int[Tensor, "batch variant n_tokens"]:
        self._require_fit(edit)
        steps = edit.steps(n_tokens) if steps is None else steps
        reading.batch.require_query_last()
        n, home, sites = edit.n_variant, self.backend.device, edit.sites
        inputs = reading.batch.inputs.repeat_interleave(n, dim=0)
        mask = reading.batch.mask.repeat_interleave(n, dim=0)
        own: list[tuple[Tensor, Tensor]] = []
        with torch.no_grad():
            x = _append(reading.residual[0][:, None, :][:, :0], reading.residual[0], n)
            for step in range(n_tokens):
                position = reading.position[:, None] + step
                for layer, block in enumerate(self.anatomy.blocks):
                    q, k, v = project(self.anatomy, block, x, position)
                    k, v = k[:, :, None], v[:, :, None]
                    if step:
                        k = torch.cat([own[layer][0], k], dim=2)
                        v = torch.cat([own[layer][1], v], dim=2)
                        own[layer] = (k, v)
                    else:
                        own.append((k, v))
                    z = self._attend_rows(reading, layer, q, k, v)
                    here = sites if step in steps else frozenset()
                    z = _changed(edit, here, Site("z", layer), z, home)
                    x = _changed(edit, here, Site("resid_post", layer), write(block, x, z), home)
                chosen = self.backend.unembed(x).argmax(dim=-1).flatten().to(home)
                inputs = torch.cat([inputs, chosen[:, None]], dim=1)
                if step + 1 == n_tokens:
                    # One more position may be beyond the model's context.
                    break
                mask = pad(mask, (0, 1), value=True)
                x = self.backend.embed(inputs, mask)[:, -1].unflatten(0, (len(reading), n))
        return inputs[:, reading.batch.inputs.shape[1] :].unflatten(0, (len(reading), n))

    def _require_fit(self, edit: Edit) -> None:
        if not self.runs(edit):
            raise ShapeError(
                f"replay runs z and resid_post of the query position alone, but this "
                f"{type(edit).__name__} acts elsewhere too; use Lens.engine_for(edit)"
            )
        self.require_fit(edit)

    def _attend_rows(
        self, reading: Prefix, layer: int, q: Tensor, own_keys: Tensor, own_values: Tensor
    ) -> Float[Tensor, "batch variant head d_head"]:
        """Attention of rows to their prompt's prefix and to their own positions.

        `own_keys` and `own_values` are `[batch, variant, own position, kv_head, d_head]`.
        """
        block = self.anatomy.blocks[layer]
        n_kv, n_own = self.anatomy.n_kv_head, own_keys.shape[2]
        batch, variant = q.shape[:2]
        grouped = q.unflatten(2, (n_kv, -1)).permute(0, 2, 3, 1, 4)  # batch kv group variant d_head
        flat = grouped.flatten(2, 3) * block.scale
        shared = reading.batch.shared
        to_prefix = _times(flat, reading.keys[layer].transpose(-1, -2), shared)
        scaled = flat.unflatten(2, (-1, variant))
        to_own = torch.einsum("bkgnd,bnokd->bkgno", scaled, own_keys).flatten(2, 3)
        n_prefix = to_prefix.shape[-1]
        # The row being run is the last of its own positions.
        last = reading.position[:, None].to(block.device) + n_own - 1
        own = last - torch.arange(n_own - 1, -1, -1).to(last)
        at = torch.cat([reading.key_position.to(block.device), own], dim=1)
        seen = pad(reading.visible.to(block.device), (0, n_own), value=True)
        if block.window is not None:
            seen = seen & (last - at < block.window)
        hidden = torch.where(seen, 0.0, float("-inf")).to(q.dtype)
        scores = capped(block, torch.cat([to_prefix, to_own], dim=-1)) + hidden[:, None, None]
        scores = scores.unflatten(2, (-1, variant)).flatten(1, 2)  # batch head variant column
        if block.slopes is not None:
            scores = scores + block.slopes[:, None, None] * at[:, None, None]
        found = weights(block, scores).to(q.dtype).unflatten(1, (n_kv, -1)).flatten(2, 3)
        from_prefix = _times(found[..., :n_prefix], reading.values[layer], shared)
        from_prefix = from_prefix.unflatten(2, (-1, variant))
        own_weights = found[..., n_prefix:].unflatten(2, (-1, variant))
        from_own = torch.einsum("bkgno,bnokd->bkgnd", own_weights, own_values)
        return (
            (from_prefix + from_own).permute(0, 3, 1, 2, 4).reshape(batch, variant, -1, q.shape[-1])
        )


def _chosen(tensor: Tensor, index: slice | Int[Tensor, " chosen"]) -> Tensor:
    return tensor[index if isinstance(index, slice) else index.to(tensor.device)]


def _times(
    rows: Float[Tensor, "batch kv_head row inner"],
    prompts: Float[Tensor, "prompt kv_head inner outer"],
    shared: int,
) -> Float[Tensor, "batch kv_head row outer"]:
    """Matrix products in which so many neighbouring rows of the batch share one right factor."""
    n_rows = rows.shape[2]
    folded = rows.unflatten(0, (-1, shared)).transpose(1, 2).flatten(2, 3)
    product = (folded @ prompts).unflatten(2, (shared, n_rows))
    return product.transpose(1, 2).flatten(0, 1)


def _changed(
    edit: Edit, sites: frozenset[Site], site: Site, x: Tensor, home: torch.device
) -> Tensor:
    """What the edit makes of rows `[batch variant …]` at a site, if it acts there."""
    if site not in sites:
        return x
    return edit.change(site, x.to(home)[:, :, None])[:, :, 0].to(x.device)


def _append(rows: Tensor, clean: Tensor, n: int) -> Tensor:
    """`rows` `[batch, variant, …]` with `n` copies of the unedited row `[batch, …]` behind them."""
    more = clean.to(rows.device)[:, None].expand(-1, n, *clean.shape[1:])
    return torch.cat([rows, more], dim=1)
