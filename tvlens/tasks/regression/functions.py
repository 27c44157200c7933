"""Function classes that regression transformers learn in context (Garg et al. 2022).

A `FunctionClass` draws a batch of functions, one for each prompt; the batch is evaluated on all
points of all prompts at once. Scales are the published ones; every class knows the variance that
follows from its own.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tvlens.errors import ShapeError, UnknownNameError

Xs = Float[Tensor, "batch point n_dims"]
Ys = Float[Tensor, "batch point"]


class Functions(ABC):
    """A batch of functions, one for each prompt."""

    @abstractmethod
    def __call__(self, xs: Xs) -> Ys:
        """f(x) of every point, by the function of its own prompt."""


@dataclass(frozen=True)
class FunctionClass(ABC):
    """A distribution over functions of `n_dims` variables.

    Attributes:
        n_dims: number of variables.
        estimator: the classical estimator for functions of the class, a name of `ORACLES`.
    """

    estimator: ClassVar[str] = "least_squares"
    n_dims: int

    def __post_init__(self) -> None:
        self._require_size("n_dims")

    def _require_size(self, field: str) -> None:
        self._require(field, Integral, 1, "a whole number, at least 1")

    def _require(self, field: str, kind: type, least: int, wanted: str) -> None:
        value = getattr(self, field)
        number = isinstance(value, kind) and not isinstance(value, bool)
        if not (number and least <= value < math.inf):
            name = type(self).__name__
            raise ShapeError(f"{name}: {field} is {value!r:.60}; expected {wanted}")

    @abstractmethod
    def draw(self, n: int, generator: Generator) -> Functions:
        """`n` functions."""

    @property
    @abstractmethod
    def variance(self) -> float:
        """Variance of f(x) over functions and x ~ N(0, I): what errors are normalised by."""

    @property
    def noise(self) -> float:
        """Standard deviation of the noise on every y that a prompt shows."""
        return 0.0


@dataclass(frozen=True)
class _Linear(Functions):
    weights: Float[Tensor, "batch n_dims"]

    def __call__(self, xs: Xs) -> Ys:
        return torch.einsum("bpd,bd->bp", xs, self.weights)


@dataclass(frozen=True)
class Linear(FunctionClass):
    """y = w·x with w ~ N(0, I)."""

    def draw(self, n: int, generator: Generator) -> Functions:
        return _Linear(torch.randn(n, self.n_dims, generator=generator))

    @property
    def variance(self) -> float:
        return float(self.n_dims)


@dataclass(frozen=True)
class SparseLinear(FunctionClass):
    """y = w·x where only `n_nonzero` coordinates of w ~ N(0, I), drawn for each function, remain.

    Attributes:
        n_nonzero: coordinates that matter; 3 in Garg et al.
    """

    estimator: ClassVar[str] = "lasso"

    n_nonzero: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_size("n_nonzero")
        if self.n_nonzero > self.n_dims:
            raise ShapeError(
                f"n_nonzero={self.n_nonzero}: expected between 1 and n_dims={self.n_dims}"
            )

    def draw(self, n: int, generator: Generator) -> Functions:
        weights = torch.randn(n, self.n_dims, generator=generator)
        order = torch.rand(n, self.n_dims, generator=generator).argsort(dim=1)
        return _Linear(weights * (order < self.n_nonzero))

    @property
    def variance(self) -> float:
        return float(self.n_nonzero)


@dataclass(frozen=True)
class NoisyLinear(Linear):
    """y = w·x + noise, the noise drawn anew for every y that a prompt shows.

    Attributes:
        noise_std: standard deviation of the noise; 1 in Garg et al.
    """

    estimator: ClassVar[str] = "ridge"

    noise_std: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("noise_std", Real, 0, "a number, at least 0")

    @property
    def noise(self) -> float:
        return self.noise_std


@dataclass(frozen=True)
class _Quadratic(Functions):
    weights: Float[Tensor, "batch n_dims"]

    def __call__(self, xs: Xs) -> Ys:
        return torch.einsum("bpd,bd->bp", xs**2, self.weights) / math.sqrt(3)


@dataclass(frozen=True)
class Quadratic(FunctionClass):
    """y = w·x² / √3 with w ~ N(0, I): the second moment of a linear function (E x⁴ = 3)."""

    estimator: ClassVar[str] = "network"

    def draw(self, n: int, generator: Generator) -> Functions:
        return _Quadratic(torch.randn(n, self.n_dims, generator=generator))

    @property
    def variance(self) -> float:
        return float(self.n_dims)


@dataclass(frozen=True)
class _ReluNetwork(Functions):
    first: Float[Tensor, "batch n_dims hidden"]
    second: Float[Tensor, "batch hidden"]

    def __call__(self, xs: Xs) -> Ys:
        hidden = torch.bmm(xs, self.first).relu()
        return torch.einsum("bph,bh->bp", hidden, self.second) * (2 / hidden.shape[-1]) ** 0.5


@dataclass(frozen=True)
class ReluNetwork(FunctionClass):
    """A two-layer network, y = √(2 / hidden) Σ_h a_h relu(w_h·x), all weights from N(0, 1).

    Attributes:
        n_hidden: hidden units; 100 in Garg et al.
    """

    estimator: ClassVar[str] = "network"

    n_hidden: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_size("n_hidden")

    def draw(self, n: int, generator: Generator) -> Functions:
        first = torch.randn(n, self.n_dims, self.n_hidden, generator=generator)
        return _ReluNetwork(first, torch.randn(n, self.n_hidden, generator=generator))

    @property
    def variance(self) -> float:
        return float(self.n_dims)


@dataclass(frozen=True)
class _Tree(Functions):
    coordinates: Int[Tensor, "batch inner"]
    leaves: Float[Tensor, "batch leaf"]

    def __call__(self, xs: Xs) -> Ys:
        depth = self.leaves.shape[1].bit_length() - 1
        node = torch.zeros(xs.shape[:2], dtype=torch.long, device=xs.device)
        for _ in range(depth):
            coordinate = self.coordinates.gather(1, node)
            right = xs.gather(2, coordinate[..., None])[..., 0] > 0
            node = 2 * node + 1 + right.long()
        return self.leaves.gather(1, node - (self.leaves.shape[1] - 1))


@dataclass(frozen=True)
class DecisionTree(FunctionClass):
    """A full binary tree: every inner node asks the sign of one coordinate, leaves are N(0, 1).

    Attributes:
        depth: questions on the way to a leaf; 4 in Garg et al.
    """

    estimator: ClassVar[str] = "boosting"

    depth: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_size("depth")

    def draw(self, n: int, generator: Generator) -> Functions:
        inner = 2**self.depth - 1
        coordinates = torch.randint(self.n_dims, (n, inner), generator=generator)
        return _Tree(coordinates, torch.randn(n, inner + 1, generator=generator))

    @property
    def variance(self) -> float:
        return 1.0


CLASSES: dict[str, type[FunctionClass]] = {
    "linear": Linear,
    "sparse-linear": SparseLinear,
    "noisy-linear": NoisyLinear,
    "quadratic": Quadratic,
    "relu": ReluNetwork,
    "tree": DecisionTree,
}
"""Every function class by the name that commands know it by."""


def function_class(name: str, n_dims: int, **options: int | float) -> FunctionClass:
    """The function class of this name over `n_dims` variables.

    Raises:
        UnknownNameError: there is no such function class, or it has no such option.
        ShapeError: an option is no number that makes sense, or the sizes do not fit each other.
    """
    if name not in CLASSES:
        raise UnknownNameError(
            f"unknown function class {name!r}; expected one of {', '.join(CLASSES)}"
        )
    known = [field.name for field in fields(CLASSES[name]) if field.name != "n_dims"]
    for option in options:
        if option not in known:
            raise UnknownNameError(
                f"function class {name!r} has no option {option!r}; it has "
                f"{', '.join(known) or 'none'}"
            )
    return CLASSES[name](n_dims, **options)
