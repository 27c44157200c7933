"""What commands print: lines that are never cut, tables with readable numbers, mistakes in red."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    # Half the time that the command line may take to start would go into pandas.
    import pandas as pd

REPORT_EVERY = 30.0
"""Seconds from one line of progress to the next, where no terminal shows a bar."""


def say(text: str) -> None:
    """Print one line as it is: brackets are no markup, and long paths are not broken."""
    _print_line(Console(), text)


def complain(text: str, kind: Literal["error", "warning"] = "error") -> None:
    """Print a mistake, or what may be one, to the error stream."""
    message = Text.assemble((f"{kind}: ", "red" if kind == "error" else "yellow"), text)
    Console(stderr=True).print(message, soft_wrap=True)


def show(
    table: "pd.DataFrame | Sequence[Mapping[str, Any]]",
    title: str | None = None,
    *,
    digits: int = 3,
) -> None:
    """Print a table whose first column is never broken.

    Args:
        table: a table, whose index is not shown, or at least one row that names its columns; cells
            without a value stay empty.
        title: a line above it.
        digits: decimals of numbers that are not whole; smaller ones are printed as 0.0012 or
            1.2e-05.
    """
    console = Console()
    shown = Table()
    columns = _columns_of_rows(table) if isinstance(table, Sequence) else _columns_of_frame(table)
    for number, (name, (_, is_number)) in enumerate(columns.items()):
        justify: Literal["left", "right"] = "right" if is_number else "left"
        shown.add_column(name, justify=justify, no_wrap=number == 0, overflow="fold")
    for row in zip(*(values for values, _ in columns.values()), strict=True):
        shown.add_row(*(Text(_cell(value, digits)) for value in row))
    if title is not None:
        # Not the table's own title, which is broken where the table is narrow.
        console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(shown)


def short(value: float, digits: int = 2) -> str:
    """A number with so many decimals, or as 0.0012 or 1.2e-05 where these would say nothing."""
    rounded = f"{value:.{digits}f}"
    return f"{value:.2g}" if value and not float(rounded) else rounded


def with_interval(value: float, low: float, high: float, *, digits: int = 2) -> str:
    """A number and its interval, such as `0.92 [0.85, 0.97]`."""
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar while the block runs; yields the function that advances it by a number of items.

    Notebooks show a widget where ipywidgets is installed and a line of text where it is not. Where
    there is neither notebook nor terminal, as in a batch job, a line every `REPORT_EVERY` seconds
    says how far the block is. `TQDM_DISABLE=1` in the environment turns all of it off.

    Example:
        >>> with progress_bar("mediation", 25) as advance:
        ...     advance(25)
    """
    console = Console(stderr=True)
    if console.is_jupyter or console.is_terminal:
        from tqdm.auto import tqdm

        with tqdm(total=total, desc=title, leave=False, dynamic_ncols=True) as bar:
            yield lambda n: bar.update(n)
    elif os.environ.get("TQDM_DISABLE"):
        yield lambda n: None
    else:
        with _progress_lines(title, total, console) as advance:
            yield advance


@contextmanager
def _progress_lines(title: str, total: int, console: Console) -> Iterator[Callable[[int], None]]:
    """Lines on `console` while the block runs, from a thread, so that long calls are no silence."""
    start = time.monotonic()
    done = 0
    ended = threading.Event()

    def advance(n: int) -> None:
        nonlocal done
        done += n

    def report() -> None:
        while not ended.wait(REPORT_EVERY):
            line = _progress_line(title, done, total, time.monotonic() - start, datetime.now())
            # An error stream that is closed, or cannot write a title, must not stop the work.
            with contextlib.suppress(OSError, ValueError):
                _print_line(console, line)

    thread = threading.Thread(target=report, name=f"progress of {title}", daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        ended.set()
        thread.join()


def _progress_line(title: str, done: int, total: int, seconds: float, now: datetime) -> str:
    """What is done, what is left and when it ends, if the rest takes as long as what is done."""
    said = f"{title}: {done} of {total}"
    if not 0 < done <= total:
        return f"{said}, {_duration(seconds)} so far"
    left = seconds * (total - done) / done
    end = now + timedelta(seconds=left)
    clock = f"{end:%H:%M}" if end.date() == now.date() else f"{end:%H:%M on %d %B}"
    return f"{said} ({done / total:.0%}), {_duration(left)} left, until about {clock}"


def _duration(seconds: float) -> str:
    """Such as `5 s`, `1 min 05 s` or `2 h 05 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, over = divmod(minutes, 60)
    if hours:
        return f"{hours} h {over:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def _print_line(console: Console, text: str) -> None:
    """One line, above the bars of a terminal, if there are any."""
    bars = sys.modules.get("tqdm") if console.is_terminal else None
    with bars.tqdm.external_write_mode(console.file) if bars else contextlib.nullcontext():
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _columns_of_rows(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[Any], bool]]:
    """The values of every column, and whether all are numbers."""
    found = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        name: (values, all(isinstance(value, int | float) for value in values))
        for name, values in found.items()
    }


def _columns_of_frame(frame: "pd.DataFrame") -> dict[str, tuple[list[Any], bool]]:
    """The same of a table of pandas; what is missing is None, whatever its column calls it."""
    from pandas.api.types import is_numeric_dtype

    return {
        str(name): (
            [None if absent else x for x, absent in zip(column, column.isna(), strict=True)],
            is_numeric_dtype(column),
        )
        for name, column in frame.items()
    }


def _cell(value: Any, digits: int) -> str:
    if hasattr(value, "item"):
        value = value.item()  # of numpy
    if value is None or value != value:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return short(value, digits)
    return str(value)
