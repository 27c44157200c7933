"""The run folder: a manifest that says how it was made, steps that survive interruption, results.

    with Run.open("runs/text", "study text", {"tasks": ["present-past"]}, seeds=[0]) as run:
        heads = run.step("present-past/aie", lambda: {"heads": mediate()})["heads"]
        run.write_table("heads", heads)

The same command and configuration into the same folder resumes: saved steps are read, not computed
again. Everything is written under a temporary name and then renamed, so nothing is ever half there.
"""

import hashlib
import io
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from filelock import BaseFileLock, FileLock, Timeout
from matplotlib import pyplot, rc_context
from matplotlib.figure import Figure
from pandas import DataFrame
from torch import Tensor

from tvlens.errors import RunError
from tvlens.runs.storage import (
    OWN,
    SUFFIXES,
    K,
    encode,
    encode_json,
    read,
    remove,
    replacing,
    restored,
    write,
)

JSON: TypeAlias = dict[str, Any] | list[Any] | tuple[Any, ...] | str | int | float | bool | None
"""A value that JSON can hold; no NaN. Tuples come back as lists."""

_INDEX = f"{OWN}step.json"
_LISTED = 350
"""Characters of a message that list what differs."""
_PACKAGES = ("tvlens", "torch", "transformer-lens", "transformers", "numpy", "pandas")


