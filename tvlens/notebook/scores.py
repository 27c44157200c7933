"""Displays of scores of heads and effects of patches."""

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens import figures
from tvlens.figures.grids import Top, best, named
from tvlens.notebook import pieces
from tvlens.notebook.displays import shows
from tvlens.scores.catalogue import SCORES
from tvlens.scores.direct import DirectAttribution
from tvlens.scores.effects import PatchEffects
from tvlens.scores.gating import HeadGates
from tvlens.scores.mediation import IndirectEffects
from tvlens.scores.score import Scores
from tvlens.stats import bootstrap_mean_axis

BEST = 5
"""Heads that are named, at most."""

_TITLES = {score.name: score.title or score.label for score in SCORES}


def score_of_heads(scores: Scores, *notes: str) -> str:
    """The display of a score of every head: facts, the best heads, and a map."""
    parts = [pieces.facts(_facts(scores))]
    if scores.scores.numel():
        k = max(1, min(10, scores.scores.numel() // 4))
        drawn = figures.value_map(
            scores.scores, title=scores.task, label=scores.unit or scores.name, k=k
        )
        words = f"{scores.name} of every head by layer, {scores.task or 'no task'}"
        parts.append(pieces.picture(drawn, f"{words}; best: {_best_heads(scores)}"))
        parts += [pieces.sentence(f"Framed: the {k} highest. Red above 0, blue below.")]
    title = _TITLES.get(scores.name, scores.name)
    return pieces.card(title, *parts, *map(pieces.sentence, notes))


def _facts(scores: Scores) -> dict[str, object]:
    n_layer, n_head = scores.scores.shape
    missing = int((~torch.isfinite(scores.scores)).sum())
    layers = scores.scores.isnan().all(dim=1)
    prompts = None if scores.values is None else len(scores.values)
    return {
        "score": f"{scores.name} ({scores.unit})" if scores.unit else scores.name,
        "task": scores.task,
        "model": scores.model,
        "heads": f"{scores.n_heads}, in {n_layer} layers of {n_head}",
        "layers without heads": pieces.layers(layers.nonzero().flatten().tolist())
        if layers.any()
        else None,
        "not finite": f"{missing - int(layers.sum()) * n_head} heads"
        if missing > int(layers.sum()) * n_head
        else None,
        "prompts": prompts,
        "best heads": _best_heads(scores),
    }


def _best_heads(scores: Scores) -> str:
    """The best heads with their scores and intervals, in words."""
    flat = scores.scores.detach().cpu().double().flatten()
    flat = flat.where(torch.isfinite(flat), torch.nan)
    found = []
    for place in best(flat.numpy(), BEST, "high").tolist():
        layer, head = divmod(place, scores.scores.shape[1])
        ends = _ends(None if scores.values is None else scores.values[:, layer, head])
        found.append(f"({layer}, {head}) {pieces.with_ends(float(flat[place]), *ends)}")
    return ", ".join(found)


def _ends(values: Float[Tensor, " prompt"] | None) -> tuple[float, ...]:
    """The ends of the 95% interval over prompts, where there is one."""
    if values is None or len(values) < 2 or not torch.isfinite(values).all():
        return ()
    _, low, high = bootstrap_mean_axis(values[:, None])
    return float(low), float(high)


@shows(Scores)
def _scores(scores: Scores) -> str:
    return score_of_heads(scores)


@shows(IndirectEffects)
def _effects(effects: IndirectEffects) -> str:
    if effects.exact is None:
        return score_of_heads(effects)
    exact = int(effects.exact.sum())
    note = f"Exact effects of {exact} heads; those of the others are to first order."
    return score_of_heads(effects, note)


@shows(HeadGates)
def _gates(gates: HeadGates) -> str:
    return "".join(map(score_of_heads, (gates.facilitating, gates.interfering)))


@shows(DirectAttribution)
def _direct(direct: DirectAttribution) -> str:
    return score_of_heads(direct.scores)


@shows(PatchEffects)
def _patches(effects: PatchEffects) -> str:
    mean = effects.mean
    n_layer, n_head, _ = mean.shape
    gap = effects.gap
    told: dict[str, object] = {
        "patched": named(effects.site),
        "task": effects.task,
        "model": effects.model,
        "metric": f"{effects.metric} ({effects.unit})" if effects.unit else effects.metric,
        "direction": effects.direction,
        "method": effects.method,
        "places": _places(effects),
        "layers": n_layer,
        "heads": n_head if effects.has_heads else None,
        "prompts": len(effects.values),
        "clean minus corrupted": pieces.number(gap),
        "strongest": _strongest(effects, mean),
    }
    parts = [pieces.facts(told)]
    if mean.numel() and torch.isfinite(mean).any():
        drawn, title, columns = _drawn(effects, mean)
        figure = figures.value_map(
            drawn,
            columns=columns,
            title=title,
            label=f"effect on {effects.metric}",
            k=5,
            top=effects.towards,
        )
        words = f"effects of patching {named(effects.site)} on {effects.metric} by layer, {title}"
        parts.append(pieces.picture(figure, words))
        side = "highest" if effects.towards == "high" else "lowest"
        parts.append(pieces.sentence(f"Framed: the 5 {side}. Red above 0, blue below."))
    return pieces.card(f"Effects of patches, {named(effects.site)}", *parts)


def _places(effects: PatchEffects) -> str:
    some = ", ".join(effects.places[:8])
    return some + (f", … ({len(effects.places)})" if len(effects.places) > 8 else "")


def _order(effects: PatchEffects, mean: Float[Tensor, "layer head place"]) -> list[list[int]]:
    """Where the strongest effects are: layer, head and place, the strongest first."""
    flat = mean.detach().cpu().double().flatten()
    flat = flat.where(torch.isfinite(flat), torch.nan)
    top: Top = effects.towards
    places = torch.from_numpy(best(flat.numpy(), BEST, top).copy())
    return torch.stack(torch.unravel_index(places, mean.shape), dim=1).tolist()


def _strongest(effects: PatchEffects, mean: Float[Tensor, "layer head place"]) -> str:
    found = []
    for layer, head, place in _order(effects, mean):
        where = f"layer {layer}" + (f", head {head}" if effects.has_heads else "")
        at = f" at {effects.places[place]}" if len(effects.places) > 1 else ""
        ends = _ends(effects.values[:, layer, head, place])
        said = pieces.with_ends(float(mean[layer, head, place]), *ends)
        found.append(f"{where}{at}: {said}")
    return "; ".join(found)


def _drawn(
    effects: PatchEffects, mean: Float[Tensor, "layer head place"]
) -> tuple[Float[Tensor, "layer column"], str, tuple[str, ...]]:
    """A map of heads at the place of the strongest effect, or of all places of a site without."""
    if effects.has_heads:
        place = _order(effects, mean)[0][2]
        several = len(effects.places) > 1
        return mean[:, :, place], f"at {effects.places[place]}" if several else "", ()
    names = effects.tokens if len(effects.tokens) == len(effects.places) else effects.places
    return mean[:, 0], effects.task, tuple(names)
