"""How far approximate effects agree with exact ones of the same places."""

from dataclasses import dataclass

from scipy import stats

from tvlens.errors import ShapeError
from tvlens.scores.effects import PatchEffects


@dataclass(frozen=True)
class Agreement:
    """Of mean effects over all layers, heads and places.

    Attributes:
        spearman: rank correlation; NaN where either is constant.
        recall: share of the k best places by exact effect that are among the k best by approximate
            effect; the best are those that bring most of the source run over.
        k: how many.
        missed: those of the k that are not, as (layer, head, place), best first.
        n_places: how many places there are.
    """

    spearman: float
    recall: float
    k: int
    missed: tuple[tuple[int, int, str], ...]
    n_places: int


def agreement_of(exact: PatchEffects, approximate: PatchEffects, k: int = 10) -> Agreement:
    """Agreement of approximate effects with exact ones of the same prompts.

    Args:
        exact: exact effects.
        approximate: those to first order.
        k: how many of the best places are looked for; all where there are fewer.

    Raises:
        ShapeError: the effects are not of the same prompts, layers, heads and places.
    """
    if exact.values.shape != approximate.values.shape or exact.places != approximate.places:
        raise ShapeError(
            f"exact effects are of {tuple(exact.values.shape)}, approximate ones of "
            f"{tuple(approximate.values.shape)} (prompt, layer, head, place); expected both of the "
            "same prompts and places"
        )
    means = exact.mean, approximate.mean
    there = ~(means[0].isnan() | means[1].isnan())
    flat = [mean[there].double() for mean in means]
    constant = any(bool((x == x[0]).all()) for x in flat)
    k = min(k, len(flat[0]))
    best, found = (x.topk(k, largest=exact.towards == "high").indices.tolist() for x in flat)
    index = there.nonzero()
    missed = [index[i].tolist() for i in best if i not in set(found)]
    return Agreement(
        float("nan") if constant else float(stats.spearmanr(*flat).statistic),
        1 - len(missed) / k,
        k,
        tuple((layer, head, exact.places[place]) for layer, head, place in missed),
        len(flat[0]),
    )
