"""Attribution patching: effects of patches to first order, all places from one backward pass.

The effect of a patch is taken as <a_source - a_target, dm/da_target> (Nanda 2023; Syed et al. 2023,
arXiv 2310.10348): what a metric would change by if it were linear in the activation. Where it is
not, as behind a saturated softmax or for a residual stream, which everything reads, the number is
off; `steps` and `fix_softmax` mend part of that, and `agreement` says how much is left.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import ModelError, ShapeError
from tvlens.lens.blocks import capped, ready
from tvlens.lens.engine import Reading
from tvlens.lens.lens import Lens
from tvlens.lens.patches import Shift
from tvlens.lens.positions import Positions
from tvlens.lens.sites import Site, SiteKind
from tvlens.lens.suffix import SuffixEngine
from tvlens.scores.effects import Direction, PatchEffects
from tvlens.scores.metrics import (
    Metric,
    MetricFunction,
    Reference,
    measured,
    metric_of,
    wrong_tokens,
)
from tvlens.scores.pairing import Pairing, Piece, paired
from tvlens.tasks.base import PromptSet


def attribution_patch(
    lens: Lens,
    source: PromptSet,
    target: PromptSet,
    *,
    site: str | Site = "resid_post",
    positions: Positions = "query",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    metric: str | MetricFunction | None = None,
    wrong: PromptSet | None = None,
    direction: Direction = "denoising",
    steps: int = 0,
    fix_softmax: bool = False,
    progress: Callable[[int], None] | None = None,
) -> PatchEffects:
    """The effects that `tvlens.patch` gives, to first order.

    Args:
        lens: the model.
        source: prompts that activations are taken from.
        target: as many prompts that they are put into.
        site: as in `patch`, like all that is not said here.
        positions: where.
        layers: layers that are patched.
        heads: heads that are patched.
        metric: what effects are differences of; it must be differentiable.
        wrong: target prompts with wrong answers.
        direction: which of the two prompts is the clean one.
        steps: 0 takes the gradient at the target run. Otherwise it is averaged over so many points
            between target and source (integrated gradients by the midpoint rule): of each layer all
            places and heads that are patched move together, so that their effects sum to that of
            patching them all, as closely as the steps are many.
        fix_softmax: for `q` and `k`, attend anew with the patched query or key instead of going
            through the gradient of the softmax (AtP*, Kramár et al. 2024, arXiv 2403.00745, section
            3.1).
        progress: called with the number of prompts finished.

    Raises:
        UnknownNameError: as `patch`, as are ShapeError, TaskError and NumericalError.
        ModelError: the softmax is to be fixed, and the model is run by whole passes.
        ShapeError: the softmax is to be fixed at another site, or along with steps; or steps are
            below 0.
    """
    measure = metric_of(lens, metric)
    pairing = paired(
        lens,
        source,
        target,
        site=site,
        positions=positions,
        layers=layers,
        heads=heads,
        wrong=wrong_tokens(lens, wrong, len(target)),
    )
    require_possible(pairing, steps, fix_softmax)
    found, before, given = [], [], []
    with lens.frozen():
        for piece in pairing.pieces():
            with torch.no_grad():
                reading = pairing.engine.read(piece.target)
                reference = pairing.reference(piece)
                ends = pairing.ends(measure, piece, reading, reference)
            before.append(ends[0])
            given.append(ends[1])
            measure_of = partial(_measure, pairing, reading, measure, piece, reference)
            if fix_softmax:
                each = _fixed(pairing, piece, measure_of)
            else:
                each = _linear(pairing, piece, measure_of, steps)
            found.append(each.flatten(1).cpu())
            if progress is not None:
                progress(len(piece))
    return pairing.effects(
        torch.cat(found),
        torch.cat(before),
        torch.cat(given),
        metric=measure,
        direction=direction,
        method="attribution",
    )


MeasureOf = Callable[[Shift], Float[Tensor, "batch variant"]]


def _measure(
    pairing: Pairing,
    reading: Reading,
    metric: Metric,
    piece: Piece,
    reference: Reference,
    edit: Shift,
) -> Float[Tensor, "batch variant"]:
    outputs = pairing.engine.run(reading, edit)
    return measured(metric, pairing.lens, outputs, piece.target, reference)


def require_possible(pairing: Pairing, steps: int, fix_softmax: bool) -> None:
    """Refuse ways of attribution that are not for a site or a model.

    Raises:
        ModelError: the softmax is to be fixed, and the model is run by whole passes.
        ShapeError: the softmax is to be fixed at another site, or along with steps; or steps are
            below 0.
    """
    if steps < 0 or (fix_softmax and (steps or pairing.kind not in ("q", "k"))):
        raise ShapeError(
            f"attribution at {pairing.kind} with steps={steps}, fix_softmax={fix_softmax}: "
            "expected steps of 0 or more, and fix_softmax for q or k alone, without steps"
        )
    if fix_softmax and not isinstance(pairing.engine, SuffixEngine):
        raise ModelError(
            f"model {pairing.lens.name!r} is run by whole passes, and fixing the softmax needs a "
            "model that is replayed; leave fix_softmax out, or use steps"
        )


def _gradients(
    lens: Lens, activations: dict[Site, Tensor], measure_of: MeasureOf
) -> dict[Site, Float[Tensor, "batch pos *rest"]]:
    """Of the metric with respect to activations of the target run, all at once."""
    zeros = {site: torch.zeros_like(x[:, None]).requires_grad_() for site, x in activations.items()}
    active = torch.zeros(1, lens.n_layer, dtype=torch.bool)
    active[0, [site.layer for site in activations]] = True
    found = measure_of(Shift(lens.n_layer, zeros, active))
    gradients = torch.autograd.grad(found.sum(), list(zeros.values()))
    return {site: x[:, 0] for site, x in zip(zeros, gradients, strict=True)}


def _linear(
    pairing: Pairing, piece: Piece, measure_of: MeasureOf, steps: int
) -> Float[Tensor, "batch place layer head"]:
    lens, kind = pairing.lens, pairing.kind
    sites = [Site(kind, layer) for layer in pairing.layers]
    target = pairing.engine.record(piece.target, sites)
    source = pairing.recorded(piece)
    moved = {site: _difference(pairing, piece, source[site], target[site]) for site in sites}
    if steps:
        gradients = {
            site: _along(lens, site, target[site], moved[site], measure_of, steps) for site in sites
        }
    else:
        gradients = _gradients(lens, target, measure_of)
    each = [_by_place(pairing, piece, gradients[site] * moved[site]) for site in sites]
    return torch.stack(each, dim=2)


def _along(
    lens: Lens,
    site: Site,
    target: Float[Tensor, "batch pos *rest"],
    moved: Float[Tensor, "batch pos *rest"],
    measure_of: MeasureOf,
    steps: int,
) -> Float[Tensor, "batch pos *rest"]:
    """Mean gradient on the way from target to source, everything moving together."""
    total = torch.zeros_like(target)
    active = torch.zeros(1, lens.n_layer, dtype=torch.bool)
    active[0, site.layer] = True
    few = max(1, lens.max_tokens // (target.shape[0] * target.shape[1]))
    for points in ((torch.arange(steps) + 0.5) / steps).split(few):
        share = points.to(target).reshape(1, -1, *(1,) * (target.ndim - 1))
        added = (share * moved[:, None]).detach().requires_grad_()
        edit = Shift(lens.n_layer, {site: added}, active.expand(len(points), -1))
        (gradient,) = torch.autograd.grad(measure_of(edit).sum(), added)
        total += gradient.sum(dim=1)
    return total / steps


def _difference(
    pairing: Pairing,
    piece: Piece,
    source: Float[Tensor, "batch pos *rest"],
    target: Float[Tensor, "batch width *rest"],
) -> Float[Tensor, "batch width *rest"]:
    """What patching every place, and every head that is patched, would change; 0 elsewhere."""
    brought = _brought(piece, source, target)
    found = brought - target
    if pairing.heads is not None:
        kept = torch.zeros(target.shape[2], dtype=torch.bool, device=target.device)
        kept[list(pairing.heads)] = True
        found = found.where(kept.reshape(-1, *(1,) * (target.ndim - 3)), 0.0)
    return found


def _brought(
    piece: Piece,
    source: Float[Tensor, "batch pos *rest"],
    target: Float[Tensor, "batch width *rest"],
) -> Float[Tensor, "batch width *rest"]:
    """The target's activations with those of the source at the columns that are patched."""
    found = target.clone()
    there = piece.to_columns >= 0
    rows = torch.arange(len(target), device=target.device)[:, None, None].expand(there.shape)[there]
    found[rows, piece.to_columns[there]] = source[rows, piece.from_columns[there]].to(found.dtype)
    return found


