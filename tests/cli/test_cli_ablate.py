"""`tvlens ablate`, as a user calls it: what it writes, and that it goes on where it was stopped."""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from helpers import tiny_regression, trained
from helpers.commands import finish_killed, manifest, mistake, ok, outcome
from tvlens.errors import RunError, ShapeError, TaskError, UnknownNameError
from tvlens.evaluation.ablation import ablate
from tvlens.evaluation.methods import evaluate
from tvlens.lens.heads import mean_head_outputs
from tvlens.scores.ablation import top_share
from tvlens.scores.score import Scores
from tvlens.studies import ablation as module
from tvlens.tasks.regression.prompts import PointCurves

pytestmark = pytest.mark.usefixtures("wide")

COLUMNS = ["task", "score", "rule", "set_to", "positions", "share", "k", "draw"]
ENDS = ["metric", "value", "ci_low", "ci_high", "n"]
SMALL = ["--shots", str(trained.SHOTS), "--steps", "10", "--draws", "3", "--n-test", "6"]
SMALL += ["--shares", "0,.125,.25,.5", "--scores", "aie,ltv,direct"]
FUNCTIONS = ["--steps", "3", "--draws", "2", "--n-test", "8", "--shares", ".5,0,.25"]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with `model`, `data` and `tiny.safetensors`, all that the command needs."""
    folder = tmp_path_factory.mktemp("user")
    trained.save_model(folder / "model")
    trained.save_tasks(folder / "data")
    tiny_regression.save(folder / "tiny.safetensors")
    return folder


@pytest.fixture(scope="module")
def source(here) -> list[object]:
    """The command with the tiny model on both tasks."""
    options = ["--model", here / "model", "--data", here / "data", *SMALL]
    return ["ablate", *options, "--tasks", ",".join(trained.TASKS)]


@pytest.fixture(scope="module")
def whole(source, here) -> Path:
    """A run of both tasks that nothing stopped."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", "100")
        ok(*source, "--set-to", "mean,other,resample", "--out", here / "whole")
    return here / "whole"


