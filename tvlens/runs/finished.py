"""Run folders that are read, not gone on with: what a run says of itself, and its tables."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tvlens.errors import RunError
from tvlens.runs.manifest import new_manifest, require_manifest
from tvlens.runs.storage import reading

if TYPE_CHECKING:
    # A folder that is no run is refused before pandas is imported.
    import pandas as pd

WRITES: dict[str, tuple[str, ...]] = {
    "study text": ("results", "heads", "headsets", "overlap_curves"),
    "study regression": ("results", "heads", "headsets", "overlap_curves", "models"),
    "mediate": ("heads",),
    "fit": ("heads",),
    "evaluate": ("results",),
    "compare": ("headsets",),
    "patch": ("patching",),
    "score": ("scores", "agreement"),
    "ablate": ("ablation", "scores"),
}
"""The tables that a finished run of each command holds; other commands may hold any."""


@dataclass(frozen=True)
class FoundRun:
    """A run folder as it was found.

    Attributes:
        folder: the folder.
        manifest: what `manifest.json` says.
        tables: every CSV table of the folder, by name without its ending.
        missing: tables that a finished run of its command holds and this one does not.
    """

    folder: Path
    manifest: dict[str, Any]
    tables: "dict[str, pd.DataFrame]"
    missing: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether it ended as it should."""
        return self.manifest["state"] == "finished" and not self.missing

    @property
    def command(self) -> str:
        """The words of its command."""
        return str(self.manifest["command"])


def read_manifest(folder: Path | str) -> dict[str, Any]:
    """Returns what the manifest of a run folder says.

    Raises:
        RunError: it is no run folder, or one of a newer version of tvlens.
    """
    folder = Path(folder)
    file = folder / "manifest.json"
    if not file.is_file():
        problem = "does not exist" if not folder.is_dir() else "holds no manifest.json"
        raise RunError(
            f"'{folder}' is no run folder: it {problem}; give a folder that a tvlens command "
            "wrote with --out"
        )
    with reading(file, "the manifest of a run"):
        manifest = json.loads(file.read_bytes())
    own = new_manifest({"command": "", "config": {}, "data": {}, "seeds": []})
    require_manifest(folder, manifest, own, remedy="give another run folder")
    theirs, ours = (each["versions"]["tvlens"] for each in (manifest, own))
    if _release(theirs) > _release(ours):
        raise RunError(
            f"run '{folder}' was written by tvlens {theirs}, and this is tvlens {ours}, which "
            "cannot know what it holds; install that version or a later one"
        )
    return dict(manifest)


def find_run(folder: Path | str) -> FoundRun:
    """Returns what a run folder holds, without opening the run.

    Raises:
        RunError: as `read_manifest`; or it holds no table yet, or one that cannot be read.
    """
    from tvlens.runs.tables import read_table

    folder, manifest = Path(folder), read_manifest(folder)
    tables = {}
    for path in sorted(folder.glob("*.csv")):
        with reading(path, "a table in CSV that a tvlens command wrote"):
            tables[path.stem] = read_table(path)
    words = str(manifest["command"]).split(" by ")[0]
    missing = tuple(name for name in WRITES.get(words, ()) if name not in tables)
    if not tables:
        kept = len(manifest["timings"])
        lacks = ", ".join(f"{name}.csv" for name in missing) or "every table"
        raise RunError(
            f"run '{folder}' is not finished ({manifest['state']}): it has kept {kept} steps of "
            f"`{manifest['command']}` and lacks {lacks}; run the same command again, which goes "
            "on from there"
        )
    return FoundRun(folder, manifest, tables, missing)


def _release(version: str) -> tuple[int, ...]:
    """Major and minor version; nothing of what is no version."""
    parts = version.split(".")[:2]
    return tuple(int(part) for part in parts) if all(p.isdecimal() for p in parts) else ()
