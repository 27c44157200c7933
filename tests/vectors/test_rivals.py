"""Rivals of the Learnable Task Vector, held against what a linear model says on paper."""

from dataclasses import replace

import pytest
import torch

import tvlens
from helpers import tiny_regression as tiny
from helpers import trained, zoo
from tvlens.errors import NumericalError, ShapeError, TaskError
from tvlens.lens.edits import NoEdit
from tvlens.lens.fitting import Schedule
from tvlens.lens.hooks import WholePassEngine
from tvlens.tasks import Pair
from tvlens.vectors.free import free_vectors
from tvlens.vectors.hendel import DonorState, state_vector
from tvlens.vectors.icv import in_context_vector
from tvlens.vectors.ltv.sample import read_fit_prompts
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.mixing import HeadBlend, fit_head_mixing
from tvlens.vectors.sparse import sparse_path

on_paper = pytest.mark.skipif(not zoo.HAS_HOOKED, reason="the model is a HookedTransformer")
CLEAN = zoo.prompts(zoo.one_shot("k"), zoo.one_shot("k", "c"))
ASKED = zoo.prompts(zoo.one_shot("m", "d"), zoo.one_shot("n", "e"))
K = zoo.WORDS.index(" k")


def logits(lens, prompts, vector=None):
    edit = NoEdit(lens.n_layer) if vector is None else vector.edit(lens, prompts)
    return lens.outputs(prompts, edit, lambda outputs, _: outputs)[:, 0]


@on_paper
def test_a_state_in_the_last_layer_says_what_clean_prompts_say():
    lens = zoo.linear_lens()
    found = logits(lens, ASKED, state_vector(lens, CLEAN, 1))
    expected = logits(lens, CLEAN).mean(dim=0)
    assert torch.allclose(found, expected.expand(2, -1), atol=1e-5)
    # One layer earlier, head (1, 0) still adds 30 " k" for the share of " k" it attends to; the
    # prompts show none, and the state has none either.
    early = logits(lens, ASKED, state_vector(lens, CLEAN, 0))
    assert torch.allclose(early[:, K], torch.zeros(2), atol=1e-5)
    assert expected[K] == pytest.approx(30 / 15, rel=1e-5)


def test_the_state_of_each_donor_gives_the_donors_predictions():
    lens = tiny.lens()
    prompts = tiny.TASK.prompts("test", shots=9, n=4)
    last = DonorState(torch.eye(lens.n_layer)[-1], lens.name, "donor")
    found = logits(lens, prompts, last)
    assert zoo.off(found, logits(lens, prompts.donors())) < 1e-5
    with pytest.raises(TaskError, match="have no donors"):
        last.edit(trained.lens(), CLEAN)
    with pytest.raises(ShapeError, match=r"is for 5 layers, model 'tiny' has 2"):
        replace(last, chosen=torch.zeros(5)).edit(lens, prompts)


@on_paper
def test_an_in_context_vector_is_the_direction_from_inputs_to_outputs():
    lens = zoo.linear_lens()
    # Read alone, the stream of "a" is its own coordinate and that of "k" another, in both layers.
    prompts = zoo.prompts(*(replace(zoo.one_shot("k"), query=Pair(x, "m")) for x in "am"))
    with pytest.raises(NumericalError, match="streams of inputs and outputs do not differ"):
        in_context_vector(lens, prompts[[1]])
    vector = in_context_vector(lens, prompts[[0]])
    a, m = zoo.WORDS.index("a"), zoo.WORDS.index("m")
    expected = torch.zeros(2, zoo.D_VOCAB)
    expected[:, m], expected[:, a] = 0.5**0.5, -(0.5**0.5)
    assert torch.allclose(vector.vectors, expected, atol=1e-6)
    x = logits(lens, ASKED)
    turned = logits(lens, ASKED, replace(vector, layers=(1,)) * 0.3)
    ahead = x + 0.3 * x.norm(dim=1, keepdim=True) * expected[1]
    assert torch.allclose(turned, ahead * (x.norm(dim=1) / ahead.norm(dim=1))[:, None], atol=1e-5)
    assert torch.allclose(turned.norm(dim=1), x.norm(dim=1), rtol=1e-5)


