"""Every analysis runs on a tiny model from any folder, writes what it says, and resumes."""

import contextlib
import io
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from helpers import drawn, tiny_regression, trained
from tvlens.studies import regression as of_functions
from tvlens.studies.summary import REGRESSION_LABELS

ROOT = Path(__file__).parents[2]
SHOTS = str(trained.SHOTS)


@pytest.fixture(scope="module", autouse=True)
def small():
    """Studies of function classes that take seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(of_functions, "RegressionSettings", tiny_regression.SmallSettings)
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(trained.save_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return trained.save_tasks(tmp_path_factory.mktemp("data") / "tasks")


def _analyses():
    return [name for name in sys.modules if name.split(".")[0] == "analyses"]


def called(name, folder, *options):
    """Calls an analysis in this process, which is quicker; what it prints."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.syspath_prepend(str(ROOT))
        patch.chdir(folder)
        patch.setattr(sys, "argv", [name, *map(str, options)])
        # Modules are not those that another test has imported or will, with other settings.
        for module in _analyses():
            patch.delitem(sys.modules, module)
        try:
            runpy.run_module(f"analyses.{name}", run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
        finally:
            for module in _analyses():
                del sys.modules[module]
    return said.getvalue()


def run(name, folder, *options):
    """Calls an analysis from another folder; what it prints."""
    command = [sys.executable, "-m", f"analyses.{name}", *options]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps(folder):
    """What is in the steps of a run, and since when."""
    return {path: path.stat().st_mtime_ns for path in folder.glob("steps/**/*") if path.is_file()}


def assert_tables_first(folder):
    """No table of a run is written after its first figure."""
    figures = [path.stat().st_mtime_ns for path in folder.glob("figures/*")]
    tables = [path.stat().st_mtime_ns for path in folder.glob("*.csv")]
    assert tables
    assert max(tables) <= min(figures)


def assert_resumes(folder, said, name, *words):
    """An analysis called again says the same, and takes no step of a run again."""
    before = steps(folder)
    assert before
    with pytest.MonkeyPatch.context() as patch:
        drawn.leave_figures(patch)
        assert called(name, *words) == said
    assert steps(folder) == before


@pytest.fixture(scope="module")
def text_study(model, data, tmp_path_factory):
    """A study of both tasks by a process of its own: its folder, its options, what it printed."""
    folder = tmp_path_factory.mktemp("text")
    options = ["--model", model, "--data", str(data), "--tasks", ",".join(trained.TASKS)]
    options += ["--shots", SHOTS, "--steps", "4", "--ltv-seeds", "2", "--n-test", "6"]
    options += ["--out", "found"]
    return folder, options, run("text_study", folder, *options)


def test_text_study_writes_both_summaries_and_resumes(text_study):
    folder, options, said = text_study
    found = folder / "found"
    for name in ("summary", "headset_summary"):
        assert (found / f"{name}.md").read_text() in said
        assert (found / f"{name}.tex").read_text().startswith(r"\begin{tabular}")
    values, results = pd.read_csv(found / "summary.csv"), pd.read_csv(found / "results.csv")
    assert list(values["task"]) == [name for name in trained.TASKS for _ in "ab"] + [
        "mean over tasks",
        "mean over tasks",
    ]
    accuracy = results.query("metric == 'accuracy'").set_index(["task", "method", "prompt"])
    for task in trained.TASKS:
        row = values.query("task == @task and prompt == 'zero-shot'").iloc[0]
        assert row["LTV"] == accuracy.loc[(task, "ltv", "zero"), "value"]
        assert row["ICL"] == accuracy.loc[(task, "icl", "clean"), "value"]
    assert not values.isna().any(axis=None)

    assert_resumes(found, said, "text_study", folder, *options)


def test_weight_travel_shows_that_the_paper_weights_stay(model, data, tmp_path):
    task = next(iter(trained.TASKS))
    options = ["--model", model, "--task", str(data / f"{task}.json"), "--shots", SHOTS]
    options += ["--steps", "20", "--seeds", "2", "--out", "found"]
    said = called("weight_travel", tmp_path, *options)
    found = tmp_path / "found"
    assert (found / "summary.md").read_text() in said
    assert (found / "summary.tex").exists()
    assert (found / "figures" / "weight-travel.pdf").stat().st_size > 1000
    assert_tables_first(found)

    table = pd.read_csv(found / "summary.csv").set_index(["preset", "seed"])
    assert list(table.index) == [("paper", 0), ("paper", 1), ("default", 0), ("default", 1)]
    paper, default = table.loc["paper"], table.loc["default"]
    assert (paper["largest travel of a weight"] <= 1.01 * 20 * 5e-5).all()
    assert (paper["correlation"] > 0.9999).all()
    assert (paper["accuracy, end"] == paper["accuracy, start"]).all()
    assert (default["norm of start"] == 0).all()
    assert (default["accuracy, start"] == default["accuracy, no vector"]).all()
    assert (default["distance"] > 100 * paper["distance"]).all()

    weights = pd.read_csv(found / "weights.csv").set_index(["preset", "seed"])
    moved = (weights["end"] - weights["start"]).abs().groupby(["preset", "seed"]).max()
    expected = table["largest travel of a weight"].sort_index()
    np.testing.assert_allclose(moved.sort_index(), expected, rtol=1e-6)
    travel = pd.read_csv(found / "travel.csv")
    assert (travel.groupby(["preset", "seed"])["step"].max() == 20).all()

    assert_resumes(found, said, "weight_travel", tmp_path, *options)


def test_a_mistake_ends_in_one_line(tmp_path):
    message = "error: unknown task 'present-pats': did you mean 'present-past'"
    with pytest.raises(SystemExit, match=re.escape(message)) as end:
        called("weight_travel", tmp_path, "--task", "present-pats")
    assert "\n" not in end.value.code
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def regression(tmp_path_factory):
    """A folder with a tiny regression model in it."""
    folder = tmp_path_factory.mktemp("regression")
    tiny_regression.save(folder / "tiny.safetensors")
    return folder


SMALL = ["--steps", "3", "--n-test", "8"]


@pytest.fixture(scope="module")
def regression_study(regression):
    """A study of the tiny model: its folder and what it printed."""
    words = ["--functions", "tiny.safetensors", "--out", "run", "--shifts", "none", *SMALL]
    return regression / "run", called("regression_study", regression, *words, "--ltv-seeds", "2")


def test_regression_study_writes_summary_and_claims(regression_study):
    folder, said = regression_study
    results = pd.read_csv(folder / "results.csv")
    summary = pd.read_csv(folder / "summary.csv").set_index("method")
    rows = results[
        (results["method"] == "ltv_class")
        & (results["prompt"] == "clean")
        & (results["points"] == tiny_regression.TRAINED)
    ].set_index("metric")["value"]
    assert summary.loc["LTV", "error, T_train"] == pytest.approx(rows["squared_error"])
    assert summary.loc["LTV", "gain, T_train"] == pytest.approx(rows["gain"])
    # Only what was measured has a row.
    there = {REGRESSION_LABELS[name] for name in results["method"] if name in REGRESSION_LABELS}
    assert set(summary.index) == there < {*REGRESSION_LABELS.values()}
    claims = pd.read_csv(folder / "claims.csv")
    assert len(claims) == 9
    assert set(claims["holds"]) <= {"yes", "no", "(yes)", "(no)"}
    assert "What the paper claims" in said


def test_whole_answers_compares_what_is_trained_on_them(model, data, tmp_path):
    options = ["--model", model, "--data", str(data), "--tasks", ",".join(trained.TASKS)]
    options += ["--shots", SHOTS, "--steps", "4", "--n-test", "6", "--n-means", "10"]
    options += ["--n-effects", "4", "--out", "found"]
    said = called("whole_answers", tmp_path, *options)
    found = tmp_path / "found"
    for name in ("whole-answers", "gaps"):
        assert (found / f"{name}.md").read_text() in said
        assert (found / f"{name}.tex").read_text().startswith(r"\begin{tabular}")
    assert (found / "figures" / "whole-answers.pdf").stat().st_size > 1000
    assert_tables_first(found)

    table = pd.read_csv(found / "whole-answers.csv").set_index(["task", "method"])
    methods = ["first token, once", "first token, everywhere", "whole, once", "whole, everywhere"]
    methods += ["whole, everywhere, means at answers", "none", "icl"]
    results = pd.read_csv(found / "results.csv")
    results = results.set_index(["task", "method", "prompt", "metric"])["value"]
    for task in trained.TASKS:
        assert {*table.loc[task].index} == {*methods}
        row = table.loc[(task, "whole, everywhere")]
        assert row["zero, accuracy"] == results[task, "whole, everywhere", "zero", "accuracy"]
        assert row["seconds of a step"] > 0
        icl = table.loc[(task, "icl")]
        assert icl["zero, exact_match"] == results[task, "icl", "clean", "exact_match"]
        assert icl["zero, exact_match"] == icl["shuffled, exact_match"] > 0.5
    trainings = pd.read_csv(found / "trainings.csv")
    assert len(trainings) == 4 * len(trained.TASKS)
    assert (trainings["validation loss"] <= trainings["validation loss without"]).all()
    gaps = pd.read_csv(found / "gaps.csv")
    assert list(gaps["task"]) == [*trained.TASKS]
    of_whole = trainings[trainings["training"] != "first token"]
    best = of_whole.loc[of_whole.groupby("task", sort=False)["validation loss"].idxmin()]
    assert list(gaps["vector"]) == list(best["training"])
    gap = gaps["zero-shot, exact match"] - gaps["ICL, exact match"]
    assert np.allclose(gaps["gap"], gap)

    assert_resumes(found, said, "whole_answers", tmp_path, *options)


def test_patching_says_where_the_task_moves(regression, model, data):
    first = next(iter(trained.TASKS))
    words = ["--preset", "smoke", "--tasks", first, "--data", data, "--model", model]
    words += ["--shots", SHOTS, "--regression", "tiny.safetensors", "--out", "patching"]
    said = called("patching", regression, *words)
    found = regression / "patching"
    assert (found / "moves.md").read_text() in said
    table = pd.read_csv(found / "patching.csv")
    assert {*table["direction"]} == {"denoising", "noising"}
    assert {*table["task"]} == {first, "tiny.safetensors"}
    assert {path.stem for path in (found / "figures").iterdir()} == {
        "roles-text",
        "roles-regression",
    }
    assert_tables_first(found)
    assert_resumes(found, said, "patching", regression, *words)


def test_approximation_is_held_against_exact_effects(model, data, tmp_path):
    first = next(iter(trained.TASKS))
    words = ["--preset", "smoke", "--tasks", first, "--data", data, "--model", model]
    words += ["--shots", SHOTS, "--screen", "4", "--out", "found"]
    said = called("approximation", tmp_path, *words)
    assert (tmp_path / "found" / "approximation.md").read_text() in said
    table = pd.read_csv(tmp_path / "found" / "approximation.csv").iloc[0]
    assert table["prompts"] == 3
    assert -1 <= table["Spearman"] <= 1
    assert_resumes(tmp_path / "found", said, "approximation", tmp_path, *words)


def test_error_ratio_measures_both_kinds_of_rows(regression):
    words = ["tiny.safetensors", "--out", "ratio", *SMALL]
    called("error_ratio", regression, *words)
    table = pd.read_csv(regression / "ratio" / "summary.csv")
    assert list(table["points"]) == [6, 9, 12, 15] * 2
    assert list(table["rows"]) == ["untrained"] * 4 + ["re-used"] * 4
    at_train = table[table["points"] == 6]["bare error"]
    # Up to T_train both kinds of rows are the same.
    assert at_train.iloc[0] == at_train.iloc[1]
    longer = table[table["points"] == 15]["bare error"]
    assert longer.iloc[0] != longer.iloc[1]


def test_ablation_of_both_modalities(regression, model, data):
    names = ",".join(trained.TASKS)
    words = ["--preset", "smoke", "--data", str(data), "--tasks", names, "--model", model]
    words += ["--shots", SHOTS, "--functions", "tiny.safetensors", "--out", "ablation"]
    said = called("ablation", regression, *words)
    both = regression / "ablation" / "both"
    assert (both / "summary.md").read_text() in said
    assert_tables_first(both)
    table = pd.read_csv(both / "ablation.csv")
    assert list(table["task"].unique()) == [*trained.TASKS, "tiny"]
    figures = {path.stem for path in (both / "figures").iterdir()}
    assert figures == {
        f"{name}-{rule}-mean-{metric}"
        for rule in ("top", "exclusive")
        for name, metric in (
            ("text", "accuracy"),
            ("regression", "squared_error"),
            ("regression", "squared_error_past"),
        )
    }
    areas = pd.read_csv(both / "ablation_areas.csv")
    summary = pd.read_csv(both / "summary.csv").set_index(["task", "score", "measure"])
    of = "task == 'seven-on' and score == 'ltv' and rule == 'top' and metric == "
    row = summary.loc[("seven-on", "ltv", "accuracy")]
    (found,) = areas.query(f"{of} 'accuracy'")["value"]
    assert row["best heads"] == pytest.approx(found)
    (found,) = areas.query(f"{of} 'accuracy_minus_random'")["value"]
    assert row["best - random"] == pytest.approx(found)
    assert 0 <= row["overlap with aie"] <= 1
    depths = pd.read_csv(both / "depths.csv")
    assert depths["value"].between(0, 1).all()
    assert {"seven-on aie", "tiny aie"} <= {*depths["first"], *depths["second"]}
    assert set(pd.read_csv(both / "task_agreement.csv")["first"]) == set(trained.TASKS)
    assert_resumes(regression / "ablation" / "text", said, "ablation", regression, *words)


def test_both_modalities_are_put_side_by_side(text_study, regression_study, tmp_path):
    words = ["--text", text_study[0] / "found", "--regression", regression_study[0]]
    said = called("modalities", tmp_path, *words, "--out", "both")
    table = pd.read_csv(tmp_path / "both" / "modalities.csv")
    assert list(table["modality"]) == ["text"] * 2 + ["regression"] * 4
    assert table["overlap above chance"].max() <= 1
    for name in ("effective share, AIE", "effective share, LTV"):
        assert table[name].dropna().between(0, 1).all()
    assert (tmp_path / "both" / "figures" / "modalities.pdf").stat().st_size
    assert_tables_first(tmp_path / "both")
    methods = pd.read_csv(tmp_path / "both" / "methods.csv")
    assert list(methods["task"]) == [*trained.TASKS, "tiny"]
    assert "Head sets of an eighth" in said


def test_rivals_stand_in_tables_and_their_vectors_carry_over(model, data, regression, tmp_path):
    first = next(iter(trained.TASKS))
    options = ["--preset", "smoke", "--model", model, "--data", str(data), "--shots", SHOTS]
    options += ["--tasks", first, "--functions", str(regression / "tiny.safetensors")]
    options += ["--out", "rivals"]
    said = called("rivals", tmp_path, *options)
    found = tmp_path / "rivals"
    table = pd.read_csv(found / "text.csv")
    assert {"LTV", "head mixing", "in-context vector", "Hendel's task vector"} <= {*table["method"]}
    assert table.loc[table["method"] == "ICL", "accuracy"].notna().all()
    assert table.loc[table["method"] == "LTV", "d_NTP"].notna().all()
    tidy = pd.read_csv(found / "text" / "text_tasks.csv")
    own = tidy.query("method == 'ltv' and prompt == 'zero'").set_index("metric")["value"]
    row = table.query("method == 'LTV' and prompts == 'zero'").iloc[0]
    assert row["accuracy"] == own["accuracy"]
    assert row["d_NTP"] == own["d_ntp"]
    bare = tidy.query("method == 'none' and prompt == 'zero' and metric == 'd_ntp'").iloc[0]
    learned = tidy.query("method == 'ltv' and prompt == 'zero' and metric == 'd_ntp'").iloc[0]
    row = table.query("method == 'no vector' and prompts == 'zero'").iloc[0]
    assert row["farther than LTV"] == f"{int(bare['ci_low'] > learned['ci_high'])} of 1"
    assert row["nearer than LTV"] == f"{int(bare['ci_high'] < learned['ci_low'])} of 1"
    shown = (found / "text_tasks.md").read_text()
    value, low, high = (learned[name] for name in ("value", "ci_low", "ci_high"))
    assert f"| {first} | zero | LTV | " in shown
    assert f" | {value:.2f} [{low:.2f}, {high:.2f}] |" in shown
    heads = pd.read_csv(found / "heads_needed.csv")
    assert {*heads["method"]} == {"LTV", "L1", "FV"}
    assert {*heads.loc[heads["method"] != "L1", "k"]} == {1, 3, 8}
    errors = pd.read_csv(found / "regression.csv")
    assert {"1 T", "1.5 T", "2.5 T"} <= {*errors.columns}
    assert "below the LTV of the class" in said
    for name in ("rivals-accuracy", "rivals-d_ntp", f"states-{first}", "heads-needed"):
        assert (found / "text" / "figures" / f"{name}.pdf").stat().st_size > 1000
    assert_resumes(found / "text", said, "rivals", tmp_path, *options)

    options = ["--study", str(found / "text"), "--model", model, "--data", str(data)]
    called("transfer", tmp_path, *options, "--out", "transfer")
    assert_tables_first(tmp_path / "transfer")
    carried = pd.read_csv(tmp_path / "transfer" / "transfer.csv")
    assert {*carried["layout"]} == {"question-answer", "input-output", "arrow", "running text"}
    there = carried.query("layout == 'question-answer' and method == 'ltv'")["value"].item()
    assert there == own["accuracy"]
    message = "rivals holds no vectors of ltv, fv_layer, mixing for zero-shot prompts"
    with pytest.raises(SystemExit, match=message):
        called("transfer", tmp_path, "--study", str(found), "--out", "none")
