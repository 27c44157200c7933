"""Figures of error curves: squared error against the number of points."""

import itertools
from dataclasses import replace

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pandas import DataFrame

from tvlens.errors import UnknownNameError
from tvlens.figures.style import GREY, PALETTE, STYLE, require_columns, whole_numbers
from tvlens.tasks.regression.oracles import ORACLES
from tvlens.vectors.catalogue import BASELINES, Look, variants

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
    results: DataFrame, *, functions: str, train_points: int | None, shift: str = "none"
) -> Figure:
    """Squared error against the number of points: oracles, vectors of the class, of each prompt.

    Lines are means over clean test prompts, bands their 95% intervals. The bare model is in every
    panel, and a line marks the longest prompts that it was trained on.

    Args:
        results: columns `functions, shift, prompt, points, method, metric, value, ci_low, ci_high`.
        functions: which function class to draw.
        train_points: T_train.
        shift: which shift to draw.

    Raises:
        UnknownNameError: a column is missing, or nothing of this class and shift is there.
    """
    columns = ("functions", "shift", "prompt", "points", "method", "metric")
    require_columns(results, "results", *columns, "value", "ci_low", "ci_high")
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
    drawn, bare = _panels(), BASELINES["bare"]
    known = {"bare"}.union(*drawn.values())
    others = {m: Look(m, "grey", dash=":") for m in rows["method"].unique() if m not in known}
    figure = Figure(figsize=(7.2, 3.8))
    figure.subplots_adjust(left=0.075, right=0.99, top=0.87, bottom=0.4, wspace=0.08)
    panels = figure.subplots(1, len(drawn), sharex=True, sharey=True)
    for axes, (title, group) in zip(panels, drawn.items(), strict=True):
        shown = {"bare": bare} | group | (others if axes is panels[0] else {})
        for method, look in shown.items():
            _curve(axes, rows[rows["method"] == method], look)
        if train_points is not None:
            label = "longest in training"
            axes.axvline(train_points, color=GREY, lw=0.8, ls=(0, (1, 2)), zorder=0, label=label)
        axes.set(title=title, yscale="log", xlabel="points in the prompt")
        axes.xaxis.set_major_locator(whole_numbers(6))
        axes.grid(axis="y")
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=6, ncols=2, columnspacing=0.8
        )
    top = float(rows.loc[rows["method"] == "bare", "value"].max())
    bottom = float(rows.loc[rows["method"].isin(["bare", "truncation"]), "ci_low"].min())
    last = max(2, int(rows["points"].max()))
    panels[0].set(ylim=(max(bottom / 2, 1e-5), max(top * 2.5, 1.5)), xlim=(1, last))
    panels[0].set_ylabel("squared error / variance of f(x)")
    under = "" if shift == "none" else f", shift: {shift}"
    figure.suptitle(f"{functions}{under}")
    return figure


def _curve(axes: Axes, part: DataFrame, look: Look) -> None:
    """One method's means and intervals; nothing where there are none."""
    # An estimator that makes no error has no place on a logarithmic axis.
    part = part[part["value"] > 1e-6].sort_values("points")
    if part.empty:
        return
    colour = PALETTE[look.colour]
    low = part["ci_low"].clip(lower=1e-6)
    axes.fill_between(part["points"], low, part["ci_high"], color=colour, alpha=0.12, lw=0)
    xy = part["points"], part["value"]
    (line,) = axes.plot(*xy, color=colour, ls=look.dash, lw=1.1, label=look.label)
    if look is BASELINES["bare"]:
        line.set(lw=1.6)
    if len(part) < 8:
        line.set(marker="o", ms=2.5)
