"""Reading tasks: those that tvlens ships, and files of `[{"input": ..., "output": ...}]` of your
own.

A file holds either such a list (the format of the public function-vector data of Todd et al.) or an
object with the list under "pairs" and optional "name", "description", "source" and "licence", which
is how shipped tasks are kept. Numbers become strings and surrounding white space is removed.
Identical pairs are merged; one input with different outputs is an error, or dropped on demand,
because a function has one value.
"""

import difflib
import json
import math
from pathlib import Path
from typing import Any, Literal, get_args

from tvlens.errors import TaskError, UnknownNameError
from tvlens.tasks.text.prompts import Pair
from tvlens.tasks.text.task import Task

Duplicates = Literal["error", "drop"]

_DATA = Path(__file__).parent / "data"
_UNSTATED = "not stated in the file"


def names() -> list[str]:
    """The names of all shipped tasks, sorted."""
    return sorted(path.stem for path in _DATA.glob("*.json"))


def load(name: str) -> Task:
    """The shipped task of that name.

    Raises:
        UnknownNameError: There is no such task; the message gives the nearest names.
    """
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(repr(match) for match in near)}? " if near else ""
        raise UnknownNameError(
            f"unknown task {name!r}: {hint}tvlens.tasks.names() lists the {len(known)} shipped "
            "tasks; tvlens.tasks.load_file(path) loads a file of your own"
        )
    return load_file(_DATA / f"{name}.json")


def load_file(path: str | Path, *, duplicates: Duplicates = "error") -> Task:
    """The task in one JSON file, named after the file unless the file says its name.

    Args:
        path: The file.
        duplicates: What to do where one input has different outputs: "error" refuses the file,
            "drop" leaves out every such input with all its outputs. Identical pairs are merged in
            both cases.

    Raises:
        TaskError: The file cannot be read, is not such a list, or holds pairs that cannot be used.
    """
    path = Path(path)
    if duplicates not in get_args(Duplicates):
        raise TaskError(f"duplicates={duplicates!r}: expected 'error' or 'drop'")
    content = _read(path)
    header = content if isinstance(content, dict) else {}
    entries = header.get("pairs") if header else content
    if not isinstance(entries, list):
        raise TaskError(
            f"task file {path}: expected a list of {{'input': ..., 'output': ...}} objects (or an "
            f"object with that list under 'pairs'), found {_kind_of(content)}; wrap the pairs in a "
            "list"
        )
    if not entries:
        raise TaskError(f"task file {path} is empty: it holds no pairs; add at least one")
    pairs = [_pair(path, number, entry) for number, entry in enumerate(entries, start=1)]
    kept, dropped = _merge(path, pairs, duplicates)
    note = f" ({dropped} inputs with different outputs left out)" if dropped else ""
    return Task(
        name=_header_text(path, header, "name", path.stem),
        pairs=kept,
        description=_header_text(path, header, "description", f"pairs of {path.name}") + note,
        source=_header_text(path, header, "source", path.name),
        licence=_header_text(path, header, "licence", _UNSTATED),
    )


def load_folder(path: str | Path, *, duplicates: Duplicates = "error") -> dict[str, Task]:
    """The tasks in all `*.json` files of a folder (hidden files left out), by file name without
    ending, sorted.

    Raises:
        TaskError: There is no such folder, it holds no JSON file, or one of the files cannot be
            used.
    """
    path = Path(path)
    if not path.is_dir():
        raise TaskError(
            f"task folder {path}: no such folder; pass one that holds *.json task files"
        )
    files = sorted(file for file in path.glob("*.json") if not file.name.startswith("."))
    if not files:
        raise TaskError(f"task folder {path}: holds no *.json file; pass one that holds task files")
    return {file.stem: load_file(file, duplicates=duplicates) for file in files}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TaskError(
            f"task file {path} cannot be read: {reason}; check the path and its permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise TaskError(
            f"task file {path} is not UTF-8 text: byte {error.start} cannot be decoded; save it as "
            "UTF-8"
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise TaskError(
            f"task file {path} is not JSON: {error}; expected a list of {{'input': ..., 'output': "
            "...}} objects"
        ) from error


def _kind_of(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(map(repr, value)) or '(none)'}"
    return {list: "a list", str: "a string", type(None): "null", bool: "true or false"}.get(
        type(value), "a number"
    )


def _header_text(path: Path, header: dict[str, Any], key: str, default: str) -> str:
    value = header.get(key, default)
    if not isinstance(value, str) or not value:
        raise TaskError(
            f"task file {path}: {key!r} is {_kind_of(value)}, expected a text; write one or leave "
            f"{key!r} out"
        )
    return value


def _pair(path: Path, number: int, entry: Any) -> Pair:
    where = f"task file {path}, pair {number}"
    if not isinstance(entry, dict):
        raise TaskError(
            f"{where}: expected an object with 'input' and 'output', found {_kind_of(entry)}"
        )
    missing = [key for key in ("input", "output") if key not in entry]
    if missing:
        raise TaskError(
            f"{where}: the key {missing[0]!r} is missing, found {_kind_of(entry)}; every pair "
            "needs 'input' and 'output'"
        )
    return Pair(_text(where, "input", entry["input"]), _text(where, "output", entry["output"]))


def _text(where: str, key: str, value: Any) -> str:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    if not isinstance(value, str):
        found = "a number that is not finite" if isinstance(value, float) else _kind_of(value)
        raise TaskError(
            f"{where}: {key!r} is {found}, expected a string or a number; correct the pair"
        )
    if not value.strip():
        raise TaskError(f"{where}: {key!r} is an empty string; correct or remove the pair")
    return value.strip()


def _merge(path: Path, pairs: list[Pair], duplicates: Duplicates) -> tuple[tuple[Pair, ...], int]:
    outputs: dict[str, dict[str, None]] = {}
    for pair in pairs:
        outputs.setdefault(pair.input, {})[pair.output] = None
    conflicts = [text for text, found in outputs.items() if len(found) > 1]
    if conflicts and duplicates == "error":
        first = conflicts[0]
        shown = " and ".join(repr(output) for output in outputs[first])
        raise TaskError(
            f"task file {path}: the input {first!r} has different outputs, {shown} "
            f"({len(conflicts)} such inputs in the file); correct the file, or pass "
            "duplicates='drop' to leave such inputs out"
        )
    kept = tuple(
        Pair(text, next(iter(found))) for text, found in outputs.items() if len(found) == 1
    )
    if not kept:
        raise TaskError(
            f"task file {path} is empty once the {len(conflicts)} inputs with different outputs "
            "are left out; correct the file"
        )
    return kept, len(conflicts)
