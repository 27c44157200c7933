"""Figures of whole answers: what first tokens say of them, and what becomes of them."""

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import DataFrame

from tvlens.errors import UnknownNameError
from tvlens.figures.scores import _COLOURS
from tvlens.figures.style import STYLE, Width, inches, outside_legend, panels_in, require_columns
from tvlens.figures.vectors import _PROMPTS

_METRICS = ("accuracy", "exact_match")
_BASELINES = {"icl": "in context (clean prompts)"}


@rc_context(STYLE)
def answer_dots(results: DataFrame, *, width: Width = "double") -> Figure:
    """First-token accuracy and exact match of each method and task, joined by a line.

    An open dot is the share of prompts whose first answer token is right, a filled one, with its
    95% interval, that of whole answers; between them is what the first token does not tell. One
    panel for each kind of prompts; in-context learning on clean prompts is in all of them.

    Args:
        results: columns `task, method, prompt, metric, value, ci_low, ci_high`.
        width: how wide, "single" or "double" column; panels stand below each other in a single one.

    Raises:
        UnknownNameError: a column is missing, no row has both metrics on zero-shot or
            shuffled-label prompts, or there is no such width.
    """
    require_columns(
        results, "results", "task", "method", "prompt", "metric", "value", "ci_low", "ci_high"
    )
    rows = results[results["metric"].isin(_METRICS)]
    panels = [kind for kind in _PROMPTS if {*rows[rows["prompt"] == kind]["metric"]} == {*_METRICS}]
    if not panels:
        raise UnknownNameError(
            f"results hold no {' and '.join(_METRICS)} on {' or '.join(_PROMPTS)} prompts; metrics "
            f"there: {sorted(map(str, results['metric'].unique()))}"
        )
    tasks = list(dict.fromkeys(rows["task"]))
    methods = [name for name in dict.fromkeys(rows["method"]) if name not in ("none", "icl")]
    methods = ["icl", *methods]
    lines, across = panels_in(width, 3.0, len(panels))
    height = 0.4 + (0.22 + 0.09 * len(methods)) * len(tasks) * lines
    figure = Figure(figsize=(inches(width), height), layout="constrained")
    grid = figure.subplots(lines, across, sharex=True, sharey=True, squeeze=False).ravel()
    offsets = np.linspace(-0.34, 0.34, len(methods)) if len(methods) > 1 else np.zeros(1)
    for axes, kind in zip(grid, panels, strict=True):
        for method, offset, colour in zip(methods, offsets, ("black", *_COLOURS), strict=False):
            own = rows[(rows["method"] == method)]
            own = own[own["prompt"] == ("clean" if method == "icl" else kind)]
            first, whole = (own[own["metric"] == m].set_index("task") for m in _METRICS)
            there = [task for task in tasks if task in first.index and task in whole.index]
            first, whole = first.loc[there], whole.loc[there]
            y = np.array([tasks.index(task) for task in there]) + offset
            axes.hlines(y, first["value"], whole["value"], color=colour, lw=0.7, ls=":")
            axes.hlines(y, whole["ci_low"], whole["ci_high"], color=colour, lw=1.1)
            axes.plot(first["value"], y, "o", color=colour, mfc="white", mew=0.9)
            label = _BASELINES.get(method, method)
            axes.plot(whole["value"], y, "o", color=colour, mew=0.9, label=label)
        axes.set_title(_PROMPTS[kind])
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_yticks(np.arange(len(tasks) - 1) + 0.5, minor=True)
        axes.grid(axis="y", which="minor")
        axes.grid(axis="x")
        axes.tick_params(axis="y", which="both", length=0)
        axes.set(xlim=(-0.03, 1.03), ylim=(len(tasks) - 0.5, -0.5))
    for axes in grid[-across:]:
        axes.set_xlabel("first token (open), whole answer (filled)")
    handles, labels = grid[0].get_legend_handles_labels()
    outside_legend(figure, handles, labels)
    return figure
