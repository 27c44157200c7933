"""`tvlens score`, as a user calls it: what it writes, and that it goes on where it was stopped."""

import os
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from helpers import trained
from helpers.commands import finish_killed, manifest, mistake, ok, outcome
from tvlens.cli import app as cli
from tvlens.errors import RunError
from tvlens.scores.agreement import overlap_curve, spearman, spearman_interval
from tvlens.scores.catalogue import SCORES, STUDIED
from tvlens.studies import scoring, stages

pytestmark = pytest.mark.usefixtures("wide")

NAMES = ["aie", "ltv", "attribution", "direct", "induction", "answers", "gates", "interfering"]
SMALL = ["--shots", str(trained.SHOTS), "--steps", "10"]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with `model` and `data`, all that the command of a user needs."""
    folder = tmp_path_factory.mktemp("user")
    trained.save_model(folder / "model")
    trained.save_tasks(folder / "data")
    return folder


@pytest.fixture(scope="module")
def source(here) -> list[object]:
    """The command with the tiny model on both tasks."""
    options = ["--model", here / "model", "--data", here / "data", *SMALL]
    return ["score", *options, "--task", ",".join(trained.TASKS)]


@pytest.fixture(scope="module")
def whole(source, here) -> Path:
    """A run of all scores that nothing stopped."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", "100")
        ok(*source, "--out", here / "whole")
    return here / "whole"


def test_every_score_of_the_catalogue_is_made(whole):
    table = pd.read_csv(whole / "scores.csv")
    assert list(table.columns) == ["task", "score", "layer", "head", "value", "ci_low", "ci_high"]
    assert list(table["score"].unique()) == NAMES
    assert list(table["task"].unique()) == list(trained.TASKS)
    assert not table.duplicated(["task", "score", "layer", "head"]).any()
    assert len(table) == len(trained.TASKS) * len(NAMES) * 2 * 4
    sure = table[table["score"] != "ltv"]
    assert (sure["ci_low"] <= sure["value"]).all()
    assert (sure["value"] <= sure["ci_high"]).all()
    assert table.loc[table["score"] == "ltv", ["ci_low", "ci_high"]].isna().all(axis=None)
    parquet = pd.read_parquet(whole / "scores.parquet")
    assert_frame_equal(parquet.convert_dtypes(), table.convert_dtypes())


def test_scores_are_those_of_the_other_commands(whole, here, tmp_path):
    words = ["--model", here / "model", "--data", here / "data", "--tasks", "seven-on"]
    ok("mediate", *words, *SMALL[:2], "--out", tmp_path / "aie")
    ok("fit", *words, *SMALL, "--out", tmp_path / "ltv")
    table = pd.read_csv(whole / "scores.csv").query("task == 'seven-on'").set_index("score")
    aie = pd.read_csv(tmp_path / "aie" / "heads.csv")
    for mine, theirs in (("value", "aie"), ("ci_low", "aie_low"), ("ci_high", "aie_high")):
        assert table.loc["aie", mine].tolist() == aie[theirs].tolist()
    ltv = pd.read_csv(tmp_path / "ltv" / "heads.csv")
    assert table.loc["ltv", "value"].tolist() == ltv["contribution"].tolist()


def test_every_two_scores_are_compared(whole):
    agreement = pd.read_csv(whole / "agreement.csv")
    assert list(agreement.columns) == (
        ["task", "comparison", "measure", "k", "value", "low", "high", "chance", "p_value"]
    )
    pairs = [f"{a} and {b}" for i, a in enumerate(NAMES) for b in NAMES[i + 1 :]]
    assert list(agreement["comparison"].unique()) == pairs
    assert set(agreement.loc[agreement["measure"] == "overlap", "k"]) == {5}
    rows = pd.read_csv(whole / "scores.csv").query("task == 'fourteen-on'")
    a, b = (
        torch.tensor(rows[rows["score"] == name]["value"].tolist()).view(2, 4)
        for name in ("aie", "direct")
    )
    own = agreement.query("task == 'fourteen-on' and comparison == 'aie and direct'")
    (row,) = own[own["measure"] == "spearman"].itertuples()
    assert (row.value, row.p_value) == pytest.approx(spearman(a, b))
    assert (row.low, row.high) == pytest.approx(spearman_interval(a, b))
    curves = pd.read_csv(whole / "overlap_curves.csv")
    mine = curves.query("task == 'fourteen-on' and comparison == 'aie and direct'")
    expected = overlap_curve(a, b, ks=[1, 2, 3, 5, 7])
    assert mine["overlap"].to_numpy() == pytest.approx(expected["overlap"].to_numpy())
    names = {path.name for path in (whole / "figures").iterdir()}
    assert {f"{kind}-{task}.pdf" for kind in ("scores", "overlap") for task in trained.TASKS} <= (
        names
    )


