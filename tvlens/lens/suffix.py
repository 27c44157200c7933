"""Exact replay of the ends of prompts: edits at any site and any position.

An edit at position p of layer l changes only positions from p on, in layers from l on. A *row* is
one variant of the columns from p to the query; it branches off the unedited run at its layer and
attends to the prompt's stored keys and values before p and, causally, to its own. The last layer
runs the query position only, or that and the columns behind it at which the tokens of whole answers
are read off. The numbers are those of whole forward passes to float precision.
`tvlens.lens.replay` is the case of one column.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

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
from tvlens.lens.engine import Engine, require_columns
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.passage import Passage
from tvlens.lens.sites import SEEN_BY_LATER, SITE_KINDS, Site, SiteKind
from tvlens.models.anatomy import Anatomy
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch

# Neighbouring positions are run as suffixes of one length while that costs at most so much more.
_WASTE = 1.15


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
        start = 0 if batch.following is None else int(batch.query[0])
        keys, values, residuals, heads, factors = [], [], [], [], []
        with torch.no_grad():
            allowed = self._allowed(mask)
            x = self.backend.embed(batch.inputs, mask)
            for layer, block in enumerate(self.anatomy.blocks):
                keep = partial(_keep, kept, layer, home)
                residuals.append(_from(keep("resid_pre", x).to(home), start))
                q, k, v = project(self.anatomy, block, x, position, keep)
                pattern = partial(keep, "pattern") if Site("pattern", layer) in kept else None
                z = attend_all(
                    self.anatomy, block, q, k, v, allowed[block.window], position, pattern
                )
                keys.append(k.transpose(1, 2))
                values.append(v.transpose(1, 2))
                heads.append(_from(z.to(home), start))
                if self.scaled:
                    at_query = heads[-1][rows, batch.query - start]
                    factors.append(factor(block, at_query.to(block.device)).to(home))
                x = write(block, x, z, keep)
            residuals.append(_from(x.to(home), start))
        return Passage(
            batch,
            tuple(keys),
            tuple(values),
            position,
            tuple(residuals),
            tuple(heads),
            torch.stack(factors, dim=1) if factors else None,
            start,
        )

    def join(self, readings: Sequence[Passage]) -> Passage:
        return Passage.join(readings)

    def run(self, reading: Passage, edit: Edit) -> Float[Tensor, "batch variant *read d_vocab"]:
        x = self.final(reading, edit)
        logits = self.backend.unembed(x.flatten(0, 1) if x.ndim > 3 else x)
        return logits.view(*x.shape[:-1], -1).to(self.backend.device)

    def final(self, reading: Passage, edit: Edit) -> Float[Tensor, "batch variant *read d_model"]:
        self.require_fit(edit)
        batch = reading.batch
        edit = edit.over(batch.answer_columns)
        columns = edit.columns(batch.query)
        columns = columns.expand(len(reading), edit.n_variant, -1)
        require_columns(edit, columns, batch.inputs.shape[1], reading.start)
        end = int(batch.query.max()) + batch.n_read
        # What acts behind the last column that is read off, or in no layer, changes nothing.
        acts = (columns >= 0) & (columns <= batch.read_columns[:, None, -1:])
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
    ) -> Float[Tensor, "batch variant *read d_model"]:
        """Final streams of variants in the order of their first layers, from column `start` on."""
        home, n_layer = self.backend.device, self.backend.n_layer
        start = min(start, int(reading.batch.query.min()))
        kept = slice(start - reading.start, end - reading.start)
        read = reading.batch.read_columns[:, None]
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
                x = _append(x, reading.residual[layer][:, kept], new)
                n, new = n + new, 0
            behind = reading.residual[layer + 1]
            if n:
                here = bool(acting[:n, layer].any())
                act = _Acting(edit, layer, columns[:, :n] - start, home) if here else unchanged
                seen = allowed[block.window][:, :, start:end, :end]
                x = self._step(reading, layer, act, x, start, seen, read - start if last else None)
                x = x.to(home)
            elif last:
                x = x[:, :, : read.shape[-1]]
            if new:
                joined = edit.of_variants(torch.arange(n, n + new))
                of = columns[:, n : n + new]
                after = self._branch(reading, layer, joined, of, allowed[block.window])
                clean, there = behind[:, None, kept], of - start
                if last:
                    clean = behind[rows, read - reading.start]
                    there = _among(of, read)
                x = torch.cat([x, put(clean.expand(-1, new, -1, -1), there, after)], dim=1)
        if joining[-1]:
            clean = reading.residual[-1][rows, read - reading.start]
            x = torch.cat([x, clean.expand(-1, joining[-1], -1, -1)], dim=1)
        return x[:, :, 0] if reading.batch.following is None else x

    def _step(
        self,
        reading: Passage,
        layer: int,
        act: Act,
        x: Float[Tensor, "batch variant suffix d_model"],
        start: int,
        allowed: Bool[Tensor, "batch 1 suffix key"],
        read: Int[Tensor, "batch 1 read"] | None,
    ) -> Float[Tensor, "batch variant token d_model"]:
        """The suffixes behind one block; of a last one the tokens that are read off alone."""
        block = self.anatomy.blocks[layer]
        x = act("resid_pre", x)
        position = reading.position[:, None, start : start + x.shape[2]]
        q, k, v = project(self.anatomy, block, x, position, act)
        if read is not None:
            rows = torch.arange(len(x), device=x.device)[:, None, None]
            variants = torch.arange(x.shape[1], device=x.device)[None, :, None]
            x, q = (t[rows.to(t.device), variants.to(t.device), read.to(t.device)] for t in (x, q))
            allowed = allowed[:, 0][rows.to(read.device), read]
            act = act.only_at(read) if isinstance(act, _Acting) else act
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
        # Columns that are none read anything that is there.
        at = columns.clamp(min=reading.start)
        kept = at - reading.start
        every = torch.arange(columns.shape[2], device=home).expand(columns.shape)
        act = _Acting(edit, layer, every.where(columns >= 0, -1), home)
        if all(site.kind == "resid_post" for site in edit.sites):
            return act("resid_post", reading.residual[layer + 1][rows, kept])
        x = reading.residual[layer][rows, kept]
        if any(site.kind in ("q", "pattern") for site in edit.sites):
            q, _, _ = project(self.anatomy, block, x, reading.position[rows, at], act)
            seen = allowed[:, 0][rows, at]
            z = self._attend(reading, layer, q, None, seen.shape[-1], seen, act)
        else:
            z = reading.heads[layer][rows, kept].to(block.device)
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
        self, reading: Passage, edit: Edit, n_tokens: int, steps: range | None = None
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

    def only_at(self, tokens: Int[Tensor, "batch 1 read"]) -> "_Acting":
        """The same for rows of these neighbouring tokens alone."""
        return _Acting(self.edit, self.layer, _among(self.index, tokens), self.home)


def _among(
    index: Int[Tensor, "batch variant at"], tokens: Int[Tensor, "batch 1 read"]
) -> Int[Tensor, "batch variant at"]:
    """Which of these neighbouring tokens each index is, -1 for none of them."""
    there = (index >= tokens[..., :1]) & (index <= tokens[..., -1:])
    return torch.where(there, index - tokens[..., :1], -1)


def _from(activation: Tensor, start: int) -> Tensor:
    """The activation from a column on, without a hold on those before."""
    return activation[:, start:].clone() if start else activation


def _append(
    rows: Float[Tensor, "batch variant suffix d_model"],
    clean: Float[Tensor, "batch suffix d_model"],
    n: int,
) -> Float[Tensor, "batch more suffix d_model"]:
    """`n` copies of unedited suffixes behind the rows."""
    return torch.cat([rows, clean[:, None].expand(-1, n, -1, -1)], dim=1)
