"""Progress bars in terminals and notebooks; silent elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar while the block runs; yields the function that advances it by a number of items.

    Example:
        >>> with progress_bar("mediation", 25) as advance:
        ...     advance(25)
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal or console.is_jupyter),
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n: bar.advance(task, n)
