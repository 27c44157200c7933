"""Studies that take the rivals in: by one line of the catalogue they stand in every table."""

from dataclasses import replace

import pandas as pd
import pytest

import tvlens
from helpers import tiny_regression as tiny
from helpers import trained
from helpers.commands import mistake
from tvlens.errors import UnknownNameError
from tvlens.runs.run import Run
from tvlens.studies.regression import regression_plans
from tvlens.studies.study import study_all
from tvlens.studies.text import TextSettings, text_plans
from tvlens.vectors.catalogue import METHODS, load_vector, methods_for, methods_named
from tvlens.vectors.ltv.settings import FitSettings

RIVALS = {each.name for each in METHODS if not each.standard}
TEXT = TextSettings(
    shots=trained.SHOTS,
    n_means=12,
    n_mediation=4,
    n_test=6,
    ltv=FitSettings(steps=10, n_prompts=16, shots=trained.SHOTS),
    ltv_seeds=1,
    ks=(2,),
    scales=(1.0,),
    compare_ks=(2,),
    control_draws=1,
    methods=methods_named("all"),
)
POINTS = tiny.SmallSettings(
    n_test=8,
    ltv=FitSettings(
        learning_rate=0.05, steps=5, n_prompts=32, n_validation=16, evaluate_every=5, patience=None
    ),
    ltv_seeds=1,
    ks=(2,),
    scales=(1.0,),
    control_draws=1,
    shifts=("none",),
    methods=methods_named("all"),
)


def text(folder):
    with Run.open(folder, "study", {}) as run:
        plans = text_plans(trained.lens(), {"seven-on": trained.TASKS["seven-on"]}, TEXT)
        return study_all(plans, run)


def test_every_rival_stands_in_the_tables_of_a_text_study(tmp_path):
    found = text(tmp_path / "run")["seven-on"]
    results = pd.read_csv(tmp_path / "run" / "results.csv")
    asked = results[results["metric"] == "exact_match"].groupby("method")["prompt"].apply(set)
    for name in RIVALS:
        assert asked[name] == {"zero", "shuffled", "clean"}, name
    sweeps = pd.read_csv(tmp_path / "run" / "sweeps.csv")
    assert set(sweeps["method"]) == RIVALS
    tried = sweeps[sweeps["prompt"] == "zero"].groupby("method").size()
    assert tried.to_dict() == {
        "hendel": 2,
        "icv": 5,
        "icv_all": 5,
        "ltv_sparse": 4,
        "mixing": 2,
        "free_layer": 4,
        "free": 2,
    }
    whole = sweeps[sweeps["method"] == "ltv_whole"].set_index("positions")["validation_loss"]
    assert set(whole.index) == {"query", "all"}
    (of_whole,) = found.methods["ltv_whole"]["zero"]
    assert of_whole.positions == whole.idxmin()
    assert of_whole.history["validation_loss"].min() == pytest.approx(whole.min())
    # What is reported is what was best on validation.
    zero = sweeps[(sweeps["method"] == "hendel") & (sweeps["prompt"] == "zero")]
    best = zero.sort_values(["accuracy", "cross_entropy"], ascending=[False, True]).iloc[0]
    (made,) = found.methods["hendel"]["zero"]
    assert made.layers == (best["layer"],)
    assert found.methods["hendel"]["clean"] == found.methods["hendel"]["shuffled"]
    assert set(pd.read_csv(tmp_path / "run" / "fv_sweep.csv")["site"]) == {"one_layer", "per_layer"}
    for name in RIVALS:
        assert list((tmp_path / "run" / "vectors").glob(f"seven-on-{name}*.safetensors")), name
    summary = (tmp_path / "run" / "summary.md").read_text()
    assert "in-context vector" in summary
    again = text(tmp_path / "run")["seven-on"]
    pd.testing.assert_frame_equal(again.results, found.results)
    pd.testing.assert_frame_equal(again.rivals, found.rivals)


def test_every_rival_stands_in_the_tables_of_a_regression_study(tmp_path):
    with Run.open(tmp_path, "study", {}) as run:
        plans = regression_plans({"linear": (tiny.lens(), tiny.TASK)}, POINTS)
        found = study_all(plans, run)["linear"]
    results = pd.read_csv(tmp_path / "results.csv")
    there = set(results["method"])
    both = {"hendel", "ltv_sparse", "mixing"}
    of_points = {each.name for each in methods_for("regression", "class") if not each.standard}
    expected = {f"{name}_class" for name in of_points} | {f"{name}_prompt" for name in both}
    assert RIVALS - of_points == {"icv_all", "ltv_whole"}
    assert expected <= there
    kinds = results.groupby("method")["prompt"].apply(set)
    for name in expected:
        assert kinds[name] == {"clean", "zero", "shuffled"}, name
    assert set(found.rivals["whose"]) == {"class", "prompt"}
    vector = load_vector(tmp_path / "vectors" / "linear-hendel_prompt-clean.safetensors")
    prompts = tiny.TASK.prompts("test", shots=8, n=3)
    measured = tvlens.evaluate(
        tiny.lens(), tiny.TASK, {"hendel": vector}, kinds=("clean",), shots=8, n=3
    )
    assert len(prompts) == 3
    assert measured["value"].notna().all()


def test_studies_make_the_standard_methods_unless_told_otherwise():
    assert not RIVALS & set(TextSettings().methods)
    assert set(replace(TEXT, methods=("ltv",)).methods) == {"ltv"}


@pytest.mark.parametrize(
    "modality", [["text", "--tasks", "antonym"], ["regression", "--functions", "linear"]]
)
def test_an_unknown_method_is_refused_by_name(tmp_path, modality):
    words = ["study", *modality, "--methods", "ltv,svd", "--out", tmp_path / "run"]
    said = mistake(*words, kind=UnknownNameError)
    assert "unknown method 'svd'; expected one of fv_layer, fv_per_layer" in said
    assert not (tmp_path / "run").exists()
