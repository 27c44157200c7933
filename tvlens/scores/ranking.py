"""Score maps of heads: how heads rank, in which layers their scores lie, how few hold them.

A head is a pair (layer, head), a score map a `[layer, head]` tensor, NaN in the whole of layers
that have no heads, which count for nothing. Scores are signed: the higher, the more the head writes
for the task, so a head that writes against it ranks last, not first.

A function that takes one map takes a tensor or anything with a `.scores` property holding one.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from tvlens.errors import NumericalError, ShapeError

Head = tuple[int, int]
# The underscores leave comparing sizes to those who compare maps, and name both shapes.
Scores = Float[Tensor, "_layer _head"]


@runtime_checkable
class HasHeadScores(Protocol):
    """Anything that scores heads, such as a mediation result or a learnable task vector."""

    @property
    def scores(self) -> Scores: ...


HeadScores = Scores | HasHeadScores


def rank_heads(scores: HeadScores) -> list[Head]:
    """All heads from the highest signed score to the lowest; ties in order of (layer, head).

    Example:
        >>> rank_heads(torch.tensor([[0.1, -0.9], [0.5, 0.1]]))
        [(1, 0), (0, 0), (1, 1), (0, 1)]
    """
    grid = grid_of(scores)
    # NaN comes last: layers without heads.
    order = np.argsort(-grid, axis=None, kind="stable")[: heads_of(grid).size]
    return [divmod(index, grid.shape[1]) for index in order.tolist()]


def top_heads(scores: HeadScores, k: int) -> list[Head]:
    """The k heads of highest signed score, best first; ties in order of (layer, head).

    Raises:
        ShapeError: k is below 1 or above the number of heads.
        NumericalError: A score is not finite.
    """
    check_ks([k], grid_of(scores))
    return rank_heads(scores)[:k]


def layer_profile(scores: HeadScores) -> Float[Tensor, " layer"]:
    """Share of the positive score mass in each layer; NaN in layers without heads.

    Zeros where no head scores above zero.
    """
    mass = grid_of(scores).clip(min=0).sum(axis=1)
    total = np.nansum(mass)
    return torch.from_numpy(mass / total if total > 0 else mass).to(torch.float32)


def concentration(scores: HeadScores, ks: Sequence[int] = (1, 5, 10)) -> pd.DataFrame:
    """How few heads hold the positive score mass, as columns `measure, k, value`.

    With x the positive part of the scores over all N heads, one row each of
    `gini`, 0 where all heads are equal and 1 - 1/N where one head holds everything;
    `effective_heads`, the participation ratio (Σx)² / Σx², from 1 to N;
    `top_share` for every k in `ks`, the share that the k best heads hold.
    All NaN where no head scores above zero.
    """
    grid = grid_of(scores)
    check_ks(ks, grid)
    mass = np.sort(heads_of(grid).clip(min=0))
    # Scaled by its maximum so that squares of tiny effects do not underflow.
    mass = mass / mass[-1] if mass[-1] > 0 else np.full_like(mass, np.nan)
    n_heads, total = mass.size, mass.sum()
    gini = (2 * np.arange(1, n_heads + 1) - n_heads - 1) @ mass / (n_heads * total)
    rows: list[tuple[Any, ...]] = [("gini", None, gini)]
    rows.append(("effective_heads", None, total**2 / (mass @ mass)))
    rows += [("top_share", k, mass[-k:].sum() / total) for k in ks]
    return tidy(rows, "measure k value")


def grid_of(scores: HeadScores) -> NDArray[np.float64]:
    """The checked scores as a float64 `[layer, head]` array, NaN in layers without heads."""
    tensor = scores if isinstance(scores, Tensor) else scores.scores
    if tensor.ndim != 2 or tensor.numel() == 0:
        raise ShapeError(
            f"scores have shape {list(tensor.shape)}: one number per head is needed, [layer, head]"
        )
    grid: NDArray[np.float64] = tensor.detach().to("cpu", torch.float64).numpy()
    absent = np.isnan(grid).all(axis=1, keepdims=True)
    broken = np.argwhere(~(np.isfinite(grid) | absent))
    if absent.all():
        broken = np.argwhere(absent)
    if len(broken):
        layer, head = broken[0]
        raise NumericalError(
            f"{len(broken)} of {grid.size} head scores are not finite (first: {grid[layer, head]} "
            f"at layer {layer}, head {head}): heads can only be ranked by finite scores"
        )
    return grid


def heads_of(grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """The scores of all heads, one after another."""
    return grid[~np.isnan(grid)]


def check_ks(ks: Sequence[int], grid: NDArray[np.float64]) -> None:
    """Refuse sizes of head sets that the map does not have.

    Raises:
        ShapeError: a k is below 1 or above the number of heads.
    """
    n_heads = heads_of(grid).size
    n_layer = n_heads // grid.shape[1]
    for k in ks:
        if not 1 <= k <= n_heads:
            raise ShapeError(
                f"top {k} heads asked for, but there are {n_heads} heads ({n_layer} layers of "
                f"{grid.shape[1]}): choose k from 1 to {n_heads}"
            )


def tidy(rows: Sequence[tuple[Any, ...]], columns: str) -> pd.DataFrame:
    """Rows as a table, the columns named in one string, k whole or empty."""
    return pd.DataFrame(rows, columns=columns.split()).astype({"k": "Int64"})
