"""Figures of whole answers: what first tokens say of them, and what becomes of them."""

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import DataFrame

from tvlens.errors import UnknownNameError
from tvlens.figures.scores import _COLOURS
from tvlens.figures.style import STYLE, require_columns
from tvlens.figures.vectors import _PROMPTS

_METRICS = ("accuracy", "exact_match")
_BASELINES = {"icl": "in context (clean prompts)"}


@rc_context(STYLE)
def answer_dots(results: DataFrame) -> Figure:
    """First-token accuracy and exact match of each method and task, joined by a line.

    An open dot is the share of prompts whose first answer token is right, a filled one, with its
    95% interval, that of whole answers; between them is what the first token does not tell. One
    panel for each kind of prompts; in-context learning on clean prompts is in all of them.

    Args:
        results: columns `task, method, prompt, metric, value, ci_low, ci_high`.

    Raises:
        UnknownNameError: a column is missing, or no row has both metrics on zero-shot or
            shuffled-label prompts.
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
    figure = Figure(figsize=(6.8, 0.9 + (0.22 + 0.09 * len(methods)) * len(tasks)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
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
        axes.set(title=_PROMPTS[kind], xlabel="first token (open), whole answer (filled)")
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_yticks(np.arange(len(tasks) - 1) + 0.5, minor=True)
        axes.grid(axis="y", which="minor")
        axes.grid(axis="x")
        axes.tick_params(axis="y", which="both", length=0)
        axes.set(xlim=(-0.03, 1.03), ylim=(len(tasks) - 0.5, -0.5))
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure
