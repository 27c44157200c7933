"""How far scores of several tasks, or several scores, agree: every two of them beside chance, and
beside how far each agrees with itself.
"""

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from tvlens.errors import NumericalError
from tvlens.scores.ablation import require_one_model
from tvlens.scores.agreement import overlap_at_k, spearman, split_half
from tvlens.scores.ranking import HeadScores, grid_of, heads_of, layer_profile
from tvlens.scores.score import Scores

COLUMNS = ["first", "second", "measure", "k", "value", "chance", "p_value", "ceiling"]


def agreement_matrix(
    scores: Mapping[str, Scores], ks: Sequence[int], *, splits: int = 100, seed: int = 0
) -> pd.DataFrame:
    """Overlap of the best k heads and Spearman's correlation of every two scores: `COLUMNS`.

    The ceiling of a pair is the geometric mean of the agreement that the two have with themselves
    on halves of their prompts; empty where one has no values of single prompts.

    Args:
        scores: scores of one model by name, such as one score of several tasks, or several scores.
        ks: sizes of the head sets.
        splits: random halves that the ceiling is a mean over.
        seed: seed of the halves.

    Raises:
        ShapeError: the scores are of several models, or a k is not from 1 to the number of heads.
    """
    require_one_model(scores)
    own = {name: _halves(score, ks, splits, seed) for name, score in scores.items()}
    rows: list[tuple[Any, ...]] = []
    for a, b in permutations(scores, 2):
        for k in ks:
            found = overlap_at_k(scores[a], scores[b], k)
            ceiling = _ceiling(own[a], own[b], ("overlap", k))
            rows.append(
                (a, b, "overlap", k, found.overlap, found.chance_overlap, found.p_value, ceiling)
            )
        rho = spearman(scores[a], scores[b])
        ceiling = _ceiling(own[a], own[b], ("spearman", None))
        rows.append((a, b, "spearman", None, rho.value, 0.0, rho.p_value, ceiling))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"k": "Int64"})


def depth_overlap(a: HeadScores, b: HeadScores) -> float:
    """How far the positive scores of two models lie equally deep: 1 if they do, 0 if nowhere.

    Heads of two models cannot be matched, but the depth of their layers can, as a share of all
    layers: this is what the two layer profiles, as densities over it, have in common. It is 1 minus
    their total variation.

    Raises:
        NumericalError: a score has no positive head.
    """
    profiles = [layer_profile(each).nan_to_num().double().numpy() for each in (a, b)]
    if not all(profile.any() for profile in profiles):
        raise NumericalError(
            "no head scores above 0, so there is no depth at which the positive scores lie; "
            "expected scores that are positive somewhere"
        )
    return _in_common(profiles[0], profiles[1])


def depth_matrix(
    scores: Mapping[str, Scores], *, draws: int = 1000, splits: int = 100, seed: int = 0
) -> pd.DataFrame:
    """`depth_overlap` of every two scores, of one model or of several: `COLUMNS`, without k.

    Chance is the mean where the heads of both are put in random order, and the p-value the share of
    such orders that have as much in common. The ceiling is that of `agreement_matrix`.

    Args:
        scores: scores by name, such as tasks of text and classes of functions.
        draws: random orders.
        splits: random halves that the ceiling is a mean over.
        seed: seed of both.

    Raises:
        NumericalError: a score has no positive head.
    """
    own = {name: _depth_halves(score, splits, seed) for name, score in scores.items()}
    generator = np.random.default_rng(seed)
    shuffled = {name: _shuffled(score, draws, generator) for name, score in scores.items()}
    rows: list[tuple[Any, ...]] = []
    for a, b in permutations(scores, 2):
        value = depth_overlap(scores[a], scores[b])
        chance = np.array([_in_common(x, y) for x, y in zip(shuffled[a], shuffled[b], strict=True)])
        p = (1 + (chance >= value - 1e-12).sum()) / (draws + 1)
        ceiling = _ceiling(own[a], own[b], ("depth", None))
        rows.append((a, b, "depth_overlap", None, value, chance.mean(), p, ceiling))
    return pd.DataFrame(rows, columns=COLUMNS).astype({"k": "Int64"})


def _halves(
    score: Scores, ks: Sequence[int], splits: int, seed: int
) -> dict[tuple[str, int | None], float]:
    """Agreement of a score with itself, by measure and k; nothing without single prompts."""
    if score.values is None or len(score.values) < 2:
        return {}
    table = split_half(score.values, list(ks), splits=splits, seed=seed)
    return {
        (row.measure, None if pd.isna(row.k) else int(row.k)): float(row.value)
        for row in table.itertuples()
    }


def _ceiling(
    a: Mapping[tuple[str, int | None], float],
    b: Mapping[tuple[str, int | None], float],
    measure: tuple[str, int | None],
) -> float:
    """Geometric mean of the two, as Spearman's correction for attenuation has it."""
    if measure not in a or measure not in b:
        return float("nan")
    return float(np.sqrt(max(0.0, a[measure]) * max(0.0, b[measure])))


def _in_common(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """What two densities over depth share, given as masses of equally thick layers."""
    ends = np.unique(np.concatenate([np.arange(len(x) + 1) / len(x) for x in (first, second)]))
    middle = (ends[:-1] + ends[1:]) / 2
    heights = [x[(middle * len(x)).astype(int)] * len(x) for x in (first, second)]
    return float(np.minimum(*heights) @ np.diff(ends))


def _shuffled(
    score: Scores, draws: int, generator: np.random.Generator
) -> list[NDArray[np.float64]]:
    """Layer profiles of the heads in random orders."""
    grid = grid_of(score)
    there, heads = ~np.isnan(grid), heads_of(grid).clip(min=0)
    found = []
    for _ in range(draws):
        mass = np.zeros_like(grid)
        mass[there] = generator.permutation(heads)
        profile = mass.sum(axis=1)
        found.append(profile / profile.sum())
    return found


def _depth_halves(score: Scores, splits: int, seed: int) -> dict[tuple[str, int | None], float]:
    """Mean of `depth_overlap` of a score on halves of its prompts; nothing without single ones."""
    if score.values is None or len(score.values) < 2:
        return {}
    half, generator = len(score.values) // 2, np.random.default_rng(seed)
    found = []
    for _ in range(splits):
        order = torch.from_numpy(generator.permutation(len(score.values)))
        halves = [score.values[order[half * i : half * (i + 1)]].double().mean(0) for i in (0, 1)]
        found.append(depth_overlap(*halves))
    return {("depth", None): float(np.mean(found))}
