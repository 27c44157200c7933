"""Measures on logits, and the intervals of their means. Pure functions: no model, no files."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Bool, Float, Real
from numpy.typing import NDArray
from torch import Tensor

from tvlens.errors import NumericalError, ShapeError, TvlensError

PromptValues = Real[Tensor | np.ndarray, " prompt"] | Bool[Tensor | np.ndarray, " prompt"]

PromptColumns: TypeAlias = Float[Tensor | np.ndarray, " prompt *each"]

# Bound on each scratch array, in elements: 4 Mi of float64 are 32 MiB.
_MAX_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval; `n` is the number of prompts behind it."""

    value: float
    low: float
    high: float
    n: int

    def map(self, transform: Callable[[float], float]) -> "Interval":
        """The interval of `transform(value)` for a monotone transform: the ends map with the value.

        Perplexity, for example, is `cross_entropy.map(math.exp)`; a decreasing transform swaps the
        ends.
        """
        low, high = sorted((float(transform(self.low)), float(transform(self.high))))
        return Interval(float(transform(self.value)), low, high, self.n)


def bootstrap_mean(
    values: PromptValues,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """The mean over prompts with its percentile-bootstrap interval, prompts being resampled.

    One value, or values that are all equal, show no spread to resample: low and high then equal the
    value, which says nothing about certainty (of shares, `share_interval` does). The same seed
    gives the same interval, the one `scipy.stats.bootstrap(method="percentile")` gives for it.

    Args:
        values: One number per prompt; booleans count as 0 and 1.
        confidence: Share of the bootstrap distribution between low and high.
        resamples: Number of bootstrap samples.
        seed: Seed of the resampling.

    Raises:
        ShapeError: There is no value.
        NumericalError: A value is not finite.
    """
    data = _finite_values(values)
    tails = _tails(confidence, resamples)
    estimates = np.concatenate(
        [data[index].mean(axis=-1) for index in _resampled_prompts(len(data), resamples, seed)]
    )
    low, high = np.quantile(estimates, tails)
    return Interval(float(data.mean()), float(low), float(high), len(data))


def share_interval(
    values: PromptValues,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """A share of prompts, as of right answers, with its interval.

    That of `bootstrap_mean`, but where the share is 0 or 1: there every resample gives the same,
    and the interval is Wilson's (1927), which is not of width zero: up to z² / (n + z²), or down to
    n / (n + z²).

    Args:
        values: one number for each prompt, 0 to 1, such as whether it was answered right.
        confidence: share of such intervals that hold the true share.
        resamples: number of bootstrap samples.
        seed: seed of the resampling.

    Raises:
        ShapeError: there is no value.
        NumericalError: a value is not finite, or not between 0 and 1.
    """
    found = bootstrap_mean(values, confidence=confidence, resamples=resamples, seed=seed)
    data = _finite_values(values)
    if data.min() < 0 or data.max() > 1:
        raise NumericalError(
            f"shares from {data.min()} to {data.max()}; expected numbers from 0 to 1, such as "
            "whether a prompt was answered right"
        )
    if not (data.max() == 0 or data.min() == 1):
        return found
    from scipy.stats import binomtest

    ends = binomtest(int(data.sum()), len(data)).proportion_ci(confidence, method="wilson")
    return Interval(found.value, float(ends.low), float(ends.high), found.n)


def bootstrap_mean_axis(
    values: PromptColumns,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Float[Tensor, "*each"], Float[Tensor, "*each"], Float[Tensor, "*each"]]:
    """Mean, low and high over prompts of every column, such as every head of a head map.

    All columns share the resampled prompts, and each gets the interval that `bootstrap_mean` gives
    its column. Computed in float64 on the CPU, returned there in the dtype of `values`, at least
    float32. Scratch memory is bounded whatever the number of prompts and heads.

    Raises:
        ShapeError: There is no prompt.
        NumericalError: A value is not finite.
    """
    dtype = torch.promote_types(torch.as_tensor(values[:0]).dtype, torch.float32)
    data = _finite_values(values)
    tails = _tails(confidence, resamples)
    n_prompts, shape = len(data), data.shape[1:]
    columns = data.reshape(n_prompts, -1)
    # Measured from the first prompt, equal values stay exactly equal through the matrix product.
    origin = columns[0]
    bounds = np.empty((2, columns.shape[1]))
    width = max(1, _MAX_ELEMENTS // resamples)
    for start in range(0, columns.shape[1], width):
        block = slice(start, start + width)
        shifted = columns[:, block] - origin[block]
        means = np.concatenate(
            [
                _counts(index, n_prompts) @ shifted / n_prompts
                for index in _resampled_prompts(n_prompts, resamples, seed)
            ]
        )
        bounds[:, block] = np.quantile(means, tails, axis=0) + origin[block]
    mean = origin + (columns - origin).mean(axis=0)
    mean, low, high = (torch.from_numpy(x.reshape(shape)).to(dtype) for x in (mean, *bounds))
    return mean, low, high


def bootstrap_ratio_axis(
    numerator: PromptColumns,
    denominator: PromptColumns,
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> tuple[Float[Tensor, "*each"], Float[Tensor, "*each"], Float[Tensor, "*each"]]:
    """Ratio of the two means over prompts, with its interval, of every column.

    Numerator and denominator are of the same prompts and are resampled together, so what makes
    a prompt hard for both does not widen the interval. Seeds as in `bootstrap_mean`.

    Raises:
        ShapeError: there is no prompt, or the two differ in shape.
        NumericalError: a value is not finite.
    """
    above, below = _finite_values(numerator), _finite_values(denominator)
    if above.shape != below.shape:
        raise ShapeError(
            f"a ratio needs the same prompts above and below, got shapes {list(above.shape)} and "
            f"{list(below.shape)}; measure both on one set of prompts"
        )
    tails = _tails(confidence, resamples)
    n, shape = len(above), above.shape[1:]
    both = np.concatenate([above.reshape(n, -1), below.reshape(n, -1)], axis=1)
    means = np.concatenate(
        [_counts(index, n) @ both / n for index in _resampled_prompts(n, resamples, seed)]
    )
    half = both.shape[1] // 2
    # Where the denominator is zero the ratio is infinite, and is reported so.
    with np.errstate(divide="ignore", invalid="ignore"):
        value = both[:, :half].mean(axis=0) / both[:, half:].mean(axis=0)
        ratios = means[:, :half] / means[:, half:]
    ratios[means[:, half:] == 0] = np.inf
    # Infinite ratios cannot be interpolated.
    method: Any = "linear" if np.isfinite(ratios).all() else "nearest"
    low, high = np.quantile(ratios, tails, axis=0, method=method)
    value, low, high = (torch.from_numpy(np.reshape(x, shape)) for x in (value, low, high))
    return value, low, high


def _finite_values(values: Tensor | NDArray[Any]) -> NDArray[np.float64]:
    if isinstance(values, Tensor):
        values = values.detach().to("cpu", torch.float64).numpy()
    data = np.asarray(values, dtype=np.float64)
    if data.size == 0:
        raise ShapeError(
            f"values of shape {list(data.shape)} hold nothing to average: a bootstrap interval "
            "needs at least one prompt; look for a filter that removed them all"
        )
    broken = np.argwhere(~np.isfinite(data))
    if len(broken):
        raise NumericalError(
            f"{len(broken)} of {data.size} values are not finite (first: {data[tuple(broken[0])]} "
            f"at prompt {broken[0][0]}): drop these prompts by name or mend what produced them"
        )
    return data


def _tails(confidence: float, resamples: int) -> tuple[float, float]:
    if not 0 < confidence < 1 or resamples < 1:
        raise TvlensError(
            f"confidence={confidence}, resamples={resamples}: a bootstrap interval needs a "
            "confidence between 0 and 1 and at least 1 resample, for example 0.95 and 2000"
        )
    return (1 - confidence) / 2, (1 + confidence) / 2


def _resampled_prompts(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """Prompt indices `[resample, prompt]` in blocks; the blocks together do not depend on size."""
    generator = np.random.default_rng(seed)
    rows = max(1, _MAX_ELEMENTS // n)
    for start in range(0, resamples, rows):
        yield generator.integers(0, n, size=(min(rows, resamples - start), n))


def _counts(index: NDArray[np.int64], n: int) -> NDArray[np.float64]:
    """How often each of `n` prompts occurs in each resample, `[resample, prompt]`."""
    rows = len(index)
    offsets = index + n * np.arange(rows)[:, None]
    return np.bincount(offsets.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
