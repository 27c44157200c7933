"""The shapes in which files hold pairs, each read to entries of `input`, `output` and, where there
is one, `instruction`.

JSON: a list of entries, an object with one under "pairs" beside what the task is called, lists by
field (`{"input": [...], "output": [...]}`), a mapping of inputs to outputs, or one entry. JSON
lines: an entry a line. CSV and TSV: a line that names the fields, then an entry a line. Nothing is
passed over: a field that has no meaning here is refused by its name. Numbers are kept as they are
written.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from tvlens.errors import TaskError

FIELDS = ("input", "output", "instruction")
HEADER = ("name", "description", "source", "licence")
SUFFIXES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
"""Endings of files that hold tasks."""

_EXPECTED = (
    "expected a list of {'input': ..., 'output': ...} objects, that list under 'pairs', lists "
    "under 'input' and 'output', or a mapping of inputs to outputs"
)


class Number(str):
    """A number as it is written in the file."""


class Entry(NamedTuple):
    """What one entry says, and where it stands, for messages."""

    where: str
    fields: Mapping[str, Any]


def read_entries(path: Path) -> tuple[dict[str, Any], list[Entry]]:
    """What a file says of its task, and its entries in order.

    Raises:
        TaskError: the file cannot be read, or has none of these shapes.
    """
    text = read_text("task file", path)
    ending = path.suffix.lower()
    if ending in (".csv", ".tsv"):
        return {}, list(_lines_of_table(path, text, "," if ending == ".csv" else "\t"))
    if ending in (".jsonl", ".ndjson"):
        lines = [(i, line) for i, line in enumerate(text.split("\n"), start=1) if line.strip()]
        places = [f"task file {path}, line {i}" for i, _ in lines]
        given = [
            parse_json(place, line, _EXPECTED)
            for place, (_, line) in zip(places, lines, strict=True)
        ]
        return {}, [_entry(*each) for each in zip(places, given, strict=True)]
    expected = f"{_EXPECTED} (JSON lines are read from files that end in .jsonl)"
    content = parse_json(f"task file {path}", text, expected)
    if isinstance(content, dict) and isinstance(content.get("pairs"), list | dict):
        header = {key: value for key, value in content.items() if key != "pairs"}
        refuse_unknown(f"task file {path}", header, HEADER)
        return header, _entries(path, content["pairs"])
    return {}, _entries(path, content)


def kind_of(value: Any) -> str:
    """What a value, of JSON mostly, is in words."""
    if isinstance(value, dict):
        return f"an object with the keys {_listed(value) or '(none)'}"
    if isinstance(value, Number) or (type(value) in (int, float) and isfinite(value)):
        return f"the number {str(value)[:20]}"
    names = {list: "a list", str: "a string", type(None): "null", bool: "true or false"}
    names[float] = "a number that is not finite"
    return names.get(type(value), f"of type {type(value).__name__}")


def shown(text: str) -> str:
    """A text in quotes, cut where it is long."""
    return repr(text if len(text) <= 40 else f"{text[:39]}…")


def _listed(names: Mapping[str, Any]) -> str:
    first = ", ".join(shown(name) for name in list(names)[:4])
    return first if len(names) <= 4 else f"{first}, … ({len(names)} in all)"


def read_text(what: str, path: Path) -> str:
    """The text of a file.

    Raises:
        TaskError: the file, called `what` in the message, cannot be read or is no UTF-8 text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return file.read()
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TaskError(
            f"{what} {path} cannot be read: {reason}; check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise TaskError(
            f"{what} {path} is not UTF-8 text: byte {error.start} cannot be decoded; save it as "
            "UTF-8"
        ) from error


def parse_json(where: str, text: str, expected: str) -> Any:
    """The value of a JSON text, its numbers as they are written.

    Raises:
        TaskError: `where` is no JSON, or gives a key twice; `expected` says what it should be.
    """
    try:
        return json.loads(
            text,
            parse_int=Number,
            parse_float=Number,
            parse_constant=float,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where} is not JSON: {error}; {expected}") from error


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in members:
        if key in found:
            raise ValueError(f"the key {shown(key)} comes twice in one object")
        found[key] = value
    return found


def _entries(path: Path, content: Any) -> list[Entry]:
    where = f"task file {path}"
    if isinstance(content, list):
        return [_entry(f"{where}, pair {i}", each) for i, each in enumerate(content, start=1)]
    if not isinstance(content, dict):
        raise TaskError(f"{where}: {_EXPECTED}, found {kind_of(content)}")
    if {"input", "output"} <= content.keys():
        refuse_unknown(where, content, FIELDS)
        lists = [value for value in content.values() if isinstance(value, list)]
        if len(lists) < len(content):
            return [_entry(f"{where}, its only pair", content)]
        return list(_rows_of_columns(where, content))
    return [
        Entry(f"{where}, input {shown(key)}", {"input": key, "output": value})
        for key, value in content.items()
    ]


def _rows_of_columns(where: str, columns: Mapping[str, list[Any]]) -> Iterator[Entry]:
    lengths = {key: len(column) for key, column in columns.items()}
    if len(set(lengths.values())) > 1:
        said = ", ".join(f"{key!r} has {n}" for key, n in lengths.items())
        raise TaskError(f"{where}: its lists differ in length ({said}); expected a value of each")
    for i, row in enumerate(zip(*columns.values(), strict=True), start=1):
        yield Entry(f"{where}, pair {i}", dict(zip(columns, row, strict=True)))


def _lines_of_table(path: Path, text: str, delimiter: str) -> Iterator[Entry]:
    where = f"task file {path}"
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if not {"input", "output"} <= set(names) or len(set(names)) < len(names):
            found = ", ".join(map(shown, names[:4])) or "nothing"
            raise TaskError(
                f"{where}: its first line holds {found}; expected the names of its columns, "
                f"input{delimiter}output, once each; put that line before the pairs"
            )
        refuse_unknown(where, dict.fromkeys(names), FIELDS)
        for row in reader:
            place = f"{where}, line {reader.line_num}"
            if not row:
                continue
            if len(row) != len(names):
                raise TaskError(
                    f"{place} has {len(row)} columns, expected {len(names)}; put a text that holds "
                    f"{delimiter!r} in double quotes"
                )
            yield Entry(place, dict(zip(names, row, strict=True)))
    except csv.Error as error:
        raise TaskError(
            f"{where}, line {reader.line_num} cannot be read: {error}; expected columns parted by "
            f"{delimiter!r}, with double quotes around texts that hold it"
        ) from error


def _entry(where: str, value: Any) -> Entry:
    if not isinstance(value, dict):
        raise TaskError(
            f"{where}: expected an object with 'input' and 'output', found {kind_of(value)}"
        )
    missing = [key for key in ("input", "output") if key not in value]
    if missing:
        raise TaskError(
            f"{where}: the key {missing[0]!r} is missing, found {kind_of(value)}; every pair "
            "needs 'input' and 'output'"
        )
    refuse_unknown(where, value, FIELDS)
    return Entry(where, value)


def refuse_unknown(where: str, given: Mapping[str, Any], known: tuple[str, ...]) -> None:
    """Refuse keys that have no meaning.

    Raises:
        TaskError: there is one.
    """
    unknown = [key for key in given if key not in known]
    if unknown:
        raise TaskError(
            f"{where}: unknown key {shown(unknown[0])}; expected {', '.join(known)}; remove it, so "
            "that nothing in the file goes unused"
        )
