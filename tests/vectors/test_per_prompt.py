"""Vectors of each prompt's own head outputs: trained, mediated and chosen prompt by prompt."""

import copy
from dataclasses import replace

import pandas as pd
import pytest
import torch
from torch.nn.functional import huber_loss

import tvlens
from helpers import tiny_regression as tiny
from helpers import zoo
from helpers.prompt_table import prompt_table
from tvlens.errors import TaskError
from tvlens.lens.edits import ReplaceHeads
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.readout import SquaredError
from tvlens.tasks.regression.prompts import PointPrompts
from tvlens.vectors.controls import permuted_controls, random_controls
from tvlens.vectors.fv import function_mixture
from tvlens.vectors.ltv.attribution import attribute
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.sample import read_fit_prompts, training_prompts, validation_prompts
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.vector import HeadMixture, TaskVector

TASK = tiny.TASK
SETTINGS = FitSettings(
    kinds=("clean",),
    shots=9,
    n_prompts=64,
    n_validation=24,
    batch_size=16,
    steps=20,
    learning_rate=0.05,
    evaluate_every=5,
    patience=None,
    per_prompt=True,
)
ALL = (0, 1)


@pytest.fixture(scope="module", params=zoo.KINDS)
def lens(request):
    return tiny.lens(request.param)


@pytest.fixture(scope="module")
def means(lens):
    return tvlens.mean_head_outputs(lens, TASK.prompts("train", shots=5, n=64))


@pytest.fixture(scope="module")
def ltv(lens, means):
    return fit(lens, means)


def fit(lens, means, settings=SETTINGS, task=TASK, **options):
    return tvlens.fit_ltv(lens, task, means, settings=settings, **options)


def in_place(weights):
    """Every head at its own layer, as `[to_layer layer head]`."""
    return torch.eye(2)[:, :, None] * weights.detach()


def first_points(prompts):
    """The donors of clean prompts, by hand."""
    values = prompts.ys[:, tiny.TRAINED - 1]
    xs, ys = prompts.xs[:, : tiny.TRAINED], prompts.ys[:, : tiny.TRAINED]
    return PointPrompts(prompts.task, prompts.split, "clean", prompts.seed, xs, ys, values)


def losses(lens, prompts, weights):
    """Huber losses of clean prompts, each run whole with its own vector."""
    found = tiny.predictions(lens, prompts, first_points(prompts), in_place(weights), ALL)
    return huber_loss(found, prompts.target, reduction="none")


def test_training_lowers_the_validation_loss(lens, ltv):
    assert ltv.per_prompt
    loss = ltv.history["validation_loss"]
    assert loss.min() < 0.9 * loss.iloc[0]
    (prompts,) = validation_prompts(TASK, SETTINGS, 0)
    assert len(prompts) == 24
    found = float(losses(lens, prompts, ltv.weights).mean())
    assert found == pytest.approx(loss.min(), rel=1e-4)
    before = float(losses(lens, prompts, torch.zeros(2, 2)).mean())
    assert before == pytest.approx(loss.iloc[0], rel=1e-4)


def test_one_step_follows_the_gradient_of_every_prompts_own_vector(lens, means):
    """Adam's first step goes by the learning rate against the sign of every slope."""
    settings = replace(SETTINGS, n_prompts=16, n_validation=4, steps=1)
    (prompts,), (held_out,) = (f(TASK, settings, 0) for f in (training_prompts, validation_prompts))
    slopes = torch.zeros(2, 2)
    for head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        step = torch.zeros(2, 2)
        step[head] = 0.02
        up, down = (float(losses(lens, prompts, w).double().mean()) for w in (step, -step))
        slopes[head] = (up - down) / 0.04
    assert slopes.abs().min() > 1e-3
    last = fit(lens, means, settings).history.iloc[-1]
    expected = float(losses(lens, held_out, -0.05 * slopes.sign()).mean())
    assert last["travel"] == pytest.approx(0.05 * 2, rel=1e-3)
    assert last["validation_loss"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("kind", "shots"), [("clean", 9), ("shuffled", 4), ("zero", 5)])
