"""The look of all figures: one style fit for print, colours for colour-blind readers too."""

from typing import Any

from matplotlib.ticker import MaxNLocator
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


def whole_numbers(at_most: int = 10) -> MaxNLocator:
    """Ticks at whole numbers only, so many at most."""
    return MaxNLocator(at_most, integer=True, steps=[1, 2, 5, 10])


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
