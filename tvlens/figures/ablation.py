"""Figures of ablation: what a model still does against the share of heads ablated.

The table is `ablation.csv`, one row for each task, set of heads and metric.
"""

import textwrap

import pandas as pd
from matplotlib import rc_context
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from pandas import DataFrame

from tvlens.errors import UnknownNameError
from tvlens.figures.style import (
    GREY,
    PALE,
    PALETTE,
    STYLE,
    WIDTHS,
    Width,
    inches,
    keep_panels,
    log_scale,
    outside_legend,
    panels_in,
    require_columns,
)
from tvlens.scores.catalogue import SCORES

_MEASURED = {
    "accuracy": "first-token accuracy",
    "cross_entropy": "cross-entropy (nats)",
    "exact_match": "whole answers right",
    "squared_error": "squared error at T_train\n(over variance)",
    "squared_error_past": "squared error past T_train\n(over variance)",
}
_ABLATED = {
    "mean": "their means",
    "zero": "zero",
    "other": "their means over other tasks",
    "resample": "those of another prompt",
}
_PLACES = {"query": "at the query", "all": "at every position"}
_WITHOUT = " without "
_RANDOM, _AS_IT_IS = _BESIDE = "random, same layers", "nothing ablated"


@rc_context(STYLE)
def ablation_curves(
    table: DataFrame,
    *,
    rule: str = "top",
    set_to: str = "mean",
    positions: str = "query",
    metric: str = "accuracy",
    width: Width = "double",
) -> Figure:
    """A measure against the share of heads ablated: a panel a task, and a line a score.

    Thin lines are 95% intervals over prompts. The grey band holds 95% of the random sets that
    are matched by layer to the sets of any score, a dashed line their mean; the dotted line is the
    model as it is. Exclusive sets have a row for each task and a column for each score whose best
    are left out.
    Of "keep" sets the share is that of the heads that stay.

    Args:
        table: the columns of `ablation.csv`.
        rule: which sets to draw: "top", "exclusive" or "keep".
        set_to: what the heads were set to.
        positions: where.
        metric: what is measured; errors are drawn on a logarithmic scale.
        width: how wide, "single" or "double" column.

    Raises:
        UnknownNameError: a column is missing, the table holds nothing of the kind, or there is no
            such width.
    """
    columns = ("task", "score", "rule", "set_to", "positions", "share", "draw", "metric")
    require_columns(table, "ablation", *columns, "value", "ci_low", "ci_high")
    way = table[(table["set_to"] == set_to) & (table["positions"] == positions)]
    rows = way[(way["rule"] == rule) & (way["metric"] == metric)]
    if rows.empty:
        there = table[["rule", "set_to", "positions", "metric"]].drop_duplicates()
        raise UnknownNameError(
            f"the ablation table holds no {metric!r} of {rule!r} sets set to {set_to!r}, positions "
            f"{positions!r}; it has {there.to_records(index=False).tolist()}"
        )
    rows = rows.assign(without=[_split(name)[1] for name in rows["score"]])
    tasks, there = list(dict.fromkeys(rows["task"])), {*rows["without"]}
    chosen = dict.fromkeys(_split(name)[0] for name in rows["score"])
    others = [name for name in chosen if name in there] or [""]
    lines, across = panels_in(width, 1.6, len(tasks))
    if rule == "exclusive":
        lines, across = len(tasks), len(others)
    wide = min(inches(width), max(WIDTHS["single"], 0.5 + 1.75 * across))
    size = wide, 0.6 + 1.45 * lines
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, across, sharex=True, sharey="row", squeeze=False)
    shown = [(task, other) for task in tasks for other in others]
    for axes, (task, other) in zip(panels.flat, shown, strict=False):
        here = way[way["task"] == task]
        if rule != "keep":
            _random(axes, here[here["metric"] == metric])
        _unablated(axes, here, metric)
        part = rows[(rows["task"] == task) & (rows["without"] == other)]
        for name, curve in part.groupby("score", sort=False):
            _curve(axes, str(name), curve.sort_values("share"))
        if not other:
            axes.set_title("\n".join(textwrap.wrap(task, 24)))
        elif axes in panels[0]:
            words = f"without best by {_label(other)}"
            axes.set_title("\n".join(textwrap.wrap(words, round(13 * wide / across))))
        if other and axes in panels[:, 0]:
            axes.set_ylabel("\n".join(textwrap.wrap(task, 16)))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        if metric.startswith("squared_error"):
            log_scale(axes, "y")
    keep_panels(panels, len(shown))
    done = f"set to {_ABLATED.get(set_to, set_to)} {_PLACES.get(positions, positions)}"
    kept = f"that stay, all others {done}" if rule == "keep" else done
    figure.supxlabel("\n".join(textwrap.wrap(f"share of heads {kept}", round(16 * size[0]))))
    figure.supylabel(_MEASURED.get(metric, metric.replace("_", " ")))
    found: dict[str, Artist] = {}
    for axes in panels.flat:
        handles, labels = axes.get_legend_handles_labels()
        found |= dict(zip(labels, handles, strict=True))
    order = [*(score.label for score in SCORES), *(each for each in found if each not in _BESIDE)]
    labels = [label for label in dict.fromkeys([*order, *_BESIDE]) if label in found]
    outside_legend(figure, [found[label] for label in labels], labels, above=True)
    return figure


def _split(name: str) -> tuple[str, str]:
    """Which score chose a set, and which one's best heads it leaves out, if any."""
    score, _, without = str(name).partition(_WITHOUT)
    return score, without


def _label(name: str) -> str:
    return {str(score.heads): score.label for score in SCORES if score.heads}.get(name, name)


def _curve(axes: Axes, name: str, curve: DataFrame) -> None:
    """One score's sets."""
    score = _split(name)[0]
    look = {str(each.heads): each for each in SCORES if each.heads}.get(score)
    colour = PALETTE["black" if look is None else look.colour]
    dash = "-" if look is None else look.dash
    axes.vlines(curve["share"], curve["ci_low"], curve["ci_high"], color=colour, lw=0.6, alpha=0.4)
    axes.plot(
        curve["share"], curve["value"], color=colour, ls=dash, marker="o", ms=2.2,
        label=_label(score),
    )  # fmt: skip


def _random(axes: Axes, rows: DataFrame) -> None:
    """The band of the random sets of all scores, from nothing ablated on."""
    drawn = rows[rows["rule"] == "random"]
    if drawn.empty:
        return
    none = rows[(rows["rule"] == "top") & (rows["share"] == 0)].head(1)
    shares = pd.concat([none, drawn]).groupby("share")["value"]
    low, high = shares.quantile(0.025), shares.quantile(0.975)
    axes.fill_between(low.index, low, high, color=PALE, lw=0, label=_RANDOM)
    mean = shares.mean()
    axes.plot(mean.index, mean, color=GREY, lw=0.8, ls="--")


def _unablated(axes: Axes, rows: DataFrame, metric: str) -> None:
    """The model as it is: what any set does, less the change that it makes."""
    both = [rows[rows["metric"] == name]["value"] for name in (metric, f"{metric}_change")]
    if not any(values.empty for values in both):
        before = float(both[0].mean() - both[1].mean())
        axes.axhline(before, color="black", lw=0.8, ls=":", label=_AS_IT_IS)
