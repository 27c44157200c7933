"""Attribution patching: effects of patches to first order, all places from one backward pass.

The effect of a patch is taken as <a_source - a_target, dm/da_target> (Nanda 2023; Syed et al. 2023,
arXiv 2310.10348): what a metric would change by if it were linear in the activation. Where it is
not, as behind a saturated softmax or for a residual stream, which everything reads, the number is
off; `steps` and `fix_softmax` mend part of that, and `agreement_of` says how much is left.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import ModelError, ShapeError
from tvlens.lens.blocks import capped, ready
from tvlens.lens.lens import Lens
from tvlens.lens.positions import Positions
from tvlens.lens.sites import Site, SiteKind
from tvlens.lens.suffix import SuffixEngine
from tvlens.models.gradients import with_gradients
from tvlens.scores.effects import Direction, PatchEffects
from tvlens.scores.gradients import at_run, on_the_way
from tvlens.scores.metrics import MetricFunction, metric_of, wrong_tokens
from tvlens.scores.pairing import Pairing, Piece, Ready, paired
from tvlens.tasks.base import PromptSet


@with_gradients
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
    each = partial(_fixed, pairing) if fix_softmax else partial(_linear, pairing, steps)
    return pairing.effects(
        each, metric=measure, direction=direction, method="attribution", progress=progress
    )


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


def _linear(pairing: Pairing, steps: int, ready: Ready) -> Float[Tensor, "batch variant"]:
    lens, piece = pairing.lens, ready.piece
    sites = [Site(pairing.kind, layer) for layer in pairing.layers]
    target, source = pairing.engine.record(piece.target, sites), pairing.recorded(piece)
    moved = {site: _difference(pairing, piece, source[site], target[site]) for site in sites}
    if steps:
        at_once = lens.max_tokens // piece.target.inputs.numel()
        gradients = on_the_way(lens.n_layer, moved, ready.measure, steps=steps, at_once=at_once)
    else:
        gradients, _ = at_run(lens.n_layer, target, ready.measure)
    return _stacked(_by_place(pairing, piece, gradients[site] * moved[site]) for site in sites)


def _stacked(
    of_layers: Iterable[Float[Tensor, "batch place head"]],
) -> Float[Tensor, "batch variant"]:
    """Effects in the order of the variants of `Pairing.patch`."""
    return torch.stack(list(of_layers), dim=2).flatten(1)


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


def _fixed(pairing: Pairing, ready: Ready) -> Float[Tensor, "batch variant"]:
    """Effects of queries or keys through patterns that are reckoned anew, not linearised."""
    engine, piece = pairing.engine, ready.piece
    assert isinstance(engine, SuffixEngine)
    kinds: tuple[SiteKind, ...] = ("q", "k", "pattern")
    sites = [Site(kind, layer) for kind in kinds for layer in pairing.layers]
    target, source = engine.record(piece.target, sites), pairing.recorded(piece)
    patterns = {site: x for site, x in target.items() if site.kind == "pattern"}
    gradients, _ = at_run(pairing.lens.n_layer, patterns, ready.measure)
    found = []
    for site, pattern in patterns.items():
        layer, gradient = site.layer, gradients[site]
        q, k = target[Site("q", layer)], target[Site("k", layer)]
        scores = partial(_scores, engine, layer, piece)
        given = source[Site(pairing.kind, layer)]
        if pairing.kind == "q":
            change = scores(_brought(piece, given, q), k) - scores(q, k)
            each = _of_queries(change, pattern, gradient)
        else:
            change = scores(q, _brought(piece, given, k)) - scores(q, k)
            each = _of_keys(change, pattern, gradient)
            each = each.unflatten(2, (pairing.lens.backend.n_kv_head, -1)).sum(dim=-1)
        found.append(_by_place(pairing, piece, each))
    return _stacked(found)


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
    change: Float[Tensor, "batch pos head key"],
    pattern: Float[Tensor, "batch pos head key"],
    gradient: Float[Tensor, "batch pos head key"],
) -> Float[Tensor, "batch pos head"]:
    """A patched query changes all scores of its own row."""
    # Less the largest of what is attended to, so that no exponential overflows.
    most = change.masked_fill(pattern == 0, -torch.inf).amax(dim=-1, keepdim=True)
    most = most.where(most.isfinite(), 0.0).clamp(min=0)
    weight = pattern * (change - most).exp()
    # Sinks keep what share their score has left; without any the weights sum to 1.
    rest = (1 - pattern.sum(dim=-1, keepdim=True)).clamp(min=0) * (-most).exp()
    total = weight.sum(dim=-1, keepdim=True) + rest
    return ((weight / total - pattern) * gradient).sum(dim=-1)


def _of_keys(
    change: Float[Tensor, "batch pos head key"],
    pattern: Float[Tensor, "batch pos head key"],
    gradient: Float[Tensor, "batch pos head key"],
) -> Float[Tensor, "batch key head"]:
    """A patched key changes one score of every later row before the softmax shares out anew."""
    grown = torch.where(pattern > 0, change.clamp(max=80.0), 0.0).exp() * pattern
    total = 1 - pattern + grown
    along = (pattern * gradient).sum(dim=-1, keepdim=True) - pattern * gradient
    found = (1 / total - 1) * along + (grown / total - pattern) * gradient
    return found.sum(dim=1).transpose(1, 2)
