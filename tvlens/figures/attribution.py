"""Figures of approximations: attribution against the exact effects of patches."""

from collections.abc import Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pandas import DataFrame

from tvlens.errors import ShapeError
from tvlens.figures.grids import (
    BEST,
    Measure,
    Top,
    best,
    choose,
    in_words,
    list_of,
    measured,
    named,
    pick,
)
from tvlens.figures.style import BLUE, GREY, PALE, RED, STYLE, outside_legend


@rc_context(STYLE)
def approximation(
    table: DataFrame,
    approximate: DataFrame | None = None,
    *,
    task: str,
    site: str | Sequence[str],
    k: int = 10,
    top: Top = "high",
    value: Measure = "value",
    method: str = "attribution",
    metric: str | None = None,
) -> Figure:
    """Approximate against exact effects, a dot for each place and head; one panel for each site.

    The dashed line is equality. Among the k best by exact effect, those that the approximation
    has not among its own k best are named, as "layer.head" where the site has heads.

    Args:
        table: the columns of `patching.csv`; effects that are only exact or only approximate are
            left out.
        approximate: a second table, of the approximation, where the first has only exact effects.
        task: which task to draw.
        site: which site, or several.
        k: how many places and heads the approximation should find; all where there are fewer.
        top: which places and heads are the best.
        value: which column to draw.
        method: the approximation.
        metric: which metric; may be left out where the table holds one.

    Raises:
        UnknownNameError: a column is missing, or a table holds no such task, site, method or
            metric.
        ShapeError: a table holds positions and roles, or nothing is in both.
        NumericalError: a value is not finite.
    """
    both = [
        choose(table, task, value, "exact", metric),
        choose(table if approximate is None else approximate, task, value, method, metric),
    ]
    sites = list_of(site)
    figure = Figure(layout="constrained")
    panels = figure.subplots(1, len(sites), squeeze=False)[0]
    longest = 0
    for axes, name in zip(panels, sites, strict=True):
        exact, other = (pick(rows, "site", name) for rows in both)
        pairs = exact.merge(other, on=["layer", "head", "place"], suffixes=("", "_approximate"))
        pairs = pairs.dropna(subset=[value, f"{value}_approximate"])
        if pairs.empty:
            raise ShapeError(
                f"nothing of site {name!r} is in the patching table both exact ({len(exact)} rows) "
                f"and by {method} ({len(other)} rows): patch the same layers, heads and places"
            )
        missed = _scatter(axes, pairs, value, k, top)
        longest = max([longest, *map(len, missed)])
        title = f"{named(name)}\n{axes.get_title()}"
        axes.set(title=title, xlabel=f"exact {measured(exact, value)}")
    panels[0].set_ylabel(f"by {method}")
    figure.set_size_inches(max(3.6, 0.5 + (2.5 + 0.055 * longest) * len(sites)), 3.35)
    figure.suptitle(task)
    handles, labels = panels[0].get_legend_handles_labels()
    outside_legend(figure, handles, labels)
    return figure


def _scatter(axes: Axes, pairs: DataFrame, value: str, k: int, top: Top) -> list[str]:
    """The dots of one site, its agreement as title, and what is missed by name.

    Where all effects are equal there is no rank correlation, so none is written.
    """
    exact, other = pairs[value].to_numpy(float), pairs[f"{value}_approximate"].to_numpy(float)
    wanted, found = best(exact, k, top), best(other, k, top)
    missed = wanted[~np.isin(wanted, found)]
    hit = wanted[np.isin(wanted, found)]
    rest = np.setdiff1d(np.arange(len(pairs)), wanted)
    low, high = min(exact.min(), other.min()), max(exact.max(), other.max())
    edge = 0.06 * (high - low) or 1.0
    axes.set(xlim=(low - edge, high + edge), ylim=(low - edge, high + edge), box_aspect=1)
    axes.axhline(0, color=PALE, lw=0.8, zorder=0)
    axes.axvline(0, color=PALE, lw=0.8, zorder=0)
    axes.axline((0, 0), slope=1, color=GREY, lw=0.8, ls="--", zorder=1)
    best_of = BEST[top].format(len(wanted))
    for places, label, look in (
        (rest, "others", {"marker": ".", "color": GREY, "ms": 3, "alpha": 0.5, "mew": 0}),
        (hit, f"{best_of}, found", {"marker": "o", "color": BLUE}),
        (missed, f"{best_of}, missed", {"marker": "s", "color": RED}),
    ):
        axes.plot(exact[places], other[places], ls="", label=label, **look)
    names = _called(pairs.iloc[missed], pairs)
    _names(axes, exact[missed], other[missed], names)
    agreement = []
    if np.ptp(exact) and np.ptp(other):
        ranks = DataFrame({"exact": exact, "other": other}).rank()
        agreement.append(f"Spearman {ranks.corr().loc['exact', 'other']:.2f}")
    if len(wanted):
        agreement.append(f"recall of {best_of}: {len(hit) / len(wanted):.2f}")
    axes.set_title(", ".join(agreement))
    return names


def _called(rows: DataFrame, among: DataFrame) -> list[str]:
    """Names of places and heads: the place only where there are several."""
    names = []
    for row in rows.itertuples():
        name = f"layer {row.layer}" if np.isnan(row.head) else f"{row.layer}.{row.head:.0f}"
        several = among["place"].nunique() > 1
        names.append(f"{name}, {in_words(row.place)}" if several else name)
    return names


def _names(
    axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], names: Sequence[str]
) -> None:
    """Names of dots in a column at the right of a panel, each with a line to its dot."""
    order = np.argsort(y, kind="stable")
    steps = 0.06 * float(np.ptp(axes.get_ylim())) * np.arange(len(order))
    # Pushed up until none overlap, pushed down likewise, and the mean of both.
    above = y[order] - steps
    up, down = np.maximum.accumulate(above), np.minimum.accumulate(above[::-1])[::-1]
    heights = (up + down) / 2 + steps
    low, high = axes.get_ylim()
    heights += max(0.0, low - float(heights.min(initial=low)))
    heights -= max(0.0, float(heights.max(initial=high)) - high)
    for dot, height in zip(order, heights, strict=True):
        axes.annotate(
            names[dot],
            (x[dot], y[dot]),
            (1.05, height),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=6.5,
            arrowprops={"arrowstyle": "-", "color": RED, "lw": 0.5, "relpos": (0, 0.5)},
        )
