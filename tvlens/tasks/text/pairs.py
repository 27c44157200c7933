"""Pairs of prompts of your own: a clean one and a corrupted one, and what follows the clean one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvlens.errors import TaskError
from tvlens.tasks.text.formats import kind_of, parse_json, read_text, refuse_unknown, shown
from tvlens.tasks.text.prompts import Pair, Prompt, Prompts, Template, require_text

_NEEDED = ("clean", "corrupted", "answer")
_KEYS = (*_NEEDED, "wrong")
_EXPECTED = (
    "expected a list of {'clean': ..., 'corrupted': ..., 'answer': ..., 'wrong': ...} objects, "
    "'wrong' in all or none"
)


@dataclass(frozen=True)
class PromptPairs:
    """Prompts that differ in what an answer hangs on, as they are: no layout is put around them.

    Attributes:
        clean: prompts, with the right answer to each.
        corrupted: as many others, with the same answers, which are not right there.
        wrong: the clean prompts with a wrong answer to each; None where there is none.
        name: what tables and files call them.

    Raises:
        TaskError: there is no prompt, there are not as many of each, a clean prompt is its
            corrupted one, or a right answer is the wrong one.
    """

    clean: Prompts
    corrupted: Prompts
    wrong: Prompts | None
    name: str

    def __post_init__(self) -> None:
        require_text(f"pairs {self.name[:20]!a}", self.name)
        several = [each for each in (self.clean, self.corrupted, self.wrong) if each is not None]
        counts = [len(each) for each in several]
        if not counts[0] or len(set(counts)) > 1:
            raise TaskError(
                f"pairs {self.name!r}: {counts} clean, corrupted and (if any) wrong prompts; "
                "expected one or more, as many of each"
            )
        for i, (clean, corrupted) in enumerate(zip(self.clean, self.corrupted, strict=True), 1):
            if clean.text == corrupted.text:
                raise TaskError(
                    f"pairs {self.name!r}, entry {i}: clean and corrupted prompt are both "
                    f"{shown(clean.text)}, so there is nothing to patch; change one or remove the "
                    "entry"
                )
        for i, (clean, wrong) in enumerate(zip(self.clean, self.wrong or (), strict=False), 1):
            if set(clean.continuations) & set(wrong.continuations):
                raise TaskError(
                    f"pairs {self.name!r}, entry {i}: 'answer' and 'wrong' are both "
                    f"{shown(wrong.continuations[0])}; expected two different answers; change one"
                )

    def __len__(self) -> int:
        return len(self.clean)

    @staticmethod
    def of(entries: Sequence[Mapping[str, str]], *, name: str = "pairs") -> "PromptPairs":
        """Pairs given as texts.

        Example:
            >>> texts = {"clean": "Paris is in", "corrupted": "Rome is in", "answer": " France"}
            >>> PromptPairs.of([texts]).clean.continuations
            [(' France',)]

        Args:
            entries: "clean", "corrupted" and "answer" of each pair, and in all or none "wrong". An
                answer that does not begin with white space has one space before it.
            name: what tables and files call them.

        Raises:
            TaskError: there is no entry, one lacks a key or has another, is of something else than
                texts, or has nothing to patch.
        """
        return _made(entries, name)


def load_pairs(path: str | Path) -> PromptPairs:
    """The pairs of prompts in a JSON file, named after it.

    The file holds a list of entries as `PromptPairs.of` takes them::

        [{"clean": "Paris is in", "corrupted": "Rome is in", "answer": " France"}]

    Raises:
        TaskError: the file cannot be read, or holds something else.
    """
    path = Path(path)
    where = f"pairs file {path}"
    content = parse_json(where, read_text("pairs file", path), _EXPECTED)
    if not isinstance(content, list):
        raise TaskError(f"{where}: {_EXPECTED}, found {kind_of(content)}")
    return _made(content, path.stem)


def _made(entries: Sequence[Any], name: str) -> PromptPairs:
    if not entries:
        raise TaskError(f"pairs {name!r} are empty: expected at least one entry; {_EXPECTED}")
    for i, entry in enumerate(entries, start=1):
        _require_usable(f"pairs {name!r}, entry {i}", entry)
    without = [i for i, entry in enumerate(entries, start=1) if "wrong" not in entry]
    if without and len(without) < len(entries):
        raise TaskError(
            f"pairs {name!r}, entry {without[0]}: the key 'wrong' is missing, which other "
            f"entries have ({len(entries) - len(without)} of {len(entries)}); give it in all "
            "or none"
        )
    return PromptPairs(
        _prompts(name, entries, "clean", "answer"),
        _prompts(name, entries, "corrupted", "answer"),
        None if without else _prompts(name, entries, "clean", "wrong"),
        name,
    )


def _require_usable(where: str, entry: Any) -> None:
    if not isinstance(entry, Mapping):
        raise TaskError(f"{where}: found {kind_of(entry)}; {_EXPECTED}")
    missing = [key for key in _NEEDED if key not in entry]
    if missing:
        raise TaskError(
            f"{where}: the key {missing[0]!r} is missing, found {kind_of(dict(entry))}; every "
            "entry needs 'clean', 'corrupted' and 'answer'"
        )
    refuse_unknown(where, entry, _KEYS)
    for key, text in entry.items():
        if not isinstance(text, str):
            raise TaskError(
                f"{where}: {key!r} is {kind_of(text)}, expected a text; write it in quotes"
            )
        require_text(f"{where}: {key!r}", text)
        if not text.strip():
            raise TaskError(f"{where}: {key!r} is empty; write a text or remove the entry")


def _prompts(name: str, entries: Sequence[Mapping[str, str]], text: str, answer: str) -> Prompts:
    items = tuple(_prompt(str(entry[text]), str(entry[answer])) for entry in entries)
    return Prompts(name, "test", "zero", 0, 0, items)


def _prompt(text: str, answer: str) -> Prompt:
    output = answer.lstrip()
    space = answer[: len(answer) - len(output)] or " "
    return Prompt((), Pair(text, output), "zero", Template("", "", "", "", space))