@pytest.fixture(scope="module")
def points(here) -> Path:
    """A run of a function class."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", "100")
        patched.chdir(here)
        words = ["--functions", "tiny.safetensors", *FUNCTIONS, "--set-to", "zero"]
        ok("ablate", *words, "--scores", "aie,ltv", "--out", here / "points")
    return here / "points"


def test_every_set_has_a_row_for_each_metric(whole):
    table = pd.read_csv(whole / "ablation.csv")
    assert list(table.columns) == COLUMNS + ENDS
    assert list(table["task"].unique()) == list(trained.TASKS)
    assert set(table["set_to"]) == {"mean", "other", "resample"}
    assert set(table["positions"]) == {"query"}
    metrics = ["accuracy", "cross_entropy"]
    assert set(table["metric"]) == {*metrics, *(f"{name}_change" for name in metrics)}
    assert (table["n"] == 6).all()
    one = table[
        (table["task"] == "seven-on")
        & (table["set_to"] == "mean")
        & (table["metric"] == "accuracy")
    ]
    counts = one.groupby("rule").size().to_dict()
    assert counts == {"top": 3 * 4, "random": 3 * 3 * 3, "exclusive": 6 * 4, "keep": 3 * 4}
    assert one.loc[one["rule"] == "top", "k"].tolist() == [0, 1, 2, 4] * 3
    assert one.loc[one["rule"] == "keep", "k"].tolist() == [8, 7, 6, 4] * 3
    assert (one["ci_low"] <= one["value"]).all()
    assert (one["value"] <= one["ci_high"]).all()
    parquet = pd.read_parquet(whole / "ablation.parquet")
    assert_frame_equal(parquet.convert_dtypes(), table.convert_dtypes())


def test_numbers_are_those_of_test_prompts_and_train_scores(whole):
    lens, task = trained.lens(), trained.TASKS["seven-on"]
    heads = pd.read_csv(whole / "scores.csv").query("task == 'seven-on' and score == 'aie'")
    aie = Scores(torch.tensor(heads["value"].to_numpy()).view(2, 4).float(), "aie", "probability")
    prompts = task.prompts("test", shots=trained.SHOTS, n=6)
    means = mean_head_outputs(lens, task.prompts("train", shots=trained.SHOTS, n=100))
    expected = ablate(lens, prompts, [top_share(aie, 0.25)], means=means)
    table = pd.read_csv(whole / "ablation.csv")
    own = table[(table["task"] == "seven-on") & (table["set_to"] == "mean")]
    row = own[(own["score"] == "aie") & (own["rule"] == "top") & (own["share"] == 0.25)]
    row = row.set_index("metric")["value"]
    assert row["cross_entropy"] == pytest.approx(float(expected.values[:, 0, 1].mean()), rel=1e-4)
    before = evaluate(lens, task, {}, kinds=["clean"], shots=trained.SHOTS, n=6)
    icl = before.set_index("metric")["value"]["cross_entropy"]
    assert row["cross_entropy_change"] == pytest.approx(row["cross_entropy"] - icl, abs=1e-5)
    none = own[(own["share"] == 0) & (own["rule"] == "top") & (own["metric"] == "cross_entropy")]
    assert none["value"].to_numpy() == pytest.approx(np.full(3, icl), rel=1e-5)


def test_areas_agreement_and_figures_stand_beside(whole):
    areas = pd.read_csv(whole / "ablation_areas.csv")
    assert list(areas.columns) == [*COLUMNS[:5], *ENDS]
    table = pd.read_csv(whole / "ablation.csv")
    of = "task == 'seven-on' and score == 'ltv' and rule == 'top' and set_to == 'other' and "
    of += "metric == 'cross_entropy'"
    curve = table.query(of)
    expected = np.trapezoid(curve["value"], curve["share"]) / 0.5
    (row,) = areas.query(of).itertuples()
    assert row.value == pytest.approx(expected)
    assert row.ci_low <= row.value <= row.ci_high
    assert "accuracy_minus_random" in set(areas["metric"])
    pairs = pd.read_csv(whole / "agreement.csv")["comparison"].unique()
    assert list(pairs) == ["aie and ltv", "aie and direct", "ltv and direct"]
    names = {path.name for path in (whole / "figures").iterdir()}
    assert names == {
        f"{rule}-{set_to}-query-accuracy.{end}"
        for rule in ("top", "exclusive", "keep")
        for set_to in ("mean", "other", "resample")
        for end in ("pdf", "png")
    }
    assert "heads are scored on train prompts" in manifest(whole)["filters"][-1]


def test_errors_at_and_past_the_trained_points(points):
    table = pd.read_csv(points / "ablation.csv")
    assert list(table.columns) == COLUMNS + ENDS
    errors = ["squared_error", "squared_error_past"]
    assert set(table["metric"]) == {*errors, *(f"{name}_change" for name in errors)}
    assert (table["n"] == 8).all()
    lens, task = tiny_regression.lens(), tiny_regression.TASK
    curves = task.curves("test", points=(6, 8, 10, 12, 14, 16), n=8)
    assert isinstance(curves, PointCurves)
    none = table[(table["share"] == 0) & (table["score"] == "aie")].set_index(["rule", "metric"])
    bare = [
        float(
            ablate(lens, curves.at(p), [top_share(Scores(torch.rand(2, 2), "a", ""), 0.0)],
                   set_to="zero").unablated.mean()
        )
        for p in curves.points
    ]  # fmt: skip
    assert none.loc[("top", "squared_error"), "value"] == pytest.approx(bare[0], rel=1e-4)
    past = none.loc[("top", "squared_error_past"), "value"]
    assert past == pytest.approx(np.mean(bare[1:]), rel=1e-4)
    assert none.loc[("keep", "squared_error"), "k"] == 4
    assert none.loc[("keep", "squared_error"), "value"] > bare[0]
    names = {path.stem for path in (points / "figures").iterdir()}
    assert names == {f"{r}-zero-query-{m}" for r in ("top", "exclusive", "keep") for m in errors}


def test_every_position_and_whole_answers(source, here, tmp_path):
    words = ["--rule", "top", "--positions", "query,all", "--set-to", "zero", "--exact-match"]
    words += ["--shares", "0,.5", "--tasks", "seven-on", "--draws", "1", "--scores", "aie"]
    said = ok(*source, *words, "--out", tmp_path)
    table = pd.read_csv(tmp_path / "ablation.csv")
    assert set(table.loc[table["positions"] == "query", "metric"]) == {
        *("accuracy", "cross_entropy", "exact_match"),
        *("accuracy_change", "cross_entropy_change", "exact_match_change"),
    }
    assert "exact_match" not in set(table.loc[table["positions"] == "all", "metric"])
    values = table[(table["metric"] == "cross_entropy") & (table["rule"] == "top")]
    by_place = values.set_index(["positions", "share"])["value"]
    assert by_place["query", 0.0] == pytest.approx(by_place["all", 0.0], rel=1e-4)
    assert by_place["query", 0.5] != pytest.approx(by_place["all", 0.5], rel=1e-2)
    assert "seven-on: mean accuracy over the shares, heads set to zero (all)" in said


def test_the_same_command_ablates_nothing_again(source, whole, undrawn, monkeypatch):
    before = outcome(whole)
    monkeypatch.setattr(module, "ablate", None)
    ok(*source, "--set-to", "mean,other,resample", "--out", whole)
    assert outcome(whole) == before


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(source, whole, tmp_path):
    folder = tmp_path / "run"
    words = [*source, "--set-to", "mean,other,resample", "--out", folder]
    command = [sys.executable, "-m", "tvlens.cli", *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    until = folder / "steps" / "seven-on" / "ablation" / "mean-query" / "0"
    finish_killed(folder, command, until, env)
    assert not (folder / "ablation.csv").exists()
    ok(*words)
    assert outcome(folder) == outcome(whole)
    assert manifest(folder)["earlier_sessions"][0]["state"] == "interrupted"


def test_sets_are_ablated_in_steps(source, whole, tmp_path, monkeypatch):
    monkeypatch.setitem(module.AT_ONCE, "query", 10)
    words = ["--set-to", "mean", "--tasks", "seven-on", "--rule", "top"]
    ok(*source, *words, "--out", tmp_path)
    folder = tmp_path / "steps" / "seven-on" / "ablation" / "mean-query"
    assert sorted(path.name for path in folder.iterdir()) == ["0", "1", "2", "3"]
    mine, theirs = (pd.read_csv(run / "ablation.csv") for run in (tmp_path, whole))
    theirs = theirs[(theirs["task"] == "seven-on") & (theirs["set_to"] == "mean")]
    theirs = theirs[theirs["rule"].isin(["top", "random"])].reset_index(drop=True)
    assert_frame_equal(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (
            ["--scores", "aie,atp"],
            UnknownNameError,
            "no score 'atp'; expected some of aie",
        ),
        (["--rule", "best"], UnknownNameError, "no rule 'best'; expected some of top, exclusive"),
        (
            ["--set-to", "median"],
            UnknownNameError,
            "cannot be set to 'median'; expected some",
        ),
        (["--positions", "3"], UnknownNameError, "at positions '3'; expected query or all"),
        (["--shares", "0,1.5"], ShapeError, "a share of 1.5 of the heads asked for; expected"),
        (["--shares", "-.1"], ShapeError, "a share of -0.1 of the heads asked for"),
        (["--shares", "a few"], UnknownNameError, "--shares 'a few': expected numbers from 0 to 1"),
        (["--scores", "aie"], UnknownNameError, "only one score is given; name two or more"),
        (["--functions", "linear"], UnknownNameError, "--tasks and --functions: expected one of"),
        (
            ["--tasks", "seven-on", "--set-to", "other"],
            TaskError,
            "set to their means over tasks other than 'seven-on', and no other task of",
        ),
    ],
)
def test_a_mistake_claims_no_folder(words, kind, said, source, tmp_path):
    message = mistake(*source, *words, "--out", tmp_path / "run", kind=kind)
    assert said in message
    assert not (tmp_path / "run").exists()


def test_mistakes_with_functions(here, points, tmp_path, monkeypatch):
    monkeypatch.chdir(here)
    command = ["ablate", "--functions", "tiny.safetensors", *FUNCTIONS, "--out", tmp_path / "run"]
    message = mistake(*command, "--set-to", "other", kind=TaskError)
    assert "name two or more tasks of one model" in message
    message = mistake(*command, "--exact-match", kind=UnknownNameError)
    assert "--functions are answered with numbers; leave it out" in message
    words = ["--functions", "tiny.safetensors", *FUNCTIONS, "--out", points]
    assert "belongs to a different run" in mistake("ablate", *words, kind=RunError)
    assert mistake("ablate", "--out", tmp_path / "run", kind=UnknownNameError).startswith("--tasks")


def test_help_names_every_option():
    said = ok("ablate", "--help")
    assert all(option in said for option in ("--rule", "--set-to", "--positions", "--functions"))
