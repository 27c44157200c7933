"""How far two ways of scoring heads agree: on the best heads, on all of them, and against chance.

Score maps are those of `tvlens.scores.ranking`. Rank measures read only the order of the scores;
layer profiles and concentration read the sizes of the positive ones. Tied scores have no order: the
measures of agreement average over every way of breaking the ties, so a map that says nothing (all
scores equal) agrees with any other exactly as much as chance, and heads that two sparse maps both
leave at zero feign no agreement.

A function that takes one map takes a tensor or anything with a `.scores` property holding one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from tvlens.errors import ShapeError, TvlensError
from tvlens.scores.ranking import (
    HeadScores,
    check_ks,
    concentration,
    grid_of,
    heads_of,
    layer_profile,
    tidy,
)


@dataclass(frozen=True)
class Overlap:
    """Agreement of two sets of k heads, and of two random sets of k among the same heads.

    `shared` counts the heads in both; where scores tie at the cut, it is the mean over the ways of
    breaking the tie. `overlap` is shared / k, `jaccard` shared / (2k - shared); their `chance_`
    values are exact expectations (hypergeometric), and `p_value` is the probability that random
    sets share at least as many.
    """

    k: int
    shared: float
    overlap: float
    jaccard: float
    chance_overlap: float
    chance_jaccard: float
    p_value: float


class Correlation(NamedTuple):
    """A rank correlation with its two-sided p-value; both are NaN where a map is constant."""

    value: float
    p_value: float


def overlap_at_k(a: HeadScores, b: HeadScores, k: int) -> Overlap:
    """Agreement of the two top-k sets beside its chance level.

    Example:
        >>> a, b = torch.tensor([[4.0, 3.0, 2.0, 1.0]]), torch.tensor([[4.0, 1.0, 3.0, 2.0]])
        >>> overlap_at_k(a, b, 2)  # doctest: +ELLIPSIS
        Overlap(k=2, shared=1.0, overlap=0.5, jaccard=0.33..., chance_overlap=0.5, ...)
    """
    row = overlap_curve(a, b, [k]).to_dict("records")[0]
    n_heads = heads_of(grid_of(a)).size
    support = np.arange(k + 1)
    jaccard = stats.hypergeom.pmf(support, n_heads, k, k) @ (support / (2 * k - support))
    return Overlap(
        k=k,
        shared=row["shared"],
        overlap=row["overlap"],
        jaccard=row["jaccard"],
        chance_overlap=row["chance"],
        chance_jaccard=float(jaccard),
        p_value=row["p_value"],
    )


def overlap_curve(a: HeadScores, b: HeadScores, ks: Sequence[int] | None = None) -> pd.DataFrame:
    """Overlap of the two top-k sets at each k (default: every k up to the number of heads).

    Columns `k, shared, overlap, jaccard, chance, chance_low, chance_high, p_value` as in
    `Overlap`; `chance` is the expected overlap of two random sets of k heads, and 95% of such pairs
    lie in `chance_low` to `chance_high`.
    """
    first, second = _pair(a, b)
    n_heads = first.size
    k = np.arange(1, n_heads + 1) if ks is None else np.array(ks, dtype=np.int64)
    check_ks(k.tolist(), grid_of(a))
    shared = _shared(first, second, k)
    # Where ties make `shared` a fraction, no fewer heads than its ceiling are "at least" as many.
    at_least = np.ceil(shared - 1e-9)
    low, high = (stats.hypergeom.ppf(tail, n_heads, k, k) / k for tail in (0.025, 0.975))
    return pd.DataFrame(
        {
            "k": k,
            "shared": shared,
            "overlap": shared / k,
            "jaccard": shared / (2 * k - shared),
            "chance": k / n_heads,
            "chance_low": low,
            "chance_high": high,
            "p_value": stats.hypergeom.sf(at_least - 1, n_heads, k, k),
        }
    )


def rank_biased_overlap(a: HeadScores, b: HeadScores, p: float = 0.9) -> float:
    """Extrapolated rank-biased overlap of the two rankings of all N heads, from 0 to 1.

    `(1 - p) Σ_{d<N} p^(d-1) A_d + p^(N-1)` with `A_d` the overlap of the two top-d sets: a mean of
    the overlaps in which depth d weighs p times as much as d - 1. At p = .9 the ten best heads
    carry 86% of the weight. Equal rankings without ties give exactly 1; chance is
    `rank_biased_overlap_chance`.

    Source: RBO_EXT of Webber, Moffat and Zobel 2010 (ACM TOIS 28, 4), for full rankings; ties as
    in RBO^a of Corsi and Urbano 2024 (SIGIR), the mean over all ways of breaking them.
    """
    first, second = _pair(a, b)
    return _rank_biased(_shared(first, second, np.arange(1, first.size + 1)), p)


def rank_biased_overlap_chance(n_heads: int, p: float = 0.9) -> float:
    """Expected rank-biased overlap of two random rankings, `(1 - p^N) / (N (1 - p))`.

    Two random top-d sets overlap by d / N on average, and this is the weighted mean of d / N.
    """
    return float(_depth_weights(n_heads, p) @ np.arange(1, n_heads + 1)) / n_heads


def spearman(a: HeadScores, b: HeadScores) -> Correlation:
    """Spearman's rank correlation over all heads; NaN where either map is constant.

    The p-value takes heads to be exchangeable, which heads of one layer need not be.
    """
    return _correlation(stats.spearmanr, a, b)


def spearman_interval(a: HeadScores, b: HeadScores) -> tuple[float, float]:
    """Ends of the 95% interval of Spearman's correlation; NaN where it is, or of under 4 heads.

    By Fisher's z with the standard error of Bonett and Wright 2000 (Psychometrika 65), √((1 + ρ²/2)
    / (N - 3)): as the p-value, it takes heads to be exchangeable.
    """
    value, n = spearman(a, b).value, heads_of(grid_of(a)).size
    if n < 4:
        return float("nan"), float("nan")
    half = stats.norm.ppf(0.975) * np.sqrt((1 + value**2 / 2) / (n - 3))
    with np.errstate(divide="ignore"):  # of maps that agree fully, both ends are 1
        low, high = np.tanh(np.arctanh(value) + np.array([-half, half]))
    return float(low), float(high)


def kendall(a: HeadScores, b: HeadScores) -> Correlation:
    """Kendall's tau-b over all heads, which corrects for ties; NaN where either map is constant."""
    return _correlation(stats.kendalltau, a, b)


