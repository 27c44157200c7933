"""Causal head gating, on a model whose heads are known and on one that does tasks."""

import math

import pytest
import torch

from helpers import trained, zoo
from tvlens.errors import NumericalError, ShapeError, UnknownNameError
from tvlens.lens.fitting import Schedule
from tvlens.scores.gating import HeadGates, head_gates, steps_of

SCHEDULE = Schedule(steps=40, learning_rate=1.0, batch_size=2, patience=None, clip=1.0)
on_paper = pytest.mark.skipif(not zoo.HAS_HOOKED, reason="the model is a HookedTransformer")


@on_paper
@pytest.mark.parametrize("positions", ["query", "all"])
def test_gates_of_a_linear_model_say_which_head_answers(positions):
    lens = zoo.linear_lens()
    prompts = zoo.prompts(zoo.one_shot("k"), zoo.one_shot("k", "c"))
    steps = []
    gates = head_gates(
        lens, prompts, positions=positions, n_masks=2, schedule=SCHEDULE, progress=steps.append
    )
    # Head (1, 0) writes the answer, (0, 1) another token, and the other two nothing.
    facilitating, interfering = gates.facilitating.scores, gates.interfering.scores
    assert facilitating[1, 0] > 0.95
    assert interfering[0, 1] > 0.95
    assert facilitating[0, 1] < 0.05
    assert interfering[1, 0] < 0.05
    assert gates.irrelevant.scores[[0, 1], [0, 1]].min() > 0.9
    assert len(steps) == steps_of(SCHEDULE) == 120


@on_paper
def test_the_loss_without_pressure_is_that_of_the_gated_logits():
    lens = zoo.linear_lens()
    prompts = zoo.prompts(zoo.one_shot("k"))
    once = Schedule(steps=1, learning_rate=1e-9, batch_size=1, patience=None)
    found = head_gates(lens, prompts, n_masks=1, schedule=once, pressure=0.0)
    # Gates as drawn: 30 " k" for the share of it, 1 in 15; 5 "<pad>" for that of "Q", 2 in 15.
    gate = found.kept[0]
    logits = torch.zeros(zoo.D_VOCAB)
    logits[zoo.WORDS.index(":")] = 1
    logits[zoo.WORDS.index(" k")] = 2 * gate[1, 0]
    logits[zoo.WORDS.index("<pad>")] = 10 / 15 * gate[0, 1]
    expected = logits.logsumexp(dim=0) - logits[zoo.WORDS.index(" k")]
    assert float(found.loss) == pytest.approx(float(expected), abs=1e-5)


def test_gates_are_scores_with_intervals_over_masks(tmp_path):
    lens = trained.lens()
    prompts = trained.TASKS["seven-on"].prompts("train", shots=trained.SHOTS, n=8)
    gates = head_gates(lens, prompts, n_masks=3, schedule=SCHEDULE, seed=1)
    for score in (gates.facilitating, gates.interfering, gates.irrelevant):
        assert score.values.shape == (3, lens.n_layer, lens.n_head)
        low, high = score.interval()
        assert (low <= score.scores + 1e-6).all()
        assert (score.scores <= high + 1e-6).all()
    assert (gates.cut <= gates.kept + 0.05).float().mean() > 0.9
    again = head_gates(lens, prompts, n_masks=3, schedule=SCHEDULE, seed=1)
    assert torch.equal(again.kept, gates.kept)
    gates.save(tmp_path / "g.safetensors")
    assert torch.equal(HeadGates.load(tmp_path / "g.safetensors").cut, gates.cut)


def test_what_cannot_be_gated_is_refused():
    lens = trained.lens()
    prompts = trained.TASKS["seven-on"].prompts("train", shots=trained.SHOTS, n=2)
    with pytest.raises(UnknownNameError, match="unknown positions 'last' of gates; expected query"):
        head_gates(lens, prompts, positions="last")
    with pytest.raises(ShapeError, match="0 masks asked for; expected at least 1"):
        head_gates(lens, prompts, n_masks=0)
    endless = Schedule(steps=2, learning_rate=math.inf, batch_size=2, patience=None)
    with pytest.raises(NumericalError, match=r"head gates without pressure of task 'seven-on' div"):
        head_gates(lens, prompts, schedule=endless)
