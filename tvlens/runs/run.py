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
import math
import re
import shutil
import time
from collections.abc import Callable, Mapping
from os.path import exists
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout
from matplotlib import pyplot, rc_context
from matplotlib.figure import Figure
from pandas import DataFrame

from tvlens.errors import NumericalError, RunError, TvlensError
from tvlens.runs.manifest import (
    digest_of,
    new_manifest,
    now,
    peak_memory_gib,
    refuse_different,
    require_index,
    require_manifest,
    resume,
)
from tvlens.runs.steps import JSON, Outputs
from tvlens.runs.storage import (
    OWN,
    K,
    encode,
    encode_json,
    read,
    remove,
    replacing,
    restored,
    write,
)

_INDEX = f"{OWN}step.json"
_DPI = 200
_PDF: Any = {"pdf.fonttype": 42}
"""Keeps the letters in PDF files searchable, and journals content."""


class Run:
    """An open run folder, made by `Run.open`. As a context manager it records how the run ended.

    Attributes:
        folder: the run folder.
        manifest: what `manifest.json` says.
    """

    def __init__(
        self, folder: Path, manifest: dict[str, Any], lock: BaseFileLock, *, made: bool = False
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self._lock = lock
        self._made = made
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
        A run that ends in a mistake before it has kept anything leaves the folder as it was, so
        that the command put right may have it.

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
        made = not exists(folder)
        lock = _lock(folder)
        try:
            for leftover in list(folder.rglob(f"{OWN}tmp-*")):
                remove(leftover)
            manifest = new_manifest(identity)
            if (folder / "manifest.json").exists():
                earlier = read(folder / "manifest.json", None, "choose another --out")
                require_manifest(folder, earlier, manifest)
                refuse_different(folder, earlier, manifest, [*identity])
                manifest = resume(earlier, manifest)
            run = cls(folder, manifest, lock, made=made)
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
        if isinstance(error, TvlensError) and self._is_bare():
            self._leave()
            return
        state = "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"
        self.manifest |= {"state": state if error else "finished", "finished": now()}
        if error is not None:
            self.manifest["error"] = {"type": type(error).__name__, "message": str(error)}
        try:
            self._write_manifest()
        finally:
            self._lock.release()

    def _is_bare(self) -> bool:
        """Whether nothing was kept, in this session or an earlier one."""
        kept = (path for path in self.folder.rglob("*") if path.is_file())
        foreign = [path for path in kept if not path.name.startswith(OWN)]
        return not self.manifest["earlier_sessions"] and foreign in (
            [],
            [self.folder / "manifest.json"],
        )

    def _leave(self) -> None:
        """Give the folder up, as it was found; still locked, so that nobody else is in it."""
        try:
            remove(self.folder / "manifest.json")
            if self._made:
                shutil.rmtree(self.folder, ignore_errors=True)
        finally:
            self._lock.release()

    def note_filter(self, text: str) -> None:
        """Adds a sentence on what was left out of the data to the manifest, once."""
        if text not in self.manifest["filters"]:
            self.manifest["filters"].append(text)
            self._write_manifest()

    def checkpoint(self, name: str) -> Path:
        """The file from which a training named so goes on when the run resumes."""
        return self._path("checkpoints", f"{name}.safetensors")

    def step(self, name: str, compute: Callable[[], Outputs]) -> dict[str, Any]:
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
        require_index(folder / _INDEX, index, remedy)
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

    def write_table(self, name: str, table: DataFrame, *, whole: bool = False) -> Path:
        """Returns the path of `name.csv`, written with `name.parquet` beside it; drops the index.

        Args:
            name: the file, without ending.
            table: what is written.
            whole: whether every cell must hold something, as in tables of results.

        Raises:
            NumericalError: a number is infinite or, in a whole table, missing.
            RunError: the table cannot be stored or the files cannot be written.
        """
        path = self._path(f"{name}.csv")
        _require_numbers(name, table, whole)
        write(path.with_suffix(".parquet"), encode(f"table {name!r}", table, {})[1])
        # Without a float_format pandas writes the shortest text that reads back as the same number.
        write(path, table.to_csv(index=False, lineterminator="\n").encode())
        return path

    def write_figure(self, name: str, figure: Figure) -> Path:
        """Returns the path of `figures/name.pdf`, written with a PNG; closes the figure.

        A figure with a layout engine is as large as it says; of any other the margins are cut to
        fit. The same figure gives the same bytes: neither file holds a time stamp.

        Raises:
            RunError: the files cannot be written.
        """
        path = self._path("figures", f"{name}.pdf")
        layout = figure.get_layout_engine()
        box = "tight" if layout is None else None
        if layout is not None:
            # Laying out takes longer than drawing, and once is enough for both files.
            figure.set_dpi(_DPI)
            layout.execute(figure)
            figure.set_layout_engine(None)
        for kind, details in (("pdf", {"CreationDate": None}), ("png", {})):
            buffer = io.BytesIO()
            with rc_context(_PDF):
                figure.savefig(buffer, format=kind, dpi=_DPI, bbox_inches=box, metadata=details)
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
            told = {"seconds": seconds, "outputs": saved, "sha256": digest_of(saved)}
            write(temporary / _INDEX, encode_json(f"step {name!r}", told))

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


def _require_numbers(name: str, table: DataFrame, whole: bool) -> None:
    for column in table:
        infinite = table[column].isin([math.inf, -math.inf])
        wrong = infinite | table[column].isna() if whole else infinite
        if wrong.any():
            row = table[wrong].iloc[0]
            told = ", ".join(f"{key}={row[key]}" for key in table.columns[:5] if key != column)
            raise NumericalError(
                f"table {name!r} is not written: {column} is {row[column]} in {int(wrong.sum())} "
                f"of {len(table)} rows, first where {told}; look for a vector that is too large, "
                "or weights that are no numbers"
            )


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
