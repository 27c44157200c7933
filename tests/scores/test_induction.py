"""What heads attend to, against patterns on paper and those of TransformerLens' own caches."""

import math
from dataclasses import replace

import pytest
import torch

from helpers import tiny_regression, zoo
from tvlens.errors import ShapeError, UnknownNameError
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.lens.replay import ReplayEngine
from tvlens.models.hooked import HookedBackend
from tvlens.scores.induction import answer_attention, induction_scores
from tvlens.tasks import Prompts

PROMPTS = Prompts.of_tokens(zoo.ROWS, [10, 11, 12, 13])


def looking_back(n, width, strength):
    """A layer whose head 0 looks n - 1 positions back, as far as there are any, and head 1 at all.

    Scores of head 0 are `strength` at that position and 0 elsewhere.
    """
    model = zoo.attention_only(
        n_layers=1, n_heads=2, d_head=width, d_model=width, normalization_type=None
    )
    with torch.no_grad():
        attn = model.blocks[0].attn
        for parameter in (model.embed.W_E, attn.W_Q, attn.W_K, attn.b_Q, attn.b_K):
            parameter.zero_()
        model.pos_embed.W_pos[:width] = torch.eye(width)
        attn.W_Q[0] = torch.eye(width)
        attn.W_K[0] = strength * width**0.5 * torch.eye(width).roll(n - 1, dims=1)
    backend = HookedBackend(model, "looking back")
    return Lens(backend, ReplayEngine(backend), FirstToken(), prefix=(2,))


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="made as a HookedTransformer")
@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("length", [2, 7])
def test_patterns_on_paper(length, whole):
    """From column t, softmax of one score of `strength` among t + 1 is e^s / (e^s + t)."""
    strength, width = 3.0, 1 + 2 * length
    lens = looking_back(length, width, strength)
    if whole:
        lens = replace(lens, engine=WholePassEngine(lens.backend))
    found = induction_scores(lens, n=3, length=length)
    columns = range(1 + length, width)
    e = math.exp(strength)
    expected = [sum(e / (e + t) for t in columns), sum(1 / (t + 1) for t in columns)]
    expected = torch.tensor([[x / length for x in expected]])
    assert torch.allclose(found.scores, expected, atol=1e-6)
    assert found.values.shape == (3, 1, 2)
    assert (found.name, found.unit, found.model) == (
        *("induction", "attention weight"),
        "looking back",
    )


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_scores_are_read_off_the_patterns_of_a_cache(kind):
    lens = zoo.lens("llama", kind, prefix=(2,))
    found = induction_scores(lens, n=3, length=9, seed=5)
    batch, period = lens.backend.repeated_prompts(3, 9, prefix=(2,), seed=5)
    assert period == 9
    with torch.no_grad():
        _, cache = lens.backend.model.run_with_cache(batch.inputs)
    for layer in range(3):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        expected = torch.stack([pattern[:, :, t, t - 8] for t in range(10, 19)]).mean(dim=0)
        assert torch.allclose(found.values[:, layer], expected, atol=1e-6)
    few = replace(lens, max_tokens=20)
    assert torch.allclose(induction_scores(few, n=3, length=9, seed=5).values, found.values)
    assert not torch.equal(induction_scores(lens, n=3, length=9, seed=6).values, found.values)


