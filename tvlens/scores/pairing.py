"""Source and target prompts side by side, in pieces that are patched together."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tvlens.errors import ShapeError, TaskError
from tvlens.lens.edits import Edit, NoEdit
from tvlens.lens.engine import Engine, Reading
from tvlens.lens.lens import Lens
from tvlens.lens.patches import Patch
from tvlens.lens.positions import Places, Positions, matched, places, shared, spread
from tvlens.lens.sites import PER_HEAD, PER_KEY_VALUE_HEAD, Site, SiteKind, require_sites, site_kind
from tvlens.models.batch import Batch
from tvlens.scores.effects import Direction, PatchEffects
from tvlens.scores.metrics import Metric, Reference, measured
from tvlens.tasks.base import PromptSet


@dataclass(frozen=True)
class Piece:
    """Some of the prompts, in columns of their own.

    Attributes:
        source: prompts that activations are taken from.
        target: prompts that they are put into.
        from_columns: columns of `source` at every place; -1 fills up.
        to_columns: the columns of `target` that belong to them.
        wrong: first tokens of wrong answers, or None.
    """

    source: Batch
    target: Batch
    from_columns: Int[Tensor, "batch place at"]
    to_columns: Int[Tensor, "batch place at"]
    wrong: Int[Tensor, " batch"] | None

    def __len__(self) -> int:
        return len(self.target)


@dataclass(frozen=True)
class Ready:
    """A piece whose prompts were read, and what its metric is of them as they are.

    Attributes:
        lens: the model.
        metric: the metric.
        piece: the prompts.
        reading: the target prompts.
        reference: what the metric may compare outputs with.
        before: metric of the target prompts.
        source: metric of the source prompts, by the target's answers.
    """

    lens: Lens
    metric: Metric
    piece: Piece
    reading: Reading
    reference: Reference
    before: Float[Tensor, " batch"]
    source: Float[Tensor, " batch"]

    def measure(self, edit: Edit) -> Float[Tensor, "batch variant"]:
        """Metric of the target prompts under an edit."""
        outputs = self.lens.engine.anywhere.run(self.reading, edit)
        return measured(self.metric, self.lens, outputs, self.piece.target, self.reference)


@dataclass(frozen=True)
class Pairing:
    """What is patched into what.

    Attributes:
        lens: the model.
        source: source prompts.
        target: target prompts.
        places: where.
        from_columns: columns of the source prompts at every place; -1 fills up.
        to_columns: the columns of the target prompts that belong to them.
        kind: the site.
        layers: layers that are patched.
        heads: heads that are patched, one by one; None at sites without heads.
        wrong: first tokens of wrong answers, or None.
        task: name of the target's task.
    """

    lens: Lens
    source: Batch
    target: Batch
    places: Places
    from_columns: Int[Tensor, "batch place at"]
    to_columns: Int[Tensor, "batch place at"]
    kind: SiteKind
    layers: tuple[int, ...]
    heads: tuple[int, ...] | None
    wrong: Int[Tensor, " batch"] | None
    task: str

    @property
    def engine(self) -> Engine:
        """Runs and records the patches."""
        return self.lens.engine.anywhere

    @property
    def n_head(self) -> int:
        """Length of the head axis of effects."""
        return 1 if self.heads is None else n_heads(self.lens, self.kind)

    def pieces(self) -> Iterator[Piece]:
        """The prompts a few at a time: those whose places are in the same columns, or one."""
        at = 0
        while at < len(self.target):
            n = 1
            while at + n < len(self.target) and self._alike(at, at + n):
                n += 1
            rows = slice(at, at + n)
            source, cut_source = trimmed(self.source[rows])
            target, cut_target = trimmed(self.target[rows])
            device = self.lens.backend.device
            yield Piece(
                source.to(device),
                target.to(device),
                _moved(self.from_columns[rows], cut_source).to(device),
                _moved(self.to_columns[rows], cut_target).to(device),
                None if self.wrong is None else self.wrong[rows],
            )
            at += n

    def _alike(self, first: int, row: int) -> bool:
        wide = max(self.source.inputs.shape[1], self.target.inputs.shape[1])
        few = (row - first + 1) * wide <= self.lens.max_tokens
        return few and all(
            torch.equal(each[first], each[row])
            for each in (self.from_columns, self.to_columns, self.target.query)
        )

    def recorded(self, piece: Piece) -> dict[Site, Tensor]:
        """Activations of the source prompts at the layers that are patched."""
        return self.engine.record(piece.source, [Site(self.kind, n) for n in self.layers])

    def read(self, piece: Piece, metric: Metric) -> "Ready":
        """The piece, ready to be run with edits."""
        engine, clean = self.lens.engine, NoEdit(self.lens.n_layer)
        with torch.no_grad():
            source = engine.run(engine.read(piece.source), clean)
            reading = self.engine.read(piece.target)
            reference = Reference(piece.wrong, source[:, 0])
            both = source, self.engine.run(reading, clean)
            given, before = (
                measured(metric, self.lens, outputs, piece.target, reference)[:, 0]
                for outputs in both
            )
        return Ready(self.lens, metric, piece, reading, reference, before, given)

    def patch(self, piece: Piece) -> Patch:
        """One variant for each place, layer and head, in this order."""
        found = self.recorded(piece)
        layers, heads = torch.tensor(self.layers), torch.tensor(self.heads or [-1])
        grid = torch.cartesian_prod(torch.arange(self.places.n_place), layers, heads)
        at = grid[:, 0].to(piece.to_columns.device)
        return Patch(
            self.kind,
            self.lens.n_layer,
            grid[:, 1],
            None if self.heads is None else grid[:, 2],
            piece.to_columns[:, at],
            {site.layer: x for site, x in found.items()},
            piece.from_columns[:, at],
        )

    def spread(
        self, found: Float[Tensor, "prompt variant"]
    ) -> Float[Tensor, "prompt layer head place"]:
        """Effects of the variants of `patch`, each where it belongs; NaN elsewhere."""
        n_place, heads = self.places.n_place, self.heads or (0,)
        each = found.unflatten(1, (n_place, len(self.layers), len(heads))).permute(0, 2, 3, 1)
        absent = (self.to_columns < 0).all(dim=-1).cpu()
        each = each.masked_fill(absent[:, None, None], torch.nan)
        values = each.new_full((len(each), self.lens.n_layer, self.n_head, n_place), torch.nan)
        layers, at = torch.tensor(self.layers)[:, None], torch.tensor(heads)
        values[:, layers, at] = each
        return values

    def effects(
        self,
        effects_of: "Callable[[Ready], Float[Tensor, 'batch variant']]",
        *,
        metric: Metric,
        direction: Direction,
        method: str,
        progress: Callable[[int], None] | None,
    ) -> PatchEffects:
        """The effects on all prompts, a piece at a time.

        Args:
            effects_of: gives the effects of the variants of `patch` on a piece.
            metric: what they are differences of.
            direction: which of the two prompts is the clean one.
            method: what the way of `effects_of` is called.
            progress: called with the number of prompts finished.
        """
        found, before, source = [], [], []
        with self.lens.frozen():
            for piece in self.pieces():
                ready = self.read(piece, metric)
                found.append(effects_of(ready).cpu())
                before.append(ready.before.cpu())
                source.append(ready.source.cpu())
                if progress is not None:
                    progress(len(piece))
        return PatchEffects(
            self.spread(torch.cat(found).float()),
            torch.cat(before).float(),
            torch.cat(source).float(),
            self.kind,
            self.places.names,
            by=self.places.by,
            metric=metric.name,
            unit=metric.unit,
            direction=direction,
            method=method,
            task=self.task,
            model=self.lens.name,
            tokens=self._tokens(),
        )

    def _tokens(self) -> tuple[str, ...]:
        tokenizer = self.lens.backend.tokenizer
        if tokenizer is None or self.target.inputs.is_floating_point():
            return ()
        first = self.target.inputs[0][self.target.mask[0]]
        return tuple(tokenizer.decode([token]) for token in first.tolist())


def paired(
    lens: Lens,
    source: PromptSet,
    target: PromptSet,
    *,
    site: str | Site,
    positions: Positions,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    wrong: Int[Tensor, " batch"] | None = None,
) -> Pairing:
    """The prompts side by side, once everything that is asked for is there.

    Raises:
        UnknownNameError: there is no such site, or the model lacks it.
        ShapeError: a layer or head is not there, prompts differ in number, or in length where
            positions are numbers.
        TaskError: positions or roles are not there, or no source differs from its target.
    """
    if isinstance(site, Site):
        layers = [site.layer] if layers is None else layers
        heads = [site.head] if heads is None and site.head is not None else heads
        site = site.kind
    kind = site_kind(site)
    there = lens.engine.anywhere.sites
    require_sites(lens.name, there, [Site(kind, n) for n in layers or there.get(kind) or (0,)])
    batches = lens.encode(source), lens.encode(target)
    if len(batches[0]) != len(batches[1]):
        raise ShapeError(
            f"{len(batches[0])} source prompts for {len(batches[1])} target prompts; expected one "
            "source for each target"
        )
    if all(_same(*(batch[i : i + 1] for batch in batches)) for i in range(len(batches[0]))):
        raise TaskError(
            f"source and target prompts of task {target.task!r} are the same, so there is nothing "
            "to patch; give prompts that differ, such as clean and label-shuffled ones"
        )
    positions, groups = spread(positions, lambda: places(lens, target, batches[1], "roles").names)
    of = places(lens, source, batches[0], positions), places(lens, target, batches[1], positions)
    columns = matched(*of, *batches, tokenizer=lens.backend.tokenizer)
    where = shared(*of)[1]
    if groups:
        where, columns = _grouped(where, groups, columns)
    if kind == "pattern":
        _require_same_keys(*batches)
    return Pairing(
        lens,
        *batches,
        where,
        *columns,
        kind,
        tuple(there[kind] if layers is None else layers),
        _heads(lens, kind, heads),
        wrong,
        target.task,
    )


def _grouped(
    where: Places,
    groups: Mapping[str, Sequence[str]],
    columns: tuple[Int[Tensor, "batch place at"], Int[Tensor, "batch place at"]],
) -> tuple[Places, tuple[Tensor, Tensor]]:
    """Places that are of several roles each, whose tokens are matched role by role."""
    index = [[where.names.index(role) for role in roles] for roles in groups.values()]

    def of(each: Int[Tensor, "batch place at"]) -> Int[Tensor, "batch group some_at"]:
        parts = [each[:, roles].flatten(1) for roles in index]
        width = max(part.shape[1] for part in parts)
        return torch.stack([pad(part, (0, width - part.shape[1]), value=-1) for part in parts], 1)

    found = of(columns[0]), of(columns[1])
    return replace(where, names=tuple(groups), columns=found[1], all_roles=False), found


def n_heads(lens: Lens, kind: SiteKind) -> int:
    """How many heads a site has; key/value heads at keys and values, 0 at sites without heads."""
    if kind in PER_KEY_VALUE_HEAD:
        return lens.backend.n_kv_head
    return lens.n_head if kind in PER_HEAD else 0


def trimmed(batch: Batch) -> tuple[Batch, int]:
    """The batch without columns that no query sees, and how many there were before the others."""
    first, end = int(batch.mask.int().argmax(dim=1).min()), int(batch.query.max()) + 1
    cut = replace(
        batch,
        inputs=batch.inputs[:, first:end],
        mask=batch.mask[:, first:end],
        query=batch.query - first,
    )
    return cut, first


def _moved(columns: Int[Tensor, "batch place at"], n: int) -> Int[Tensor, "batch place at"]:
    return torch.where(columns < 0, -1, columns - n)


def _same(source: Batch, target: Batch) -> bool:
    source, target = trimmed(source)[0], trimmed(target)[0]
    return torch.equal(source.inputs, target.inputs) and torch.equal(source.query, target.query)


def _heads(lens: Lens, kind: SiteKind, heads: Sequence[int] | None) -> tuple[int, ...] | None:
    n = n_heads(lens, kind)
    if not n:
        if heads is not None:
            raise ShapeError(
                f"{kind} has no heads; leave heads out, or patch z, q, k, v or pattern"
            )
        return None
    outside = [head for head in heads or () if not 0 <= head < n]
    if outside or (heads is not None and not len(heads)):
        raise ShapeError(
            f"heads {list(heads or ())} of {kind} asked for; {lens.name!r} has heads 0 to {n - 1} "
            "there: choose one or more of these"
        )
    return tuple(range(n)) if heads is None else tuple(heads)


def _require_same_keys(source: Batch, target: Batch) -> None:
    for i, (a, b) in enumerate(zip(source.mask.sum(1), target.mask.sum(1), strict=True)):
        if a != b:
            raise ShapeError(
                f"prompt {i}: a pattern of {int(a)} source tokens does not fit {int(b)} target "
                "tokens; patch q, k or z, or use prompts of equal length"
            )
