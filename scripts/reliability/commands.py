"""The commands that are stopped, and whether their folders are those of undisturbed runs."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from helpers import trained
from reliability.children import Ended, count_operations, do, start, tvlens_command
from reliability.counts import FINE, Verdict, of_message, shortened

TEMPORARY = ".tvlens-tmp-"
LOCK = ".tvlens-lock"
TIMES = ("started", "finished", "timings", "peak_memory_gib", "earlier_sessions")
"""What a manifest says of the times of a run, besides its results."""


@dataclass(frozen=True)
class Command:
    """A command that writes a run folder.

    Attributes:
        name: what tables call it.
        words: all of it but `--out`.
        reference: the folder of an undisturbed run.
        seconds: how long that took.
        operations: how many operations on files.
        size: how many bytes it wrote.
    """

    name: str
    words: list[str]
    reference: Path
    seconds: float
    operations: int

    @property
    def size(self) -> int:
        """Bytes in its folder."""
        return sum(file.stat().st_size for file in files_of(self.reference).values())

    @property
    def largest(self) -> int:
        """Bytes in its largest file."""
        return max(file.stat().st_size for file in files_of(self.reference).values())

    def run(self, out: Path, before: Callable[[], object] = lambda: None) -> Ended:
        """Run it undisturbed."""
        return start(tvlens_command(self.words, out, before=before)).wait(limit=120.0)

    def judge_end(self, out: Path, ended: Ended | None = None) -> Verdict:
        """Run it to its end, if it is not there, and compare its folder with the undisturbed."""
        ended = ended or self.run(out)
        if ended.broken:
            return ended.broken
        if ended.status:
            return Verdict("raw", f"does not resume: {shortened(ended.err)}")
        return left_over(out) or differing(out, self.reference) or FINE


def make_commands(folder: Path, names: list[str] | None = None) -> list[Command]:
    """The commands on a tiny model, each run once undisturbed."""
    if names != ["train"]:
        do(lambda: (trained.save_model(folder / "model"), trained.save_tasks(folder / "data")))
    source = ["--model", str(folder / "model"), "--data", str(folder / "data")]
    source += ["--tasks", "seven-on", "--shots", str(trained.SHOTS)]
    few = ["--n-means", "10", "--n-validation", "3", "--n-test", "4"]
    few += ["--ltv-seeds", "1", "--control-draws", "1"]
    words = {
        "mediate": ["mediate", *source],
        "fit": ["fit", *source, "--steps", "4"],
        "train": ["regression", "train", "--functions", "linear", "--preset", "tiny"],
        "study": ["study", "text", *source, "--steps", "4", *few],
    }
    words["train"] += ["--steps", "120", "--device", "cpu"]
    made = []
    for name, each in words.items():
        if names is not None and name not in names:
            continue
        reference = folder / f"undisturbed-{name}"
        ended, operations = count_operations(each, reference)
        if ended.status or ended.broken:
            raise RuntimeError(f"`tvlens {' '.join(each)}` fails undisturbed: {ended.err}")
        made.append(Command(name, each, reference, ended.seconds, operations))
    return made


def files_of(folder: Path) -> dict[str, Path]:
    """All files of a run folder, by name, but the lock."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {str(path.relative_to(folder)): path for path in found}


def differing(found: Path, expected: Path) -> Verdict | None:
    """Whether two run folders differ in anything but recorded times."""
    a, b = files_of(found), files_of(expected)
    odd = sorted(set(a) ^ set(b)) or [name for name in b if timeless(a[name]) != timeless(b[name])]
    return Verdict("differs", f"{len(odd)} files, such as {odd[0]}") if odd else None


def left_over(folder: Path) -> Verdict | None:
    """Whether temporary files are there, or the lock is held."""
    names = sorted(path.name for path in folder.parent.rglob(f"{TEMPORARY}*"))
    if names:
        return Verdict("left", f"{len(names)} files, such as {names[0]}")
    try:
        if folder.is_dir():
            FileLock(folder / LOCK, timeout=0).acquire().lock.release()
    except Timeout:
        return Verdict("left", "the lock is held")
    return None


def timeless(path: Path) -> bytes:
    """The content of a file without the times recorded in it.

    Those are the manifest's `TIMES`, the seconds of every step, and the `times` of a training.
    """
    content = path.read_bytes()
    if path.stem == "times":
        return b""
    if path.name == "manifest.json":
        return _without(json.loads(content), TIMES)
    if path.name == ".tvlens-step.json":
        index = json.loads(content)
        for entry in index["outputs"].values():
            if entry[0].startswith("times."):
                entry[1] = ""
                index["sha256"] = ""
        return _without(index, ("seconds",))
    return content


def _without(content: dict[str, Any], keys: tuple[str, ...]) -> bytes:
    return json.dumps({k: x for k, x in content.items() if k not in keys}).encode()


def of_refusal(ended: Ended, words: str = "") -> Verdict:
    """A command that must end in one line on the error stream, with status 2."""
    lines = ended.err.strip("\n")
    if ended.broken:
        return ended.broken
    if ended.status != 2 or not lines.startswith("error: ") or words not in lines:
        return Verdict("raw", f"status {ended.status}: {shortened(ended.err)}")
    return of_message(lines.removeprefix("error: "))


def folders(parent: Path, name: str) -> Iterator[Path]:
    """New folders to run in, each in a folder of its own."""
    number = 0
    while True:
        number += 1
        yield parent / f"{name}-{number}" / "run"