def _by_place(
    pairing: Pairing, piece: Piece, products: Float[Tensor, "batch width *rest"]
) -> Float[Tensor, "batch place head"]:
    """Sums over each place's columns and all that stands behind the heads."""
    each = products if pairing.heads is not None else products[:, :, None]
    each = each.flatten(3).sum(dim=-1) if each.ndim > 3 else each
    if pairing.heads is not None:
        each = each[:, :, list(pairing.heads)]
    rows = torch.arange(len(each), device=each.device)[:, None, None]
    there = (piece.to_columns >= 0)[..., None]
    return each[rows, piece.to_columns.clamp(min=0)].where(there, 0.0).sum(dim=2)


def _fixed(
    pairing: Pairing, piece: Piece, measure_of: MeasureOf
) -> Float[Tensor, "batch place layer head"]:
    """Effects of queries or keys through patterns that are reckoned anew, not linearised."""
    engine = pairing.engine
    assert isinstance(engine, SuffixEngine)
    kinds: tuple[SiteKind, ...] = ("q", "k", "pattern")
    sites = [Site(kind, layer) for kind in kinds for layer in pairing.layers]
    target = engine.record(piece.target, sites)
    source = pairing.recorded(piece)
    patterns = {site: x for site, x in target.items() if site.kind == "pattern"}
    gradients = _gradients(pairing.lens, patterns, measure_of)
    found = []
    for layer in pairing.layers:
        pattern = target[Site("pattern", layer)]
        gradient = gradients[Site("pattern", layer)]
        q, k = target[Site("q", layer)], target[Site("k", layer)]
        scores = partial(_scores, engine, layer, piece)
        given = source[Site(pairing.kind, layer)]
        if pairing.kind == "q":
            new = scores(_brought(piece, given, q), k)
            each = _of_queries(scores(q, k), new, pattern, gradient)
        else:
            new = scores(q, _brought(piece, given, k))
            each = _of_keys(scores(q, k), new, pattern, gradient)
            each = each.unflatten(2, (pairing.lens.backend.n_kv_head, -1)).sum(dim=-1)
        found.append(_by_place(pairing, piece, each))
    return torch.stack(found, dim=2)


