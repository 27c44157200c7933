"""What commands print: lines that are never cut, tables with readable numbers, mistakes in red."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm.auto import tqdm


def say(text: str) -> None:
    """Print one line as it is: brackets are no markup, and long paths are not broken."""
    Console().print(text, markup=False, highlight=False, soft_wrap=True)


def complain(text: str) -> None:
    """Print a mistake to the error stream."""
    message = Text.assemble(("error: ", "red"), text)
    Console(stderr=True).print(message, soft_wrap=True)


def show(frame: pd.DataFrame, title: str | None = None, *, digits: int = 3) -> None:
    """Print a table whose first column is never broken.

    Args:
        frame: the table; its index is not shown, and cells without a value stay empty.
        title: a line above it.
        digits: decimals of numbers that are not whole; smaller ones are printed as 1.2e-05.
    """
    console = Console()
    table = Table()
    for number, column in enumerate(frame.columns):
        table.add_column(
            str(column),
            justify="right" if pd.api.types.is_numeric_dtype(frame[column]) else "left",
            no_wrap=number == 0,
            overflow="fold",
        )
    for row in frame.itertuples(index=False):
        table.add_row(*(Text(_cell(value, digits)) for value in row))
    if title is not None:
        # Not the table's own title, which is broken where the table is narrow.
        console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


def with_interval(value: float, low: float, high: float, *, digits: int = 2) -> str:
    """A number and its interval, such as `0.92 [0.85, 0.97]`."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _cell(value: Any, digits: int) -> str:
    if pd.isna(value):
        return ""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        rounded = f"{value:.{digits}f}"
        return f"{value:.1e}" if value and not float(rounded) else rounded
    return str(value)


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar while the block runs; yields the function that advances it by a number of items.

    Notebooks show a widget where ipywidgets is installed and a line of text where it is not.
    `TQDM_DISABLE=1` in the environment turns bars off.

    Example:
        >>> with progress_bar("mediation", 25) as advance:
        ...     advance(25)
    """
    console = Console(stderr=True)
    # Nothing is said of bars that are to be seen, so that the environment decides.
    hidden = {} if console.is_jupyter or console.is_terminal else {"disable": True}
    with tqdm(total=total, desc=title, leave=False, dynamic_ncols=True, **hidden) as bar:
        yield lambda n: bar.update(n)
