"""The points of regression prompts: how x is drawn, what shifts do to it, and what y is shown."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator

from tvlens.tasks.regression.functions import FunctionClass, Functions, Xs, Ys


def gaussian(xs: Xs, generator: Generator) -> Xs:
    """x ~ N(0, I), as in training."""
    return xs


def skewed(xs: Xs, generator: Generator) -> Xs:
    """Covariance with eigenvalues ∝ 1/i in a random basis of each prompt, of the same trace."""
    n_dims = xs.shape[2]
    spread = (1 / torch.arange(1, n_dims + 1, dtype=xs.dtype)).sqrt()
    spread = spread * (n_dims / spread.square().sum()).sqrt()
    noise = torch.randn(len(xs), n_dims, n_dims, generator=generator, dtype=xs.dtype)
    basis, _ = torch.linalg.qr(noise)
    return torch.einsum("bpd,bed->bpe", xs * spread, basis)


def doubled(xs: Xs, generator: Generator) -> Xs:
    """Inputs twice as large as in training."""
    return 2 * xs


def orthogonal_query(xs: Xs, generator: Generator) -> Xs:
    """The query without its part in the span of the examples, at the length it had.

    Where the examples span everything nothing is left of it, and the query stays as it is.
    """
    examples, query = xs[:, :-1], xs[:, -1]
    if not 0 < examples.shape[1] < xs.shape[2]:
        return xs
    basis, _ = torch.linalg.qr(examples.transpose(1, 2))
    inside = torch.einsum("bdk,bek,be->bd", basis, basis, query)
    outside = query - inside
    longer = query.norm(dim=1, keepdim=True) / outside.norm(dim=1, keepdim=True)
    return torch.cat([examples, (outside * longer)[:, None]], dim=1)


InputChange = Callable[[Xs, Generator], Xs]
"""What becomes of x ~ N(0, I)."""


@dataclass(frozen=True)
class Shift:
    """How prompts differ from those of training.

    Attributes:
        change: what becomes of the inputs.
        noise_share: variance of the noise on every y shown, over the variance of f(x).
        one_query: whether the change is made for the last point alone, so that a prompt cannot be
            asked at several numbers of points.
    """

    change: InputChange = gaussian
    noise_share: float = 0.0
    one_query: bool = False


SHIFTS: dict[str, Shift] = {
    "none": Shift(),
    "skewed": Shift(skewed),
    "doubled": Shift(doubled),
    # Garg et al. (2022) put noise of variance 1 on linear functions of variance 20.
    "noisy-labels": Shift(noise_share=0.05),
    "orthogonal-query": Shift(orthogonal_query, one_query=True),
}
"""Shifts by name."""


@dataclass(frozen=True)
class Points:
    """Points of prompts, and the functions behind them.

    Attributes:
        xs: x of every point.
        ys: the y that a prompt shows, with noise.
        values: f(x) without noise.
        functions: one function for each prompt.
    """

    xs: Xs
    ys: Ys
    values: Ys
    functions: Functions


def draw_points(
    functions: FunctionClass,
    n: int,
    n_points: int,
    generator: Generator,
    *,
    shift: Shift = SHIFTS["none"],
) -> Points:
    """`n` prompts of so many points, a new function for each.

    Args:
        functions: what functions are drawn from.
        n: number of prompts.
        n_points: points of each.
        generator: where all randomness comes from.
        shift: how prompts differ from those of training.
    """
    drawn = torch.randn(n, n_points, functions.n_dims, generator=generator)
    xs = shift.change(drawn, generator)
    return _shown(functions, functions.draw(n, generator), xs, generator, shift)


def more_points(
    functions: FunctionClass, points: Points, n_points: int, generator: Generator, *, shift: Shift
) -> Points:
    """So many other points of the same functions, one query like every other."""
    n, _, n_dims = points.xs.shape
    xs = torch.randn(n, n_points, n_dims, generator=generator)
    if not shift.one_query:
        xs = shift.change(xs, generator)
    return _shown(functions, points.functions, xs, generator, shift)


def _shown(
    functions: FunctionClass, drawn: Functions, xs: Xs, generator: Generator, shift: Shift
) -> Points:
    values = drawn(xs)
    variance = functions.noise**2 + shift.noise_share * functions.variance
    noise = variance**0.5 * torch.randn(values.shape, generator=generator)
    return Points(xs, values + noise, values, drawn)


def deranged(ys: Ys, generator: Generator) -> Ys:
    """Every prompt's values turned by one place around a random circle: none keeps its own."""
    order = torch.rand(ys.shape, generator=generator).argsort(dim=1)
    return torch.empty_like(ys).scatter(1, order, ys.gather(1, order.roll(1, dims=1)))
