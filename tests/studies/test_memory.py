"""A study in one call: the numbers of a study with a run folder, in memory alone."""

from dataclasses import fields, replace
from functools import cache, partial

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

import tvlens
from helpers import tiny_regression, trained, zoo
from tvlens.errors import RunError, TaskError
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.models.regression.training import preset
from tvlens.models.regression.transformer import RegressionTransformer
from tvlens.runs.run import Run
from tvlens.runs.steps import Memory, Steps
from tvlens.studies import comparison, regression
from tvlens.studies.regression import RegressionPlan, RegressionSettings
from tvlens.studies.study import Study, study_task
from tvlens.studies.text import TextPlan, TextSettings
from tvlens.tasks.regression import task as functions
from tvlens.vectors.ltv.settings import FitSettings

TEXT = TextSettings(
    shots=trained.SHOTS,
    n_means=12,
    n_mediation=4,
    n_test=4,
    methods=("fv_layer", "ltv", "random"),
    ltv=FitSettings(steps=4, n_prompts=16, n_validation=8, shots=trained.SHOTS),
    ltv_seeds=2,
    ks=(2,),
    scales=(1.0,),
    compare_ks=(2, 4),
    control_draws=1,
)
POINTS = RegressionSettings(
    n_means=16,
    n_mediation=4,
    n_test=4,
    n_oracle=2,
    n_slow=2,
    n_dummy=2,
    n_lengths=1,
    reach=1.2,
    shifts=("none",),
    methods=("fv_layer", "ltv", "random"),
    ltv=FitSettings(learning_rate=0.05, steps=3, n_prompts=16, n_validation=8, patience=None),
    ltv_seeds=1,
    ks=(2,),
    scales=(1.0,),
    compare_ks=(2,),
    control_draws=1,
)


TASK = trained.TASKS["seven-on"]
FUNCTIONS = tiny_regression.TASK


@cache
def points_lens() -> Lens:
    """A model of points that has learned nothing, which is quickly made."""
    torch.manual_seed(0)
    return tvlens.load(RegressionTransformer(preset("tiny").sizes), name="points")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Takes every prompt for answered, few prompts, and no estimator that is slow to fit."""
    always = lambda _, outputs, batch: outputs[..., 0] < torch.inf  # noqa: E731
    monkeypatch.setattr(FirstToken, "answered", always)
    monkeypatch.setattr(functions, "_PROMPTS", {"train": 8, "validation": 4, "test": 4})
    few = {name: regression.ORACLES[name] for name in ("ridge", "averaging")}
    monkeypatch.setattr(regression, "ORACLES", few)
    views = tuple(view for view in regression.VIEWS if view.prompts == "uninformative")
    monkeypatch.setattr(regression, "VIEWS", views)
    monkeypatch.setattr(comparison, "split_half", partial(comparison.split_half, splits=4))


def require_equal(found: Study, expected: Study) -> None:
    """Every table the same to the last digit, and every vector."""
    tables = [f.name for f in fields(Study) if isinstance(getattr(found, f.name), pd.DataFrame)]
    assert len(tables) == 7
    for name in tables:
        assert_frame_equal(getattr(found, name), getattr(expected, name), check_exact=True)
    assert list(found.ltvs) == list(expected.ltvs)
    for key, ltv in found.ltvs.items():
        assert torch.equal(ltv.omega, expected.ltvs[key].omega)
        assert_frame_equal(ltv.history, expected.ltvs[key].history, check_exact=True)
    assert list(found.methods) == list(expected.methods)


@pytest.mark.parametrize(
    ("lens", "task", "settings", "plan"),
    [(zoo.lens, TASK, TEXT, TextPlan), (points_lens, FUNCTIONS, POINTS, RegressionPlan)],
    ids=["text", "regression"],
)
def test_the_numbers_are_those_of_a_study_with_a_run_folder(lens, task, settings, plan, tmp_path):
    found = tvlens.study(lens(), task, settings)
    with Run.open(tmp_path / "run", "study", {}) as run:
        require_equal(found, study_task(plan(lens(), task, settings), run))
    shown = found._repr_html_()
    assert task.name in shown
    assert "data:image/png;base64," in shown


@pytest.mark.parametrize(
    ("lens", "task", "settings", "says"),
    [
        (zoo.lens, FUNCTIONS, None, "is a function class.*'llama' reads text"),
        (points_lens, TASK, None, "text task.*'points' reads points"),
        (zoo.lens, TASK, POINTS, "RegressionSettings; expected.*TextS"),
        (points_lens, FUNCTIONS, TEXT, "TextSettings; expected.*Regression"),
        (zoo.lens, TASK, replace(TEXT, shots=400), "400 shots"),
    ],
)
def test_what_cannot_be_studied_is_refused_at_once(lens, task, settings, says):
    with pytest.raises(TaskError, match=says):
        tvlens.study(lens(), task, settings)


def test_memory_gives_back_what_a_run_folder_does(tmp_path):
    table = pd.DataFrame({"x": [1.0, float("nan")], "y": ["a", None]}, index=[3, 4])
    outputs = {"table": table, "facts": {"k": (1, 2)}, "held": {"x": torch.ones(2).bfloat16()}}
    with Run.open(tmp_path / "run", "test", {}) as run:
        expected, memory = run.step("a", lambda: outputs), Memory()
        assert isinstance(run, Steps)
        assert isinstance(memory, Steps)
        found = memory.step("a", lambda: outputs)
        assert_frame_equal(found["table"], expected["table"])
        assert found["facts"] == expected["facts"] == {"k": [1, 2]}
        assert torch.equal(found["held"]["x"], expected["held"]["x"])
        means = HeadMeans(torch.ones(1, 2, 3), torch.ones(1, 2, 4), (0,), 1, "m")
        assert memory.kept("m", HeadMeans, lambda: means).kept == (0,)
    memory.note_filter("some")
    memory.note_filter("some")
    assert memory.filters == ["some"]
    with pytest.raises(RunError, match="step 'a' has already run"):
        memory.step("a", lambda: outputs)
