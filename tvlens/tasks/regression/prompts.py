"""Prompts of points: examples of one function, and an x at which it is asked."""

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import TaskError
from tvlens.tasks.base import PromptKind, Split
from tvlens.tasks.regression.functions import Xs, Ys


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
        donor: clean prompts of the same functions, of the length the model was trained on.
        dummies: which of the points are no examples but places for a vector.
    """

    task: str
    split: Split
    kind: PromptKind
    seed: int
    xs: Xs
    ys: Ys
    target: Float[Tensor, " batch"]
    donor: "PointPrompts | None" = field(default=None, repr=False)
    dummies: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.xs.shape[0]

    @property
    def shots(self) -> int:
        """Examples before the query."""
        return self.xs.shape[1] - 1 - len(self.dummies)

    @property
    def points(self) -> tuple[int, ...]:
        """The one number of points, the query among them, that is asked."""
        return (self.shots + 1,)

    @property
    def places(self) -> tuple[int, ...]:
        """Columns of x₁, y₁, x₂, y₂, … at which a vector acts besides the query: the dummies' x."""
        return tuple(2 * i for i in self.dummies)

    @property
    def roles(self) -> tuple[str, ...]:
        """The role of every column of x₁, y₁, x₂, y₂, …: "x 1", "y 1", … and at last "query".

        Dummies are counted like examples.
        """
        shown = range(1, self.xs.shape[1])
        return (*(f"{name} {i}" for i in shown for name in "xy"), "query")

    def donors(self) -> "PointPrompts":
        """One clean prompt for each prompt, whose head outputs carry the same function.

        Those of clean prompts are their own first points; those of others show other points. They
        have as many points as the model was trained on, or all there are of a shorter prompt.

        Raises:
            TaskError: the task does not know how many points the model was trained on.
        """
        if self.donor is None:
            raise no_donors(self.task)
        return self.donor

    def with_dummies(self, shares: tuple[float, ...]) -> "PointPrompts":
        """The prompts with pairs of zeros put in, at which vectors are added too.

        Args:
            shares: shares of the examples that stand before each pair, ascending, from 0 to 1.
                The baselines of Saglam et al. (2025) use .1, .25, .5, .75 and .9.
        """
        at = [round(share * self.shots) for share in shares]
        order: list[int] = []
        dummies: list[int] = []
        for i in range(self.shots + 1):
            for _ in range(at.count(i)):
                dummies.append(len(order))
                order.append(-1)
            order.append(i)
        index = torch.tensor(order)
        real = (index >= 0).to(self.xs.dtype)
        xs = self.xs[:, index] * real[None, :, None]
        return replace(self, xs=xs, ys=self.ys[:, index] * real, dummies=tuple(dummies))


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
        train_points: how many points the model was trained on, where that is known.
    """

    task: str
    split: Split
    seed: int
    points: tuple[int, ...]
    xs: Xs
    ys: Ys
    values: Ys
    train_points: int | None = None

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

    def first(self, n: int) -> "PointCurves":
        """The first `n` prompts."""
        return replace(self, xs=self.xs[:n], ys=self.ys[:n], values=self.values[:n])

    def at(self, points: int) -> PointPrompts:
        """The prompts of this number of points alone."""
        found = self._window(0, points)
        if self.train_points is None:
            return found
        return replace(found, donor=self._window(0, min(points, self.train_points)))

    def last(self, window: int) -> PointPrompts:
        """Every prompt cut to its last so many points, for each number of points above that.

        Rows are in the order of this curve's, those of no more than `window` points left out.

        Raises:
            TaskError: no number of points is above the window.
        """
        ends = [points for points in self.points if points > window]
        if not ends:
            raise TaskError(
                f"task {self.task!r}: curves at {list(self.points)} points have nothing to cut to "
                f"the last {window}; ask for more points"
            )
        parts = [self._window(end - window, end) for end in ends]

        def rows(name: str) -> Tensor:
            return torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)

        return replace(parts[0], xs=rows("xs"), ys=rows("ys"), target=rows("target"))

    def donors(self) -> "PointCurves":
        """The prompt's own first points for each row: as many as the model was trained on, or all.

        Raises:
            TaskError: the task does not know how many points the model was trained on.
        """
        if self.train_points is None:
            raise no_donors(self.task)
        at_most = self.train_points
        return replace(self, points=tuple(min(points, at_most) for points in self.points))

    def _window(self, start: int, end: int) -> PointPrompts:
        xs, ys = self.xs[:, start:end], self.ys[:, start:end]
        return PointPrompts(
            self.task, self.split, "clean", self.seed, xs, ys, self.values[:, end - 1]
        )

    @property
    def _asked(self) -> Int[Tensor, " point"]:
        return torch.tensor(self.points) - 1


def no_donors(task: str) -> TaskError:
    """What to raise where T_train is needed and not known."""
    return TaskError(
        f"task {task!r} does not say how many points the model was trained on, so its prompts have "
        "no donors to take head outputs from; make it with FunctionTask(..., train_points=N)"
    )