class Run:
    """An open run folder, made by `Run.open`. As a context manager it records how the run ended.

    Attributes:
        folder: the run folder.
        manifest: what `manifest.json` says.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], lock: BaseFileLock) -> None:
        self.folder = folder
        self.manifest = manifest
        self._lock = lock
        self._steps_seen: set[str] = set()

    @classmethod
    def open(
        cls,
        folder: Path | str,
        command: str,
        config: Mapping[str, JSON],
        *,
        data: Mapping[str, str] | None = None,
        seeds: Mapping[str, int] | list[int] | None = None,
    ) -> "Run":
        """Returns the run in `folder`: new, or resumed if the same run was there before.

        Two runs are the same if command, config, data, seeds and tvlens' major.minor version are.

        Args:
            folder: where the run lives; made if need be. Not part of what makes two runs the same.
            command: what is run, such as "study text".
            config: every setting that changes the result.
            data: SHA-256 of the data used, by name.
            seeds: the seeds used.

        Raises:
            RunError: the folder belongs to a different run, to something else or to a process that
                is still running; or it cannot be made or written.
        """
        asked = {"command": command, "config": config, "data": data or {}, "seeds": seeds or []}
        identity = json.loads(encode_json(f"the configuration of {command!r}", asked))
        folder = Path(folder)
        lock = _lock(folder)
        try:
            for leftover in list(folder.rglob(f"{OWN}tmp-*")):
                remove(leftover)
            manifest = _new_manifest(identity)
            if (folder / "manifest.json").exists():
                earlier = read(folder / "manifest.json", None, "choose another --out")
                _require_manifest(folder, earlier, manifest)
                _refuse_different(folder, earlier, manifest, [*identity])
                manifest = _resume(earlier, manifest)
            run = cls(folder, manifest, lock)
            run._write_manifest()
        except BaseException:
            lock.release()
            raise
        return run

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self.manifest |= {"state": state if error else "finished", "finished": _now()}
        if error is not None:
            self.manifest["error"] = {"type": type(error).__name__, "message": str(error)}
        try:
            self._write_manifest()
        finally:
            self._lock.release()

    def note_filter(self, text: str) -> None:
        """Adds a sentence on what was left out of the data to the manifest, once."""
        if text not in self.manifest["filters"]:
            self.manifest["filters"].append(text)
            self._write_manifest()

    def step(
        self,
        name: str,
        compute: Callable[[], Mapping[str, DataFrame | Mapping[str, Tensor] | JSON]],
    ) -> dict[str, Any]:
        """Returns the outputs of a named step: computed and saved once, read when the run resumes.

        What comes back was always read from the saved files (tables with a fresh index, tensors on
        the CPU), so a resumed run goes on from the same values as an uninterrupted one. For the
        same reason `compute` must not depend on random state that another step leaves behind.

        Args:
            name: unique in the run; "/" makes sub-folders, as in "present-past/aie".
            compute: gives the outputs by name, each a DataFrame, a dict of tensors or a JSON value.

        Raises:
            RunError: the name cannot be used, an output cannot be saved or a saved file is damaged.
        """
        folder = self._path("steps", name)
        if name in self._steps_seen:
            raise RunError(f"step {name!r} has already run in this session; give it another name")
        nested = any((parent / _INDEX).exists() for parent in folder.parents)
        if nested or (folder.exists() and not (folder / _INDEX).exists()):
            raise RunError(
                f"step {name!r}: '{folder}' is inside another step or holds other things; give "
                "the step another name, or delete the folder"
            )
        self._steps_seen.add(name)
        if not folder.exists():
            start = time.perf_counter()
            outputs = compute()
            self._save_step(folder, name, outputs, round(time.perf_counter() - start, 3))
        remedy = f"delete '{folder}'"
        index = read(folder / _INDEX, None, remedy)
        _require_index(folder / _INDEX, index, remedy)
        self.manifest["timings"][name] = index["seconds"]
        self._write_manifest()
        files = index["outputs"].items()
        return {key: read(folder / file, digest, remedy) for key, (file, digest) in files}

    def kept(self, name: str, kind: type[K], compute: Callable[[], K]) -> K:
        """The value of a named step that keeps itself, as `step`.

        Args:
            name: unique in the run.
            kind: what the value is.
            compute: gives the value.
        """

        def outputs() -> dict[str, Any]:
            tensors, facts = compute().state()
            return {"tensors": tensors, "facts": facts}

        saved, folder = self.step(name, outputs), self._path("steps", name)
        if not saved.keys() >= {"tensors", "facts"}:
            raise RunError(
                f"step {name!r} in '{folder}' keeps {', '.join(saved) or 'nothing'}, expected "
                "tensors and facts; delete that folder and run the same command again"
            )
        return restored(kind, saved["tensors"], saved["facts"], folder)

    def write_table(self, name: str, table: DataFrame) -> Path:
        """Returns the path of `name.csv`, written with `name.parquet` beside it; drops the index.

        Raises:
            RunError: the table cannot be stored or the files cannot be written.
        """
        path = self._path(f"{name}.csv")
        write(path.with_suffix(".parquet"), encode(f"table {name!r}", table, {})[1])
        # Without a float_format pandas writes the shortest text that reads back as the same number.
        write(path, table.to_csv(index=False, lineterminator="\n").encode())
        return path

    def write_figure(self, name: str, figure: Figure) -> Path:
        """Returns the path of `figures/name.pdf`, written with a PNG (200 dpi); closes the figure.

        The same figure gives the same bytes: neither file holds a time stamp.

        Raises:
            RunError: the files cannot be written.
        """
        path = self._path("figures", f"{name}.pdf")
        for kind, details in (("pdf", {"CreationDate": None}), ("png", {})):
            buffer = io.BytesIO()
            with rc_context({"pdf.fonttype": 42}):  # keeps the letters in the PDF searchable
                figure.savefig(buffer, format=kind, dpi=200, bbox_inches="tight", metadata=details)
            write(path.with_suffix(f".{kind}"), buffer.getvalue())
        pyplot.close(figure)
        return path

    def _save_step(
        self, folder: Path, name: str, outputs: Mapping[str, Any], seconds: float
    ) -> None:
        saved: dict[str, list[str]] = {}
        origin = {"step": name, "command": self.manifest["command"]}
        with replacing(folder) as temporary:
            for key, value in outputs.items():
                suffix, content = encode(f"output {key!r} of step {name!r}", value, origin)
                file = self._path("steps", name, f"{key}{suffix}").name
                write(temporary / file, content)
                saved[key] = [file, hashlib.sha256(content).hexdigest()]
            index = encode_json(f"step {name!r}", {"seconds": seconds, "outputs": saved})
            write(temporary / _INDEX, index)

    def _write_manifest(self) -> None:
        self.manifest["peak_memory_gib"] = peak_memory_gib()
        write(self.folder / "manifest.json", encode_json("the manifest", self.manifest))

    def _path(self, *names: str) -> Path:
        if not self._lock.is_locked:
            raise RunError(f"run '{self.folder}' is closed; open it again to write to it")
        parts = "/".join(names).split("/")
        for part in parts:
            if not re.fullmatch(r"\w[\w.+ -]*", part):
                raise RunError(
                    f"{part!r} in {'/'.join(names)!r} cannot name a file of a run; start with a "
                    "letter or digit, then letters, digits, spaces and '_-+.'"
                )
        return self.folder.joinpath(*parts)


def peak_memory_gib() -> float | None:
    """Returns the largest resident memory of this process so far in GiB; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 3)


