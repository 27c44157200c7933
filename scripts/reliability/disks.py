"""Commands on a disk that is too small, and two at once in one folder."""

import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from reliability.children import start, tvlens_command
from reliability.commands import Command, folders, left_over, of_refusal
from reliability.counts import FINE, LONGEST_WAIT, Counts, Verdict

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
    if ended.status or ended.broken:
        verdict = of_refusal(ended)
        if verdict.kind != "refused":
            return verdict
        leftover = left_over(out)
        if leftover:
            return leftover
    grow()
    return command.judge_end(out)


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


def pairs_at_once(commands: list[Command], folder: Path, n: int) -> list[Counts]:
    """Two processes in one folder: every command, so many times."""
    found = []
    for command in commands:
        counts = Counts(f"{command.name}, two at once")
        for number, out in zip(range(n), folders(folder / "pairs", command.name), strict=False):
            name = "at once" if number % 2 else "one after the other"
            counts.add(f"{out.parent.name}, {name}", two(command, out, wait=number % 2 == 0))
        found.append(counts)
    return found


def two(command: Command, out: Path, *, wait: bool) -> Verdict:
    """Two processes, of which one must do it all and the other say that the folder is in use.

    Args:
        command: what both do.
        out: the folder.
        wait: whether the second one begins when the first one has the folder.
    """
    work = tvlens_command(command.words, out)
    first = start(work)
    if wait:
        until = time.monotonic() + LONGEST_WAIT
        while not (out / "manifest.json").exists() and time.monotonic() < until:
            time.sleep(0.005)
    second = start(work)
    ends = sorted((first.wait(limit=120.0), second.wait(limit=120.0)), key=lambda x: x.status)
    if ends[0].status or not ends[1].status:
        return Verdict("differs", f"ended with {[each.status for each in ends]}")
    if ends[0].broken:
        return ends[0].broken
    verdict = of_refusal(ends[1], "in use")
    if verdict.kind != "refused":
        return verdict
    end = command.judge_end(out)
    return verdict if end == FINE else end