def test_an_in_context_vector_acts_at_every_position_where_it_should():
    lens = trained.lens()
    task = trained.TASKS["seven-on"]
    prompts = task.prompts("test", shots=2, n=3, kind="shuffled")
    vector = in_context_vector(lens, task.prompts("train", shots=2, n=4)) * 0.3
    everywhere = replace(vector, everywhere=True)
    found = logits(lens, prompts, everywhere)
    batch = lens.encode(prompts)
    edit = vector.edit(lens, prompts).and_at(range(batch.inputs.shape[1]))
    whole = WholePassEngine(lens.backend)
    with torch.no_grad():
        expected = whole.run(whole.read(batch), edit)[:, 0]
    assert zoo.off(found, expected) < 1e-4
    assert zoo.off(found, logits(lens, prompts, vector)) > 0.01
    both = tvlens.evaluate(
        lens, task, {"query": vector, "all": everywhere}, kinds=("zero",), n=3, shots=2
    )
    assert set(both["method"]) == {"none", "query", "all"}


def test_in_context_vectors_of_points_go_from_x_to_y():
    lens = tiny.lens()
    prompts = tiny.TASK.prompts("train", shots=3, n=2)
    batch = lens.encode(prompts)
    with torch.no_grad(), lens.frozen():
        sites = [tvlens.lens.Site("resid_post", n) for n in range(lens.n_layer)]
        kept = WholePassEngine(lens.backend).record(batch, sites)
    streams = torch.stack([kept[site] for site in sites], dim=2)
    differences = (streams[:, 1:6:2] - streams[:, 0:5:2]).flatten(0, 1).flatten(1)
    direction = in_context_vector(lens, prompts).vectors.flatten()
    along = (differences @ direction).square().sum() / direction.square().sum()
    largest = torch.linalg.matrix_norm(differences, 2) ** 2
    assert float(along / largest) == pytest.approx(1, abs=1e-4)
    assert differences.mean(dim=0) @ direction > 0
    with pytest.raises(TaskError, match="have none; give text prompts"):
        in_context_vector(lens, tiny.TASK.prompts("train", kind="zero", n=2))


@on_paper
def test_head_mixing_moves_heads_towards_their_means():
    lens = zoo.linear_lens()
    means = tvlens.mean_head_outputs(lens, CLEAN, answered_only=False)
    alpha = torch.zeros(2, 2)
    alpha[1, 0] = 0.25
    blend = HeadBlend(alpha, means.z, lens.name, "made")
    # The clean share of " k" is 1 in 15, that of the prompts asked 0.
    moved = logits(lens, ASKED, blend) - logits(lens, ASKED)
    expected = torch.zeros(zoo.D_VOCAB)
    expected[K] = 0.25 * 30 / 15
    assert torch.allclose(moved, expected.expand(2, -1), atol=1e-5)


@on_paper
def test_a_free_vector_takes_its_first_step_towards_the_answers():
    lens = zoo.linear_lens()
    means = tvlens.mean_head_outputs(lens, CLEAN, answered_only=False)
    task = zoo.TASK
    settings = FitSettings(kinds=("zero",), n_prompts=8, n_validation=2)
    read = read_fit_prompts(lens, task, settings, 0)
    one = Schedule(steps=1, learning_rate=1.0, batch_size=8)
    ((row, vector),) = free_vectors(lens, means, read, layers=[[1]], rates=[0.1], schedule=one)
    # Layer 1 writes 30/15 " k" on the average of the two prompts: one coordinate of all.
    size = 0.1 * 2 / zoo.D_VOCAB**0.5
    reading = read.training.reading
    targets = torch.nn.functional.one_hot(reading.batch.target, zoo.D_VOCAB).float()
    with torch.no_grad():
        outputs = lens.engine.run(reading, NoEdit(2))[:, 0]
    gradient = (outputs.softmax(dim=1) - targets).mean(dim=0)
    assert torch.allclose(vector.vectors[1], -size * gradient.sign(), atol=1e-5)
    assert vector.layers == (1,)
    assert row["validation_loss"] > 0


