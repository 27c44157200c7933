"""Where heads look."""

import pytest
import torch

from helpers import tiny_regression, zoo
from tvlens.errors import ShapeError, TaskError, UnknownNameError
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.lens.replay import ReplayEngine
from tvlens.scores.induction import answer_attention, induction_scores

HOOKED = pytest.mark.skipif(not zoo.HAS_HOOKED, reason="made as a HookedTransformer")


def patterns_of(lens, batch):
    """`hook_pattern` as transformer-lens keeps it, `[batch layer head query key]`."""
    names = [f"blocks.{n}.attn.hook_pattern" for n in range(lens.n_layer)]
    kept = {}

    def keep(pattern, hook):
        kept[hook.name] = pattern.detach()

    with torch.no_grad(), lens.backend.model.hooks(fwd_hooks=[(name, keep) for name in names]):
        lens.backend.forward(batch.inputs, batch.mask)
    return torch.stack([kept[name] for name in names], dim=1)


@pytest.mark.parametrize("prefix", [(), (2,)])
def test_scores_are_those_of_patterns_by_hooks(lens, prefix):
    lens = Lens(lens.backend, lens.engine, lens.readout, prefix=prefix)
    found = induction_scores(lens, n=3, length=6, seed=4)
    batch = lens.backend.repeated(3, 6, prefix=prefix, seed=4)
    start = len(prefix)
    assert batch.inputs.shape == (3, start + 12)
    assert torch.equal(batch.inputs[:, start : start + 6], batch.inputs[:, start + 6 :])
    assert not set(batch.inputs[:, start:].flatten().tolist()) & {0, 1, 2, 3}
    patterns = patterns_of(lens, batch)
    expected = torch.zeros(3, 3, 4)
    for i in range(6):
        expected += patterns[..., start + 6 + i, start + i + 1] / 6
    assert torch.allclose(found.values, expected, atol=1e-6)
    assert (found.name, found.unit) == ("induction", "attention")
    assert torch.equal(induction_scores(lens, n=3, length=6, seed=4).scores, found.scores)
    assert not torch.equal(induction_scores(lens, n=3, length=6, seed=5).scores, found.scores)


@HOOKED
def test_a_head_that_looks_at_the_token_after_the_same_one_scores_one():
    """Positions are told apart by the model's own, so that a head can look so many places back."""
    length = 5
    model = zoo.attention_only(
        n_layers=1, n_heads=2, d_head=16, d_model=16, normalization_type=None, n_ctx=16
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.pos_embed.W_pos.copy_(100 * torch.eye(16))
        # A query at p has the key of p - length + 1 on its mind.
        back = torch.zeros(16, 16)
        for p in range(length - 1, 16):
            back[p, p - length + 1] = 1.0
        model.blocks[0].attn.W_Q[0] = back
        model.blocks[0].attn.W_K[0] = torch.eye(16)
    backend = zoo.HookedBackend(model, "made by hand")
    found = induction_scores(Lens(backend, ReplayEngine(backend), FirstToken()), n=2, length=length)
    assert torch.allclose(found.values[:, 0, 0], torch.ones(2), atol=1e-5)
    # The other head attends to all alike.
    alike = torch.tensor([1 / (length + i + 1) for i in range(length)]).mean()
    assert torch.allclose(found.values[:, 0, 1], alike.expand(2), atol=1e-6)


def test_sequences_fit_the_context(lens):
    room = lens.backend.n_ctx // 2
    found = induction_scores(lens, n=1, length=10_000)
    assert torch.equal(found.scores, induction_scores(lens, n=1, length=room).scores)
    with pytest.raises(ShapeError, match=r"0 sequences of 24 tokens twice asked for; 'llama' has"):
        induction_scores(lens, n=0)
    with pytest.raises(ShapeError, match=r"1 sequences of 1 tokens twice asked for"):
        induction_scores(lens, n=1, length=1)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_models_of_points_are_shown_numbers_twice(kind):
    lens = tiny_regression.lens(kind)
    found = induction_scores(lens, n=3, length=7, seed=1)
    batch = lens.backend.repeated(3, 7, seed=1)
    assert batch.inputs.shape == (3, 12, 1)
    patterns = patterns_of(lens, batch)
    expected = sum(patterns[..., 6 + i, i + 1] for i in range(6)) / 6
    assert torch.allclose(found.values, expected, atol=1e-5)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_attention_to_answers_is_that_to_their_tokens(kind, task):
    lens = zoo.lens("llama", kind)
    prompts = task.prompts("train", shots=2, n=4)
    found = answer_attention(lens, prompts)
    tokenizer, expected = lens.backend.tokenizer, torch.zeros(4, 3, 4)
    for i, prompt in enumerate(prompts):
        ids = tokenizer(prompt.text).input_ids
        batch = zoo.batch([ids])
        pattern = patterns_of(lens, batch)[0, :, :, -1]
        # Answers stand between "A:" and the end of the line.
        text, at = prompt.text, 0
        for demo in prompt.demos:
            at = text.index("A:", at) + 2
            before = len(tokenizer(text[:at]).input_ids)
            n = len(tokenizer(f" {demo.output}").input_ids)
            expected[i] += pattern[..., before : before + n].sum(dim=-1)
    assert torch.allclose(found.values, expected, atol=1e-5)
    assert expected.max() > 0.01
    assert (found.name, found.task) == ("answer_attention", prompts.task)


def test_attention_to_every_y_of_points():
    lens = tiny_regression.lens()
    prompts = tiny_regression.TASK.prompts("train", shots=5, n=4)
    found = answer_attention(lens, prompts)
    expected = patterns_of(lens, lens.encode(prompts))[..., -1, 1::2].sum(dim=-1)
    assert torch.allclose(found.values, expected, atol=1e-5)


def test_what_cannot_be_looked_at_is_refused(lens, task):
    with pytest.raises(TaskError, match=r"expected|no "):
        answer_attention(lens, task.prompts("train", n=2, kind="zero"))
    backend = zoo.backend("gpt-neo", "bridge")
    slow = Lens(backend, WholePassEngine(backend), FirstToken())
    with pytest.raises(UnknownNameError, match=r"'gpt-neo' has no site 'pattern'"):
        induction_scores(slow, n=1, length=4)


def test_few_at_once_change_nothing(lens):
    whole = induction_scores(lens, n=3, length=6)
    small = Lens(lens.backend, lens.engine, lens.readout, max_tokens=12)
    assert torch.allclose(induction_scores(small, n=3, length=6).values, whole.values, atol=1e-6)