def layer_profile_distance(a: HeadScores, b: HeadScores) -> float:
    """Total variation, 0 to 1, of the two layer profiles; NaN where a map has no positive score."""
    _pair(a, b)
    first, second = layer_profile(a).nan_to_num(), layer_profile(b).nan_to_num()
    moved = 0.5 * float((first - second).abs().sum())
    return moved if first.any() and second.any() else float("nan")


def stability(
    samples: Float[Tensor, "sample layer head"], k: int | Sequence[int], *, p: float = 0.9
) -> pd.DataFrame:
    """Agreement among repeated maps, such as seeds: mean and range over all pairs of samples.

    Columns `measure, k, value, low, high, chance, n`; measures `overlap` (at each k),
    `rank_biased_overlap` and `spearman`; `low` and `high` are the least and the greatest of the `n`
    pairs.
    """
    if len(samples) < 2:
        raise ShapeError(f"stability compares pairs: give 2 or more maps, not {len(samples)}")
    return _agreement(list(combinations(samples, 2)), k, p, (0.0, 1.0))


def split_half(
    values: Float[Tensor, "prompt layer head"],
    k: int | Sequence[int],
    *,
    p: float = 0.9,
    splits: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Agreement of a map with itself: means over one random half of the prompts against the other.

    Columns and measures as in `stability`; `low` and `high` enclose 95% of the `n` seeded splits.
    This is the ceiling that agreement with any other map can reach, a cautious one: each half
    holds half of the prompts, and of an odd number one is left out.
    """
    half = len(values) // 2
    if half < 1 or splits < 1:
        raise ShapeError(
            f"halves need 2 or more prompts and 1 or more splits, not {len(values)} and {splits}"
        )
    data = values.detach().to("cpu", torch.float64)
    generator = np.random.default_rng(seed)
    pairs = []
    for _ in range(splits):
        order = torch.from_numpy(generator.permutation(len(values)))
        pairs.append((data[order[:half]].mean(dim=0), data[order[half : 2 * half]].mean(dim=0)))
    return _agreement(pairs, k, p, (0.025, 0.975))


def compare_head_sets(
    a: HeadScores,
    b: HeadScores,
    *,
    ks: Sequence[int] = (5, 10, 20),
    p: float = 0.9,
    names: tuple[str, str] = ("a", "b"),
) -> pd.DataFrame:
    """Every measure of agreement between two head maps, one row each.

    Columns `measure, k, value, chance, p_value`, empty where a measure has none. Measures:
    `overlap`, `jaccard` (at each k), `rank_biased_overlap`, `spearman`, `kendall`,
    `layer_profile_distance` (total variation), and for each map, named by `names`,
    `gini_<name>`, `effective_heads_<name>` and `top_share_<name>` (at each k).

    Raises:
        ShapeError: The maps differ in shape, or a k is out of range.
        NumericalError: A score is not finite.
    """
    if names[0] == names[1]:
        raise TvlensError(f"both maps are named '{names[0]}': give two different names")
    sets = [overlap_at_k(a, b, k) for k in ks]
    chance = rank_biased_overlap_chance(heads_of(grid_of(a)).size, p)
    rho, tau = spearman(a, b), kendall(a, b)
    rows = [
        *(("overlap", s.k, s.overlap, s.chance_overlap, s.p_value) for s in sets),
        *(("jaccard", s.k, s.jaccard, s.chance_jaccard, s.p_value) for s in sets),
        ("rank_biased_overlap", None, rank_biased_overlap(a, b, p), chance, np.nan),
        ("spearman", None, rho.value, 0.0, rho.p_value),
        ("kendall", None, tau.value, 0.0, tau.p_value),
        ("layer_profile_distance", None, layer_profile_distance(a, b), np.nan, np.nan),
    ]
    for scores, name in zip((a, b), names, strict=True):
        for measure, k, value in concentration(scores, ks).itertuples(index=False):
            rows.append((f"{measure}_{name}", k, value, np.nan, np.nan))
    return tidy(rows, "measure k value chance p_value")


def _pair(a: HeadScores, b: HeadScores) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = grid_of(a), grid_of(b)
    if first.shape != second.shape:
        raise ShapeError(
            f"head maps of shape {list(first.shape)} and {list(second.shape)} ([layer, head]) "
            "cannot be compared: score the heads of one model"
        )
    without = [np.flatnonzero(np.isnan(grid).all(axis=1)).tolist() for grid in (first, second)]
    if without[0] != without[1]:
        raise ShapeError(
            f"head maps without heads in layers {without[0]} and {without[1]} cannot be compared: "
            "score the heads of one model"
        )
    return heads_of(first), heads_of(second)


def _depth_weights(n_heads: int, p: float) -> NDArray[np.float64]:
    """Weight of each depth in rank-biased overlap; they sum to 1."""
    if not 0 < p < 1:
        raise TvlensError(f"p of rank-biased overlap must lie between 0 and 1, got {p}: try 0.9")
    weight = np.power(p, np.arange(n_heads), dtype=np.float64)
    weight[:-1] *= 1 - p
    return weight


def _shared(
    first: NDArray[np.float64], second: NDArray[np.float64], depths: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Expected number of heads in both top-d sets for each depth d, ties broken at random.

    A head with `above` heads above it in a group of `tied` equal scores is in the top d with
    probability (d - above) / tied, clipped to 0 and 1; the two maps break their ties independently.
    """
    ranks = np.stack([-first.ravel(), -second.ravel()])
    above = stats.rankdata(ranks, method="min", axis=1) - 1
    tied = stats.rankdata(ranks, method="max", axis=1) - above
    # One depth at a time: memory stays linear in the number of heads.
    return np.array([((d - above) / tied).clip(0, 1).prod(axis=0).sum() for d in depths])


def _correlation(test: Callable[..., Any], a: HeadScores, b: HeadScores) -> Correlation:
    first, second = _pair(a, b)
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return Correlation(float("nan"), float("nan"))
    result = test(first.ravel(), second.ravel())
    return Correlation(float(result.statistic), float(result.pvalue))


def _rank_biased(shared: NDArray[np.float64], p: float) -> float:
    """Rank-biased overlap of the numbers of heads in both top-d sets, d from 1 to all heads."""
    weight = _depth_weights(shared.size, p)
    return float(1 - weight @ (1 - shared / np.arange(1, shared.size + 1)))


def _agreement(
    pairs: list[tuple[Tensor, Tensor]], k: int | Sequence[int], p: float, tails: tuple[float, float]
) -> pd.DataFrame:
    """Mean and quantiles over pairs of maps, beside chance, of the measures of whole rankings."""
    ks = [k] if isinstance(k, int) else list(k)
    grid = grid_of(pairs[0][0])
    check_ks(ks, grid)
    n_heads = heads_of(grid).size
    depths = np.arange(1, n_heads + 1)
    shared = [_shared(*_pair(*pair), depths) for pair in pairs]
    chance = rank_biased_overlap_chance(n_heads, p)
    measures: list[tuple[Any, ...]] = [
        ("overlap", size, size / n_heads, [both[size - 1] / size for both in shared]) for size in ks
    ]
    measures.append(("rank_biased_overlap", None, chance, [_rank_biased(x, p) for x in shared]))
    measures.append(("spearman", None, 0.0, [spearman(*pair).value for pair in pairs]))
    rows = [
        (measure, size, np.mean(sample), *np.quantile(sample, tails), expected, len(sample))
        for measure, size, expected, sample in measures
    ]
    return tidy(rows, "measure k value low high chance n")