def test_evaluation_adds_to_every_prompt_the_vector_of_its_own_donor(lens, ltv, kind, shots):
    vector = ltv.task_vector
    assert isinstance(vector, HeadMixture)
    assert vector.layers == ALL
    assert torch.equal(vector.mix, in_place(ltv.weights))
    prompts = TASK.prompts("test", shots=shots, n=5, kind=kind)
    table = prompt_table(lens, prompts, {"ltv": ltv}, kind=kind)
    found = torch.tensor(table.loc[table["method"] == "ltv", "value"].to_numpy())
    predicted = tiny.predictions(lens, prompts, prompts.donors(), vector.mix, ALL)
    expected = (predicted - prompts.target).square()
    assert zoo.off(found, expected) < 1e-4
    mean = tvlens.evaluate(lens, TASK, {"ltv": ltv}, kinds=(kind,), shots=shots, n=5)
    (value,) = mean.loc[mean["method"] == "ltv", "value"]
    assert value == pytest.approx(float(expected.mean()), rel=1e-4)
    bare = torch.tensor(table.loc[table["method"] != "ltv", "value"].to_numpy())
    assert zoo.off(bare, expected) > 0.01


def test_own_vectors_do_not_depend_on_the_pieces_that_prompts_are_read_in(lens, ltv):
    prompts = TASK.prompts("test", shots=9, n=7)
    controls = random_controls(ltv, n=3)
    methods = {"ltv": ltv, "random": controls, "shared": TaskVector.none(lens)}
    whole = prompt_table(lens, prompts, methods, kind="clean")
    small = replace(lens, max_tokens=50, max_rows=2)
    parts = prompt_table(small, prompts, methods, kind="clean")
    pd.testing.assert_frame_equal(parts, whole, rtol=1e-4)
    each = [prompt_table(lens, prompts, {"one": c}, kind="clean") for c in controls]
    values = [frame.loc[frame["method"] == "one", "value"].to_numpy() for frame in each]
    random = whole.loc[whole["method"] == "random", "value"].to_numpy()
    assert random == pytest.approx(sum(values) / 3, rel=1e-4)


def test_every_row_of_a_curve_has_its_own_donor(lens, ltv):
    curves = TASK.curves("test", points=(1, 4, 11), n=4)
    found = prompt_table(lens, curves, {"ltv": ltv}, kind="clean")
    found = torch.tensor(found.loc[found["method"] == "ltv", "value"].to_numpy()).view(4, 3)
    for column, points in enumerate(curves.points):
        prompts = curves.at(points)
        donors = replace(prompts, xs=prompts.xs[:, :6], ys=prompts.ys[:, :6])
        predicted = tiny.predictions(lens, prompts, donors, in_place(ltv.weights), ALL)
        assert zoo.off(found[:, column], (predicted - prompts.target).square()) < 1e-4


def test_sizes_of_heads_are_means_over_single_prompts(lens, means, ltv):
    (prompts,) = training_prompts(TASK, SETTINGS, 0)
    expected = tiny.head_outputs(lens, first_points(prompts)).norm(dim=-1).mean(dim=0)
    assert zoo.off(ltv.norms, expected) < 1e-4
    # By Jensen's inequality a mean of sizes is no less than the size of the mean.
    assert (ltv.norms > means.outputs.norm(dim=-1)).all()
    shares = ltv.contributions(signed=False) / ltv.weights.detach().abs()
    assert zoo.off(shares, expected) < 1e-4


def test_attributions_sum_to_the_gain_on_prompts_with_their_own_vectors(lens, ltv):
    mine = copy.deepcopy(ltv)
    prompts = validation_prompts(TASK, SETTINGS, 0)
    bare = losses(lens, prompts[0], torch.zeros(2, 2))
    gain = float((bare - losses(lens, prompts[0], ltv.weights)).mean())
    assert gain > 0
    assert float(ltv.attribution.sum()) == pytest.approx(gain, rel=0.1)
    fine = attribute(lens, mine, prompts, steps=128)
    assert float(fine.sum()) == pytest.approx(gain, rel=0.01)
    pieces = attribute(replace(lens, max_rows=128 * 3), copy.deepcopy(mine), prompts, steps=128)
    assert zoo.off(pieces, fine) < 1e-4


def test_controls_weigh_own_outputs_with_the_learned_norm(ltv):
    norm = float(ltv.weights.detach().norm())
    sizes = ltv.weights.detach().flatten().sort().values
    random, permuted = random_controls(ltv, n=3), permuted_controls(ltv, n=3)
    for control in (*random, *permuted):
        assert isinstance(control, HeadMixture)
        assert control.layers == ALL
        weights = control.mix[ALL, ALL]
        assert torch.equal(control.mix, in_place(weights))
        assert float(weights.norm()) == pytest.approx(norm, rel=1e-5)
        assert not torch.equal(weights, ltv.weights)
        same = torch.equal(weights.flatten().sort().values, sizes)
        assert same == ("permuted" in control.origin)


