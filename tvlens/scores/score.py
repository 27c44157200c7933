"""A number for every head: per prompt where it has one, with a name, a unit and an interval.

Tables hold one row per head, with the columns task, layer, head and the score's own. Heads are
matched by layer and head, never by their place in a table. Layers of a model that have no heads
(`Backend.attention_layers`) are NaN in a score and have no rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.display import Displayed
from tvlens.errors import ShapeError, UnknownNameError
from tvlens.runs.facts import text_of
from tvlens.runs.labelled import labelled
from tvlens.runs.storage import Kept, write
from tvlens.runs.tables import read_table
from tvlens.scores.ranking import Head, top_heads
from tvlens.stats import bootstrap_mean_axis

if TYPE_CHECKING:
    import xarray

HEAD_KEYS = ["task", "layer", "head"]

# Axes with an underscore are compared below, in words.
HeadMap = Float[Tensor, "_layer _head"]


S = TypeVar("S", bound="Scores")


@dataclass(frozen=True, eq=False)
class Scores(Kept, Displayed):
    """A signed score of every head; any two of one model can be compared.

    Attributes:
        scores: the score of every head; NaN throughout layers without heads.
        name: what its column is called in tables.
        unit: what it is measured in.
        task: name of the task.
        model: name of the model.
        values: the scores on single prompts that `scores` is the mean of, where there are any.
        baseline: what effects on each prompt are differences from, where scores are effects.
    """

    scores: HeadMap
    name: str
    unit: str
    task: str = ""
    model: str = ""
    values: Float[Tensor, "prompt _layer _head"] | None = None
    baseline: Float[Tensor, " prompt"] | None = None

    def __post_init__(self) -> None:
        each = [self.scores, *(x for x in (self.values, self.baseline) if x is not None)]
        if self.scores.ndim != 2 or not all(x.is_floating_point() for x in each):
            raise ShapeError(
                f"scores {self.name!r} have shape {tuple(self.scores.shape)} and type "
                f"{self.scores.dtype}; expected real numbers of (layer, head)"
            )
        if self.baseline is not None and self.baseline.shape != (
            len(self.baseline if self.values is None else self.values),
        ):
            raise ShapeError(
                f"scores {self.name!r}: the baseline has shape {tuple(self.baseline.shape)}; "
                "expected one number for each prompt"
            )
        if self.values is not None and self.values.shape[1:] != self.scores.shape:
            raise ShapeError(
                f"scores {self.name!r} are of {tuple(self.scores.shape)} (layer, head), their "
                f"values on single prompts of {tuple(self.values.shape[1:])}; both must be of one "
                "model"
            )

    @classmethod
    def of_prompts(
        cls: type[S],
        values: Float[Tensor, "prompt _layer _head"],
        *,
        name: str,
        unit: str,
        task: str = "",
        model: str = "",
        baseline: Float[Tensor, " prompt"] | None = None,
    ) -> S:
        """The mean over prompts of scores on single prompts."""
        mean = values.double().mean(dim=0).float()
        return cls(mean, name, unit, task, model, values=values, baseline=baseline)

    @property
    def n_heads(self) -> int:
        """Number of heads of the whole model."""
        return int(_has_heads(self.scores).sum()) * self.scores.shape[1]

    def top(self, k: int) -> list[Head]:
        """The k heads of largest score as (layer, head), best first.

        Raises:
            ShapeError: k is smaller than 1 or larger than the number of heads.
        """
        return top_heads(self.scores, k)

    def interval(self, *, seed: int = 0) -> tuple[HeadMap, HeadMap] | None:
        """Ends of the 95% bootstrap interval over prompts; None for scores without prompts."""
        if self.values is None:
            return None
        _, low, high = self._bootstrapped(self.values, seed)
        return low, high

    def _bootstrapped(self, values: Tensor, seed: int) -> tuple[HeadMap, ...]:
        """Mean and ends of the interval, of the heads that are there."""
        there = _has_heads(self.scores)
        maps = torch.full((3, *self.scores.shape), torch.nan, dtype=torch.float64)
        maps[:, there] = torch.stack(bootstrap_mean_axis(values[:, there], seed=seed)).double()
        return tuple(maps.to(torch.promote_types(values.dtype, torch.float32)))

    def to_frame(self, *, seed: int = 0) -> pd.DataFrame:
        """One row per head: task, layer, head, NAME, and NAME_low, NAME_high where there are any.

        Args:
            seed: seed of the bootstrap.
        """
        columns = {self.name: self.scores}
        if self.values is not None:
            mean, low, high = self._bootstrapped(self.values, seed)
            columns = {self.name: mean, f"{self.name}_low": low, f"{self.name}_high": high}
        return head_table(columns, self.task)

    @classmethod
    def from_frame(
        cls,
        table: pd.DataFrame,
        name: str,
        *,
        unit: str = "",
        model: str = "",
        layers: Sequence[int] | None = None,
    ) -> "dict[str, Scores]":
        """The scores in one column of a table of heads, by task, each head in its own place.

        Args:
            table: columns task, layer, head and `name`, such as `RUN/heads.csv`.
            name: the column.
            unit: what it is measured in, which tables do not say.
            model: name of the model, which they do not say either.
            layers: layers that have heads, where some have none (`Backend.attention_layers`).

        Raises:
            UnknownNameError: a column is missing, or holds no numbers.
            ShapeError: a head has several rows or none, or layers and heads do not count from 0.
        """
        missing = {*HEAD_KEYS, name} - set(table.columns)
        if missing:
            raise UnknownNameError(
                f"the table of heads has no column {', '.join(sorted(missing))}; it has "
                f"{', '.join(map(str, table.columns))}"
            )
        if not pd.api.types.is_numeric_dtype(table[name]):
            raise UnknownNameError(f"column {name!r} holds no numbers; name a score of heads")
        if table["task"].isna().any():
            raise UnknownNameError("the table of heads has rows without a task; name one in each")
        layers_in(table)
        return {
            str(task): Scores(_grid(rows, name, str(task), layers), name, unit, str(task), model)
            for task, rows in table.groupby("task", sort=False)
        }

    def to_csv(self, path: Path | str, *, seed: int = 0) -> None:
        """Write the table of `to_frame` as CSV, whole or not at all; `from_csv` reads it.

        So does `tvlens compare NAME@PATH OTHER@FILE`.

        Args:
            path: the file.
            seed: seed of the bootstrap.

        Raises:
            RunError: the file cannot be written.
        """
        text = self.to_frame(seed=seed).to_csv(index=False, lineterminator="\n")
        write(Path(path), text.encode())

    @classmethod
    def from_csv(
        cls, path: Path | str, name: str, *, unit: str = "", model: str = ""
    ) -> dict[str, "Scores"]:
        """The scores of one column of a CSV of heads, by task: `from_frame` of a file.

        Layers that have no rows are layers without heads.

        Args:
            path: a file with the columns task, layer, head and `name`, such as `RUN/heads.csv`.
            name: the column.
            unit: what it is measured in.
            model: name of the model.

        Raises:
            RunError: the file cannot be read.
            UnknownNameError: a column is missing, or holds no numbers.
            ShapeError: a head has several rows or none, or layers and heads do not count from 0.
        """
        table = read_table(path)
        try:
            # Maps of different layers are not compared with each other later on.
            return cls.from_frame(table, name, unit=unit, model=model, layers=layers_in(table))
        except (UnknownNameError, ShapeError) as error:
            raise type(error)(f"{path}: {error}") from error

    def to_xarray(self) -> "xarray.DataArray":
        """The scores with names on their axes: of single prompts where there are any; needs xarray.

        The axes are (prompt, layer, head), or (layer, head) for scores without prompts.

        Raises:
            ImportError: xarray is not installed.
        """
        facts = {"unit": self.unit, "task": self.task, "model": self.model}
        if self.values is None:
            return labelled(self.scores, ("layer", "head"), self.name, facts=facts)
        return labelled(self.values, ("prompt", "layer", "head"), self.name, facts=facts)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Scores, values and baseline; name, unit, task and model."""
        tensors = {"scores": self.scores, "values": self.values, "baseline": self.baseline}
        facts = {"name": self.name, "unit": self.unit, "task": self.task, "model": self.model}
        return {name: x for name, x in tensors.items() if x is not None}, facts

    @classmethod
    def of_state(cls: type[S], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> S:
        """The scores that have this state."""
        return cls(
            tensors["scores"],
            text_of(facts, "name"),
            text_of(facts, "unit"),
            text_of(facts, "task"),
            text_of(facts, "model"),
            values=tensors.get("values"),
            baseline=tensors.get("baseline"),
        )


def _has_heads(scores: HeadMap) -> Bool[Tensor, " layer"]:
    """Which layers have heads: a single head that is NaN is no layer without."""
    return ~scores.isnan().all(dim=1)


def layers_in(table: pd.DataFrame) -> list[int]:
    """Layers that a table of heads has rows of, sorted.

    Raises:
        UnknownNameError: there is no column of layers.
        ShapeError: layers or heads are not whole numbers that count from 0.
    """
    for key in HEAD_KEYS[1:]:
        if key not in table:
            raise UnknownNameError(f"the table of heads has no column {key}")
        numbers = np.array([_number(value) for value in table[key]])
        wrong = ~((numbers >= 0) & (numbers < len(table)) & (np.floor(numbers) == numbers))
        if wrong.any():
            first = int(wrong.argmax())
            raise ShapeError(
                f"the table of heads has {key} {str(table[key].iloc[first])[:20]!r} in row "
                f"{first + 1}; expected one row for every head, layers and heads counted from 0"
            )
    return sorted({int(float(layer)) for layer in table["layer"]})


def _number(value: object) -> float:
    """NaN for what is no number."""
    try:
        return float(str(value))
    except ValueError:
        return math.nan


def head_table(columns: Mapping[str, HeadMap], task: str) -> pd.DataFrame:
    """Maps of all heads as one row per head: task, layer, head, and a column for each map.

    Layers that are NaN in all maps have no rows.
    """
    maps = {name: x.detach().cpu() for name, x in columns.items()}
    there = torch.stack([_has_heads(x) for x in maps.values()]).any(dim=0)
    layers = there.nonzero().flatten().tolist()
    heads = range(next(iter(maps.values())).shape[1])
    index = pd.MultiIndex.from_product([layers, heads], names=HEAD_KEYS[1:])
    flat = {name: x[there].flatten().tolist() for name, x in maps.items()}
    frame = pd.DataFrame(flat, index).reset_index()
    frame.insert(0, "task", task)
    return frame


def join_scores(scores: Sequence[Scores], *, seed: int = 0) -> pd.DataFrame:
    """Several scores of one task side by side: one row per head, the columns of `to_frame` of each.

    Args:
        scores: scores of one model on one task.
        seed: seed of the bootstrap.

    Raises:
        ShapeError: they are of different numbers of heads.
    """
    shapes = {tuple(score.scores.shape): score.name for score in scores}
    if len(shapes) > 1:
        described = ", ".join(f"{name!r} of {shape}" for shape, name in shapes.items())
        raise ShapeError(
            f"scores of different numbers of (layer, head) have no common table: {described}; "
            "score the heads of one model"
        )
    frames = [score.to_frame(seed=seed).drop(columns="task") for score in scores]
    table = reduce(lambda a, b: a.merge(b, on=HEAD_KEYS[1:], validate="one_to_one"), frames)
    table.insert(0, "task", scores[0].task)
    return table


def _grid(rows: pd.DataFrame, name: str, task: str, layers: Sequence[int] | None) -> HeadMap:
    """The `[layer, head]` map of one task's rows."""
    keys = rows[["layer", "head"]].astype(float).astype("int64")
    twice = keys[keys.duplicated()]
    if len(twice):
        layer, head = twice.iloc[0]
        raise ShapeError(
            f"task {task!r}: the table of heads has several rows for layer {layer}, head {head}; "
            "expected one for each head"
        )
    numbers = keys.to_numpy()
    n_layer, n_head = int(numbers[:, 0].max()) + 1, int(numbers[:, 1].max()) + 1
    there = {(int(layer), int(head)) for layer, head in numbers}
    expected = range(n_layer) if layers is None else layers
    lacking = [(i, j) for i in expected for j in range(n_head) if (i, j) not in there]
    if lacking:
        layer, head = lacking[0]
        raise ShapeError(
            f"task {task!r}: the table of heads has {len(rows)} rows up to layer {n_layer - 1}, "
            f"head {n_head - 1}, and {len(lacking)} heads below have none (first: layer {layer}, "
            f"head {head}); expected one row for every head, layers and heads counted from 0"
        )
    grid = torch.full((n_layer, n_head), torch.nan, dtype=torch.float64)
    at, heads = (torch.from_numpy(numbers[:, i].copy()) for i in range(2))
    grid[at, heads] = torch.tensor(rows[name].to_numpy(dtype=float))
    return grid
