"""What was tried, and what came of it."""

import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import tvlens
from tvlens.console import say, show

GOOD = ("fine", "refused", "skipped")
BAD = ("raw", "long", "hangs", "memory", "left", "differs")
"""Raw exceptions, long messages, ends that do not come, more than `MOST_MEMORY`, temporary files or
locks that are left, and bytes or values that differ."""

LONGEST_MESSAGE = 600
LONGEST_WAIT = 20.0
"""Seconds that anything may take to end."""
MOST_MEMORY = 2 * 2**30
SHOWN = 40


@dataclass(frozen=True)
class Verdict:
    """What came of one input, kill or the like: one of `GOOD` or `BAD`, why, and where it began.

    Those of one kind and place are shown as one.
    """

    kind: str
    why: str = ""
    where: str = ""


FINE = Verdict("fine")


@dataclass
class Counts:
    """How often what happened in one part."""

    part: str
    found: Counter[str] = field(default_factory=Counter)
    offences: list[tuple[str, Verdict]] = field(default_factory=list)

    def add(self, name: str, verdict: Verdict) -> None:
        """Count one; `name` says how to find it again."""
        self.found[verdict.kind] += 1
        if verdict.kind in BAD:
            self.offences.append((name, verdict))

    @property
    def row(self) -> dict[str, object]:
        """A row of the table."""
        tried = sum(self.found.values())
        return {"part": self.part, "tried": tried} | {k: self.found[k] for k in (*GOOD, *BAD)}


def report(parts: Iterable[Counts]) -> bool:
    """Print the table and what was wrong, each thing once; whether nothing was."""
    parts = [part for part in parts if part.found]
    total = Counts("all", sum((part.found for part in parts), Counter()))
    show([part.row for part in [*parts, total]])
    alike: dict[tuple[str, str, str], list[tuple[str, Verdict]]] = {}
    for part in parts:
        for name, verdict in part.offences:
            alike.setdefault((part.part, verdict.kind, verdict.where), []).append((name, verdict))
    for (part, kind, where), found in list(alike.items())[:SHOWN]:
        name, verdict = found[0]
        say(f"{part}: {kind} {where}, {len(found)} times, first {name}: {verdict.why}")
    if len(alike) > SHOWN:
        say(f"and {len(alike) - SHOWN} more")
    return not alike


def of_message(message: str) -> Verdict:
    """A mistake said on purpose is one line of moderate length; differing runs are a list."""
    too_long = len(message) > LONGEST_MESSAGE or "\n" in message.strip() or "\r" in message
    if too_long and "belongs to a different run" not in message:
        return Verdict("long", f"{len(message)} characters: {shortened(message)}", "message")
    return Verdict("refused", shortened(message))


def of_exception(error: BaseException) -> Verdict:
    """A raw exception: its type, its message, and the innermost line of tvlens."""
    where = f"{type(error).__name__} in {innermost(error.__traceback__)}"
    return Verdict("raw", shortened(str(error)), where)


def innermost(trace: TracebackType | None) -> str:
    """The innermost line of tvlens, or else the innermost line."""
    frames = traceback.extract_tb(trace)
    root = Path(tvlens.__file__).parent
    own = [frame for frame in frames if Path(frame.filename).is_relative_to(root)]
    frame = (own or frames)[-1]
    path = Path(frame.filename)
    name = path.relative_to(root.parent) if own else path.name
    return f"{name}:{frame.lineno}, {frame.name}"


def shortened(text: str) -> str:
    """The first line, cut; safe to print."""
    line = text.strip().partition("\n")[0][:160]
    return line.encode(errors="backslashreplace").decode()
