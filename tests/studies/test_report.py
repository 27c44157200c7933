"""Reports of run folders: which may stand together, what is refused, what heads attend to."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from helpers import reports, tiny_regression, trained
from tvlens.errors import ModelError, RunError
from tvlens.runs.finished import find_run
from tvlens.scores.direct import direct_effects
from tvlens.studies import examples
from tvlens.studies.examples import examples_of
from tvlens.studies.report import (
    Asked,
    command_of,
    find_runs,
    require_writable,
    write_report,
)

HEADS = [(0, 1), (1, 3)]


def test_patterns_and_direct_effects_are_the_models_own():
    lens, task = trained.lens(), trained.TASKS["seven-on"]
    found = examples_of(lens, task, HEADS, shots=trained.SHOTS, seed=3)
    prompts = task.prompts("test", shots=trained.SHOTS, n=examples.PROMPTS, seed=3)
    batch = lens.encode(prompts)
    parts = direct_effects(lens, prompts).heads
    assert len(found) == examples.PROMPTS
    for i, each in enumerate(found):
        assert "".join(each.tokens) == prompts.texts[i]
        assert each.answer == prompts.answers[i]
        assert set(each.patterns) == set(each.direct) == set(HEADS)
        for layer, head in HEADS:
            hook = f"blocks.{layer}.attn.hook_pattern"
            with torch.no_grad():
                _, cache = lens.backend.model.run_with_cache(
                    batch.inputs[i : i + 1], names_filter=hook
                )
            expected = cache[hook][0, head].numpy()
            shown = each.patterns[layer, head] / 255
            assert shown == pytest.approx(expected, abs=0.5 / 255 + 1e-6)
            assert shown.sum(axis=1) == pytest.approx(np.ones(len(shown)), abs=0.1)
            assert each.direct[layer, head] == pytest.approx(float(parts[i, layer, head]))


def test_prompts_that_are_padded_lose_their_padding(monkeypatch):
    lens, task = trained.lens(), trained.TASKS["seven-on"]
    short = task.prompts("test", shots=1, n=1)
    long = task.prompts("test", shots=3, n=1)
    both = type(short)(short.task, "test", "clean", 3, 0, (*short.items, *long.items))
    monkeypatch.setattr(type(task), "prompts", lambda *_, **__: both)
    found = examples_of(lens, task, HEADS, shots=3, seed=0)
    assert ["".join(each.tokens) for each in found] == both.texts
    alone = lens.encode(short)
    hook = "blocks.1.attn.hook_pattern"
    with torch.no_grad():
        _, cache = lens.backend.model.run_with_cache(alone.inputs, names_filter=hook)
    shown = found[0].patterns[1, 3] / 255
    assert shown == pytest.approx(cache[hook][0, 3].numpy(), abs=0.5 / 255 + 1e-4)


def test_points_have_names_instead_of_tokens():
    lens = tiny_regression.lens()
    (first, *_) = examples_of(lens, tiny_regression.TASK, [(0, 0)], shots=5, seed=0)
    assert first.tokens[:3] == ("x 1", "y 1", "x 2")
    assert first.patterns[0, 0].shape == (11, 11)
    assert "prediction" in first.unit
    float(first.answer)


def test_a_model_that_does_not_tell_its_parts_is_shown_without(monkeypatch):
    def refuse(*_: object) -> None:
        raise ModelError("parts do not sum")

    monkeypatch.setattr(examples, "direct_effects", refuse)
    found = examples_of(trained.lens(), trained.TASKS["seven-on"], HEADS, shots=2, seed=0)
    assert found[0].patterns
    assert not found[0].direct


def test_a_page_of_a_folder_is_the_same_wherever_that_lies(tmp_path):
    pages = []
    for name in ("one", "two"):
        folder = reports.save(tmp_path / name, reports.tables())
        pages.append(write_report(find_runs([folder]), folder / "report.html").read_bytes())
    assert pages[0] == pages[1]
    assert b"data in <code>heads.csv</code>" in pages[0]
    assert b"the report was made with --no-attention" in pages[0]


def test_a_task_that_cannot_be_asked_is_said_and_the_others_are_shown(tmp_path):
    folder = reports.save(tmp_path / "run", {"heads": reports.heads(("seven-on", "antonym"))})
    task = trained.TASKS["seven-on"]
    few = replace(task, pairs=task.pairs[:4])
    asked = {
        "seven-on": Asked(trained.lens(), task, 2, 0),
        "antonym": Asked(trained.lens(), few, 5, 0),
    }
    # The tiny model has 2 layers, and the best head of the table is in layer 2.
    html = write_report(find_runs([folder]), tmp_path / "page.html", asked).read_text()
    assert "What heads attend to is left out: " in html
    assert "CircuitsVis" in html


def test_runs_of_one_model_stand_together(tmp_path):
    first = reports.save(tmp_path / "a", {"heads": reports.heads()})
    second = reports.save(tmp_path / "b", {"patching": reports.patched()}, command="patch")
    config = {"first": "aie@a/heads.csv", "second": "aie@b/heads.csv"}
    sets = {"headsets": reports.overlaps()[1]}
    compared = reports.save(tmp_path / "c", sets, command="compare", config=config)
    runs = find_runs([first, second, compared, first])
    assert [run.folder for run in runs] == [first, second, compared]
    html = write_report(runs, tmp_path / "page.html").read_text()
    assert "data in <code>b/patching.csv</code>" in html
    assert "tvlens compare aie@a/heads.csv aie@b/heads.csv" in html


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"config": {"model": "other"}},
            "'{0}/a' is of tiny, '{0}/b' of other; make a report of each",
        ),
        (
            {"data": {"weights and tokenizer": "2" * 64}},
            "'{0}/a' is of tiny, '{0}/b' of tiny with other weights; make a report of each",
        ),
        (
            {"command": "study regression", "config": {"functions": ["linear"]}},
            "'{0}/a' is of tiny, '{0}/b' of linear; make a report of each",
        ),
    ],
)
def test_runs_of_different_models_are_refused(tmp_path, changes, said):
    folders = [
        reports.save(tmp_path / "a", reports.tables()),
        reports.save(tmp_path / "b", reports.tables(), **changes),
    ]
    with pytest.raises(RunError) as caught:
        find_runs(folders)
    expected = "runs of different models cannot stand in one report: " + said.format(tmp_path)
    assert str(caught.value) == expected


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(RunError) as caught:
        find_run(tmp_path / "none")
    assert str(caught.value) == (
        f"'{tmp_path}/none' is no run folder: it does not exist; give a folder that a tvlens "
        "command wrote with --out"
    )
    with pytest.raises(RunError, match=r"is no run folder: it holds no manifest\.json; give a"):
        find_run(tmp_path)
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(
        RunError, match="is not a run's manifest: it is no object; give another run"
    ):
        find_run(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(RunError, match=r"cannot read .*manifest.json"):
        find_run(tmp_path)


def test_a_run_that_is_not_finished_says_what_is_missing(tmp_path):
    begun = reports.save(tmp_path / "a", {}, state="interrupted", timings={"x/means": 1, "x/y": 2})
    with pytest.raises(RunError) as caught:
        find_run(begun)
    assert str(caught.value) == (
        f"run '{begun}' is not finished (interrupted): it has kept 2 steps of `study text` and "
        "lacks results.csv, heads.csv, headsets.csv, overlap_curves.csv; run the same command "
        "again, which goes on from there"
    )
    half = reports.save(tmp_path / "b", {"heads": reports.heads()}, state="failed")
    run = find_run(half)
    assert not run.finished
    assert run.missing == ("results", "headsets", "overlap_curves")
    html = write_report([run], tmp_path / "page.html").read_text()
    assert (
        "The run <code>b</code> is not finished (its state is failed): it lacks results.csv, "
        in html
    )


def test_a_run_of_a_newer_version_is_refused(tmp_path):
    versions = reports.manifest()["versions"]
    for newer in ("0.2.0", "1.0"):
        folder = reports.save(
            tmp_path / newer, reports.tables(), versions=versions | {"tvlens": newer}
        )
        with pytest.raises(RunError) as caught:
            find_run(folder)
        assert str(caught.value) == (
            f"run '{folder}' was written by tvlens {newer}, and this is tvlens 0.1.0, which cannot "
            "know what it holds; install that version or a later one"
        )
    for older in ("0.1.7", "0.0.9", "unknown"):
        folder = reports.save(
            tmp_path / f"v{older}", reports.tables(), versions=versions | {"tvlens": older}
        )
        find_run(folder)


def test_a_damaged_table_is_named(tmp_path):
    folder = reports.save(tmp_path / "run", {})
    (folder / "heads.csv").write_bytes(b'"a\xff')
    with pytest.raises(RunError, match=r"cannot read .*heads.csv: .*; expected a table in CSV"):
        find_run(folder)


def test_a_table_of_something_else_is_refused_with_the_name_of_its_folder(tmp_path):
    results = reports.text_results()
    results["value"] = "much"
    folder = reports.save(tmp_path / "run", {"results": results})
    with pytest.raises(RunError) as caught:
        write_report(find_runs([folder]), tmp_path / "page.html")
    said = f"cannot read {folder}: .*; expected tables and manifests as tvlens commands write them"
    assert re.match(said, str(caught.value))
    assert not (tmp_path / "page.html").exists()


def test_a_page_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(RunError) as caught:
        require_writable(tmp_path)
    assert str(caught.value) == (
        f"the report cannot be written: '{tmp_path}' is a folder; name a file, such as "
        f"{tmp_path}/report.html"
    )
    (tmp_path / "file").touch()
    with pytest.raises(RunError) as caught:
        write_report([], tmp_path / "file" / "page.html")
    assert str(caught.value) == (
        f"the report cannot be written: '{tmp_path}/file' cannot be made (File exists); choose "
        "another --out"
    )


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({}, "tvlens study text --model tiny --tasks present-past,antonym --seed 0"),
        (
            {"command": "score by aie,ltv"},
            "tvlens score --model tiny --task present-past,antonym --by aie,ltv --seed 0",
        ),
        (
            {"command": "study regression", "config": {"functions": ["linear", "relu"]}},
            "tvlens study regression --functions linear,relu --seed 0",
        ),
        ({"command": "patching by role"}, "patching by role"),
    ],
)
def test_the_command_is_told_as_it_is_typed(changes, command):
    assert command_of(reports.manifest(**changes)) == command


def test_tokens_of_positions_come_from_the_steps(tmp_path):
    tables = {"patching": reports.patched(positions=True)}
    folder = reports.save(tmp_path / "run", tables, command="patch")
    step = folder / "steps" / "present-past" / "resid_post" / "exact" / "0"
    step.mkdir(parents=True)
    (step / "facts.json").write_text(json.dumps({"tokens": list(reports.TOKENS)}))
    html = write_report(find_runs([folder]), tmp_path / "page.html").read_text()
    assert '"go 2"' in html
    (step / "facts.json").write_text("[")
    html = write_report(find_runs([folder]), tmp_path / "page.html").read_text()
    assert '"go 2"' not in html


def test_five_tasks_with_all_their_patterns_stay_small(tmp_path: Path):
    """As many heads, prompts and tokens as a study of the bundled model has."""
    rng = np.random.default_rng(0)
    tasks = tuple(f"task-{i}" for i in range(5))
    rows = [
        {"task": task, "layer": layer, "head": head, "aie": x, "aie_low": x, "aie_high": x}
        | {"omega": x, "contribution": x}
        for task in tasks
        for layer in range(30)
        for head in range(9)
        for x in rng.normal(size=1)
    ]
    heads = [(layer, head) for layer in range(30) for head in range(9)][: examples.MOST_HEADS]
    tril = np.tril(rng.integers(0, 256, (60, 60))).astype(np.uint8)
    one = reports.Example(
        tuple(f"token{i}" for i in range(60)), "a", dict.fromkeys(heads, tril),
        dict.fromkeys(heads, 0.123456), "logits",
    )  # fmt: skip
    tables = {"heads": pd.DataFrame(rows), "results": reports.text_results(tasks)}
    tables |= dict(zip(("overlap_curves", "headsets"), reports.overlaps(tasks), strict=True))
    runs = [reports.RunTables(".", "c", reports.manifest(), tables)]
    page = reports.contents(runs=runs, examples={task: (one, one) for task in tasks})
    from tvlens.figures.report.page import report_page

    assert len(report_page(page).encode()) < 5e6
