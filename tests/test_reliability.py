"""A short run of the reliability suite, and that it sees what it looks for."""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from random import Random

import pandas as pd
import pytest
from reliability import fuzz
from reliability.children import Ended, Stop
from reliability.commands import differing, left_over, of_refusal
from reliability.counts import BAD, FINE, Counts, Verdict, report
from reliability.damage import damage
from reliability.kinds import KINDS, Kind
from reliability.stops import of_stop

from tvlens.errors import TaskError

ROOT = Path(__file__).parents[1]
SHORT = ["--inputs", "300", "--kills", "3", "--interrupts", "1", "--disks", "1", "--pairs", "1"]


def test_a_short_run_finds_nothing():
    """In a process of its own, where nothing has begun a thread and types are not checked."""
    words = [sys.executable, "-m", "reliability", *SHORT, "--commands", "train"]
    paths = {"PYTHONPATH": os.pathsep.join(str(ROOT / name) for name in (".", "scripts", "tests"))}
    env = os.environ | paths | {"COLUMNS": "100"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (whole,) = [line for line in done.stdout.splitlines() if line.startswith("│ all")]
    assert int(whole.split("│")[2]) > 300


# --- the watchers ---------------------------------------------------------------------------------


def raw(folder: Path) -> None:
    raise ValueError("odd")


def clear(folder: Path) -> None:
    raise TaskError("a file is odd")


def long(folder: Path) -> None:
    raise TaskError("a\nb")


def sleep(folder: Path) -> None:
    time.sleep(30)


def grow(folder: Path) -> None:
    # Fresh pages, step by step: an allocator may hold as much already, and give it out again.
    with mmap.mmap(-1, 1 << 29, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as kept:
        for start in range(0, len(kept), 1 << 24):
            time.sleep(0.1)
            kept[start : start + (1 << 24)] = b"x" * (1 << 24)
        time.sleep(60)


def leave(folder: Path) -> None:
    (folder / ".tvlens-tmp-x").write_text("")


def die(folder: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_code(folder: Path) -> None:
    os.mkdir("code-ran")


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize(
    ("read", "kind"),
    [
        (lambda folder: None, "fine"),
        (clear, "refused"),
        (raw, "raw"),
        (long, "long"),
        (sleep, "hangs"),
        (grow, "memory"),
        (leave, "left"),
        (die, "raw"),
        (run_code, "raw"),
    ],
)
def test_what_a_reader_does_wrong_is_seen(read, kind, tmp_path, monkeypatch):
    """And the inputs behind it are read all the same."""
    # This process, of which the readers are copies, may hold much or little itself.
    first: dict[int, int] = {}
    held = fuzz.memory_of
    monkeypatch.setattr(
        fuzz, "memory_of", lambda process: held(process) - first.setdefault(process, held(process))
    )
    monkeypatch.setattr(fuzz, "LONGEST_WAIT", 1.0 if read is sleep else 15.0)
    monkeypatch.setattr(fuzz, "MOST_MEMORY", 1 << 28)
    (tmp_path / "examples" / "a").mkdir(parents=True)
    (tmp_path / "examples" / "a" / "x.json").write_text("{}")
    made = Kind("a", lambda folder: None, read)
    found = list(fuzz.verdicts(made, [3, 8], 0, tmp_path / "examples", tmp_path / "place"))
    assert [(number, verdict.kind) for number, verdict in found] == [(3, kind), (8, kind)]


def test_the_same_number_is_the_same_damage(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for file in ("x.json", "y.csv", "z.jsonl"):
            (tmp_path / name / file).write_text('{"input": 1, "output": [2]}\n')
        damage(tmp_path / name, Random(4))
    assert differing(tmp_path / "a", tmp_path / "b") is None
    (tmp_path / "c").mkdir()
    assert differing(tmp_path / "a", tmp_path / "c").kind == "differs"


def test_every_kind_has_a_name_of_its_own():
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert sum(fuzz.shares(10_000).values()) == pytest.approx(10_000, abs=len(names))


def ended(status: int, err: str = "") -> Ended:
    return Ended(status, "", err, 1.0, 0.1, 0, False)


def test_ends_of_commands_are_told_apart():
    line = "error: Stopped. What is finished is kept in --out: the same command goes on from there."
    ctrl_c, kill = Stop(signal.SIGINT, 1.0), Stop(signal.SIGKILL, 1.0)
    assert of_stop(ended(130, f"{line}\n"), ctrl_c) == FINE
    assert of_stop(ended(130, "Aborted."), ctrl_c).kind == "raw"
    assert of_stop(ended(1, f"{line}\n"), ctrl_c).kind == "raw"
    assert of_stop(ended(1, "Traceback (most\nKeyError: 1"), ctrl_c).why.startswith("KeyError: 1")
    assert of_stop(ended(-9), kill) == FINE
    assert of_stop(ended(2), kill).kind == "raw"
    assert of_refusal(ended(2, "error: in use\n"), "in use").kind == "refused"
    assert of_refusal(ended(2, "error: a\nb\n")).kind == "long"
    assert of_refusal(ended(1, "error: a\n")).kind == "raw"


def test_times_make_no_difference_and_all_else_does(tmp_path):
    for name, seconds in (("a/run", 1.0), ("b/run", 2.0)):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        pd.DataFrame({"step": [1], "seconds": [seconds]}).to_csv(folder / "times.csv")
        facts = {"started": seconds, "timings": {"x": seconds}, "state": "finished"}
        (folder / "manifest.json").write_text(json.dumps(facts))
    a, b = tmp_path / "a" / "run", tmp_path / "b" / "run"
    assert differing(a, b) is None
    assert left_over(a) is None
    (b / "manifest.json").write_text(json.dumps({"state": "failed"}))
    assert differing(a, b).kind == "differs"
    (a / ".tvlens-tmp-heads.csv").write_text("")
    assert left_over(a).kind == "left"
    assert differing(a, b).kind == "differs"


def test_what_was_wrong_is_said_once_and_ends_badly(capsys):
    counts = Counts("files: a")
    counts.add("a:1", FINE)
    assert report([counts])
    for i in range(3):
        counts.add(f"a:{i}", Verdict("raw", f"x.json: no {i}", "KeyError in b.py:1"))
    assert not report([counts])
    said = capsys.readouterr().out
    assert said.count("KeyError in b.py:1") == 1
    assert "files: a: raw KeyError in b.py:1, 3 times, first a:0: x.json: no 0" in said
    assert {"raw", "left", "differs"} < set(BAD)
