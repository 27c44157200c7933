"""The fidelity benchmark: squared error at every number of points, for every method and oracle.

A whole curve costs one reading of each prompt: every number of points is a replayed row on the
prompt's own keys and values. All errors are over the variance of f(x) in training, so that 1 is
the error of always predicting its mean.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import TaskError
from tvlens.evaluation.methods import BARE, Draws, evaluate_prompts
from tvlens.lens.edits import NoEdit
from tvlens.lens.lens import Lens
from tvlens.stats import bootstrap_mean_axis, bootstrap_ratio_axis
from tvlens.tasks.base import PromptKind, Split
from tvlens.tasks.regression.oracles import Oracle
from tvlens.tasks.regression.prompts import PointCurves, PointPrompts
from tvlens.tasks.regression.task import FunctionTask

FIDELITY_COLUMNS = [
    *("functions", "shift", "prompt", "points", "method"),
    *("metric", "value", "ci_low", "ci_high", "n"),
]
DUMMY_PLACES = (0.1, 0.25, 0.5, 0.75, 0.9)
"""Where the baselines of Saglam et al. (2025) put pairs of zeros, as shares of the examples."""


@dataclass(frozen=True)
class Errors:
    """Squared errors of one method, over the variance of f(x) in training.

    Attributes:
        points: numbers of points asked, the query among them.
        values: the errors.
    """

    points: tuple[int, ...]
    values: Float[Tensor, "prompt point"]

    @classmethod
    def join(cls, parts: Sequence["Errors"]) -> "Errors":
        """The errors of the same number of prompts at further numbers of points."""
        points = tuple(p for part in parts for p in part.points)
        return cls(points, torch.cat([part.values for part in parts], dim=1))

    def at(self, points: Sequence[int]) -> "Errors":
        """The errors at these numbers of points alone."""
        columns = [self.points.index(p) for p in points]
        return Errors(tuple(points), self.values[:, columns])

    def mean(self) -> "Errors":
        """The mean over all numbers of points, filed under the largest."""
        return Errors((max(self.points),), self.values.mean(dim=1, keepdim=True))


def prompt_sets(
    task: FunctionTask,
    split: Split,
    *,
    kind: PromptKind,
    points: Sequence[int],
    n: int,
    seed: int,
) -> list[PointCurves | PointPrompts]:
    """Prompts of one kind at every number of points that the kind and the task's shift allow.

    Clean prompts are curves, where the shift lets a prompt have one. Label-shuffled ones need two
    examples and are drawn anew for each number of points. A zero-shot prompt is its query alone.
    The query of shift "orthogonal-query" exists up to as many points as there are dimensions.

    Raises:
        TaskError: there is no such number of points.
    """
    if kind == "zero":
        shots = (task.train_points or 1) - 1
        return [task.prompts(split, shots=shots, n=n, seed=seed, kind=kind)]
    if kind == "clean" and task.has_curves:
        return [task.curves(split, points=points, n=n, seed=seed)]
    least = 3 if kind == "shuffled" else 2
    most = max(points) if task.has_curves else task.functions.n_dims
    allowed = [p for p in points if least <= p <= most]
    if not allowed:
        limit = "" if task.has_curves else f" and at most {most}"
        raise TaskError(
            f"task {task.name!r}: no {kind} prompts of shift {task.shift!r} have "
            f"{list(points)} points; expected at least {least}{limit}"
        )
    return [task.prompts(split, shots=p - 1, n=n, seed=seed, kind=kind) for p in allowed]


def method_errors(
    lens: Lens,
    sets: Sequence[PointCurves | PointPrompts],
    methods: Mapping[str, Draws],
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Errors]:
    """Every method, and the bare model, on every set of prompts.

    Args:
        lens: the model.
        sets: prompts of one kind, at increasing numbers of points.
        methods: what is added to prompts of this kind, by name.
        progress: called with the number of rows (prompts times numbers of points) finished.
    """
    parts: dict[str, list[Errors]] = {}
    for prompts in sets:
        found = evaluate_prompts(lens, prompts, methods, progress=progress)
        for name in found.methods:
            values = found.of(name, "squared_error").view(-1, len(prompts.points))
            parts.setdefault(name, []).append(Errors(prompts.points, values))
    return {name: Errors.join(errors) for name, errors in parts.items()}


def truncation_errors(lens: Lens, curves: PointCurves, window: int, bare: Errors) -> Errors:
    """The bare model shown only the last `window` points of longer prompts.

    Args:
        lens: the model.
        curves: the prompts.
        window: number of points shown, the query among them: T_train.
        bare: the bare model's errors on the same prompts, which shorter prompts keep.
    """
    longer = [p for p in curves.points if p > window]
    if not longer:
        return bare
    found = lens.outputs(curves.last(window), NoEdit(lens.n_layer), lens.readout.measure)
    cut = Errors(tuple(longer), found[:, 0, 0].double().cpu().view(-1, len(longer)))
    return Errors.join([bare.at([p for p in bare.points if p <= window]), cut])


def dummy_errors(
    lens: Lens,
    curves: PointCurves,
    methods: Mapping[str, Draws],
    places: tuple[float, ...] = DUMMY_PLACES,
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Errors]:
    """Every method on prompts with pairs of zeros put in, at which its vector is added as well.

    What is added before the query changes what the query sees, so these prompts run whole. Methods
    are called NAME_dummies; bare_dummies is the model on the same prompts without a vector.

    Args:
        lens: the model.
        curves: the prompts; with the dummies they must fit the model's positions.
        methods: what is added, by name.
        places: shares of the examples before each pair.
        progress: called with the number of prompts finished, of all lengths together.
    """
    sets = [curves.at(points).with_dummies(places) for points in curves.points]
    found = method_errors(lens, sets, methods, progress=progress)
    return {f"{name}_dummies": errors for name, errors in found.items()}


def oracle_errors(
    sets: Sequence[PointCurves | PointPrompts], oracle: Oracle, variance: float, n: int
) -> Errors:
    """A classical estimator on the first `n` prompts of every set, shown what the model is shown.

    Args:
        sets: prompts of one kind, at increasing numbers of points.
        oracle: the estimator.
        variance: of f(x) in training.
        n: number of prompts.
    """
    parts = []
    for prompts in sets:
        for points in prompts.points:
            asked = prompts.at(points) if isinstance(prompts, PointCurves) else prompts
            xs, ys = asked.xs[:n], asked.ys[:n]
            predicted = oracle(xs[:, :-1], ys[:, :-1], xs[:, -1])
            error = (predicted - asked.target[:n]).square().double() / variance
            parts.append(Errors((points,), error[:, None]))
    return Errors.join(parts)


def error_table(
    errors: Mapping[str, Errors],
    *,
    functions: str,
    shift: str,
    prompt: PromptKind,
    train_points: int,
    seed: int,
) -> pd.DataFrame:
    """Errors as rows of `results.csv`: means with 95% bootstrap intervals over prompts.

    Metrics: `squared_error`, over the variance of f(x) in training; `gain`, the bare model's error
    over the method's on the same prompts, resampled in pairs: above 1 the method helps; and
    `squared_error_past` and `gain_past`, the same of the mean over all numbers of points from
    T_train + 1 to `points`. An estimator without any error, as least squares can be on a few
    prompts, has no gain, and no row of it.

    Args:
        errors: errors by method; `bare` must be among them, of as many prompts or more.
        functions: name of the function class.
        shift: how prompts differ from those of training.
        prompt: kind of prompts.
        train_points: T_train.
        seed: seed of the bootstrap.
    """
    frames = []
    for method, found in errors.items():
        bare = errors[BARE].at([p for p in found.points if p in errors[BARE].points])
        asked = {"": found}
        past = [p for p in found.points if p > train_points]
        if past == [p for p in bare.points if p > train_points] and len(past) > 1:
            asked["_past"] = found.at(past).mean()
        for suffix, own in asked.items():
            other = bare if not suffix else bare.at(past).mean()
            metrics = {"squared_error": bootstrap_mean_axis(own.values, seed=seed)}
            if method != BARE and other.points == own.points:
                paired = other.values[: len(own.values)]
                metrics["gain"] = bootstrap_ratio_axis(paired, own.values, seed=seed)
            for metric, (value, low, high) in metrics.items():
                numbers = {"value": value, "ci_low": low, "ci_high": high}
                frame = pd.DataFrame({key: x.double().numpy() for key, x in numbers.items()})
                kept = {"points": own.points, "method": method, "metric": metric + suffix}
                frame = frame.assign(**kept, n=len(own.values))
                if metric == "gain":
                    frame = frame[np.isfinite(frame[list(numbers)]).all(axis=1)]
                frames.append(frame)
    table = pd.concat(frames, ignore_index=True)
    table = table.assign(functions=functions, shift=shift, prompt=prompt)
    return table[FIDELITY_COLUMNS]
