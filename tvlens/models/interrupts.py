"""Clean-up that an interrupt cannot cut short."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C inside waits until the block is left, so that what it does is done whole.

    In other threads than the main one nothing is done, as signals do not come to them, nor where a
    program around Python handles them.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGINT) is None:
        yield
        return
    waiting: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if waiting:
            signal.raise_signal(signal.SIGINT)


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
