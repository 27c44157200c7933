"""Thousands of damaged files, each read in a process that is watched."""

import json
import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator
from dataclasses import astuple, replace
from pathlib import Path
from random import Random
from types import FrameType

from reliability.children import Child, do, start
from reliability.counts import (
    BAD,
    FINE,
    LONGEST_WAIT,
    MOST_MEMORY,
    Counts,
    Verdict,
    of_exception,
    of_message,
    shortened,
)
from reliability.damage import damage
from reliability.kinds import KINDS, Kind, Unequal
from reliability.tensors import MARK
from tvlens.errors import TvlensError

AT_ONCE = 200
"""Inputs for one process, which is then replaced, as libraries keep things."""
TEMPORARY = ".tvlens-tmp-"


class TooLong(BaseException):
    """An input took longer than anything may."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


def make_examples(folder: Path, kinds: list[Kind] = KINDS) -> None:
    """A whole example of every kind, which must be read without complaint."""

    def make() -> None:
        for kind in kinds:
            (folder / kind.name).mkdir(parents=True)
            kind.make(folder / kind.name)
            copy = folder / f"{kind.name}-whole"
            shutil.copytree(folder / kind.name, copy)
            kind.read(copy)

    do(make)


def try_input(kind: Kind, number: int, seed: int, examples: Path, place: Path) -> Verdict:
    """One damaged example, read in this process."""
    folder = place / "input"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(examples / kind.name, folder)
    os.chdir(place)
    name = damage(folder, Random(f"{kind.name} {number} {seed}"))
    verdict = read(kind, folder)
    leftover = [path.name for path in place.rglob(f"{TEMPORARY}*")]
    if (place / MARK).exists() or (folder / MARK).exists():
        shutil.rmtree(place / MARK, ignore_errors=True)
        verdict = Verdict("raw", "code that stood in a file was run")
    elif leftover and verdict.kind not in BAD:
        verdict = Verdict("left", leftover[0])
    if verdict.kind in BAD:
        verdict = replace(verdict, why=f"{name}: {verdict.why}")
    return verdict


def read(kind: Kind, folder: Path) -> Verdict:
    """What comes of reading; nothing may take too long."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(int(LONGEST_WAIT))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(folder)
        return FINE
    except TvlensError as error:
        return of_message(str(error))
    except Unequal as error:
        return Verdict("differs", str(error), str(error))
    except TooLong:
        return Verdict("hangs", f"no end after {LONGEST_WAIT:.0f} s")
    except Exception as error:
        return of_exception(error)
    finally:
        signal.alarm(0)


def work(kind: Kind, numbers: list[int], seed: int, examples: Path, place: Path) -> None:
    """Read inputs one after another; a line says which begins, and what came of it."""
    lines = os.fdopen(os.dup(1), "w", buffering=1)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)  # what readers print
    for number in numbers:
        print(json.dumps([number]), file=lines)
        verdict = try_input(kind, number, seed, examples, place)
        print(json.dumps([number, *astuple(verdict)]), file=lines)


def verdicts(
    kind: Kind, numbers: list[int], seed: int, examples: Path, place: Path
) -> Iterator[tuple[int, Verdict]]:
    """What came of every input; a process that dies or does not come back costs one of them."""
    place.mkdir(parents=True, exist_ok=True)
    while numbers:
        few = numbers[:AT_ONCE]
        done = 0
        child = start(lambda few=few: work(kind, few, seed, examples, place))
        for number, verdict in watched(child):
            yield number, verdict
            done += 1
        numbers = numbers[done:]


def watched(child: Child) -> Iterator[tuple[int, Verdict]]:
    """The lines of a worker, until it ends; and why it ended, if within an input."""
    out, err = child.streams
    began, number = time.monotonic(), None
    rest = b""
    problem: Verdict | None = None
    while True:
        ended, status = os.waitpid(child.process, os.WNOHANG)
        child.read(0.02)
        *lines, rest = (rest + bytes(child.streams[out])).split(b"\n")
        child.streams[out].clear()
        for line in lines:
            number, *found = json.loads(line)
            began = time.monotonic()
            if found:
                yield number, Verdict(*found)
                number = None
        if ended:
            break
        if memory_of(child.process) > MOST_MEMORY:
            problem = Verdict("memory", f"more than {MOST_MEMORY / 2**30:.0f} GiB")
        elif time.monotonic() - began > LONGEST_WAIT + 5:
            problem = Verdict("hangs", "not even a signal ends it")
        if problem is not None:
            os.kill(child.process, signal.SIGKILL)
    said = child.streams[err].decode(errors="replace")
    child.close()
    code = os.waitstatus_to_exitcode(status)
    if number is not None:
        last = shortened(said.strip().rpartition("\n")[2])
        yield number, problem or Verdict("raw", f"the process ended with {code}: {last}")
    elif code:
        raise RuntimeError(f"a worker ended with {code}: {said}")


def memory_of(process: int) -> int:
    """Resident memory of a process in bytes; 0 where that cannot be told."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def shares(n: int, kinds: list[Kind] = KINDS) -> dict[str, int]:
    """How many inputs every kind gets of `n` in all."""
    whole = sum(kind.share for kind in kinds)
    return {kind.name: max(1, round(n * kind.share / whole)) for kind in kinds}


def fuzzed(folder: Path, n: int, seed: int, only: str | None = None) -> list[Counts]:
    """Damaged files of every kind, or those named by `KIND` or `KIND:NUMBER`."""
    name, _, number = (only or "").partition(":")
    kinds = [kind for kind in KINDS if name in ("", kind.name)]
    make_examples(folder / "examples", kinds)
    share = shares(n, kinds)
    found = []
    for kind in kinds:
        counts = Counts(f"files: {kind.name}")
        numbers = [int(number)] if number else list(range(share[kind.name]))
        for at, verdict in verdicts(kind, numbers, seed, folder / "examples", folder / "place"):
            counts.add(f"{kind.name}:{at}", verdict)
        found.append(counts)
    return found