def _lock(folder: Path) -> BaseFileLock:
    lock = FileLock(folder / f"{OWN}lock", timeout=0)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(OWN))
        if not names or "manifest.json" in names:
            lock.acquire()
            return lock
    except Timeout:
        problem = "is in use by another process; wait for it to end, or choose another --out"
    except OSError as error:
        problem = f"cannot be made or written: {error.strerror or error}; choose another --out"
    else:
        problem = f"holds {names[0]!r} but no manifest.json; choose another --out, or an empty one"
    raise RunError(f"run folder '{folder}' {problem}")


def _new_manifest(identity: dict[str, Any]) -> dict[str, Any]:
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    machine = {"versions": versions, "platform": platform.platform(), "cpu_count": os.cpu_count()}
    times = {"state": "running", "started": _now(), "finished": None, "error": None}
    notes: dict[str, Any] = {"filters": [], "timings": {}, "earlier_sessions": []}
    return {**identity, **machine, **times, **notes}


def _resume(earlier: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    kept = ("versions", "state", "started", "finished", "error", "peak_memory_gib")
    session = {key: earlier.get(key) for key in kept}
    if session["state"] == "running":  # its process was killed, or it would still hold the lock
        session["state"] = "interrupted"
    sessions = [*earlier["earlier_sessions"], session]
    notes = {"filters": earlier["filters"], "timings": earlier["timings"]}
    return {**manifest, **notes, "earlier_sessions": sessions}


def _require_manifest(folder: Path, earlier: Any, now: dict[str, Any]) -> None:
    """Refuse what has not the keys of a manifest, each of its kind."""
    problem = "is no object"
    if isinstance(earlier, dict):
        lists = ("filters", "earlier_sessions")
        kinds: dict[str, type] = dict.fromkeys(("versions", "config", "data", "timings"), dict)
        kinds |= {key: list for key in lists}
        wrong = [key for key, kind in kinds.items() if not isinstance(earlier.get(key), kind)]
        missing = [key for key in now if key not in earlier]
        if not wrong and not missing and isinstance(earlier["versions"].get("tvlens"), str):
            return
        problem = f"has no sound {(missing or wrong or ['versions'])[0]!r}"
    raise RunError(
        f"'{folder}/manifest.json' is not a run's manifest: it {problem}; choose another --out"
    )


def _require_index(path: Path, index: Any, remedy: str) -> None:
    """Refuse what is no index of a step: its seconds, and files of this folder with digests."""
    sound = isinstance(index, dict) and isinstance(index.get("outputs"), dict)
    if sound and isinstance(index.get("seconds"), int | float):
        expected = ((key, entry) for key, entry in index["outputs"].items())
        if all(
            isinstance(entry, list)
            and [type(part) for part in entry] == [str, str]
            and entry[0] in {f"{key}{suffix}" for suffix in SUFFIXES}
            for key, entry in expected
        ):
            return
    raise RunError(
        f"'{path}' is no index of a step: expected seconds, and for every output its file and the "
        f"file's SHA-256; {remedy} and run the same command again"
    )


def _refuse_different(folder: Path, earlier: Any, now: dict[str, Any], keys: list[str]) -> None:
    versions = [manifest["versions"]["tvlens"].split(".")[:2] for manifest in (earlier, now)]
    old = _flat({**{key: earlier[key] for key in keys}, "tvlens": ".".join(versions[0])})
    new = _flat({**{key: now[key] for key in keys}, "tvlens": ".".join(versions[1])})
    differing = [
        f"  {key}: {_cut(old.get(key, 'absent'))} there, {_cut(new.get(key, 'absent'))} now\n"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    if differing:
        fit = sum(length <= _LISTED for length in accumulate(map(len, differing))) or 1
        more = f"  and {len(differing) - fit} more\n" if len(differing) > fit else ""
        raise RunError(
            f"run folder '{folder}' belongs to a different run:\n{''.join(differing[:fit])}{more}"
            "choose another --out, or delete the folder to start again"
        )


def _cut(text: str) -> str:
    return text if len(text) <= 70 else f"{text[:34]} … {text[-34:]}"


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat = {}
    for key, item in value.items():
        nested = _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {}
        flat.update(nested or {f"{prefix}{key}": json.dumps(item, ensure_ascii=False)})
    return flat


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