def test_heads_are_held_against_chance_and_tasks_against_each_other(whole):
    table = pd.read_csv(whole / "significance.csv")
    assert set(table["task"]) == set(trained.TASKS)
    # Attention cannot be below zero, and LTVs have no single prompts.
    assert set(table["score"]) == {"aie", "attribution", "direct"}
    assert len(table) == len(trained.TASKS) * 3 * 8
    assert (table["q_value"] >= table["p_value"]).all()
    scores = pd.read_csv(whole / "scores.csv")
    both = table.merge(scores, on=["task", "score", "layer", "head"])
    assert both["value_x"].to_numpy() == pytest.approx(both["value_y"].to_numpy(), abs=1e-6)
    shared = pd.read_csv(whole / "task_agreement.csv")
    # Induction is of no task.
    assert list(shared["score"].unique()) == [name for name in NAMES if name != "induction"]
    one = shared.query("score == 'aie' and measure == 'spearman' and first == 'seven-on'")
    assert one["second"].tolist() == ["fourteen-on"]
    assert one["ceiling"].between(0, 1).all()
    assert shared.query("score == 'ltv'")["ceiling"].isna().all()
    assert (whole / "figures" / "tasks-aie.pdf").exists()
    pooled = pd.read_csv(whole / "pooled.csv").query("score == 'aie'")
    maps = [
        scores.query("score == 'aie' and task == @task")["value"].to_numpy()
        for task in trained.TASKS
    ]
    expected = np.mean([(x - x.mean()) / x.std() for x in maps], axis=0)
    assert pooled["value"].to_numpy() == pytest.approx(expected, abs=1e-5)
    assert pooled["task"].unique().tolist() == ["pooled"]


def test_the_interval_of_a_rank_correlation():
    ranks = torch.arange(100.0)
    moved = ranks.clone()
    moved[:60] = moved[:60].flip(0)
    low, high = spearman_interval(ranks.view(10, 10), moved.view(10, 10))
    value = spearman(ranks.view(10, 10), moved.view(10, 10)).value
    assert low < value < high
    # Simulated pairs of normal variables of this rank correlation scatter as widely.
    rho = 2 * np.sin(np.pi * value / 6)
    generator = np.random.default_rng(0)
    drawn = [
        spearman(*torch.tensor(pair.T.copy()).view(2, 10, 10)).value
        for pair in generator.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=(400, 100))
    ]
    assert 2 * 1.96 * np.std(drawn) == pytest.approx(high - low, rel=0.1)
    assert spearman_interval(ranks.view(10, 10), ranks.view(10, 10)) == pytest.approx((1, 1))
    few = torch.tensor([[1.0, 2.0, 3.0]])
    assert np.isnan(spearman_interval(few, few)).all()


def test_only_what_is_asked_for_is_made(source, tmp_path):
    ok(*source, "--by", " answers ,direct,direct", "--out", tmp_path)
    assert list(pd.read_csv(tmp_path / "scores.csv")["score"].unique()) == ["direct", "answers"]
    steps = {path.name for path in (tmp_path / "steps" / "seven-on").iterdir()}
    assert steps == {"means", "direct", "answers"}
    out = ok(*source, "--by", "induction", "--out", tmp_path / "one")
    assert pd.read_csv(tmp_path / "one" / "agreement.csv").empty
    assert not (tmp_path / "one" / "figures").exists()
    assert "seven-on: best heads by induction (attention weight): " in out


def test_the_same_command_makes_nothing_again(source, whole, undrawn, monkeypatch):
    before = outcome(whole)
    for name in (
        "attributed_effects",
        "direct_effects",
        "induction_scores",
        "answer_attention",
        "head_gates",
    ):
        monkeypatch.setattr(scoring, name, None)
    for name in ("mean_head_outputs", "indirect_effects", "fit_ltv"):
        monkeypatch.setattr(stages, name, None)
    ok(*source, "--out", whole)
    assert outcome(whole) == before


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(source, whole, tmp_path):
    folder = tmp_path / "run"
    words = [*source, "--out", folder]
    command = [sys.executable, "-m", "tvlens.cli", *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    finish_killed(folder, command, folder / "steps" / "fourteen-on" / "means", env)
    assert not (folder / "scores.csv").exists()
    ok(*words)
    assert outcome(folder) == outcome(whole)
    assert manifest(folder)["earlier_sessions"][0]["state"] == "interrupted"


def test_studies_make_the_scores_that_they_made():
    assert [score.name for score in STUDIED] == ["aie", "omega", "contribution"]
    assert [score.heads for score in SCORES if score.heads] == NAMES


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--by", "aie,atp"],
            "there is no score 'atp'; expected some of aie, ltv, attribution, direct, induction, "
            "answers, gates, interfering, or all",
        ),
        (["--by", ","], "--by names nothing; expected names separated by commas"),
        (["--task", "seven"], "unknown task 'seven': did you mean 'seven-on'"),
        (["--shots", "20"], "the model's context holds 128; use fewer shots or shorter pairs"),
    ],
)
def test_a_mistake_ends_in_one_line_and_claims_no_folder(
    words, said, source, tmp_path, monkeypatch, capsys
):
    words = [*map(str, [*source, *words]), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["tvlens", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err
    assert not (tmp_path / "run").exists()


def test_other_scores_into_the_same_folder_are_refused(source, whole):
    message = mistake(*source, "--by", "aie", "--out", whole, kind=RunError)
    assert "belongs to a different run" in message
