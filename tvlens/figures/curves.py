"""Figures of error curves: squared error against the number of points."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, get_args

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from tvlens.errors import UnknownNameError
from tvlens.figures.style import (
    GREY,
    PALETTE,
    STYLE,
    WIDTHS,
    Width,
    inches,
    label_ends,
    log_scale,
    require_columns,
    whole_numbers,
)
from tvlens.tasks.regression.functions import CLASSES
from tvlens.tasks.regression.oracles import ORACLES
from tvlens.vectors.catalogue import BASELINES, Look, variants

Lines = Literal["main", "all"]

_HEIGHT = 2.7
_ESTIMATORS = ("green", "sky", "pink", "orange", "grey", "red", "blue", "black")


def _panels() -> dict[str, dict[str, Look]]:
    """What is drawn in each panel, by its name in tables."""
    dashes = {"slow": ":"}
    looks = itertools.cycle(_ESTIMATORS)
    oracles = {
        name: Look(oracle.label, colour, dash=dashes.get(oracle.cost, "--"))
        for (name, oracle), colour in zip(ORACLES.items(), looks, strict=False)
    }
    panels = {
        "model and estimators": {"truncation": BASELINES["truncation"], **oracles},
        "vectors of the class": {},
        "vectors of each prompt": {},
    }
    of_whose = {"class": "vectors of the class", "prompt": "vectors of each prompt"}
    dummies = {}
    for variant in variants().values():
        look = variant.method.look
        if variant.dummies:
            dummies[variant.name] = replace(look, label=f"{look.label}, dummies", dash=":")
        else:
            panels[of_whose[variant.whose]][variant.name] = look
    bare = Look("bare, dummies", "black", dash=":")
    panels["vectors of the class"] |= {"bare_dummies": bare, **dummies}
    return panels


@rc_context(STYLE)
def error_curves(
    results: DataFrame,
    *,
    functions: str,
    train_points: int | None,
    shift: str = "none",
    lines: Lines = "main",
    width: Width | None = None,
) -> Figure:
    """Squared error against the number of points.

    Lines are means over clean test prompts, bands their 95% intervals; an upright line marks the
    longest prompts that the model was trained on. Of the main lines there are five, with their
    names at their ends: the bare model, the model shown the last points only, the function vector
    and the Learnable Task Vector of the class, and the classical estimator for such functions.
    All lines are those, every other vector and every estimator, in three panels.

    Args:
        results: columns `functions, shift, prompt, points, method, metric, value, ci_low, ci_high`.
        functions: which function class to draw.
        train_points: T_train.
        shift: which shift to draw.
        lines: "main" or "all".
        width: how wide, "single" or "double" column; single for the main lines, double for all.

    Raises:
        UnknownNameError: a column is missing, nothing of this class and shift is there, or lines or
            width have no such name.
    """
    columns = ("functions", "shift", "prompt", "points", "method", "metric")
    require_columns(results, "results", *columns, "value", "ci_low", "ci_high")
    if lines not in get_args(Lines):
        raise UnknownNameError(
            f"lines={lines!r}; expected one of {', '.join(map(repr, get_args(Lines)))}"
        )
    rows = results[
        (results["functions"] == functions)
        & (results["shift"] == shift)
        & (results["prompt"] == "clean")
        & (results["metric"] == "squared_error")
    ]
    if rows.empty:
        there = results[["functions", "shift"]].drop_duplicates().to_records(index=False).tolist()
        raise UnknownNameError(
            f"results hold no squared_error of {functions!r} under shift {shift!r} on clean "
            f"prompts; there are {there}"
        )
    inches_wide = inches(width or ("single" if lines == "main" else "double"))
    if lines == "main":
        figure = Figure(figsize=(inches_wide, _HEIGHT), layout="constrained")
        axes = figure.subplots()
        _limits(axes, rows)
        _name_lines(axes, rows, _main(rows, functions))
        if train_points is not None:
            axes.axvline(train_points, color=GREY, lw=0.8, ls=(0, (1, 2)), zorder=0)
            axes.annotate(
                "longest in training",
                (train_points, 1),
                (3, -2),
                xycoords=("data", "axes fraction"),
                textcoords="offset points",
                va="top",
                fontsize=6,
                color=GREY,
            )
    else:
        figure = _in_panels(rows, train_points, inches_wide)
    figure.axes[0].set_ylabel("squared error / variance of f(x)")
    under = "" if shift == "none" else f", shift: {shift}"
    figure.suptitle(f"{functions}{under}")
    return figure


def _main(rows: DataFrame, functions: str) -> dict[str, Look]:
    """The five lines that matter, those that are there, by their names in tables."""
    there = set(rows["method"])
    own = CLASSES[functions].estimator if functions in CLASSES else None
    looks = {
        "bare": BASELINES["bare"],
        "truncation": replace(BASELINES["truncation"], colour="pink", dash="--"),
    }
    looks |= {name: variants()[name].method.look for name in ("fv_layer_class", "ltv_class")}
    for name in [name for name in (own, *ORACLES) if name and name in there][:1]:
        looks[name] = Look(ORACLES[name].label, "green", dash="-.")
    return {name: look for name, look in looks.items() if name in there}


def _name_lines(axes: Axes, rows: DataFrame, looks: Mapping[str, Look]) -> None:
    ends, right = [], axes.get_xlim()[1]
    for method, look in looks.items():
        last = _last_in_sight(axes, _curve(axes, rows[rows["method"] == method], look))
        if last is None:
            continue
        colour = PALETTE[look.colour]
        if last[0] == right:
            ends.append((look.label, last[1], colour))
            continue
        # An estimator makes no error from there on, or less than is shown.
        before = last[0] > right * 2 / 3
        axes.annotate(
            look.label,
            last,
            (-4 if before else 4, 3),
            textcoords="offset points",
            ha="right" if before else "left",
            color=colour,
            fontsize=7,
        )
    label_ends(axes, ends, height=_HEIGHT - 0.8)


def _in_panels(rows: DataFrame, train_points: int | None, width: float) -> Figure:
    """Estimators, vectors of the class and those of each prompt, the bare model in every panel."""
    drawn, bare = _panels(), BASELINES["bare"]
    known = {"bare"}.union(*drawn.values())
    others = {m: Look(m, "grey", dash=":") for m in rows["method"].unique() if m not in known}
    beside = width == WIDTHS["double"]
    n_rows, n_columns = (1, len(drawn)) if beside else (len(drawn), 1)
    figure = Figure(figsize=(width, 3.9 if beside else 8.4), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (title, group) in zip(panels, drawn.items(), strict=True):
        shown = {"bare": bare} | group | (others if axes is panels[0] else {})
        for method, look in shown.items():
            _curve(axes, rows[rows["method"] == method], look)
        if train_points is not None:
            label = "longest in training"
            axes.axvline(train_points, color=GREY, lw=0.8, ls=(0, (1, 2)), zorder=0, label=label)
        axes.set_title(title)
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=6, ncols=2, columnspacing=0.8
        )
        _limits(axes, rows)
    return figure


def _limits(axes: Axes, rows: DataFrame) -> None:
    """Scales that hold the bare model and the last points."""
    top = float(rows.loc[rows["method"] == "bare", "value"].max())
    bottom = float(rows.loc[rows["method"].isin(["bare", "truncation"]), "ci_low"].min())
    last = max(2, int(rows["points"].max()))
    axes.set(xlabel="points in the prompt", xlim=(1, last))
    axes.set(ylim=(max(bottom / 2, 1e-5), max(top * 2.5, 1.5)))
    log_scale(axes, "y")
    axes.xaxis.set_major_locator(whole_numbers(6))
    axes.grid(axis="y")


def _curve(axes: Axes, part: DataFrame, look: Look) -> list[tuple[float, float]]:
    """One method's means and intervals; returns where the means are."""
    # An estimator that makes no error has no place on a logarithmic axis.
    part = part[part["value"] > 1e-6].sort_values("points")
    if part.empty:
        return []
    colour = PALETTE[look.colour]
    low = part["ci_low"].clip(lower=1e-6)
    axes.fill_between(part["points"], low, part["ci_high"], color=colour, alpha=0.12, lw=0)
    xy = part["points"], part["value"]
    (line,) = axes.plot(*xy, color=colour, ls=look.dash, lw=1.1, label=look.label)
    if look is BASELINES["bare"]:
        line.set(lw=1.6)
    if len(part) < 8:
        line.set(marker="o", ms=2.5)
    return [(float(x), float(y)) for x, y in zip(*xy, strict=True)]


def _last_in_sight(axes: Axes, places: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """Where a line ends or leaves the axes below for good; nothing if it is never in them."""
    bottom = axes.get_ylim()[0]
    inside = [n for n, (_, y) in enumerate(places) if y >= bottom]
    if not inside:
        return None
    x, y = places[inside[-1]]
    if inside[-1] + 1 == len(places):
        return x, y
    beyond, below = places[inside[-1] + 1]
    return x + (beyond - x) * math.log(y / bottom) / math.log(y / below), bottom
