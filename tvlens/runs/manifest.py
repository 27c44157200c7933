"""The manifest of a run: what it says, and whether two of them are of the same run."""

import hashlib
import json
import os
import platform
import sys
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

from tvlens.errors import RunError
from tvlens.runs.storage import SUFFIXES

_PACKAGES = ("tvlens", "torch", "transformer-lens", "transformers", "numpy", "pandas")
_LISTED = 350
"""Characters of a message that list what differs."""


def peak_memory_gib() -> float | None:
    """Returns the largest resident memory of this process so far in GiB; None on Windows."""
    if sys.platform == "win32":
        return None
    import resource

    unit = 2**30 if sys.platform == "darwin" else 2**20  # macOS counts bytes, Linux KiB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 3)


def new_manifest(identity: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that begins now, on this machine."""
    versions = {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}
    machine = {"versions": versions, "platform": platform.platform(), "cpu_count": os.cpu_count()}
    times = {"state": "running", "started": now(), "finished": None, "error": None}
    notes: dict[str, Any] = {"filters": [], "timings": {}, "earlier_sessions": []}
    return {**identity, **machine, **times, **notes}


def resume(earlier: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest of a run that goes on, with what earlier sessions have noted."""
    kept = ("versions", "state", "started", "finished", "error", "peak_memory_gib")
    session = {key: earlier.get(key) for key in kept}
    if session["state"] == "running":  # its process was killed, or it would still hold the lock
        session["state"] = "interrupted"
    sessions = [*earlier["earlier_sessions"], session]
    notes = {"filters": earlier["filters"], "timings": earlier["timings"]}
    return {**manifest, **notes, "earlier_sessions": sessions}


def require_manifest(
    folder: Path, earlier: Any, expected: dict[str, Any], *, remedy: str = "choose another --out"
) -> None:
    """Refuse what has not the keys of a manifest, each of its kind.

    Args:
        folder: the run folder.
        earlier: what its `manifest.json` holds.
        expected: a manifest.
        remedy: what to do about it.

    Raises:
        RunError: a key is missing, or holds something else.
    """
    problem = "is no object"
    if isinstance(earlier, dict):
        lists = ("filters", "earlier_sessions")
        kinds: dict[str, type] = dict.fromkeys(("versions", "config", "data", "timings"), dict)
        kinds |= {key: list for key in lists}
        wrong = [key for key, kind in kinds.items() if not isinstance(earlier.get(key), kind)]
        missing = [key for key in expected if key not in earlier]
        if not wrong and not missing and isinstance(earlier["versions"].get("tvlens"), str):
            return
        problem = f"has no sound {(missing or wrong or ['versions'])[0]!r}"
    raise RunError(f"'{folder}/manifest.json' is not a run's manifest: it {problem}; {remedy}")


def digest_of(outputs: dict[str, Any]) -> str:
    """SHA-256, in hexadecimal, of what an index says of the outputs of a step."""
    return hashlib.sha256(json.dumps(outputs, sort_keys=True).encode()).hexdigest()


def require_index(path: Path, index: Any, remedy: str) -> None:
    """Refuse what is no index of a step: its seconds, and files of this folder with digests.

    Raises:
        RunError: it is something else; the message gives the remedy.
    """
    sound = isinstance(index, dict) and isinstance(index.get("outputs"), dict)
    if sound and isinstance(index.get("seconds"), int | float):
        expected = ((key, entry) for key, entry in index["outputs"].items())
        if all(
            isinstance(entry, list)
            and [type(part) for part in entry] == [str, str]
            and entry[0] in {f"{key}{suffix}" for suffix in SUFFIXES}
            for key, entry in expected
        ) and index.get("sha256") == digest_of(index["outputs"]):
            return
    raise RunError(
        f"'{path}' is no index of a step: expected seconds, for every output its file and the "
        f"file's SHA-256, and that of all of these; {remedy} and run the same command again"
    )


def refuse_different(
    folder: Path, earlier: dict[str, Any], asked: dict[str, Any], keys: list[str]
) -> None:
    """Refuse to go on with another run.

    Args:
        folder: the run folder.
        earlier: the manifest that is there.
        asked: that of the run that is asked for.
        keys: what makes two runs the same, beside the version.

    Raises:
        RunError: they differ; the message says in what.
    """
    versions = [manifest["versions"]["tvlens"].split(".")[:2] for manifest in (earlier, asked)]
    old = _flat({**{key: earlier[key] for key in keys}, "tvlens": ".".join(versions[0])})
    new = _flat({**{key: asked[key] for key in keys}, "tvlens": ".".join(versions[1])})
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


def now() -> str:
    """The time, to the second, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
