"""The same questions asked of a regression model: one lens, one replay, one set of methods."""

from dataclasses import replace

import pytest
import torch

import tvlens
from helpers import tiny_regression as tiny
from helpers import zoo
from tvlens.errors import ModelError, NumericalError, ShapeError, TaskError
from tvlens.lens.edits import ReplaceHeads
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.readout import FirstToken, SquaredError
from tvlens.models.batch import Batch
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.task import FunctionTask

TASK = FunctionTask("linear", function_class("linear", 1))
SETTINGS = tvlens.FitSettings(
    kinds=("clean",), shots=12, n_prompts=64, steps=20, learning_rate=0.05, evaluate_every=5
)


@pytest.fixture(scope="module", params=zoo.KINDS)
def lens(request):
    return tiny.lens(request.param)


@pytest.fixture(scope="module")
def means(lens):
    return tvlens.mean_head_outputs(lens, TASK.prompts("train", shots=5, n=64))


def test_the_lens_replays_and_reads_squared_errors(lens):
    assert lens.engine.name == "replay"
    assert isinstance(lens.readout, SquaredError)
    assert (lens.n_layer, lens.n_head, lens.d_model) == (2, 2, 32)


def test_errors_are_those_of_the_trained_module(lens):
    prompts = TASK.prompts("test", shots=5, n=8)
    table = tvlens.evaluate(lens, TASK, {}, kinds=("clean",), shots=5, n=8)
    with torch.no_grad():
        predicted = tiny.trained()(prompts.xs, prompts.ys)[:, -1]
    expected = float((predicted - prompts.target).square().mean())
    (row,) = table.to_dict("records")
    assert (row["method"], row["metric"], row["n"]) == ("icl", "squared_error", 8)
    assert row["value"] == pytest.approx(expected, rel=1e-4)


def test_it_does_the_task_in_context_and_not_without(lens):
    table = tvlens.evaluate(lens, TASK, {}, shots=5, n=200)
    error = table.set_index("prompt")["value"]
    assert error["clean"] < 0.4 * error["zero"]
    assert error["clean"] < 0.4 * error["shuffled"]


def test_no_prompt_is_left_out_of_the_means(lens, means):
    assert means.count == means.offered == 64
    reading = lens.engine.read(lens.encode(TASK.prompts("train", shots=5, n=64)))
    assert zoo.off(means.z, reading.z.mean(dim=0)) < 1e-4


def test_effects_are_those_of_a_loop_of_hooked_passes(lens, means):
    prompts = TASK.prompts("train", shots=5, n=6, kind="shuffled")
    effects = tvlens.indirect_effects(lens, prompts, means)
    slow = WholePassEngine(lens.backend)
    reading = slow.read(lens.encode(prompts))
    scores = lens.readout.score(slow.run(reading, ReplaceHeads.each_head(means.z)), reading.batch)
    expected = (scores - effects.baseline[:, None]).unflatten(1, (2, 2))
    assert (effects.values - expected).abs().max() < 1e-4
    assert effects.unit == "reduction of squared error"


def test_a_learned_vector_lowers_the_error_beyond_the_training_length(lens, means):
    ltv = tvlens.fit_ltv(lens, TASK, means, settings=SETTINGS)
    history = ltv.history
    assert history["validation_loss"].min() < history["validation_loss"].iloc[0]
    assert torch.isfinite(ltv.contributions()).all()
    table = tvlens.evaluate(lens, TASK, {"ltv": ltv}, kinds=("clean",), shots=12, n=200)
    error = table.set_index("method")["value"]
    assert error["ltv"] < error["icl"]


def test_function_vectors_are_chosen_by_lowest_error(lens, means):
    prompts = TASK.prompts("train", shots=5, n=6, kind="shuffled")
    effects = tvlens.indirect_effects(lens, prompts, means)
    validation = {"clean": TASK.prompts("validation", shots=12, n=16)}
    found = tvlens.choose_function_vectors(lens, means, effects, validation, ks=(1, 2))
    sweep = found.sweep[found.sweep["site"] == "one_layer"]
    best = sweep.loc[sweep["squared_error"].idxmin()]
    assert found.one_layer["clean"].layers == (int(best["layer"]),)


def test_both_modalities_compare_by_the_same_tables(lens, means):
    prompts = TASK.prompts("train", shots=5, n=6, kind="shuffled")
    effects = tvlens.indirect_effects(lens, prompts, means)
    ltv = tvlens.fit_ltv(lens, TASK, means, settings=replace(SETTINGS, steps=5))
    table = tvlens.compare_head_sets(effects, ltv, ks=(1, 2))
    assert {"overlap", "spearman", "rank_biased_overlap"} <= set(table["measure"])


def test_models_refuse_prompts_of_the_other_kind(lens):
    with pytest.raises(ModelError, match="model 'tiny' reads points, not Prompts"):
        lens.encode(zoo.prompts(zoo.one_shot("k")))
    with pytest.raises(
        ModelError, match="reads text, not PointPrompts; expected prompts of a text"
    ):
        zoo.lens().encode(TASK.prompts("test", n=1))


def test_numbers_have_no_exact_match(lens):
    with pytest.raises(ModelError, match="exact_match compares generated text, but 'tiny' answers"):
        tvlens.evaluate(lens, TASK, {}, n=2, exact_match=True)


def test_points_that_do_not_fit_are_refused(lens):
    other = FunctionTask("linear", function_class("linear", 2))
    with pytest.raises(ShapeError, match="points have 2 dimensions, the regression model reads 1"):
        lens.encode(other.prompts("test", n=1))
    with pytest.raises(ShapeError, match=r"prompts have 17 points, .* has positions for 16"):
        lens.encode(TASK.prompts("test", shots=16, n=1))


def test_squared_errors_on_paper():
    batch = Batch.of_sequences(torch.zeros(2, 1, 1), torch.tensor([1.0, 0.0]))
    outputs = torch.tensor([[[3.0], [1.0]], [[0.5], [-8.0]]])
    readout = SquaredError(variance=4.0)
    assert readout.measure(outputs, batch)[..., 0].tolist() == [[1.0, 0.0], [0.0625, 16.0]]
    assert readout.score(outputs, batch).tolist() == [[-1.0, 0.0], [-0.0625, -16.0]]
    # Huber: half the square up to 1, and the distance less one half beyond.
    assert readout.loss(outputs, batch).tolist() == [[0.5, 0.0], [0.03125, 3.5]]
    assert readout.answered(outputs, batch).all()
    assert not readout.has_text
    assert FirstToken.has_text


def test_points_that_are_not_finite_are_refused(lens):
    prompts = TASK.prompts("test", shots=5, n=3)
    for name in ("xs", "ys"):
        values = getattr(prompts, name).clone()
        values[1, 3] = float("nan")
        letter = name[0]
        with pytest.raises(
            NumericalError, match=rf"{letter} of point 4 of prompt 1 is not finite; expected finite"
        ):
            lens.encode(replace(prompts, **{name: values}))
    # What is never shown may be anything.
    ys = prompts.ys.clone()
    ys[:, -1] = float("nan")
    assert torch.equal(lens.encode(replace(prompts, ys=ys)).inputs, lens.encode(prompts).inputs)


def test_no_prompts_are_refused(lens):
    prompts = TASK.prompts("test", shots=5, n=1)
    empty = replace(
        prompts, xs=prompts.xs[:0], ys=prompts.ys[:0], target=prompts.target[:0], donor=None
    )
    with pytest.raises(TaskError, match="no prompt to read; expected at least one"):
        lens.encode(empty)
