"""Progress bars in terminals and notebooks; silent elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from tqdm.auto import tqdm


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
