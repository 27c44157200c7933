"""Clean-up that an interrupt cannot cut short."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside waits until the block is left, so that what it does is done whole.

    In other threads than the main one nothing is done: signals do not come to them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[tuple[int, Any]] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: waiting.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting and callable(handler):
            handler(*waiting[0])


@contextmanager
def surely(clean_up: Callable[[], object]) -> Iterator[None]:
    """`clean_up` is called on exit, whole, also where Ctrl-C lands between the block and it.

    Args:
        clean_up: may be called twice.
    """
    try:
        try:
            yield
        finally:
            with uninterrupted():
                clean_up()
    finally:
        # Once more, for a Ctrl-C that came before the first call could hold it off.
        with uninterrupted():
            clean_up()
