"""The regression study by its command, on a model of two dimensions that has learned a little."""

import json
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch

import tvlens
from helpers import tiny_regression as tiny
from helpers.commands import mistake, ok, run
from tvlens.errors import RunError, TaskError, UnknownNameError
from tvlens.models.catalogue import list_shipped
from tvlens.models.regression.training import model_card, preset, train
from tvlens.models.regression.transformer import save_regression
from tvlens.studies import regression as module
from tvlens.studies import stages
from tvlens.studies import study as whole
from tvlens.studies.plan import View
from tvlens.studies.regression import RegressionPlan, RegressionSettings
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.task import FunctionTask
from tvlens.vectors.catalogue import load_vector
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.vector import HeadMixture, TaskVector

TINY = preset("tiny")
TRAINING = replace(TINY, sizes=replace(TINY.sizes, n_dims=2), steps=100)
WORDS = ["--steps", "5", "--n-test", "8", "--ltv-seeds", "1"]
WORDS += ["--shifts", "none,skewed,orthogonal-query"]
LONGEST = 16
UNITS = ("class", "prompt")
CHOSEN = {f"{method}_{unit}" for method in ("fv_layer", "fv_per_layer") for unit in UNITS}
AVERAGES = {f"average_{unit}" for unit in UNITS}
VECTORS = CHOSEN | AVERAGES | {f"ltv_{unit}" for unit in UNITS} | {"fv_published_class"}
CONTROLS = {f"{method}_{unit}" for method in ("random", "permuted") for unit in UNITS}
DUMMIES = {f"{m}_dummies" for m in ("bare", "fv_layer_class", "fv_published_class", "ltv_class")}
ORACLES = {"least_squares", "ridge", "lasso", "nearest_neighbours", "averaging", "tree"}
LENGTHS = {f"ltv_lengths_{unit}" for unit in UNITS}


