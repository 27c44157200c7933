"""`tvlens report`, as a user calls it, and the page that studies end with."""

import sys
from pathlib import Path

import pytest

from helpers import reports, trained
from helpers.commands import mistake, ok, run
from tvlens.cli import app as cli
from tvlens.errors import RunError

pytestmark = pytest.mark.usefixtures("wide")

SMALL = [
    "--shots", trained.SHOTS, "--steps", 5, "--ltv-seeds", 1, "--n-means", 12, "--n-test", 4,
    "--control-draws", 1, "--n-validation", 4,
]  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with `model`, `data`, and a `study` of both tasks."""
    folder = tmp_path_factory.mktemp("user")
    trained.save_model(folder / "model")
    trained.save_tasks(folder / "data")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", "100")
        options = ["--model", folder / "model", "--data", folder / "data", *SMALL]
        tasks = ["--tasks", ",".join(trained.TASKS)]
        out = ok("study", "text", *tasks, *options, "--out", folder / "study")
    assert out.splitlines()[-1] == f"Open {folder}/study/report.html in a browser"
    return folder


def test_a_study_ends_with_its_page(here):
    html = (here / "study" / "report.html").read_text()
    for task in trained.TASKS:
        assert (
            f'<div class="attention" data-task="{task}"><p class="how">What a head attends to'
            in html
        )
    assert "data in <code>heads.csv</code>" in html
    assert "carry 2 tasks: seven-on and fourteen-on, by AIE and LTV contribution" in html


def test_the_command_makes_the_same_page(here):
    out = here / "study" / "again.html"
    said = ok("report", here / "study", "--data", here / "data", "--out", out)
    assert said.splitlines()[-1].startswith(f"Wrote {out} (")
    assert out.read_bytes() == (here / "study" / "report.html").read_bytes()


def test_a_page_can_be_made_without_the_model(here, tmp_path, monkeypatch):
    monkeypatch.setattr("tvlens.cli.report.load_lens", None)
    out = tmp_path / "new" / "page.html"
    ok("report", here / "study", "--no-attention", "--out", out)
    html = out.read_text()
    assert "What heads attend to is left out: the report was made with --no-attention." in html
    assert "CircuitsVis=" not in html
    assert len(html) < len((here / "study" / "report.html").read_text()) - 1e6


def test_tasks_that_are_not_found_are_named_and_left_out(here, tmp_path):
    out = tmp_path / "page.html"
    result = run("report", here / "study", "--out", out)
    assert result.code == 0
    assert "warning: seven-on: What heads attend to is left out: unknown task" in result.err
    (tmp_path / "data").mkdir()
    for name, task in zip(trained.TASKS, reversed(trained.TASKS), strict=True):
        text = (here / "data" / f"{task}.json").read_text()
        (tmp_path / "data" / f"{name}.json").write_text(text)
    result = run("report", here / "study", "--data", tmp_path / "data", "--out", out)
    assert "the run asked another seven-on, or in another layout" in result.err
    assert "the run asked another seven-on" in out.read_text()


def test_an_unfinished_run_is_warned_of(tmp_path):
    half = reports.save(tmp_path / "half", {"heads": reports.heads()}, state="interrupted")
    result = run("report", half, "--no-attention", "--out", tmp_path / "page.html")
    assert result.code == 0
    lacks = "it lacks results.csv, headsets.csv, overlap_curves.csv"
    assert result.err == f"warning: run '{half}' is not finished: {lacks}\n"


def test_mistakes_are_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("tvlens.cli.report.load_lens", None)
    run_folder = reports.save(tmp_path / "run", reports.tables())
    assert "is no run folder: it does not exist" in mistake("report", tmp_path / "x", kind=RunError)
    said = mistake("report", run_folder, "--out", tmp_path, kind=RunError)
    assert "is a folder; name a file" in said
    other = reports.save(tmp_path / "other", reports.tables(), config={"model": "other"})
    said = mistake("report", run_folder, other, kind=RunError)
    assert "runs of different models cannot stand in one report" in said


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tvlens", "report", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
