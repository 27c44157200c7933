"""Reading tasks: those that tvlens ships, and files of your own in any of the shapes of
`tvlens.tasks.text.formats`, such as the `[{"input": ..., "output": ...}]` of the public
function-vector data of Todd et al.

Surrounding white space is removed. A list of outputs is several right answers, of which the first
is shown in demonstrations. Identical pairs are merged; one input with different outputs is an
error, because a function has one value, unless told otherwise. An `instruction` opens every prompt
of the task and so must be the same in all pairs.
"""

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import replace
from os.path import isdir
from pathlib import Path
from typing import Any, Literal, get_args

from tvlens.errors import TaskError, UnknownNameError
from tvlens.tasks.text.formats import SUFFIXES, Entry, Number, kind_of, read_entries, shown
from tvlens.tasks.text.prompts import Pair, Template
from tvlens.tasks.text.task import Task

Duplicates = Literal["error", "drop", "merge"]

_DATA = Path(__file__).parent / "data"
_UNSTATED = "not stated in the file"
_LONGEST_NUMBER = 100


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
            f"unknown task {shown(name)}: {hint}tvlens.tasks.names() lists the {len(known)} "
            "shipped tasks; tvlens.tasks.load_file(path) loads a file of your own"
        )
    return load_file(_DATA / f"{name}.json")


def load_file(path: str | Path, *, duplicates: Duplicates = "error") -> Task:
    """The task in one file, named after the file unless the file says its name.

    Args:
        path: The file, which ends in .json, .jsonl, .ndjson, .csv or .tsv.
        duplicates: What to do where pairs give one input different outputs: "error" refuses the
            file, "drop" leaves out every such input with all its outputs, "merge" takes all of
            them as right answers. Identical pairs are merged in any case.

    Raises:
        TaskError: The file cannot be read, is of no such shape, or holds pairs that cannot be used.
    """
    path = Path(path)
    if duplicates not in get_args(Duplicates):
        expected = ", ".join(map(repr, get_args(Duplicates)))
        raise TaskError(f"duplicates={duplicates!r}: expected one of {expected}")
    header, entries = read_entries(path)
    if not entries:
        raise TaskError(f"task file {path} is empty: it holds no pairs; add at least one")
    kept, note = _merge(path, [_pair(entry) for entry in entries], duplicates)
    return Task(
        name=_header_text(path, header, "name", path.stem),
        pairs=kept,
        description=_header_text(path, header, "description", f"pairs of {path.name}") + note,
        source=_header_text(path, header, "source", path.name),
        licence=_header_text(path, header, "licence", _UNSTATED),
        template=Template(instruction=_instruction(path, entries)),
    )


def load_folder(path: str | Path, *, duplicates: Duplicates = "error") -> dict[str, Task]:
    """The tasks in all task files of a folder and the folders in it, by name, sorted.

    Names are file names without ending, behind that of a folder inside, as `abstractive/antonym`;
    hidden files are left out. A file that cannot be used is named in a warning, and the others are
    loaded.

    Raises:
        TaskError: There is no such folder, it holds no task file, or none that can be used.
    """
    found, left_out = read_folder(path, duplicates=duplicates)
    for error in left_out:
        warnings.warn(f"left out: {error}", stacklevel=2)
    return found


def read_folder(
    path: str | Path, *, duplicates: Duplicates = "error"
) -> tuple[dict[str, Task], list[TaskError]]:
    """The tasks of `load_folder`, and what is wrong with each file that was left out."""
    path = Path(path)
    if not isdir(path):
        raise TaskError(f"task folder {path}: no such folder; pass one that holds task files")
    files = task_files(path)
    if not files:
        raise TaskError(
            f"task folder {path}: holds no task file; expected some that end in "
            f"{', '.join(SUFFIXES)}"
        )
    found, left_out = {}, []
    for name in files:
        try:
            found[name] = load_named(path, name, duplicates=duplicates)
        except TaskError as error:
            left_out.append(error)
    if not found:
        raise TaskError(
            f"task folder {path}: none of its {len(files)} task files can be used; {left_out[0]}"
        )
    return found, left_out


