"""Direct path patching: what a head says to chosen receivers, everything else left as it is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import ModelError, ShapeError, TaskError, UnknownNameError
from tvlens.lens.edits import NoEdit
from tvlens.lens.engine import Engine, Reading
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.lens.passage import Passage
from tvlens.lens.positions import Positions, matched, places
from tvlens.lens.sites import Site
from tvlens.lens.suffix import SuffixEngine
from tvlens.models.batch import Batch
from tvlens.scores.edges import Edges, NormScale, at_columns
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


def path_effects(
    lens: Lens,
    source: PromptSet | HeadMeans,
    target: PromptSet,
    receiver: Receiver | str | Sequence[Receiver | str],
    *,
    senders: Sequence[Head] | None = None,
    at: Positions = "query",
    norm: NormScale = "exact",
    metric: str | MetricFunction | None = None,
    wrong: PromptSet | None = None,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """Effects of what each head would say to one receiver if it had read the source prompts.

    For a sender and a receiver: what the sender adds to the residual stream changes from its target
    to its source value in the receiver's input alone, `(z_source - z_target) W_O`. Every other
    component keeps its output, the receiver's output is made anew, and the model runs on from it as
    it does. The effect is metric(path patched) - metric(unpatched), by the target's own answers
    (Wang et al. 2023, arXiv 2211.00593, appendix B, without its paths through MLPs; Goldowsky-Dill
    et al. 2023, arXiv 2304.05969). Where a block scales what attention writes by a norm, all of
    attention is scaled anew with the head's z replaced, and the change is the difference.

    Several receivers are patched jointly: each hears the sender, and none what another makes of it
    before its own output is put in.

    Example:
        >>> clean = task.prompts("train", n=8)
        >>> shuffled = task.prompts("train", n=8, kind="shuffled")
        >>> path_effects(lens, clean, shuffled, "logits").top(5)
        >>> path_effects(lens, clean, shuffled, "v of 9.6", at="all").top(5)

    Args:
        lens: the model. Receivers other than the logits take one that is run by replay.
        source: prompts that the senders' activations are taken from, or their means at the query.
        target: as many prompts that they are put into.
        receiver: what hears the change, in words such as "q of 12.3" (`Receiver`), or several.
        senders: heads (layer, head) that are patched, each on its own; all by default. Others are
            NaN in the result.
        at: where senders are patched, all at once: the query position, all positions up to
            it, numbers, or roles (`Positions`). All but the query and roles take source and target
            prompts of equal length.
        norm: whether the norm that the receiver reads through is made anew, or its scale is held
            as it is on the target prompt, which makes what it reads linear in what is said.
        metric: a name of `METRICS`, or a function of outputs `[batch variant d_out]` and their
            `Batch`; by default the probability of the answer, or the squared error.
        wrong: target prompts with wrong answers, for the logit difference; the mean over the
            vocabulary is taken without.
        progress: called with the number of prompts finished.

    Returns:
        The effect of every sender on every prompt: exactly 0 where no receiver hears the sender,
        or where it says the same in both prompts.

    Raises:
        UnknownNameError: there is no such receiver, norm or metric, or the model has no such site.
        ModelError: the model is run by whole passes, and what is asked for takes its parts, or its
            last norm is not shown.
        ShapeError: a layer or head is not there, no sender comes before the receiver, or prompts
            differ in number or, where positions are numbers, in length.
        TaskError: means are asked for what they do not know, or positions are not there.
        NumericalError: a metric is not finite.
    """
    receivers = _receivers(receiver)
    measure = metric_of(lens, metric)
    engine = _engine(lens, receivers, norm)
    asked = _senders(lens, senders)
    reach = sorted({head for head in asked if any(r.hears(engine, head[0]) for r in receivers)})
    if not reach:
        raise ShapeError(
            f"none of {len(asked)} senders of {lens.name!r} comes before "
            f"{' or '.join(map(str, receivers))}, so none has a direct path to it; choose a "
            "receiver in a later layer, or other senders"
        )
    pairs = _paired(lens, source, target, at, measure)
    wrongs = wrong_tokens(lens, wrong, len(target))
    found, before = [], []
    with lens.frozen(), torch.no_grad():
        for rows, piece in pairs.pieces(lens):
            reading = engine.read(piece.target)
            clean = engine.run(reading, NoEdit(lens.n_layer))
            given = _outputs(lens, piece.source) if _compares(measure) else clean[:, 0]
            reference = Reference(None if wrongs is None else wrongs[rows], given)
            unpatched = measured(measure, lens, clean, piece.target, reference)
            edges = _edges(lens, engine, receivers, norm, reading, piece, {n for n, _ in reach})
            parts = []
            for outputs, moved in edges.outputs(reach):
                effect = measured(measure, lens, outputs, piece.target, reference) - unpatched
                parts.append(effect.where(moved, 0.0).float().cpu())
            found.append(torch.cat(parts, dim=1))
            before.append(unpatched[:, 0].float().cpu())
            if progress is not None:
                progress(len(piece.target))
    values = torch.full((len(target), lens.n_layer, lens.n_head), torch.nan)
    for heads, effects in ((asked, torch.tensor(0.0)), (reach, torch.cat(found))):
        layer, head = torch.tensor(heads).T
        values[:, layer, head] = effects
    return Scores.of_prompts(
        values,
        name="path",
        unit=measure.unit,
        task=target.task,
        model=lens.name,
        baseline=torch.cat(before),
    )


@dataclass(frozen=True)
class _Pairs:
    """Target prompts, and what senders are given in them.

    Attributes:
        target: the target prompts.
        to: columns at which senders are patched; -1 fills up.
        source: the source prompts, or None for means.
        origin: the columns of `source` that belong to `to`.
        means: what heads are given in place of a prompt's activations, or None.
    """

    target: Batch
    to: Int[Tensor, "batch at"]
    source: Batch | None
    origin: Int[Tensor, "batch at"]
    means: Float[Tensor, "layer head d_head"] | None

    def pieces(self, lens: Lens) -> Iterator[tuple[slice, "_Pairs"]]:
        """A few prompts at a time, without columns that no query sees."""
        both = [self.target, *([] if self.source is None else [self.source])]
        step = max(1, lens.max_tokens // max(batch.inputs.shape[1] for batch in both))
        device = lens.backend.device
        for start in range(0, len(self.target), step):
            rows = slice(start, start + step)
            target, cut = trimmed(self.target[rows])
            source, cut_source = (None, 0) if self.source is None else trimmed(self.source[rows])
            to, origin = self.to[rows], self.origin[rows]
            yield (
                rows,
                _Pairs(
                    target.to(device),
                    torch.where(to < 0, -1, to - cut).to(device),
                    None if source is None else source.to(device),
                    torch.where(origin < 0, -1, origin - cut_source).to(device),
                    self.means,
                ),
            )


def _receivers(receiver: Receiver | str | Sequence[Receiver | str]) -> tuple[Receiver, ...]:
    several = [receiver] if isinstance(receiver, Receiver | str) else list(receiver)
    found = [Receiver.of(each) if isinstance(each, str) else each for each in several]
    if not found:
        raise UnknownNameError("no receiver is given; expected one or more, such as 'q of 2.3'")
    return tuple(dict.fromkeys(found))


def _engine(lens: Lens, receivers: Sequence[Receiver], norm: str) -> Engine[Any]:
    """The engine that runs paths to these receivers, once the model has them."""
    if norm not in get_args(NormScale):
        raise UnknownNameError(f"norms are 'exact' or 'frozen', not {norm!r}")
    inside = [str(receiver) for receiver in receivers if receiver.layer is not None]
    if norm == "frozen" and inside and len(inside) < len(receivers):
        raise ModelError(
            f"norm='frozen' asked for {inside[0]} and the logits jointly, whose norm reads what "
            "the other makes; patch them one at a time, or with norm='exact'"
        )
    engine: Engine[Any] = lens.engine.anywhere
    if isinstance(engine, SuffixEngine):
        for receiver in receivers:
            receiver.require_in(engine)
    elif inside:
        raise ModelError(
            f"{lens.name!r} is run by {engine.name}, which do not take a receiver such as "
            f"{inside[0]} out of the model; choose the receiver 'logits', or patch whole "
            "activations with patch(...)"
        )
    elif engine.scaled:
        raise ModelError(
            f"{lens.name!r} is run by {engine.name}, and its blocks scale what heads write, which "
            "takes blocks that replay knows; patch whole activations with patch(...)"
        )
    return engine


def _senders(lens: Lens, senders: Sequence[Head] | None) -> list[Head]:
    every = [(n, head) for n in lens.backend.attention_layers for head in range(lens.n_head)]
    if senders is None:
        return every
    given = [(int(layer), int(head)) for layer, head in senders]
    outside = [head for head in given if head not in every]
    if outside or not given:
        raise ShapeError(
            f"senders {outside or given} asked for; {lens.name!r} has heads 0 to {lens.n_head - 1} "
            f"in layers {', '.join(map(str, lens.backend.attention_layers))}: choose one or more "
            "(layer, head) of these"
        )
    return given


def _paired(
    lens: Lens,
    source: PromptSet | HeadMeans,
    target: PromptSet,
    at: Positions,
    measure: Metric,
) -> _Pairs:
    batch = lens.encode(target)
    if isinstance(source, HeadMeans):
        source.require_fit(lens)
        if at != "query" or _compares(measure):
            wanted = f"metric {measure.name!r}" if at == "query" else f"{at=}"
            raise TaskError(
                f"{wanted} asked for with the means of {source.count} prompts, which hold heads at "
                "the query position and no outputs; give source prompts"
            )
        query = batch.query[:, None]
        return _Pairs(batch, query, None, query, source.z)
    given = lens.encode(source)
    if len(given) != len(batch):
        raise ShapeError(
            f"{len(given)} source prompts for {len(batch)} target prompts; expected one source "
            "for each target"
        )
    of = places(lens, source, given, at), places(lens, target, batch, at)
    origin, to = matched(*of, given, batch, tokenizer=lens.backend.tokenizer)
    to, origin = to.flatten(1), origin.flatten(1)
    # Of a column that is given twice, the first.
    again = (to[:, :, None] == to[:, None]).tril(-1).any(dim=2)
    return _Pairs(batch, to.where(~again, -1), given, origin.where(~again, -1), None)


def _edges(
    lens: Lens,
    engine: Engine[Any],
    receivers: tuple[Receiver, ...],
    norm: NormScale,
    reading: Reading,
    piece: _Pairs,
    layers: set[int],
) -> Edges:
    sites, end = [Site("z", layer) for layer in layers], Site("resid_post", lens.n_layer - 1)
    query = piece.target.query[:, None]
    if isinstance(reading, Passage):
        last = reading.residual[-1]
        z = {layer: reading.heads[layer] for layer in layers}
    else:
        recorded = engine.record(piece.target, [*sites, end])
        last = recorded.pop(end)
        z = {site.layer: x for site, x in recorded.items()}
    if piece.means is not None:
        new = {layer: piece.means[layer][None, None] for layer in layers}
    else:
        assert piece.source is not None
        given = engine.record(piece.source, sites)
        new = {site.layer: at_columns(x, piece.origin) for site, x in given.items()}
    at = {layer: at_columns(x, piece.to) for layer, x in z.items()}
    return Edges(lens, engine, receivers, norm, reading, piece.to, at, new, at_columns(last, query))


def _compares(measure: Metric) -> bool:
    """Whether a metric looks at the source run."""
    return measure.name == "kl" and measure in METRICS


def _outputs(lens: Lens, source: Batch | None) -> Float[Tensor, "batch d_vocab"]:
    assert source is not None
    return lens.engine.run(lens.engine.read(source), NoEdit(lens.n_layer))[:, 0]