def _scores(
    engine: SuffixEngine,
    layer: int,
    piece: Piece,
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch pos kv_head d_head"],
) -> Float[Tensor, "batch pos head key"]:
    """What patterns are the softmax of, all but what depends on positions alone."""
    block = engine.anatomy.blocks[layer]
    position = (piece.target.mask.long().cumsum(dim=1) - 1).clamp(min=0)
    q, k = ready(block, q.to(block.device), k.to(block.device), position.to(block.device))
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    found = capped(block, torch.einsum("bqhd,bkhd->bqhk", q * block.scale, k))
    return found.to(engine.backend.device)


def _of_queries(
    old: Float[Tensor, "batch pos head key"],
    new: Float[Tensor, "batch pos head key"],
    pattern: Float[Tensor, "batch pos head key"],
    gradient: Float[Tensor, "batch pos head key"],
) -> Float[Tensor, "batch pos head"]:
    """A patched query changes all weights of its own row."""
    weight = pattern * (new - old - _shift(new - old, pattern)).exp()
    # Sinks keep what share their score has left; without any the weights sum to 1.
    rest = (1 - pattern.sum(dim=-1, keepdim=True)).clamp(min=0)
    rest = rest * (-_shift(new - old, pattern)).exp()
    total = weight.sum(dim=-1, keepdim=True) + rest
    return ((weight / total - pattern) * gradient).sum(dim=-1)


def _shift(difference: Tensor, pattern: Tensor) -> Tensor:
    """Largest change of a score that is attended to, so that no exponential overflows."""
    seen = difference.masked_fill(pattern == 0, -torch.inf).amax(dim=-1, keepdim=True)
    return seen.where(seen.isfinite(), 0.0).clamp(min=0)


def _of_keys(
    old: Float[Tensor, "batch pos head key"],
    new: Float[Tensor, "batch pos head key"],
    pattern: Float[Tensor, "batch pos head key"],
    gradient: Float[Tensor, "batch pos head key"],
) -> Float[Tensor, "batch key head"]:
    """A patched key changes one weight of every later row before the softmax shares out anew."""
    grown = torch.where(pattern > 0, (new - old).clamp(max=80.0), 0.0).exp() * pattern
    total = 1 - pattern + grown
    along = (pattern * gradient).sum(dim=-1, keepdim=True) - pattern * gradient
    change = (1 / total - 1) * along + (grown / total - pattern) * gradient
    return change.sum(dim=1).transpose(1, 2)
