"""Direct path patching: what a head says to one receiver, everything else left as it is."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import ModelError, ShapeError, TaskError, UnknownNameError
from tvlens.lens.blocks import project_out
from tvlens.lens.edits import NoEdit
from tvlens.lens.engine import Engine
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.lens.patches import Patch
from tvlens.lens.sites import Site
from tvlens.lens.suffix import Passage, SuffixEngine
from tvlens.models.anatomy import Block
from tvlens.models.batch import Batch
from tvlens.scores.metrics import (
    METRICS,
    Metric,
    MetricFunction,
    Reference,
    measured,
    metric_of,
    wrong_tokens,
)
from tvlens.scores.pairing import trimmed
from tvlens.scores.ranking import Head
from tvlens.scores.receivers import Receiver
from tvlens.scores.score import Scores
from tvlens.tasks.base import PromptSet

At = Literal["query", "all"]


def path_effects(
    lens: Lens,
    source: PromptSet | HeadMeans,
    target: PromptSet,
    receiver: Receiver | str,
    *,
    senders: Sequence[Head] | None = None,
    at: At = "query",
    metric: str | MetricFunction | None = None,
    wrong: PromptSet | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Effects of what each head would say to one receiver if it had read the source prompts.

    For a sender and a receiver: what the sender adds to the residual stream changes from its target
    to its source value in the receiver's input alone; every other component keeps its output until
    the receiver's is known, which is patched, and the model runs on from it as it does. The effect
    is metric(path patched) - metric(unpatched), by the target's own answers (Wang et al. 2023,
    arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969). It is exact: the scaling of
    what attention writes, the receiver's norm and the receiver are recomputed, none is linearised.

    Example:
        >>> clean = task.prompts("train", n=8)
        >>> shuffled = task.prompts("train", n=8, kind="shuffled")
        >>> path_effects(lens, clean, shuffled, "logits").top(5)

    Args:
        lens: the model.
        source: prompts that the senders' activations are taken from, or their means at the query.
        target: as many prompts that they are put into.
        receiver: who hears the change (`Receiver`).
        senders: heads (layer, head) that are patched, each on its own; all by default. Others are
            NaN in the result.
        at: where senders are patched: at the query position, or at every position up to it, which
            takes as many source as target tokens.
        metric: a name of `METRICS`, or a function of outputs `[batch variant d_out]` and their
            `Batch`; by default the probability of the answer, or the squared error.
        wrong: target prompts with wrong answers, for the logit difference; the mean over the
            vocabulary is taken without.
        progress: called with the number of prompts finished.

    Returns:
        The effect of every sender on every prompt; 0 where it does not come before the receiver.

    Raises:
        UnknownNameError: there is no such receiver or metric, or the model has no such site.
        ModelError: the model is run by whole passes.
        ShapeError: a layer or head is not there, no sender comes before the receiver, or prompts
            differ in number or, with `at="all"`, in length.
        TaskError: means are asked for what they do not know.
        NumericalError: a metric is not finite.
    """
    receiver = Receiver.of(receiver) if isinstance(receiver, str) else receiver
    measure = metric_of(lens, metric)
    engine = _engine(lens)
    receiver.require_in(engine)
    asked = _senders(lens, senders)
    reach = sorted({head for head in asked if receiver.hears(engine.anatomy, head[0])})
    if not reach:
        raise ShapeError(
            f"none of {len(asked)} heads of {lens.name!r} comes before {receiver}, so none has a "
            "direct path to it; choose a receiver in a later layer, or other senders"
        )
    to = lens.encode(target)
    given = _given(lens, source, to, at=at, measure=measure)
    wrongs = wrong_tokens(lens, wrong, len(to))
    found, before = [], []
    step = max(1, lens.max_tokens // max(part.inputs.shape[1] for part in (given or to, to)))
    with lens.frozen(), torch.no_grad():
        for start in range(0, len(to), step):
            rows = slice(start, start + step)
            piece = trimmed(to[rows])[0].to(lens.backend.device)
            other = None if given is None else trimmed(given[rows])[0].to(lens.backend.device)
            reading = engine.read(piece)
            clean = engine.run(reading, NoEdit(lens.n_layer))
            reference = Reference(
                None if wrongs is None else wrongs[rows],
                clean[:, 0] if other is None else _outputs(lens, other, clean, measure),
            )
            before.append(measured(measure, lens, clean, piece, reference)[:, 0].cpu())
            paths = _Paths(engine, receiver, reading, *_columns(piece, other, at))
            z = _replacements(engine, source, other, {layer for layer, _ in reach})
            parts = [
                measured(measure, lens, outputs, piece, reference).cpu()
                for outputs in paths.outputs(z, reach, lens.max_rows)
            ]
            found.append(torch.cat(parts, dim=1) - before[-1][:, None])
            if progress is not None:
                progress(len(piece))
    values = torch.full((len(to), lens.n_layer, lens.n_head), torch.nan)
    for heads, effects in ((asked, torch.tensor(0.0)), (reach, torch.cat(found).float())):
        layer, head = torch.tensor(heads).T
        values[:, layer, head] = effects
    return Scores.of_prompts(
        values,
        name="path",
        unit=measure.unit,
        task=target.task,
        model=lens.name,
        baseline=torch.cat(before).float(),
    )


@dataclass(frozen=True)
class _Paths:
    """Runs prompts with what senders say to one receiver.

    Attributes:
        engine: runs them.
        receiver: the receiver.
        reading: the target prompts.
        to: columns at which senders are patched; -1 fills up.
        source: the columns of the source prompts that belong to them.
    """

    engine: SuffixEngine
    receiver: Receiver
    reading: Passage
    to: Int[Tensor, "batch at"]
    source: Int[Tensor, "batch at"]

    def outputs(
        self,
        z: dict[int, Float[Tensor, "some_batch pos head d_head"]],
        senders: Sequence[Head],
        max_rows: int,
    ) -> Iterator[Float[Tensor, "batch some_sender d_vocab"]]:
        """Outputs under every sender, in the order given, a few of them at a time."""
        n, width = self.to.shape
        step = max(1, min(max_rows // n, self.engine.max_tokens // (n * width)))
        for first in range(0, len(senders), step):
            few = senders[first : first + step]
            layers = {layer for layer, _ in few}
            change = torch.cat(
                [
                    self._said(layer, z[layer], [head for at, head in few if at == layer])
                    for layer in sorted(layers)
                ],
                dim=1,
            )
            yield self._heard(change)

    def _at(self, x: Float[Tensor, "batch pos *rest"], columns: Int[Tensor, "batch at"]) -> Tensor:
        rows = torch.arange(len(columns), device=columns.device)[:, None]
        return x[rows, columns.clamp(min=0)]

    def _said(
        self, layer: int, source: Float[Tensor, "some_batch pos head d_head"], heads: list[int]
    ) -> Float[Tensor, "batch sender at d_model"]:
        """How what the block's attention adds changes with each of these heads."""
        block = self.engine.anatomy.blocks[layer]
        z = self._at(self.reading.heads[layer], self.to).to(block.device)
        same = source.shape[1] == 1
        new = (source if same else self._at(source, self.source)).to(z)
        w_o = block.w_o.unflatten(0, (self.engine.anatomy.n_head, -1))[heads]
        change = torch.einsum("bphd,hdm->bhpm", (new - z)[:, :, heads], w_o)
        if block.scale_output is not None:
            out = project_out(block, z)[:, None]
            change = block.scale_output(out + change) - block.scale_output(out)
        return change.to(self.engine.backend.device)

    def _heard(
        self, change: Float[Tensor, "batch sender at d_model"]
    ) -> Float[Tensor, "batch sender d_vocab"]:
        """Outputs when the receiver's input is changed so."""
        reading, receiver, backend = self.reading, self.receiver, self.engine.backend
        if receiver.layer is None:
            query = reading.batch.query[:, None]
            of_query = change.where((self.to == query)[:, None, :, None], 0.0).sum(dim=2)
            return backend.unembed(self._at(reading.residual[-1], query) + of_query)
        block, layer = self.engine.anatomy.blocks[receiver.layer], receiver.layer
        x = self._at(reading.residual[layer], self.to).to(block.device)
        if receiver.kind == "mlp" and not block.parallel:
            out = project_out(block, self._at(reading.heads[layer], self.to).to(block.device))
            x = x + (out if block.scale_output is None else block.scale_output(out))
        values = self._received(block, x[:, None] + change.to(block.device)).to(backend.device)
        n = values.shape[1]
        index = torch.arange(values.shape[1] * values.shape[2], device=values.device)
        patch = Patch(
            receiver.site_kind,
            backend.n_layer,
            torch.full((n,), layer),
            None if receiver.head is None else torch.full((n,), receiver.head),
            self.to[:, None],
            {layer: values.flatten(1, 2)},
            index.view(1, n, -1),
        )
        return self.engine.run(reading, patch)

    def _received(self, block: Block, x: Float[Tensor, "batch sender at d_model"]) -> Tensor:
        """What the receiver makes of its input; of a head `[batch sender at 1 d_head]`."""
        if block.mlp is not None and self.receiver.kind == "mlp":
            return block.mlp(x)
        anatomy = self.engine.anatomy
        first = {"q": 0, "k": anatomy.n_head, "v": anatomy.n_head + anatomy.n_kv_head}
        start = (first[self.receiver.kind] + (self.receiver.head or 0)) * anatomy.d_head
        part = slice(start, start + anatomy.d_head)
        found = block.norm(x) @ block.w_qkv[:, part]
        return (found if block.b_qkv is None else found + block.b_qkv[part])[..., None, :]


def _engine(lens: Lens) -> SuffixEngine:
    engine: Engine[Any] = lens.engine.anywhere
    if isinstance(engine, SuffixEngine):
        return engine
    raise ModelError(
        f"{lens.name!r} is run by {engine.name}; path patching recomputes single parts of a model, "
        "which takes one that replay knows: patch whole activations with patch(...) instead"
    )


def _senders(lens: Lens, senders: Sequence[Head] | None) -> list[Head]:
    every = [(n, head) for n in lens.backend.attention_layers for head in range(lens.n_head)]
    if senders is None:
        return every
    outside = [head for head in senders if tuple(head) not in every]
    if outside or not len(senders):
        raise ShapeError(
            f"senders {list(outside or senders)} asked for; {lens.name!r} has layers 0 to "
            f"{lens.n_layer - 1} of heads 0 to {lens.n_head - 1}: choose one or more (layer, head) "
            "of these"
        )
    return [(int(layer), int(head)) for layer, head in senders]


def _given(
    lens: Lens, source: PromptSet | HeadMeans, target: Batch, *, at: At, measure: Metric
) -> Batch | None:
    """The source prompts, once they can be put into the target; None for means."""
    if at not in get_args(At):
        raise UnknownNameError(f"senders act at 'query' or 'all', not at {at!r}")
    if isinstance(source, HeadMeans):
        source.require_fit(lens)
        if at == "all" or _compares(measure):
            wanted = "at='all'" if at == "all" else f"metric {measure.name!r}"
            raise TaskError(
                f"{wanted} asked for with the means of {source.count} prompts, which hold heads at "
                "the query position and no outputs; give source prompts"
            )
        return None
    found = lens.encode(source)
    if len(found) != len(target):
        raise ShapeError(
            f"{len(found)} source prompts for {len(target)} target prompts; expected one source "
            "for each target"
        )
    if at == "all":
        lengths = [_seen(batch).sum(dim=1).tolist() for batch in (found, target)]
        for i, (a, b) in enumerate(zip(*lengths, strict=True)):
            if a != b:
                raise ShapeError(
                    f"prompt {i}: {a} source tokens for {b} target tokens; path patching at='all' "
                    "takes prompts of equal length: use these, or at='query'"
                )
    return found


def _compares(measure: Metric) -> bool:
    """Whether a metric looks at the source run."""
    return measure.name == "kl" and measure in METRICS


def _outputs(lens: Lens, source: Batch, clean: Tensor, measure: Metric) -> Tensor:
    """Outputs of the source run, where the metric looks at them."""
    if not _compares(measure):
        return clean[:, 0]
    return lens.engine.run(lens.engine.read(source), NoEdit(lens.n_layer))[:, 0]


def _seen(batch: Batch) -> Tensor:
    """Which columns `[batch pos]` hold tokens up to the query."""
    column = torch.arange(batch.inputs.shape[1], device=batch.query.device)
    return batch.mask & (column <= batch.query[:, None])


def _columns(target: Batch, source: Batch | None, at: At) -> tuple[Tensor, Tensor]:
    """Columns `[batch at]` of the target, and those of the source that belong to them."""
    query = target.query[:, None]
    if source is None:
        return query, query
    if at == "query":
        return query, source.query[:, None]
    column = torch.arange(target.inputs.shape[1], device=query.device)
    to = torch.where(_seen(target), column, -1)
    return to, torch.where(to < 0, -1, to - query + source.query[:, None])


def _replacements(
    engine: SuffixEngine,
    source: PromptSet | HeadMeans,
    batch: Batch | None,
    layers: Collection[int],
) -> dict[int, Float[Tensor, "some_batch pos head d_head"]]:
    """What heads of these layers are replaced by, at all columns; means have a single one."""
    if isinstance(source, HeadMeans):
        return {layer: source.z[layer][None, None] for layer in layers}
    if batch is None:
        return {}
    found = engine.record(batch, [Site("z", layer) for layer in layers])
    return {site.layer: x for site, x in found.items()}
