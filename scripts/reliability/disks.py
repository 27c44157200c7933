"""Commands on a disk that is too small, and two at once in one folder."""

import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reliability.children import Stop, start, tvlens_command
from reliability.commands import Command, folders, left_over, of_refusal
from reliability.counts import FINE, Counts, Verdict

ROOMY = 1 << 28
PAGE = 4096


def small_disks(commands: list[Command], folder: Path, n: int, seed: int) -> list[Counts]:
    """Every command in file systems with too little room, and with files of limited size."""
    found = []
    for command in commands:
        random_ = random.Random(f"disks {command.name} {seed}")
        full, limited = Counts(f"{command.name}, disk full"), Counts(f"{command.name}, short files")
        for out in folders(folder / "disks", command.name):
            if sum(full.found.values()) + sum(limited.found.values()) >= 2 * n:
                break
            pages = random_.randint(1, command.size // PAGE)
            verdict = on_small_disk(command, out, pages * PAGE)
            full.add(f"{out.parent.name}, {pages} pages", verdict or Verdict("skipped"))
            limit = random_.randint(0, command.largest - 1)
            other = out.with_name("limited")
            limited.add(f"{out.parent.name}, {limit} bytes", with_limit(command, other, limit))
        found += [full, limited]
    return found


def on_small_disk(command: Command, out: Path, size: int) -> Verdict | None:
    """A command on a disk of so many bytes, and again once there is room; None if not possible."""
    with mounted(out.parent, size) as grow:
        return None if grow is None else _refused_then_fine(command, out, grow, lambda: None)


def with_limit(command: Command, out: Path, size: int) -> Verdict:
    """A command that can write files of so many bytes at most, and again without a limit."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    out.parent.mkdir(parents=True, exist_ok=True)
    return _refused_then_fine(command, out, lambda: None, limit)


def _refused_then_fine(
    command: Command, out: Path, grow: Callable[[], object], before: Callable[[], object]
) -> Verdict:
    ended = command.run(out, before)
    verdict = FINE  # what it wrote may have fitted
    if ended.status or ended.broken:
        verdict = of_refusal(ended)
        if verdict.kind != "refused":
            return verdict
        leftover = left_over(out)
        if leftover:
            return leftover
    grow()
    end = command.judge_end(out)
    return verdict if end == FINE else end


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[Callable[[], object] | None]:
    """A file system of so many bytes, and what makes room in it; None where none may be mounted."""
    folder.mkdir(parents=True)

    def mount(options: str) -> bool:
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        return not subprocess.run(words, capture_output=True, check=False).returncode

    if shutil.which("mount") is None or not mount(f"size={size}"):
        yield None
        return
    try:
        yield lambda: mount(f"remount,size={ROOMY}")
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def pairs_at_once(commands: list[Command], folder: Path, n: int, seed: int) -> list[Counts]:
    """Two processes in one folder: every command, so many times."""
    found = []
    for command in commands:
        counts = Counts(f"{command.name}, two at once")
        random_ = random.Random(f"pairs {command.name} {seed}")
        for number, out in zip(range(n), folders(folder / "pairs", command.name), strict=False):
            at = None if number % 2 else random_.randint(4, command.operations)
            name = "at once" if at is None else f"the second one at operation {at} of the first"
            counts.add(f"{out.parent.name}, {name}", two(command, out, at))
        found.append(counts)
    return found


def two(command: Command, out: Path, at: int | None) -> Verdict:
    """Two processes, of which one must do it all and the other say that the folder is in use.

    Args:
        command: what both do.
        out: the folder.
        at: the operation on files at which the first one holds still until the second one ends;
            None to begin both at once, where one may also come when the other is done.
    """
    work = tvlens_command(command.words, out)
    if at is None:
        children = [start(work), start(work)]
        ends = [child.wait(limit=120.0) for child in children]
    else:
        stop = Stop(signal.SIGSTOP, operation=at)
        first = start(tvlens_command(command.words, out, stop))
        os.waitid(os.P_PID, first.process, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        ends = [command.run(out)]
        os.kill(first.process, signal.SIGCONT)
        ends.append(first.wait(limit=240.0))
    ends.sort(key=lambda end: end.status)
    done, other = ends
    if done.status or (at is not None and not other.status):
        return Verdict("differs", f"ended with {[end.status for end in ends]}: {other.err[:200]}")
    verdict = of_refusal(other, "in use") if other.status else FINE
    if verdict.kind not in ("fine", "refused"):
        return verdict
    end = command.judge_end(out, done)
    return verdict if end == FINE else end