def test_saved_and_read_back(lens, ltv, tmp_path):
    ltv.save(tmp_path / "own.safetensors")
    found = LearnableTaskVector.load(tmp_path / "own.safetensors")
    assert found.per_prompt
    for name, tensor in ltv.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(found.task_vector.mix, ltv.task_vector.mix)
    shared = LearnableTaskVector(ltv.outputs, model=lens.name)
    shared.save(tmp_path / "shared.safetensors")
    found = LearnableTaskVector.load(tmp_path / "shared.safetensors")
    assert not found.per_prompt
    assert torch.equal(found.norms, ltv.outputs.norm(dim=-1))


class Stop(Exception):
    """Raised where a user would press Ctrl-C."""


@pytest.mark.parametrize("shots", [9, (7, 9)])
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(lens, means, tmp_path, shots):
    settings = replace(SETTINGS, shots=shots, n_prompts=24)
    done = []

    def stop_at_12(n):
        done.append(n)
        if sum(done) == 12:
            raise Stop

    path = tmp_path / "checkpoint.safetensors"
    with pytest.raises(Stop):
        fit(lens, means, settings, checkpoint=path, progress=stop_at_12)
    resumed = []
    found = fit(lens, means, settings, checkpoint=path, progress=resumed.append)
    assert sum(resumed) == 10
    expected = fit(lens, means, settings)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    pd.testing.assert_frame_equal(found.history, expected.history)