@pytest.fixture(scope="module")
def learned():
    lens = trained.lens()
    task = trained.TASKS["seven-on"]
    clean = task.prompts("train", shots=trained.SHOTS, n=20)
    means = tvlens.mean_head_outputs(lens, clean)
    settings = FitSettings(steps=30, n_prompts=32, shots=trained.SHOTS)
    read = read_fit_prompts(lens, task, settings, 0)
    ltv = tvlens.fit_ltv(lens, task, means, settings=settings, read=read)
    return lens, means, read, ltv


def loss(lens, read, vector):
    batch = read.validation.reading.batch
    edit = vector.edit(lens, trained.TASKS["seven-on"].prompts("validation", kind="zero"))
    with torch.no_grad():
        outputs = lens.engine.run(read.validation.reading, edit)
    return float(lens.readout.loss(outputs, batch).double().mean())


def test_free_vectors_bound_sums_of_heads(learned):
    lens, means, read, ltv = learned
    schedule = Schedule(steps=60, learning_rate=1.0, patience=None)
    every = [[0], [1], [0, 1]]
    found = free_vectors(lens, means, read, layers=every, rates=[0.1], schedule=schedule)
    losses = [row["validation_loss"] for row, _ in found]
    assert losses[2] < loss(lens, read, ltv.plain) + 0.05
    for row, vector in found:
        assert loss(lens, read, vector) == pytest.approx(row["validation_loss"], rel=1e-5)
    # Trained alone, a variant becomes what it became beside the others.
    alone = free_vectors(lens, means, read, layers=[[1]], rates=[0.1], schedule=schedule)
    assert torch.allclose(alone[0][1].vectors, found[1][1].vectors, atol=1e-4)


def test_head_mixing_learns_what_helps(learned):
    lens, means, read, _ = learned
    schedule = Schedule(steps=60, learning_rate=0.3, patience=None)
    found = fit_head_mixing(lens, means, read, schedule=schedule)
    nothing = loss(lens, read, HeadBlend(torch.zeros_like(means.z[..., 0]), means.z, "m", "none"))
    for row, blend in found:
        assert loss(lens, read, blend) == pytest.approx(row["validation_loss"], rel=1e-5)
        assert row["validation_loss"] < nothing - 0.1
        assert 0 <= blend.alpha.min() <= blend.alpha.max() <= 1
    with pytest.raises(TaskError, match="were read without donors"):
        fit_head_mixing(lens, means, read, per_prompt=True)


def test_a_sparse_path_keeps_as_many_heads_as_asked(learned):
    lens, _, read, ltv = learned
    schedule = Schedule(steps=20, learning_rate=0.1, patience=None)
    ks = (1, 3, 8)
    found = sparse_path(lens, ltv, read, ks=ks, schedule=schedule)
    for k, (row, vector) in zip(ks, found, strict=True):
        assert row["k"] == k
        weights = torch.linalg.lstsq(
            ltv.outputs.transpose(1, 2), vector.vectors[:, :, None].to(ltv.outputs)
        ).solution
        assert int((weights[..., 0].abs() > 1e-4).sum()) <= k
        assert loss(lens, read, vector) == pytest.approx(row["validation_loss"], rel=1e-5)
    assert found[2][0]["validation_loss"] <= loss(lens, read, ltv.plain) + 1e-6
    with pytest.raises(ShapeError, match="9"):
        sparse_path(lens, ltv, read, ks=[9])