def load_named(folder: Path, name: str, *, duplicates: Duplicates = "error") -> Task:
    """The task of this name in a folder, called so whatever its file says.

    Raises:
        TaskError: Several files or none are called so, or the one cannot be used.
    """
    files = task_files(folder).get(name, [])
    if len(files) != 1:
        said = " and ".join(file.name for file in files) or "none"
        raise TaskError(
            f"task folder {folder}: {name!r} may be one file, found {said}; rename all but one"
        )
    return replace(load_file(files[0], duplicates=duplicates), name=name)


def task_files(folder: Path) -> dict[str, list[Path]]:
    """The task files of a folder and the folders in it, by the names of their tasks, sorted.

    Without what is hidden, and without the folders that tvlens keeps runs in.
    """
    found: dict[str, list[Path]] = {}
    runs = {lock.parent for lock in folder.rglob(".tvlens-lock")}
    for file in sorted(folder.rglob("*")):
        inside = file.relative_to(folder)
        hidden = any(part.startswith(".") for part in inside.parts) or runs & {*file.parents}
        if file.suffix.lower() in SUFFIXES and not hidden and file.is_file():
            found.setdefault(inside.with_suffix("").as_posix(), []).append(file)
    return dict(sorted(found.items()))


def _header_text(path: Path, header: Mapping[str, Any], key: str, default: str) -> str:
    value = header.get(key, default)
    if not isinstance(value, str) or isinstance(value, Number) or not value:
        raise TaskError(
            f"task file {path}: {key!r} is {kind_of(value)}, expected a text; write one or leave "
            f"{key!r} out"
        )
    return value


def _instruction(path: Path, entries: list[Entry]) -> str:
    """What opens the prompts of all entries."""
    found = {
        _text(entry.where, "instruction", given) if given not in (None, "") else ""
        for entry in entries
        for given in (entry.fields.get("instruction"),)
    }
    if len(found) > 1:
        first, second = sorted(found)[:2]
        raise TaskError(
            f"task file {path}: its pairs have {len(found)} instructions, such as {shown(first)} "
            f"and {shown(second)}; a task is one function: make a file of the pairs of each, or "
            "write the instruction into the inputs"
        )
    return found.pop()


def _pair(entry: Entry) -> Pair:
    where, given = entry.where, entry.fields["output"]
    if isinstance(given, list) and not given:
        raise TaskError(f"{where}: 'output' is an empty list; expected at least one right answer")
    outputs = [_text(where, "output", x) for x in (given if isinstance(given, list) else [given])]
    first, *others = dict.fromkeys(outputs)
    return Pair(_text(where, "input", entry.fields["input"]), first, tuple(others))


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise TaskError(
            f"{where}: {key!r} is {kind_of(value)}, expected a string or a number; correct the pair"
        )
    if isinstance(value, Number) and len(value) > _LONGEST_NUMBER:
        raise TaskError(
            f"{where}: {key!r} is a number of {len(value)} characters, expected {_LONGEST_NUMBER} "
            "at most; put it in quotes if it is meant as a text"
        )
    if not value.strip():
        raise TaskError(f"{where}: {key!r} is an empty string; correct or remove the pair")
    return str(value.strip())


def _merge(path: Path, pairs: list[Pair], duplicates: Duplicates) -> tuple[tuple[Pair, ...], str]:
    """Each input once, and a note on the inputs that came with different outputs."""
    outputs: dict[str, dict[tuple[str, ...], None]] = {}
    for pair in pairs:
        outputs.setdefault(pair.input, {})[pair.answers] = None
    conflicts = [text for text, found in outputs.items() if len(found) > 1]
    if conflicts and duplicates == "error":
        first = conflicts[0]
        answers = [" or ".join(map(shown, found[:2])) for found in list(outputs[first])[:2]]
        raise TaskError(
            f"task file {path}: the input {shown(first)} has different outputs, "
            f"{' and '.join(answers)} ({len(conflicts)} such inputs in the file); correct the "
            "file, or pass duplicates='drop' to leave such inputs out, or 'merge' to take all "
            "their outputs as right"
        )
    kept = []
    for text, found in outputs.items():
        if len(found) == 1 or duplicates == "merge":
            answer, *others = dict.fromkeys(output for each in found for output in each)
            kept.append(Pair(text, answer, tuple(others)))
    if not kept:
        raise TaskError(
            f"task file {path} is empty once the {len(conflicts)} inputs with different outputs "
            "are left out; correct the file"
        )
    done = "left out" if duplicates == "drop" else "merged"
    note = f" ({len(conflicts)} inputs with different outputs {done})" if conflicts else ""
    return tuple(kept), note