def test_a_checkpoint_of_shared_vectors_is_not_gone_on_from(lens, means, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    few = replace(SETTINGS, n_prompts=8, n_validation=4, steps=1)
    fit(lens, means, replace(few, per_prompt=False), checkpoint=path)
    with pytest.raises(tvlens.errors.RunError, match="was made with other settings"):
        fit(lens, means, few, checkpoint=path)


def test_what_cannot_be_weighed_prompt_by_prompt_is_refused(lens, means):
    words = r"per_prompt=True weighs heads, so it needs granularity='head', not 'block'"
    with pytest.raises(TaskError, match=words):
        fit(lens, means, replace(SETTINGS, granularity="block"))
    words = r"task 'linear' does not say how many points the model was trained on, so its prompts"
    with pytest.raises(TaskError, match=words):
        fit(lens, means, task=replace(TASK, train_points=None))


LENGTHS = replace(SETTINGS, shots=(7, 9))


def test_there_is_a_set_of_prompts_for_every_length_and_kind():
    assert LENGTHS.lengths == (7, 9)
    assert SETTINGS.lengths == (9,)
    settings = replace(LENGTHS, kinds=("clean", "shuffled"))
    for made, split, n in ((training_prompts, "train", 64), (validation_prompts, "validation", 24)):
        sets = made(TASK, settings, 3)
        assert [(p.shots, p.kind) for p in sets] == [
            (7, "clean"),
            (7, "shuffled"),
            (9, "clean"),
            (9, "shuffled"),
        ]
        for prompts in sets:
            shots, kind = prompts.shots, prompts.kind
            expected = TASK.prompts(split, shots=shots, n=n, seed=3, kind=kind)
            assert torch.equal(prompts.xs, expected.xs)
            assert torch.equal(prompts.ys, expected.ys)


@pytest.mark.parametrize("per_prompt", [True, False])
def test_every_step_sees_all_lengths(lens, means, per_prompt):
    seen = []

    class Reads(SquaredError):
        def loss(self, outputs, batch):
            if torch.is_grad_enabled() and outputs.shape[1] == 1:
                seen.append(batch.mask.sum(dim=1).tolist())
            return super().loss(outputs, batch)

    settings = replace(LENGTHS, steps=4, per_prompt=per_prompt)
    fit(replace(lens, readout=Reads()), means, settings)
    # A prompt of 7 examples and the query's x is 15 positions long, one of 9 examples 19.
    assert [(row.count(15), row.count(19)) for row in seen] == [(8, 8)] * 4


@pytest.mark.parametrize("per_prompt", [True, False])
def test_training_at_several_lengths_lowers_the_loss_at_all_of_them(lens, means, per_prompt):
    ltv = fit(lens, means, replace(LENGTHS, per_prompt=per_prompt))
    history = ltv.history["validation_loss"]
    assert history.min() < history.iloc[0]
    found = []
    for prompts in validation_prompts(TASK, LENGTHS, 0):
        table = prompt_table(lens, prompts, {"ltv": ltv}, kind="clean")
        off = torch.tensor(table.loc[table["method"] == "ltv", "value"].to_numpy()).sqrt()
        found.append(huber_loss(off, torch.zeros_like(off), reduction="none"))
    assert float(torch.cat(found).mean()) == pytest.approx(history.min(), rel=1e-4)


def test_trainings_can_share_one_reading(lens, means):
    settings = replace(LENGTHS, n_prompts=16, n_validation=4, steps=5)
    read = read_fit_prompts(lens, TASK, settings, 0)
    for per_prompt in (True, False):
        own = replace(settings, per_prompt=per_prompt)
        shared, alone = fit(lens, means, own, read=read), fit(lens, means, own)
        assert shared.per_prompt == per_prompt
        for name, tensor in alone.state_dict().items():
            assert torch.equal(shared.state_dict()[name], tensor), name
        pd.testing.assert_frame_equal(shared.history, alone.history)


def test_effects_without_means_are_those_of_a_loop_over_prompts_and_donors(lens):
    prompts = TASK.prompts("train", shots=5, n=4, kind="shuffled")
    found = tvlens.indirect_effects(lens, prompts, None)
    engine = WholePassEngine(lens.backend)
    donors = prompts.donors()
    for i in range(4):
        z = engine.read(lens.encode(tiny.row(donors, i))).z[0]
        batch = lens.encode(tiny.row(prompts, i))
        for layer in range(2):
            for head in range(2):
                mask = torch.zeros(2, 2, 2, dtype=torch.bool)
                mask[0, layer, head] = True
                with torch.no_grad():
                    outputs = engine.run_batch(batch, ReplaceHeads(mask, z[None, None]))
                patched, baseline = lens.readout.score(outputs, batch)[0].tolist()
                assert float(found.baseline[i]) == pytest.approx(baseline, rel=1e-4)
                expected = patched - baseline
                assert float(found.values[i, layer, head]) == pytest.approx(expected, abs=1e-4)
    assert found.values.abs().max() > 0.1
    whole = tvlens.indirect_effects(replace(lens, max_tokens=20, max_rows=2), prompts, None)
    assert zoo.off(whole.values, found.values) < 1e-4


def test_effects_without_means_need_donors(lens):
    prompts = replace(TASK, train_points=None).prompts("train", shots=5, n=2, kind="shuffled")
    with pytest.raises(TaskError, match="its prompts have no donors to take head outputs from"):
        tvlens.indirect_effects(lens, prompts, None)


def test_own_function_vectors_are_chosen_among_mixtures(lens, means):
    mediated = TASK.prompts("train", shots=5, n=8, kind="shuffled")
    effects = tvlens.indirect_effects(lens, mediated, None)
    validation = {
        "clean": TASK.curves("validation", points=(8, 12), n=8),
        "shuffled": TASK.prompts("validation", shots=5, n=8, kind="shuffled"),
    }
    found = tvlens.choose_function_vectors(
        lens, means, effects, validation, ks=(1, 3), scales=(0.5, 1.0), per_prompt=True
    )
    assert len(found.sweep) == 2 * 2 * 2 * (1 + 2)
    for kind in validation:
        assert isinstance(found.one_layer[kind], HeadMixture)
        assert isinstance(found.per_layer[kind], HeadMixture)
    for layer in (None, 1):
        mixture = function_mixture(means, effects.top(3), layer=layer, scale=0.5)
        table = tvlens.evaluate(
            lens, TASK, {"fv": mixture}, split="validation", kinds=("shuffled",), shots=5, n=8
        )
        (expected,) = table.loc[table["method"] == "fv", "value"]
        chosen = found.sweep.query("prompt == 'shuffled' and k == 3 and scale == 0.5")
        (value,) = chosen.loc[chosen["layer"] == (-1 if layer is None else layer), "squared_error"]
        assert value == pytest.approx(expected, rel=1e-5)
    rows = found.sweep.query("prompt == 'shuffled' and site == 'one_layer'")
    best = rows.loc[rows["squared_error"].idxmin()]
    expected = function_mixture(
        means, effects.top(int(best["k"])), layer=int(best["layer"]), scale=float(best["scale"])
    )
    assert torch.equal(found.one_layer["shuffled"].mix, expected.mix)
    assert found.one_layer["shuffled"].layers == expected.layers
