"""Figures of many methods at once: what they do over tasks, which states they make, how many heads
they need.
"""

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import DataFrame

from tvlens.errors import UnknownNameError
from tvlens.figures.style import (
    BLUE,
    GREY,
    ORANGE,
    PALE,
    PALETTE,
    SKY,
    STYLE,
    Width,
    inches,
    keep_panels,
    log_scale,
    outside_legend,
    panels_in,
    require_columns,
)
from tvlens.vectors.catalogue import BASELINES, METHODS, Look

_PROMPTS = {"zero": "zero-shot prompts", "shuffled": "shuffled-label prompts"}
_METRICS = {
    "accuracy": "first-token accuracy",
    "exact_match": "exact match",
    "cross_entropy": "cross-entropy (nats)",
    "d_ntp": "distance to in-context next-token distribution (nats)",
}
_LOWER = ("cross_entropy", "d_ntp", "d_ntp_labels")


@rc_context(STYLE)
def method_means(
    results: DataFrame, *, metric: str = "accuracy", width: Width = "double"
) -> Figure:
    """Every method's mean over tasks, with a small dot for each task; one panel a kind of prompts.

    Methods are sorted by their mean on the first panel. The upright line is in-context learning on
    clean prompts, where the metric has it. Distances and losses stand on a logarithmic axis, on
    which controls do not press the rest together.

    Args:
        results: columns `task, method, prompt, metric, value`.
        metric: which of the metrics to draw.
        width: how wide, "single" or "double" column; panels stand below each other in a single one.

    Raises:
        UnknownNameError: a column is missing, no row has this metric on zero-shot or
            shuffled-label prompts, or there is no such width.
    """
    require_columns(results, "results", "task", "method", "prompt", "metric", "value")
    rows = results[results["metric"] == metric]
    prompts = [prompt for prompt in _PROMPTS if (rows["prompt"] == prompt).any()]
    if not prompts:
        known = sorted(map(str, results["metric"].unique()))
        raise UnknownNameError(
            f"results hold no {metric!r} on {' or '.join(_PROMPTS)} prompts; metrics there: {known}"
        )
    looks = _looks()
    means = rows[rows["prompt"] == prompts[0]].groupby("method")["value"].mean()
    order = [m for m in means.sort_values(ascending=metric not in _LOWER).index if m != "icl"]
    lines, across = panels_in(width, 3.0, len(prompts))
    height = 0.7 + (0.2 + 0.21 * len(order)) * lines
    figure = Figure(figsize=(inches(width), height), layout="constrained")
    panels = figure.subplots(lines, across, sharex=True, sharey=True, squeeze=False).ravel()
    icl = rows.loc[(rows["method"] == "icl") & (rows["prompt"] == "clean"), "value"]
    for axes, prompt in zip(panels, prompts, strict=True):
        part = rows[rows["prompt"] == prompt]
        if len(icl):
            axes.axvline(float(icl.mean()), color="black", lw=0.9)
        for y, method in enumerate(order):
            look = looks.get(method, Look(method, "black"))
            values = part.loc[part["method"] == method, "value"].to_numpy(dtype=float)
            if not len(values):
                continue
            colour = PALETTE[look.colour]
            axes.plot([values.min(), values.max()], [y, y], color=colour, lw=0.8, alpha=0.45)
            axes.plot(values, np.full(len(values), y), ".", color=colour, ms=3, alpha=0.45)
            axes.plot(values.mean(), y, look.marker, color=colour, ms=5)
        axes.set_title(_PROMPTS[prompt], pad=12 if len(icl) else None)
        axes.set_yticks(range(len(order)), [looks.get(m, Look(m, "black")).label for m in order])
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x")
    if metric in _LOWER and (rows["value"] > 0).all():
        log_scale(panels[0], "x")
    figure.supxlabel(_METRICS.get(metric, metric))
    if len(icl):
        panels[0].text(
            float(icl.mean()),
            len(order) - 0.4,
            "in context",
            ha="center",
            va="bottom",
            fontsize=6.5,
        )
    return figure


def _looks() -> dict[str, Look]:
    return {"none": BASELINES["none"]} | {method.name: method.look for method in METHODS}


