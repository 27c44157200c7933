"""What every theme uses: the value `Relation`, word lists, and the two ways to clean pairs."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WORDS = Path(__file__).parents[1] / "task_words"
Pairs = list[tuple[str, str]]


@dataclass(frozen=True)
class Origin:
    """Where pairs come from, and on what terms they are shipped (SPDX expression; holders)."""

    source: str
    licence: str


@dataclass(frozen=True)
class Relation:
    """One task before it is written."""

    name: str
    description: str
    origin: Origin
    pairs: Pairs


OURS = Origin("word lists of tvlens", "MIT; the tvlens authors")


def spaced(words: str) -> list[str]:
    """The words of a text, for lists that would otherwise take a line per word."""
    return words.split()


def word_list(name: str) -> list[str]:
    """The words of a list, in order."""
    return [word for line in _lines(name) for word in line.split()]


def table(name: str) -> list[list[str]]:
    """The rows of a list whose fields are separated by a colon and a space."""
    return [line.split(": ") for line in _lines(name)]


def _lines(name: str) -> list[str]:
    lines = (WORDS / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def function(pairs: Pairs) -> Pairs:
    """The pairs, each once, without those whose sides look the same or whose input is ambiguous."""
    pairs = [pair for pair in dict.fromkeys(pairs) if pair[0].casefold() != pair[1].casefold()]
    counts = Counter(pair[0] for pair in pairs)
    return [pair for pair in pairs if counts[pair[0]] == 1]


def both(
    forward: tuple[str, str], backward: tuple[str, str], origin: Origin, pairs: Pairs
) -> Iterator[Relation]:
    """A relation and its inverse, each given by (name, description), over the same pairs in order.

    Pairs that share a side with another pair are left out, since one direction would be ambiguous.
    The equal order gives both directions the same splits.
    """
    pairs = function(pairs)
    counts = Counter(pair[1] for pair in pairs)
    pairs = [pair for pair in pairs if counts[pair[1]] == 1]
    yield Relation(*forward, origin, pairs)
    yield Relation(*backward, origin, [(b, a) for a, b in pairs])
