"""Which heads' scores are more than chance, over prompts, and what several tasks say together."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from tvlens.errors import NumericalError, ShapeError, TvlensError
from tvlens.scores.ablation import require_one_model
from tvlens.scores.ranking import Head
from tvlens.scores.score import Scores

COLUMNS = ["task", "score", "layer", "head", "value", "p_value", "q_value", "sign"]

# Bound on each scratch array, in elements.
_MAX_ELEMENTS = 1 << 22


class SignedHeads(NamedTuple):
    """Heads whose scores are more than chance, strongest first.

    Attributes:
        positive: those that write for the task.
        negative: those that write against it.
    """

    positive: tuple[Head, ...]
    negative: tuple[Head, ...]


def permutation_test(
    scores: Scores, *, resamples: int = 9999, seed: int = 0, name: str | None = None
) -> pd.DataFrame:
    """Whether each head's mean over prompts is off zero: one row per head, `COLUMNS`.

    If a head did nothing, the sign of its value on every prompt could as well be the other one. The
    two-sided p-value is the share of such changes of signs that give a mean at least as far from
    zero: all of them where there are no more than `resamples`, else so many random ones and the
    scores themselves. Signs change for all heads together. `q_value` controls the false-discovery
    rate over the heads (Benjamini and Hochberg 1995).

    Scores that cannot be negative, such as attention, have no such null hypothesis.

    Args:
        scores: scores with values of single prompts, such as indirect effects.
        resamples: how many changes of signs are tried at most.
        seed: seed of their draw.
        name: what the score is called in the table; its own name by default.

    Raises:
        ShapeError: the scores have no values of single prompts.
        NumericalError: a value is not finite.
    """
    values = _values_of(scores)
    there = ~scores.scores.isnan().all(dim=1)
    data = values[:, there].flatten(1).detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(data).all():
        raise NumericalError(
            f"scores {scores.name!r} of task {scores.task!r} have values that are not finite; "
            "expected finite values of every head; try dtype=torch.float32"
        )
    p = _p_values(data, resamples, seed)
    layers, heads = there.nonzero().flatten().tolist(), range(scores.scores.shape[1])
    table = pd.DataFrame(
        [(layer, head) for layer in layers for head in heads], columns=["layer", "head"]
    )
    mean = data.mean(axis=0)
    found = {"value": mean, "p_value": p, "q_value": stats.false_discovery_control(p)}
    labels = {"task": scores.task, "score": name or scores.name}
    return table.assign(**found, sign=np.sign(mean).astype(int), **labels)[COLUMNS]


def signed_heads(table: pd.DataFrame, *, level: float = 0.05) -> SignedHeads:
    """The heads of `permutation_test` that are more than chance, by sign.

    Args:
        table: what the test found of one score and task.
        level: the false-discovery rate that is allowed.
    """
    if not 0 < level < 1:
        raise TvlensError(
            f"level={level}: expected a false-discovery rate between 0 and 1, such as .05"
        )
    sure = table[table["q_value"] <= level].sort_values("value", key=np.abs, ascending=False)

    def of(sign: int) -> tuple[Head, ...]:
        rows = sure[sure["sign"] == sign]
        pairs = zip(rows["layer"].tolist(), rows["head"].tolist(), strict=True)
        return tuple((int(layer), int(head)) for layer, head in pairs)

    return SignedHeads(of(1), of(-1))


def pooled(scores: Sequence[Scores], *, task: str = "pooled") -> Scores:
    """One score over several tasks: the mean of their scores, each standardised over the heads.

    The tasks are to it what prompts are to a score of one: `values` holds their standardised
    scores, and intervals are over tasks.

    Args:
        scores: the same score of one model on several tasks.
        task: what the tasks together are called.

    Raises:
        ShapeError: there is none, or they are of several models.
        NumericalError: all heads of a task have the same score.
    """
    if not scores:
        raise ShapeError("no scores are given to pool; expected one of each task")
    require_one_model({f"{i}, {each.task}": each for i, each in enumerate(scores)})
    maps = []
    for each in scores:
        grid = each.scores.double()
        known = grid[~grid.isnan()]
        spread = known.std(correction=0)
        if not spread > 0:
            raise NumericalError(
                f"scores {each.name!r} of task {each.task!r} are the same for all heads, so they "
                "cannot be standardised; leave the task out"
            )
        maps.append(((grid - known.mean()) / spread).float())
    return Scores.of_prompts(
        torch.stack(maps),
        name=scores[0].name,
        unit="standard deviations over heads",
        task=task,
        model=scores[0].model,
    )


def _values_of(scores: Scores) -> Float[Tensor, "prompt layer head"]:
    if scores.values is None or len(scores.values) < 2:
        n = 0 if scores.values is None else len(scores.values)
        raise ShapeError(
            f"scores {scores.name!r} have values of {n} single prompts; a permutation test needs "
            "two or more: give scores of prompts, such as indirect effects"
        )
    return scores.values


def _p_values(data: NDArray[np.float64], resamples: int, seed: int) -> NDArray[np.float64]:
    """Two-sided p-values of the columns of `[prompt, head]`."""
    n, width = data.shape
    if resamples < 1:
        raise TvlensError(f"resamples={resamples}: expected 1 or more changes of signs")
    whole = n < 63 and 2**n <= resamples
    total = 2**n if whole else resamples
    # Sums that differ by rounding alone are equal.
    least = np.abs(data.sum(axis=0)) - 1e-12 * np.abs(data).sum(axis=0)
    generator = np.random.default_rng(seed)
    rows = max(1, _MAX_ELEMENTS // max(n, width))
    count = np.zeros(width)
    for start in range(0, total, rows):
        size = min(rows, total - start)
        if whole:
            bits = (np.arange(start, start + size)[:, None] >> np.arange(n)) & 1
        else:
            bits = generator.integers(0, 2, size=(size, n))
        count += (np.abs((1.0 - 2.0 * bits) @ data) >= least).sum(axis=0)
    found: NDArray[np.float64] = count / total if whole else (count + 1) / (total + 1)
    return found