def test_sequences_are_of_words_and_repeat(lens):
    batch, period = lens.backend.repeated_prompts(5, 24, prefix=(2,), seed=0)
    assert batch.inputs.shape == (5, 49)
    assert (batch.inputs[:, 0] == 2).all()
    assert torch.equal(batch.inputs[:, 1:25], batch.inputs[:, 25:])
    assert period == 24
    assert batch.inputs[:, 1:].min() >= len(zoo.SPECIAL)
    assert all(len(set(row)) == 24 for row in batch.inputs[:, 1:25].tolist())
    assert len({tuple(row) for row in batch.inputs.tolist()}) == 5
    for n, length in ((0, 5), (3, 1), (3, 51)):
        with pytest.raises(ShapeError, match=r"expected at least one prompt of 2 to 50 tokens"):
            induction_scores(lens, n=n, length=length)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_points_repeat_as_far_as_there_are_positions(kind):
    lens = tiny_regression.lens(kind)
    batch, period = lens.backend.repeated_prompts(4, 24, prefix=(), seed=0)
    n_points = lens.backend.n_ctx // 4
    assert (batch.inputs.shape[1], period) == (4 * n_points, 2 * n_points)
    assert torch.equal(batch.inputs[:, :period], batch.inputs[:, period:])
    found = induction_scores(lens, n=4)
    with torch.no_grad():
        _, cache = lens.backend.model.run_with_cache(*_read_in(lens, batch.inputs), **_start(lens))
    pattern = cache["blocks.1.attn.hook_pattern"]
    columns = range(period, 2 * period)
    expected = torch.stack([pattern[:, :, t, t - period + 1] for t in columns]).mean(dim=0)
    assert torch.allclose(found.values[:, 1], expected, atol=1e-6)
    short, period = lens.backend.repeated_prompts(4, 2, prefix=(), seed=0)
    assert (short.inputs.shape[1], period) == (8, 4)
    with pytest.raises(ShapeError, match=r"0 prompts of 24 points and the same again asked of"):
        induction_scores(lens, n=0)


def _read_in(lens, inputs):
    if lens.backend.kind == "bridge":
        return (lens.backend.trained.read_in(inputs),)
    return (lens.backend.embed(inputs, torch.ones(inputs.shape[:2], dtype=torch.bool)),)


def _start(lens):
    return {} if lens.backend.kind == "bridge" else {"start_at_layer": 0}


def test_attention_to_all_columns_is_one(backend):
    """Sinks take their share, and have no column."""
    lens = Lens(backend, ReplayEngine(backend), FirstToken())
    found = answer_attention(lens, PROMPTS, torch.arange(7).expand(4, -1))
    assert found.values.shape == (4, 3, backend.n_head)
    if backend.name == "gpt-oss":
        assert found.values.max() < 1 + 1e-5
        assert found.scores.mean() < 0.9
    else:
        assert torch.allclose(found.values, torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_attention_is_that_of_a_cache_to_these_columns(kind):
    lens = zoo.lens("llama", kind, max_tokens=14)
    columns = torch.tensor([[6, 3], [-1, 5], [6, -1], [-1, 4]])
    found = answer_attention(lens, PROMPTS, columns)
    assert (found.name, found.task) == ("answer_attention", "tokens")
    for i, row in enumerate(zoo.ROWS):
        with torch.no_grad():
            _, cache = lens.backend.model.run_with_cache(torch.tensor([row]))
        at = [int(c) - (7 - len(row)) for c in columns[i] if c >= 0]
        for layer in range(3):
            expected = cache[f"blocks.{layer}.attn.hook_pattern"][0, :, -1, at].sum(dim=-1)
            assert torch.allclose(found.values[i, layer], expected, atol=1e-5)


def test_layers_without_heads_have_no_score():
    backend = zoo.backend("lfm2", "bridge")
    lens = Lens(backend, WholePassEngine(backend), FirstToken())
    found = answer_attention(lens, PROMPTS, torch.arange(7).expand(4, -1))
    assert found.scores.isnan().all(dim=1).tolist() == [True, False, True]
    assert torch.allclose(found.values[:, 1], torch.ones(()), atol=1e-5)


def test_what_cannot_be_read_is_refused(lens):
    for columns, said in (
        ([[0]] * 3, r"columns of 3 prompts are given for 4 prompts of task 'tokens'"),
        ([[0], [7], [0], [0]], r"prompt 1 of task 'tokens' is asked at column 6, .* \[7\] is"),
        ([[0], [0], [-2], [0]], r"prompt 2 .* columns \[-2\] is wanted; expected different"),
        ([[0, -1, -1], [2, 0, 2], [0, 1, 2], [0, 1, 2]], r"prompt 1 .* columns \[2, 0, 2\]"),
    ):
        with pytest.raises(ShapeError, match=said):
            answer_attention(lens, PROMPTS, torch.tensor(columns))


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 reads what it shows")
def test_patterns_that_are_only_shown_are_refused():
    backend = zoo.backend("gpt-neo", "bridge")
    shown_only = Lens(backend, WholePassEngine(backend), FirstToken())
    with pytest.raises(UnknownNameError, match=r"'gpt-neo' has no site 'pattern'"):
        induction_scores(shown_only)
