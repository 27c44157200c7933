"""A function class as a task: what prompts of points are drawn from."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch
from torch import Generator

from tvlens.display import Displayed
from tvlens.errors import TaskError, UnknownNameError
from tvlens.tasks.base import PromptKind, Split
from tvlens.tasks.regression.functions import FunctionClass, function_class
from tvlens.tasks.regression.inputs import SHIFTS, Points, Shift, deranged, draw_points, more_points
from tvlens.tasks.regression.prompts import PointCurves, PointPrompts, no_donors
from tvlens.tasks.streams import digest, generator

_PROMPTS = {"train": 1024, "validation": 256, "test": 256}


@dataclass(frozen=True)
class FunctionTask(Displayed):
    """A function class as a task: every prompt has a function of its own.

    Attributes:
        name: name in tables.
        functions: the class that functions are drawn from.
        shift: how prompts differ from those of training, one of `SHIFTS`.
        train_points: how many points the model was trained on (T_train); head outputs of single
            prompts are taken from so many. Shipped models have it in their card.
    """

    name: str
    functions: FunctionClass
    shift: str = "none"
    train_points: int | None = None

    def __post_init__(self) -> None:
        if self.shift not in SHIFTS:
            raise UnknownNameError(
                f"unknown shift {self.shift!r} of task {self.name!r}; expected one of "
                f"{', '.join(SHIFTS)}"
            )

    @classmethod
    def of_card(cls, name: str, card: Mapping[str, Any], n_dims: int) -> "FunctionTask":
        """The task that a regression model was trained on, from its model card.

        Args:
            name: name in tables.
            card: what `load_shipped` and `load_regression` give beside the model.
            n_dims: dimensions of the model.

        Raises:
            TaskError: the card does not say what the model was trained on.
        """
        try:
            functions, options = card["functions"], card["settings"]["options"]
            return cls(
                name,
                function_class(functions, n_dims, **options),
                train_points=card["train_points"],
            )
        except (KeyError, TypeError) as error:
            raise TaskError(
                f"the model card of {name!r} lacks {error}; expected functions, train_points and "
                "settings with options, as `tvlens regression train` writes them"
            ) from error

    def require_train_points(self) -> int:
        """T_train.

        Raises:
            TaskError: the task does not know it.
        """
        if self.train_points is None:
            raise no_donors(self.name)
        return self.train_points

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of everything that prompts are drawn from."""
        described = {"class": type(self.functions).__name__, "shift": self.shift}
        described |= asdict(self.functions) | {"train_points": self.train_points}
        # With the spaces that the digests of runs made so far were taken of.
        return digest(described, separators=(", ", ": "))

    @property
    def has_curves(self) -> bool:
        """Whether a prompt can be asked at several numbers of points."""
        return not self._shift.one_query

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
            n: number of prompts; 1024, 256 and 256 by default.
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
        points, rest = self._draw(split, shots + 1, n, seed, f"{shots} shots")
        xs, ys, target = points.xs, points.ys, points.values[:, -1]
        if kind == "clean":
            longest = (shots + 1,)
            return PointCurves(
                self.name, split, seed, longest, xs, ys, points.values, self.train_points
            ).at(shots + 1)
        if kind == "shuffled":
            ys = torch.cat([deranged(ys[:, :-1], rest), ys[:, -1:]], dim=1)
        else:
            xs, ys = xs[:, -1:], ys[:, -1:]
        donor = self._donor(points, split, seed)
        return PointPrompts(self.name, split, kind, seed, xs, ys, target, donor)

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
        if not self.has_curves:
            raise TaskError(
                f"task {self.name!r}: the query of shift {self.shift!r} depends on the number "
                "of points, so a prompt has no curve; use prompts(shots=...) for every number"
            )
        longest = max(points)
        drawn, _ = self._draw(split, longest, n, seed, f"curve of {longest}")
        return PointCurves(
            self.name,
            split,
            seed,
            tuple(points),
            drawn.xs,
            drawn.ys,
            drawn.values,
            self.train_points,
        )

    @property
    def _shift(self) -> Shift:
        return SHIFTS[self.shift]

    def _draw(
        self, split: Split, n_points: int, n: int, seed: int, what: str
    ) -> tuple[Points, Generator]:
        """Points, and the generator that they were drawn with."""
        drawn = generator("points", seed=seed, split=split, what=what)
        return draw_points(self.functions, n, n_points, drawn, shift=self._shift), drawn

    def _donor(self, points: Points, split: Split, seed: int) -> PointPrompts | None:
        if self.train_points is None:
            return None
        what = f"donors of {points.xs.shape[1] - 1} shots"
        drawn = generator("points", seed=seed, split=split, what=what)
        other = more_points(self.functions, points, self.train_points, drawn, shift=self._shift)
        target = other.values[:, -1]
        return PointPrompts(self.name, split, "clean", seed, other.xs, other.ys, target)

    def _require(self, what: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            raise TaskError(
                f"task {self.name!r}: unknown {what} {value!r}; expected one of "
                f"{', '.join(map(repr, allowed))}"
            )
