"""Prompts of points: examples of one function, and an x at which it is asked."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import get_args

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from tvlens.errors import TaskError, UnknownNameError
from tvlens.tasks.draw import stream
from tvlens.tasks.functions import FunctionClass
from tvlens.tasks.prompts import PromptKind, Split

Xs = Float[Tensor, "batch point n_dims"]
_PROMPTS = {"train": 1024, "validation": 128, "test": 256}


@dataclass(frozen=True)
class PointPrompts:
    """Prompts of one number of points, the last of which is the query.

    Attributes:
        task: name of the task.
        split: split they were drawn for.
        kind: "clean"; "zero", the query alone; or "shuffled", with the y of the examples permuted.
        seed: seed they were drawn with.
        xs: all points.
        ys: what stands behind every x; that of the query is never shown.
        target: f(x) at the query, without noise.
    """

    task: str
    split: Split
    kind: PromptKind
    seed: int
    xs: Xs
    ys: Float[Tensor, "batch point"]
    target: Float[Tensor, " batch"]

    def __len__(self) -> int:
        return self.xs.shape[0]

    @property
    def shots(self) -> int:
        """Examples before the query."""
        return self.xs.shape[1] - 1


@dataclass(frozen=True)
class PointCurves:
    """Prompts each of which is asked at several numbers of points: error curves.

    Attributes:
        task: name of the task.
        split: split they were drawn for.
        seed: seed they were drawn with.
        points: numbers of points, the query among them, that are asked; row by row, prompt after
            prompt.
        xs: all points.
        ys: what stands behind every x.
        values: f(x) of every point, without noise.
    """

    task: str
    split: Split
    seed: int
    points: tuple[int, ...]
    xs: Xs
    ys: Float[Tensor, "batch point"]
    values: Float[Tensor, "batch point"]

    def __len__(self) -> int:
        return self.xs.shape[0] * len(self.points)

    @property
    def shots(self) -> int:
        """Examples before the last query."""
        return max(self.points) - 1

    @property
    def target(self) -> Float[Tensor, " row"]:
        """f(x) at every query."""
        return self.values[:, self._asked].flatten()

    @property
    def query(self) -> Int[Tensor, " row"]:
        """Position of every query in the sequence x₁, y₁, x₂, y₂, …"""
        return (2 * self._asked).repeat(len(self.xs))

    def at(self, points: int) -> PointPrompts:
        """The prompts of this number of points alone."""
        xs, ys = self.xs[:, :points], self.ys[:, :points]
        target = self.values[:, points - 1]
        return PointPrompts(self.task, self.split, "clean", self.seed, xs, ys, target)

    @property
    def _asked(self) -> Int[Tensor, " point"]:
        return torch.tensor(self.points) - 1


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

INPUTS: dict[str, InputChange] = {
    "none": gaussian,
    "skewed": skewed,
    "doubled": doubled,
    "orthogonal-query": orthogonal_query,
}
"""Changes of the inputs by the name of the shift."""


def draw_points(
    functions: FunctionClass,
    n: int,
    n_points: int,
    generator: Generator,
    *,
    change: InputChange = gaussian,
) -> tuple[Xs, Float[Tensor, "batch point"], Float[Tensor, "batch point"]]:
    """`n` prompts of so many points, a new function for each: x, the y shown, and f(x).

    Args:
        functions: what functions are drawn from.
        n: number of prompts.
        n_points: points of each.
        generator: where all randomness comes from.
        change: what becomes of x ~ N(0, I).
    """
    drawn = torch.randn(n, n_points, functions.n_dims, generator=generator)
    xs = change(drawn, generator)
    values = functions.draw(n, generator)(xs)
    noise = functions.noise * torch.randn(values.shape, generator=generator)
    return xs, values + noise, values


@dataclass(frozen=True)
class FunctionTask:
    """A function class as a task: every prompt has a function of its own.

    Attributes:
        name: name in tables.
        functions: the class that functions are drawn from.
        shift: how inputs differ from those of training, one of `INPUTS`.
    """

    name: str
    functions: FunctionClass
    shift: str = "none"

    def __post_init__(self) -> None:
        if self.shift not in INPUTS:
            raise UnknownNameError(
                f"unknown shift {self.shift!r} of task {self.name!r}; expected one of "
                f"{', '.join(INPUTS)}"
            )

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of everything that prompts are drawn from."""
        described = {"class": type(self.functions).__name__, "shift": self.shift}
        described |= asdict(self.functions)
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def prompts(
        self,
        split: Split,
        *,
        shots: int = 10,
        n: int | None = None,
        seed: int = 0,
        kind: PromptKind = "clean",
    ) -> PointPrompts:
        """Prompts with functions and points of their own; no two splits share a random stream.

        Prompts of one split, seed, number of shots and `n` have the same functions, points and
        queries whatever their kind, so effects can be compared prompt by prompt.

        Args:
            split: "train", "validation" or "test".
            shots: examples before the query; kind "zero" draws them and shows none.
            n: number of prompts; 1024, 128 and 256 by default.
            seed: seed of everything.
            kind: "clean"; "zero", the query alone; or "shuffled", with the y of the examples
                permuted so that none keeps its own.

        Raises:
            TaskError: unknown split or kind, n below 1, or too few shots.
        """
        self._require("split", split, get_args(Split))
        self._require("kind", kind, get_args(PromptKind))
        n = _PROMPTS[split] if n is None else n
        least = 2 if kind == "shuffled" else 0
        if n < 1 or shots < least:
            raise TaskError(
                f"task {self.name!r}: {n} prompts of kind {kind!r} with {shots} shots asked for; "
                f"expected at least 1 prompt and {least} shots"
            )
        xs, ys, values, generator = self._draw(split, shots + 1, n, seed, f"{shots} shots")
        if kind == "shuffled":
            ys = torch.cat([_deranged(ys[:, :-1], generator), ys[:, -1:]], dim=1)
        if kind == "zero":
            xs, ys = xs[:, -1:], ys[:, -1:]
        return PointPrompts(self.name, split, kind, seed, xs, ys, values[:, -1])

    def curves(
        self, split: Split, *, points: Sequence[int], n: int | None = None, seed: int = 0
    ) -> PointCurves:
        """Clean prompts each of which is asked at several numbers of points.

        Args:
            split: "train", "validation" or "test".
            points: numbers of points, the query among them.
            n: number of prompts; as in `prompts` by default.
            seed: seed of everything.

        Raises:
            TaskError: unknown split, n below 1, no number of points, one below 1, or a shift that
                belongs to one query.
        """
        self._require("split", split, get_args(Split))
        n = _PROMPTS[split] if n is None else n
        if n < 1 or not points or min(points) < 1:
            raise TaskError(
                f"task {self.name!r}: {n} curves at {list(points)} points asked for; expected one "
                "or more numbers of points, each at least 1, and at least 1 prompt"
            )
        if self.shift == "orthogonal-query":
            raise TaskError(
                f"task {self.name!r}: the query of shift 'orthogonal-query' depends on the number "
                "of points, so a prompt has no curve; use prompts(shots=...) for every number"
            )
        longest = max(points)
        xs, ys, values, _ = self._draw(split, longest, n, seed, f"curve of {longest}")
        return PointCurves(self.name, split, seed, tuple(points), xs, ys, values)

    def _draw(
        self, split: Split, n_points: int, n: int, seed: int, what: str
    ) -> tuple[Tensor, Tensor, Tensor, Generator]:
        """x, shown y and f(x) of every point, and the generator that they were drawn with."""
        key = stream("points", seed=seed, split=split, what=what)
        generator = torch.Generator().manual_seed(key.getrandbits(63))
        change = INPUTS[self.shift]
        return *draw_points(self.functions, n, n_points, generator, change=change), generator

    def _require(self, what: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise TaskError(
                f"task {self.name!r}: unknown {what} {value!r}; expected one of "
                f"{', '.join(map(repr, allowed))}"
            )


def _deranged(
    ys: Float[Tensor, "batch example"], generator: Generator
) -> Float[Tensor, "batch example"]:
    """Every prompt's values turned by one place around a random circle: none keeps its own."""
    order = torch.rand(ys.shape, generator=generator).argsort(dim=1)
    return torch.empty_like(ys).scatter(1, order, ys.gather(1, order.roll(1, dims=1)))
