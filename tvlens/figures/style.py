"""The look of all figures: one style fit for print, colours for colour-blind readers too."""

import textwrap
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter
from pandas import DataFrame

from tvlens.errors import UnknownNameError

# The Okabe-Ito palette.
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
SKY, RED, GREY, PALE = "#56B4E9", "#D55E00", "#666666", "#E3E3E3"
PALETTE = {
    "black": "black",
    "blue": BLUE,
    "brown": "#7F4F24",
    "dark": "#3B3B3B",
    "green": GREEN,
    "grey": GREY,
    "orange": ORANGE,
    "pink": PINK,
    "red": RED,
    "sky": SKY,
}
"""Colours by the names that catalogues use."""
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8.0,
    "figure.labelsize": 8.0,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
    "grid.color": PALE,
    "legend.frameon": False,
}


Width = Literal["single", "double"]
WIDTHS: dict[Width, float] = {"single": 3.35, "double": 6.9}
"""Inches of one column of a paper, and of both with what is between them."""


def inches(width: Width) -> float:
    """How wide a figure of this width is.

    Raises:
        UnknownNameError: there is no such width.
    """
    if width not in WIDTHS:
        raise UnknownNameError(f"width={width!r}; expected one of {', '.join(WIDTHS)} (columns)")
    return WIDTHS[width]


def panels_in(width: Width, panel: float, n: int) -> tuple[int, int]:
    """Rows and columns of n panels that are so many inches wide, at least one beside the other.

    Raises:
        UnknownNameError: there is no such width.
    """
    columns = min(n, max(1, int(inches(width) / panel)))
    # As many in every row as there are in the first, as far as they go.
    rows = -(-n // columns)
    return rows, -(-n // rows)


def keep_panels(grid: np.ndarray, n: int) -> list[Axes]:
    """The first n panels of a grid, read row by row; removes the others.

    Panels that share an axis are labelled in the lowest row only: what stands above a removed one
    is now the lowest of its column, and labelled too.
    """
    panels = list(grid.flat)
    for place, empty in enumerate(panels[n:], n):
        empty.remove()
        above = place - grid.shape[-1]
        if 0 <= above < n:
            panels[above].tick_params(axis="x", labelbottom=True)
    return panels[:n]


def outside_legend(
    figure: Figure, handles: Sequence[Artist], labels: Sequence[str], *, above: bool = False
) -> None:
    """A legend below or above all panels, by whose height the figure grows.

    It has as few rows as the figure's width allows and is read row by row; labels that are too long
    by themselves, as names may be, are broken.
    """
    if not labels:
        return
    n, letters = len(labels), max(8, round(14 * (figure.get_figwidth() - 0.6)))
    labels = [
        "\n".join(textwrap.fill(line, letters) for line in str(label).split("\n"))
        for label in labels
    ]
    for ncols in range(n, 0, -1):
        # Legends are filled column by column.
        order = [i for column in range(ncols) for i in range(column, n, ncols)]
        legend = figure.legend(
            [handles[i] for i in order],
            [labels[i] for i in order],
            loc="outside upper center" if above else "outside lower center",
            ncols=ncols,
        )
        box = legend.get_window_extent()
        if ncols == 1 or box.width <= figure.bbox.width:
            break
        legend.remove()
    figure.set_figheight(figure.get_figheight() + box.height / figure.dpi)


def label_ends(axes: Axes, ends: Sequence[tuple[str, float, str]], *, height: float) -> None:
    """Names lines at their right ends, moved apart where they would lie on each other.

    Args:
        axes: where the lines are, with their limits set.
        ends: label, last value and colour of each line.
        height: height of the axes in inches.
    """
    if not ends:
        return
    shown = axes.transData.transform([(1, value) for _, value, _ in ends])
    wanted = axes.transAxes.inverted().transform(shown)[:, 1].clip(0, 1)
    for (label, _, colour), y in zip(ends, _apart(wanted, 0.125 / height), strict=True):
        axes.annotate(
            label, (1.02, y), xycoords="axes fraction", va="center", color=colour, fontsize=7
        )


def _apart(wanted: np.ndarray, gap: float) -> np.ndarray:
    """Places in the same order that are as near as may be, no two closer than the gap."""
    order = np.argsort(wanted, kind="stable")
    # Least squares in the order of the lines: each group that would overlap stands round its mean.
    groups: list[list[float]] = []
    for value in wanted[order].tolist():
        groups.append([value])
        while len(groups) > 1 and _low(groups[-1], gap) - _high(groups[-2], gap) < gap:
            last = groups.pop()
            groups[-1] += last
    placed = np.empty(len(wanted))
    placed[order] = [_low(group, gap) + i * gap for group in groups for i in range(len(group))]
    return placed


def _low(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) - gap * (len(group) - 1) / 2


def _high(group: Sequence[float], gap: float) -> float:
    return sum(group) / len(group) + gap * (len(group) - 1) / 2


def whole_numbers(at_most: int = 10) -> MaxNLocator:
    """Ticks at whole numbers only, so many at most."""
    return MaxNLocator(at_most, integer=True, steps=[1, 2, 5, 10])


def log_scale(axes: Axes, which: Literal["x", "y"]) -> None:
    """A logarithmic axis; as plain numbers, and at threes, where it spans few powers of ten.

    Args:
        axes: what is drawn, with its limits set.
        which: the axis along x or the one along y.
    """
    axes.set(**{f"{which}scale": "log"})
    axis = {"x": axes.xaxis, "y": axes.yaxis}[which]
    low, high = axis.get_view_interval()
    if high < 1000 * low:
        axis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def require_columns(table: DataFrame, name: str, *columns: str) -> None:
    """Refuse a table that lacks a column.

    Raises:
        UnknownNameError: a column is missing.
    """
    missing = [column for column in columns if column not in table]
    if missing:
        raise UnknownNameError(
            f"the {name} table lacks {missing}; expected {list(columns)}, got {list(table.columns)}"
        )
