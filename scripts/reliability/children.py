"""Commands in forked children, which need not import everything anew: watched, and stopped."""

import mmap
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from reliability.counts import LONGEST_WAIT, MOST_MEMORY, Verdict, shortened
from tvlens.cli.app import main

SIGNS = ("Traceback (", "Exception ignored")
"""What lines begin with that no command may print."""
OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
"""What the file system is asked for, as Python's audit events call it."""


@dataclass(frozen=True)
class Stop:
    """A signal to send: after some seconds, or just before the n-th operation on files."""

    number: int
    seconds: float | None = None
    operation: int | None = None

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        at = f"operation {self.operation}" if self.seconds is None else f"{self.seconds:.3f} s"
        return f"{name} at {at}"


@dataclass(frozen=True)
class Ended:
    """How a child ended.

    Attributes:
        status: exit status, negative for a signal.
        out: what it printed.
        err: what it printed to the error stream.
        seconds: how long it took.
        after_stop: seconds from the signal to the end, where one was sent by the clock.
        memory: largest resident memory in bytes.
        hung: whether it had to be killed because it took too long.
    """

    status: int
    out: str
    err: str
    seconds: float
    after_stop: float
    memory: int
    hung: bool

    @property
    def broken(self) -> Verdict | None:
        """What no command may do however it ends."""
        if self.hung:
            return Verdict("hangs", f"no end {LONGEST_WAIT:.0f} s later")
        if self.memory > MOST_MEMORY:
            return Verdict("memory", f"{self.memory / 2**30:.1f} GiB")
        if any(line.startswith(SIGNS) for line in self.err.splitlines()):
            lines = self.err.strip().splitlines()
            first = next(line for line in lines if line.startswith(SIGNS))
            return Verdict("raw", shortened(f"{lines[-1]}, {first}"), f"status {self.status}")
        return None


@dataclass
class Child:
    """A process that runs, and what it has printed so far."""

    process: int
    streams: dict[int, bytearray]
    began: float = field(default_factory=time.monotonic)

    def wait(self, stop: Stop | None = None, *, limit: float = LONGEST_WAIT) -> Ended:
        """How it ends, stopped at a moment if one is given."""
        due = self.began + stop.seconds if stop and stop.seconds is not None else None
        sent = None
        hung = False
        while True:
            ready, status, usage = os.wait4(self.process, os.WNOHANG)
            if ready:
                break
            now = time.monotonic()
            if stop is not None and due is not None and now >= due:
                os.kill(self.process, stop.number)
                due, sent = None, now
            if now - (sent or self.began) > limit:
                os.kill(self.process, signal.SIGKILL)
                hung = True
            self.read(0.002 if due is None else min(0.002, max(0.0, due - now)))
        now = time.monotonic()
        while self.read(0.0):
            pass
        out, err = (kept.decode(errors="replace") for kept in self.streams.values())
        self.close()
        code = os.waitstatus_to_exitcode(status)
        took, after = now - self.began, now - (sent or now)
        return Ended(code, out, err, took, after, usage.ru_maxrss * 1024, hung)

    def close(self) -> None:
        """Let go of what it printed to."""
        for stream in self.streams:
            os.close(stream)

    def read(self, seconds: float) -> bool:
        """Take what has come, after waiting so long at most; whether anything had."""
        found = False
        for stream in select.select(list(self.streams), [], [], seconds)[0]:
            content = os.read(stream, 1 << 16)
            self.streams[stream] += content
            found = found or bool(content)
        if not found and seconds:
            time.sleep(seconds)  # a closed stream is always ready
        return found


def start(work: Callable[[], object]) -> Child:
    """Do something in a child."""
    sys.stdout.flush()
    out, err = os.pipe(), os.pipe()
    process = os.fork()
    if process:
        for _, written in (out, err):
            os.close(written)
        return Child(process, {out[0]: bytearray(), err[0]: bytearray()})
    code = 1
    try:
        for number, (_, written) in enumerate((out, err), start=1):
            os.dup2(written, number)
        sys.stdout, sys.stderr = (
            open(n, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
            for n in (1, 2)
        )
        # A background process may have been told to ignore it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def do(work: Callable[[], object]) -> None:
    """Do something in a child, which must go well: this process itself stays without threads."""
    ended = start(work).wait(limit=600.0)
    if ended.status:
        raise RuntimeError(f"setting up failed: {ended.err}")


def tvlens_command(
    words: list[str],
    out: Path,
    stop: Stop | None = None,
    before: Callable[[], object] = lambda: None,
) -> Callable[[], None]:
    """What runs `tvlens` with these words into a folder.

    Args:
        words: the command but for `--out`.
        out: its run folder.
        stop: a signal that comes with an operation on files.
        before: what is done first.
    """

    def work() -> None:
        sys.argv = ["tvlens", *words, "--out", str(out)]
        before()
        if stop is not None and stop.operation is not None:
            last, number = stop.operation, stop.number
            watch_files(out, lambda n: os.kill(os.getpid(), number) if n == last else None)
        main()

    return work


def watch_files(folder: Path, each: Callable[[int], object]) -> None:
    """Call `each` before every operation on files in a folder, with its number from 1."""
    place, count = str(folder), 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and arguments and str(arguments[0]).startswith(place):
            count += 1
            each(count)

    sys.addaudithook(hook)


def count_operations(words: list[str], out: Path) -> tuple[Ended, int]:
    """An undisturbed run, and how many operations on files it takes."""
    shared = mmap.mmap(-1, 8)

    def note(n: int) -> None:
        shared[:] = n.to_bytes(8, "little")

    ended = start(tvlens_command(words, out, before=lambda: watch_files(out, note))).wait(
        limit=600.0
    )
    return ended, int.from_bytes(shared[:], "little")
