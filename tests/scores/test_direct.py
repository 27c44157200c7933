"""What parts of the model add to the logits sums to them."""

import warnings

import pytest
import torch

import tvlens
from helpers import tiny_regression, zoo
from tvlens.errors import TaskError
from tvlens.lens.edits import NoEdit
from tvlens.scores.direct import direct_effects
from tvlens.tasks import Prompts

ROWS = [[31, 6, 9, 40, 12], [8, 33, 20]]
PROMPTS = Prompts.of_tokens(ROWS, [11, 12])
WRONG = Prompts.of_tokens(ROWS, [20, 7])


def logits_of(lens):
    batch = lens.encode(PROMPTS)
    with torch.no_grad(), lens.frozen():
        return lens.engine.run(lens.engine.read(batch), NoEdit(lens.n_layer))[:, 0].float()


def uncapped(lens):
    """What `final_logit_softcapping` is put on."""
    cap = getattr(lens.backend.config, "final_logit_softcapping", None)
    logits = logits_of(lens)
    return cap * (logits / cap).atanh() if cap else logits


def loaded(name, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        if name in zoo.OWN:
            return zoo.lens(name, kind)
        return tvlens.load(
            zoo.huggingface(name), tokenizer=zoo.tokenizer(), name=name, backend=kind
        )


HYBRIDS = [(name, "bridge") for name in (*zoo.HYBRID_CONFIGS, *zoo.LATENT_CONFIGS, "dynamic-rope")]


@pytest.mark.parametrize(("name", "kind"), zoo.CASES + HYBRIDS)
def test_parts_sum_to_the_logit_difference(name, kind):
    lens = loaded(name, kind)
    logits, rows = uncapped(lens), torch.arange(2)
    right = logits[rows, torch.tensor([11, 12])]
    for wrong, other in ((None, logits.mean(dim=-1)), (WRONG, logits[rows, torch.tensor([20, 7])])):
        found = direct_effects(lens, PROMPTS, wrong=wrong)
        expected = right - other
        size = float(found.heads.nan_to_num().abs().max()) + float(found.blocks.abs().max())
        assert torch.allclose(found.total, expected, atol=2e-4 * max(1.0, size))
        assert torch.allclose(found.sum, expected, atol=2e-4 * max(1.0, size))
        assert found.heads.nan_to_num().abs().max() > 1e-3
        layers = list(lens.backend.attention_layers)
        assert not found.heads[:, layers].isnan().any()
        assert int(found.heads.isnan().all(dim=2)[0].sum()) == lens.n_layer - len(layers)


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="made as a HookedTransformer")
def test_a_head_that_writes_a_token_is_credited_with_it():
    """Head (1, 0) writes 30 times the share of " k", head (0, 1) 5 times that of "Q" as "<pad>"."""
    lens = zoo.linear_lens()
    k, q, pad = (zoo.WORDS.index(word) for word in (" k", "Q", "<pad>"))
    rows = Prompts.of_tokens([[q, k, 10, 11], [10, 11, 12, 13]], [k, k])
    wrong = Prompts.of_tokens(rows.rows, [pad, pad])
    found = direct_effects(lens, rows, wrong=wrong)
    expected = torch.zeros(2, 2, 2)
    expected[0, 1, 0], expected[0, 0, 1] = 30 / 4, -5 / 4
    assert torch.allclose(found.heads, expected, atol=1e-5)
    assert found.biases.abs().max() == found.blocks.abs().max() == 0
    assert found.embedding.tolist() == found.constant.tolist() == [0, 0]


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_parts_of_a_prediction(kind):
    lens = tiny_regression.lens(kind)
    prompts = tiny_regression.TASK.prompts("train", shots=5, n=6)
    found = direct_effects(lens, prompts)
    batch = lens.encode(prompts)
    with torch.no_grad(), lens.frozen():
        predicted = lens.engine.run(lens.engine.read(batch), NoEdit(lens.n_layer))[:, 0, 0]
    expected = predicted * prompts.target.sign() / lens.readout.variance**0.5
    assert torch.allclose(found.total, expected, atol=1e-4)
    assert torch.allclose(found.sum, expected, atol=1e-4)
    assert found.unit == "prediction towards the target"
    assert (expected > 0).float().mean() > 0.8


def test_scores_keep_what_prompts_say(lens):
    done = []
    found = direct_effects(lens, PROMPTS, progress=done.append)
    scores = found.scores
    assert (scores.name, scores.unit, scores.model) == ("direct", "logit difference", "llama")
    assert torch.equal(scores.values, found.heads)
    assert sum(done) == 2
    assert {"direct", "direct_low", "direct_high"} <= set(scores.to_frame())


def test_wrong_answers_to_other_prompts_are_refused(lens):
    with pytest.raises(TaskError, match=r"1 wrong answers for 2 prompts; expected one for each"):
        direct_effects(lens, PROMPTS, wrong=WRONG[[0]])