@rc_context(STYLE)
def state_map(
    states: DataFrame,
    *,
    methods: tuple[str, ...] = ("ltv", "fv_layer", "hendel"),
    width: Width = "double",
) -> Figure:
    """Last hidden states of prompts on two principal components, one panel a method.

    Grey are the prompts as they are, black clean ones that ask the same, coloured the method's.

    Args:
        states: columns `method, prompt, first, second` of one task, `Likeness.projection`.
        methods: whose panels are drawn, those that are there.
        width: how wide, "single" or "double" column.

    Raises:
        UnknownNameError: a column is missing, none of the methods is there, or there is no such
            width.
    """
    require_columns(states, "states", "method", "prompt", "first", "second")
    shown = [name for name in methods if (states["method"] == name).any()]
    if not shown:
        raise UnknownNameError(
            f"the states hold none of {', '.join(methods)}; methods there: "
            f"{sorted(map(str, states['method'].unique()))}"
        )
    looks = _looks()
    lines, across = panels_in(width, 1.5, len(shown))
    wide = min(inches(width), 1.1 + 1.9 * across)
    figure = Figure(figsize=(wide, 0.25 + 1.85 * lines), layout="constrained")
    grid = figure.subplots(lines, across, sharex=True, sharey=True, squeeze=False)
    panels = keep_panels(grid, len(shown))
    for axes, name in zip(panels, shown, strict=True):
        for method, colour, marker, label in (
            ("none", GREY, "x", "no vector"),
            ("icl", "black", "+", "in context"),
            (name, PALETTE[looks[name].colour], looks[name].marker, looks[name].label),
        ):
            part = states[states["method"] == method]
            axes.plot(
                part["first"], part["second"], marker, color=colour, ms=3, mew=0.8, label=label
            )
        axes.set_title(looks[name].label)
        axes.grid(color=PALE)
    figure.supxlabel("first component")
    figure.supylabel("second component")
    handles, labels = panels[0].get_legend_handles_labels()
    outside_legend(figure, handles[:2], labels[:2], above=True)
    return figure


@rc_context(STYLE)
def heads_needed(table: DataFrame, *, metric: str = "accuracy", width: Width = "double") -> Figure:
    """Accuracy against number of heads, of sparse LTVs and of function vectors; a panel a task.

    Args:
        table: columns `task, method, k, prompt, metric, value, ci_low, ci_high`; methods LTV (the
            best heads, trained further), L1 (trained under a penalty) and FV, those that are there.
        metric: which of the metrics to draw.
        width: how wide, "single" or "double" column.

    Raises:
        UnknownNameError: a column is missing, or there is no such width.
    """
    require_columns(table, "heads needed", "task", "method", "k", "metric", "value", "ci_low")
    rows = table[table["metric"] == metric]
    tasks = list(dict.fromkeys(rows["task"]))
    n_rows, n_columns = panels_in(width, 1.65, len(tasks))
    wide = min(inches(width), 1.0 + 2.0 * n_columns)
    figure = Figure(figsize=(wide, 0.25 + 1.55 * n_rows), layout="constrained")
    grid = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    panels = keep_panels(grid, len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        for method, label, colour, marker in (
            ("LTV", "LTV of the best heads", BLUE, "o"),
            ("L1", "LTV under an L1 penalty", SKY, "s"),
            ("FV", "function vector", ORANGE, "^"),
        ):
            part = rows[(rows["task"] == task) & (rows["method"] == method)].sort_values("k")
            part = part[part["k"] > 0]
            axes.fill_between(part["k"], part["ci_low"], part["ci_high"], color=colour, alpha=0.15)
            if len(part):
                axes.plot(part["k"], part["value"], marker=marker, color=colour, ms=3, label=label)
        axes.set_title(str(task))
        axes.grid()
        log_scale(axes, "x")
    figure.supxlabel("heads")
    figure.supylabel(_METRICS.get(metric, metric))
    handles, labels = panels[0].get_legend_handles_labels()
    outside_legend(figure, handles, labels, above=True)
    return figure


@rc_context(STYLE)
def transfer_grid(table: DataFrame, *, across: str = "task") -> Figure:
    """Accuracy of vectors where they were not learned: a grid with its numbers in it.

    Args:
        table: columns `learned_on, value` and the one named by `across`, one row a cell.
        across: column along the axis, "task" or "layout".

    Raises:
        UnknownNameError: a column is missing.
    """
    require_columns(table, "transfer", "learned_on", "value", across)
    grid = table.pivot(index="learned_on", columns=across, values="value")
    rows = list(dict.fromkeys(table["learned_on"]))
    columns = list(dict.fromkeys(table[across]))
    grid = grid.loc[rows, columns]
    size = 1.9 + 0.42 * len(columns), 1.2 + 0.3 * len(rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid.to_numpy(), cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for y, x in np.ndindex(grid.shape):
        value = float(grid.iloc[y, x])
        if not np.isnan(value):
            colour = "white" if value < 0.55 else "black"
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=6.5)
    axes.set_xticks(range(len(columns)), columns, rotation=35, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.tick_params(length=0)
    axes.set(xlabel=f"asked {'of' if across == 'task' else 'in'}", ylabel="learned on")
    figure.colorbar(image, ax=axes, label="accuracy", shrink=0.9)
    return figure