class Study(NamedTuple):
    """A model, its file, the command that studied it, its run folder and what was printed."""

    model: Any
    command: list[Any]
    out: Any
    said: str

    def table(self, name):
        return pd.read_csv(self.out / f"{name}.csv")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    trained = train("linear", TRAINING)
    card = model_card("linear", TRAINING, 0, None, "cpu", trained)
    save_regression(trained.model, folder / "lines.safetensors", card, dtype=torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("COLUMNS", "100")
        patch.setenv("TERMINAL_WIDTH", "100")
        patch.setattr(module, "RegressionSettings", tiny.SmallSettings)
        command = ["study", "regression", "--functions", "lines.safetensors", "--out", "run"]
        command += WORDS
        said = ok(*command)
        yield Study(trained.model, command, folder / "run", said)


def test_the_table_of_results_has_every_method_on_every_kind_and_shift(study):
    results = study.table("results")
    assert list(results.columns) == [
        *("functions", "shift", "prompt", "points", "method"),
        *("metric", "value", "ci_low", "ci_high", "n"),
    ]
    assert set(results["functions"]) == {"lines"}
    found = {key: set(part["method"]) for key, part in results.groupby(["shift", "prompt"])}
    told = VECTORS | ORACLES | LENGTHS | {"bare"}
    assert found == {
        ("none", "clean"): told | CONTROLS | DUMMIES | {"truncation", "boosting", "network"},
        ("none", "zero"): VECTORS | CONTROLS | {"bare"},
        ("none", "shuffled"): VECTORS | CONTROLS | {"bare"},
        ("skewed", "clean"): told | {"truncation"},
        ("orthogonal-query", "clean"): told,
    }
    assert not results.duplicated(["shift", "prompt", "points", "method", "metric"]).any()
    # Least squares can be exact on all of a few prompts, and has no gain then.
    of_oracle = results[(results["method"] == "least_squares") & (results["metric"] == "gain")]
    assert len(of_oracle) < results["points"].nunique()
    assert np.isfinite(results[["value", "ci_low", "ci_high"]].to_numpy()).all()
    assert (results["ci_low"] <= results["value"] + 1e-12).all()
    assert (results["value"] <= results["ci_high"] + 1e-12).all()
    assert (results["value"] >= 0).all()


def test_every_method_is_asked_at_the_numbers_of_points_that_there_are(study):
    results = study.table("results")
    errors = results[results["metric"] == "squared_error"]

    def points(shift, prompt, method):
        rows = errors[(errors["shift"] == shift) & (errors["prompt"] == prompt)]
        return rows.loc[rows["method"] == method, "points"].tolist()

    for method in ("bare", "ltv_prompt", "fv_layer_class", "truncation", "lasso"):
        assert points("none", "clean", method) == list(range(1, LONGEST + 1))
    assert points("none", "shuffled", "ltv_class") == list(range(3, LONGEST + 1))
    assert points("none", "zero", "ltv_class") == [1]
    assert points("orthogonal-query", "clean", "bare") == [2]
    # From T_train to the longest prompts that leave positions for five dummies.
    assert points("none", "clean", "ltv_class_dummies") == [6, 8, 11]
    assert points("none", "clean", "network") == [6, 8, 10, 12, 14, 16]
    past = results[(results["metric"] == "gain_past") & (results["method"] == "ltv_class")]
    assert past[["shift", "prompt", "points"]].to_numpy().tolist() == [
        ["none", "clean", LONGEST],
        ["none", "shuffled", LONGEST],
        ["skewed", "clean", LONGEST],
    ]


def test_numbers_of_prompts_are_those_asked_for(study):
    results = study.table("results")
    n = results.groupby("method")["n"].unique()
    for method in ("bare", "ltv_class", "averaging", "truncation", "random_prompt"):
        assert n[method].tolist() == [8]
    assert n["least_squares"].tolist() == [4]
    assert n["boosting"].tolist() == [2]
    assert n["ltv_class_dummies"].tolist() == n["bare_dummies"].tolist() == [5]


@pytest.mark.parametrize("shift", ["none", "skewed"])
def test_errors_of_the_bare_model_are_those_of_the_trained_module(study, shift):
    task = FunctionTask("lines", function_class("linear", 2), shift)
    curves = task.curves("test", points=range(1, LONGEST + 1), n=8)
    with torch.no_grad():
        off = study.model(curves.xs, curves.ys) - curves.values
    expected = off.square().mean(dim=0) / 2
    rows = study.table("results").query(
        "method == 'bare' and metric == 'squared_error' and prompt == 'clean' and shift == @shift"
    )
    assert rows["value"].to_numpy() == pytest.approx(expected.numpy(), rel=1e-3)


def test_errors_on_shuffled_and_zero_shot_prompts_are_those_of_the_trained_module(study):
    task = FunctionTask("lines", function_class("linear", 2))
    results = study.table("results").query("method == 'bare' and metric == 'squared_error'")
    for kind, shots in (("shuffled", 4), ("shuffled", 9), ("zero", 5)):
        prompts = task.prompts("test", shots=shots, n=8, kind=kind)
        with torch.no_grad():
            off = study.model(prompts.xs, prompts.ys)[:, -1] - prompts.target
        rows = results[(results["prompt"] == kind) & (results["points"] == prompts.xs.shape[1])]
        (value,) = rows["value"]
        assert value == pytest.approx(float(off.square().mean() / 2), rel=1e-3)


def test_errors_of_a_saved_vector_are_those_in_the_table(study):
    model = tvlens.load(study.out.parent / "lines.safetensors")
    task = FunctionTask("lines", function_class("linear", 2), train_points=6)
    results = study.table("results").query("metric == 'squared_error' and shift == 'none'")
    for method, file in (
        ("ltv_prompt", "lines-ltv_prompt-zero"),
        ("fv_layer_class", "lines-fv_layer_class-shuffled"),
    ):
        vector = load_vector(study.out / "vectors" / f"{file}.safetensors")
        table = tvlens.evaluate(model, task, {"x": vector}, kinds=("shuffled",), shots=8, n=8)
        (expected,) = table.loc[table["method"] == "x", "value"]
        rows = results[(results["method"] == method) & (results["prompt"] == "shuffled")]
        (value,) = rows.loc[rows["points"] == 9, "value"]
        assert value == pytest.approx(expected, rel=1e-4)


def test_there_is_a_row_for_every_head_in_every_view(study):
    heads = study.table("heads")
    assert list(heads.columns) == (
        ["task", "layer", "head", "aie", "aie_low", "aie_high", "omega", "contribution"]
    )
    views = [
        f"lines-{unit}-{prompts}" for prompts in ("informative", "uninformative") for unit in UNITS
    ]
    expected = [(view, layer, head) for view in views for layer in range(2) for head in range(2)]
    assert list(heads[["task", "layer", "head"]].itertuples(index=False, name=None)) == expected
    for view in views:
        whose, prompts = view.removeprefix("lines-").split("-")
        name = f"lines-ltv_{whose}-{'clean' if prompts == 'informative' else 'zero'}"
        ltv = LearnableTaskVector.load(study.out / "vectors" / f"{name}.safetensors")
        rows = heads[heads["task"] == view]
        assert rows["omega"].tolist() == pytest.approx(ltv.weights.detach().flatten().tolist())
        assert ltv.per_prompt == ("prompt" in view)
    headsets = study.table("headsets")
    assert list(headsets["task"].unique()) == views
    assert set(headsets["comparison"]) == {"aie and ltv", "aie halves"}
    assert {"overlap", "spearman"} <= set(headsets["measure"])


def test_figures_vectors_and_tables_are_there(study):
    views = [f"{unit}-{prompts}" for unit in UNITS for prompts in ("informative", "uninformative")]
    figures = {file.stem for file in (study.out / "figures").iterdir()}
    assert {"fidelity-lines", "layer-profiles-lines", "overlap-lines"} <= figures
    assert {f"heads-lines-{view}" for view in views} <= figures
    kinds = {"class": TaskVector, "prompt": HeadMixture}
    files = {
        f"lines-ltv_{unit}-{kind}": LearnableTaskVector
        for unit in UNITS
        for kind in ("clean", "zero")
    }
    files |= {f"lines-ltv_lengths_{unit}": LearnableTaskVector for unit in UNITS}
    files |= {f"lines-average_{unit}": kinds[unit] for unit in UNITS}
    files |= {"lines-fv_published_class": TaskVector}
    files |= {
        f"lines-{method}-{kind}": kinds[method.rsplit("_", 1)[1]]
        for method in CHOSEN
        for kind in ("clean", "zero", "shuffled")
    }
    assert {file.stem for file in (study.out / "vectors").iterdir()} == set(files)
    for name, kind in files.items():
        assert isinstance(load_vector(study.out / "vectors" / f"{name}.safetensors"), kind)
    for name in ("overlap_curves", "fv_sweep", "ltv_history", "layer_profiles"):
        assert len(study.table(name)) > 3
    manifest = json.loads((study.out / "manifest.json").read_text())
    assert manifest["state"] == "finished"
    assert manifest["config"]["settings"]["shifts"] == ["none", "skewed", "orthogonal-query"]
    assert study.model.digest in json.dumps(manifest)


def test_the_command_says_what_it_found(study):
    assert "lines: Lens('lines', bridge, 2 layers x 2 heads, d_model 32, replay)" in study.said
    assert "trained on up to 6 points" in study.said
    assert "squared error over variance [95% interval]" in study.said
    assert f"Tables, vectors, figures and manifest are in {study.out.name}" in study.said


def test_the_same_command_computes_nothing_again_and_writes_the_same(study, undrawn, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("a finished step was computed again")

    for name in ("mean_head_outputs", "indirect_effects", "method_errors", "read_fit_prompts"):
        home = next(m for m in (stages, module) if hasattr(m, name))
        monkeypatch.setattr(home, name, never)
    names = ("results.csv", "heads.csv", "headsets.csv", "fv_sweep.csv")
    before = {name: (study.out / name).read_bytes() for name in names}
    assert ok(*study.command) == study.said
    assert {name: (study.out / name).read_bytes() for name in names} == before


def test_the_page_of_the_study_shows_curves_and_what_heads_attend_to(study):
    html = (study.out / "report.html").read_text()
    assert "Made by <code>tvlens study regression --functions lines --seed 0</code>" in html
    assert "lines: vectors of each prompt" in html
    assert '<div class="attention" data-task="lines-class-informative"><p class="how">' in html
    assert f"lines: at {LONGEST} points, past the 6 of training, the bare model errs by" in html
    # A file of one's own is not known by the name of its class.
    result = run("report", study.out, "--out", study.out.parent / "page.html")
    assert result.code == 0
    assert "warning: lines: What heads attend to is left out: --functions 'lines'" in result.err


def test_another_command_into_the_same_folder_is_refused(study):
    message = mistake(*study.command, "--n-test", "9", kind=RunError)
    assert "run folder 'run' belongs to a different run" in message
    assert "config.settings.n_test: 8 there, 9 now" in message


def test_what_cannot_be_studied_is_refused_and_claims_no_folder(study, tmp_path):
    words = ["study", "regression", "--out", tmp_path / "run", *WORDS, "--functions"]
    message = mistake(*words, "nosuch", kind=UnknownNameError)
    assert "--functions 'nosuch': no shipped model has learned this class; expected" in message
    for name in list_shipped():
        assert name.removesuffix("-small") in message
    message = mistake(*words, "", kind=UnknownNameError)
    assert message == "--functions names no class; expected names separated by commas"
    message = mistake(*words, " , ", kind=UnknownNameError)
    assert "--functions names no class" in message
    message = mistake(*words, "nosuch.safetensors", kind=UnknownNameError)
    assert "no regression model 'nosuch.safetensors': no shipped model has this name" in message
    message = mistake(*words, "lines.safetensors", "--shifts", "none,bent", kind=UnknownNameError)
    assert "unknown shift 'bent' of task 'lines'; expected one of none, skewed" in message
    assert not (tmp_path / "run").exists()


def test_a_model_that_does_not_say_what_it_was_trained_on_is_refused(study, tmp_path):
    path = tmp_path / "bare.safetensors"
    save_regression(study.model, path, {"functions": "linear"}, dtype=torch.float32)
    words = ["study", "regression", "--out", tmp_path / "run", "--functions", path]
    assert "lacks 'settings'" in mistake(*words, kind=TaskError)
    assert not (tmp_path / "run").exists()


def test_a_plan_needs_to_know_the_training_length():
    lens = tiny.lens()
    with pytest.raises(TaskError, match="does not say how many points the model was trained on"):
        RegressionPlan(lens, replace(tiny.TASK, train_points=None), RegressionSettings())


@pytest.mark.usefixtures("unchecked")
def test_function_vectors_take_the_heads_of_their_own_view(monkeypatch):
    plan = RegressionPlan(tiny.lens(), tiny.TASK, RegressionSettings())
    monkeypatch.setattr(stages, "trained_for", lambda *_: {})
    effects = {view: mock.Mock(name=str(view)) for view in plan.views}
    assert len(effects) == 4
    materials = whole._materials(plan, mock.Mock(), mock.Mock(), effects, {})
    found = {each.whose: each.effects for each in materials}
    assert found == {whose: effects[View(whose, "uninformative")] for whose in UNITS}


@pytest.mark.parametrize(
    ("train_points", "reach", "longest", "lengths"),
    [
        (6, 2.5, 16, (8, 10, 12, 14, 16)),
        (6, 1.5, 10, (7, 8, 9, 10)),
        (4, 2.5, 11, (7, 8, 9, 10, 11)),
        (15, 2.5, 16, (16,)),
        # There are no positions past the training length.
        (16, 2.5, 16, (16,)),
    ],
)
def test_lengths_go_past_the_training_length_as_far_as_there_are_positions(
    train_points, reach, longest, lengths
):
    task = replace(tiny.TASK, train_points=train_points)
    plan = RegressionPlan(tiny.lens(), task, RegressionSettings(reach=reach))
    assert (plan.longest, plan.lengths) == (longest, lengths)
    assert plan.points == tuple(range(1, longest + 1))
