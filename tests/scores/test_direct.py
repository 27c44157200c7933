"""Parts of the residual stream sum to what the model gives, whatever it is made of."""

from dataclasses import replace

import pytest
import torch

from helpers import tiny_regression, zoo
from tvlens.errors import ModelError, ShapeError, TaskError
from tvlens.lens.edits import NoEdit
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.scores.direct import COLUMNS, DirectAttribution, direct_effects
from tvlens.tasks import Prompts

RIGHT, WRONG = [10, 11, 12, 13], [40, 8, 12, 5]
PROMPTS, AGAINST = (Prompts.of_tokens(zoo.ROWS, tokens) for tokens in (RIGHT, WRONG))
WHOLE = [*zoo.HYBRID_CONFIGS, *zoo.LATENT_CONFIGS, "dynamic-rope"]


@torch.no_grad()
def logits(backend, prompts=PROMPTS):
    """Those of whole passes, before the cap."""
    batch = backend.encode(prompts, prefix=())
    found = backend.forward(batch.inputs, batch.mask)[:, -1]
    cap = backend.logit_cap
    return found if cap is None else cap * (found / cap).double().atanh().float()


def require_parts(lens):
    found, expected = direct_effects(lens, PROMPTS), logits(lens.backend)
    rows = torch.arange(4)
    right = expected[rows, RIGHT]
    tolerance = 2e-4 * expected.std()
    assert torch.allclose(found.sum, right - expected.mean(dim=1), atol=tolerance)
    assert torch.allclose(found.sum, found.total, atol=tolerance)
    other = direct_effects(replace(lens, max_tokens=8, max_rows=1), PROMPTS, against=AGAINST)
    assert torch.allclose(other.sum, right - expected[rows, WRONG], atol=tolerance)
    assert other.sum[2].abs() <= tolerance
    return found


def test_parts_sum_to_logit_differences(backend):
    lens = zoo.Lens(backend, zoo.ReplayEngine(backend), FirstToken())
    lens.engine.scaled = lens.engine.anywhere.scaled = backend.name in zoo.SCALED_CONFIGS
    found = require_parts(lens)
    slow = WholePassEngine(backend, scaled=lens.engine.scaled)
    by_passes = direct_effects(replace(lens, engine=slow), PROMPTS)
    for name, expected in found.state()[0].items():
        passed = by_passes.state()[0][name]
        assert torch.allclose(passed, expected, atol=2e-4 * float(found.total.std())), name
    assert found.heads.std() > 1e-3


@pytest.mark.parametrize("name", WHOLE)
def test_parts_of_models_that_are_run_whole_sum_too(name):
    backend = zoo.backend(name, "bridge")
    engine = WholePassEngine(backend, scaled=name == "granite-hybrid")
    found = require_parts(Lens(backend, engine, FirstToken()))
    there = ~found.scores.scores.isnan().all(dim=1)
    assert there.nonzero().flatten().tolist() == list(backend.attention_layers)
    assert found.biases[:, ~there].abs().sum() == 0


def test_parts_of_half_precision_sum_roughly():
    backend = zoo.backend("gpt2", "bridge", torch.bfloat16)
    found = direct_effects(Lens(backend, zoo.ReplayEngine(backend), FirstToken()), PROMPTS)
    assert zoo.off(found.sum, found.total) < zoo.TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_heads_are_those_of_the_cache(name, kind):
    """By TransformerLens' own activations and weights, the scale being that of its final norm."""
    backend = zoo.backend(name, kind)
    found = direct_effects(zoo.lens(name, kind), PROMPTS, against=AGAINST)
    model = backend.model
    for i, row in enumerate(zoo.ROWS):
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([row]))
        direction = model.W_U[:, RIGHT[i]] - model.W_U[:, WRONG[i]]
        x = cache["blocks.2.hook_resid_post"][0, -1]
        weight = _weight(backend) * direction
        centre = name == "gpt2"
        scale = ((x - centre * x.mean()).square().mean() + 1e-5).rsqrt()
        for layer in range(3):
            z = cache[f"blocks.{layer}.attn.hook_z"][0, -1].view(4, -1)
            outputs = torch.einsum("hd,hdm->hm", z, backend.w_o[layer])
            outputs = outputs - centre * outputs.mean(dim=-1, keepdim=True)
            assert torch.allclose(found.heads[i, layer], scale * outputs @ weight, atol=1e-4)


def _weight(backend):
    return (
        zoo.huggingface(backend.name)
        .base_model._modules["ln_f" if backend.name == "gpt2" else "norm"]
        .weight.detach()
    )


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="the linear model is a HookedTransformer")
def test_a_linear_model_says_what_its_weights_say():
    """Head (0, 1) reads "Q" and writes 5 times "<pad>"; head (1, 0) writes 30 times " k"."""
    words = zoo.WORDS
    prompts = Prompts.of_tokens([[words.index("Q"), words.index(" k")] * 2], [0])
    found = direct_effects(
        zoo.linear_lens(), prompts, against=Prompts.of_tokens([[0]], [words.index(" k")])
    )
    assert torch.allclose(found.heads, torch.tensor([[[0.0, 2.5], [-15.0, 0.0]]]))
    assert found.embeddings.tolist() == [-1.0]
    assert found.constant.tolist() == [0.0]


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_predictions_are_attributed_too(kind):
    lens = tiny_regression.lens(kind)
    lens = replace(lens, readout=type(lens.readout)(4.0), max_tokens=20)
    prompts = tiny_regression.TASK.prompts("train", shots=4, n=5)
    seen = []
    found = direct_effects(lens, prompts, progress=seen.append)
    said = lens.outputs(prompts, NoEdit(lens.n_layer), lambda outputs, batch: outputs)[:, 0, 0]
    expected = said * prompts.target.sign() / 2
    assert torch.allclose(found.sum, expected, atol=1e-5)
    assert set(prompts.target.sign().tolist()) == {-1.0, 1.0}
    assert found.unit == found.scores.unit == "standard deviations"
    assert sum(seen) == 5
    assert len(seen) > 1
    with pytest.raises(ModelError, match=r"whose answers are predictions; expected against=None"):
        direct_effects(lens, prompts, against=prompts)


def test_scores_are_means_of_prompts_and_tables_sum(lens, tmp_path):
    found = direct_effects(lens, PROMPTS)
    scores = found.scores
    assert (scores.name, scores.unit, scores.model) == ("direct", "logits", "llama")
    assert torch.allclose(scores.scores, found.heads.mean(dim=0))
    table = found.to_frame()
    assert tuple(table.columns) == COLUMNS
    assert table["value"].sum() == pytest.approx(float(found.total.mean()), abs=1e-5)
    assert table["part"].value_counts().to_dict() == {
        **{"head": 12, "bias": 3, "rest": 3},
        **{"embeddings": 1, "constant": 1},
    }
    found.save(tmp_path / "direct.safetensors")
    again = DirectAttribution.load(tmp_path / "direct.safetensors")
    assert torch.equal(again.heads, found.heads)
    assert again.state()[1] == found.state()[1]
    with pytest.raises(ShapeError, match=r"heads have shape \(4, 3, 4\), rest \(4, 2\)"):
        replace(found, rest=found.rest[:, :2])


def test_the_likeliest_right_answer_counts(lens, monkeypatch):
    expected = logits(lens.backend)
    prompts = lens.encode(PROMPTS)
    several = replace(prompts, answers=tuple(((a,), (20,)) for a in RIGHT))
    plain = direct_effects(lens, PROMPTS).total
    monkeypatch.setattr(type(lens.backend), "encode", lambda *_, **__: several)
    found = direct_effects(lens, PROMPTS)
    best = expected[:, [20]].maximum(expected[torch.arange(4), RIGHT][:, None])[:, 0]
    assert torch.allclose(found.sum, best - expected.mean(dim=1), atol=1e-3)
    assert (found.total != plain).any()


def test_inference_mode_changes_nothing(lens):
    with torch.inference_mode():
        found = direct_effects(lens, PROMPTS)
    assert torch.equal(found.heads, direct_effects(lens, PROMPTS).heads)


def test_what_does_not_add_up_is_refused(lens):
    with pytest.raises(TaskError, match=r"4 wrong answers for 2 prompts"):
        direct_effects(lens, Prompts.of_tokens(zoo.ROWS[:2], [1, 2]), against=PROMPTS)
    backend = zoo.backend("gemma2", "bridge")
    unscaled = Lens(backend, WholePassEngine(backend), FirstToken())
    with pytest.raises(ModelError, match=r"parts of 'gemma2' sum to .* and the model gives"):
        direct_effects(unscaled, PROMPTS)
    backend = zoo.backend("opt-projected", "bridge")
    with pytest.raises(ModelError, match=r"'opt-projected' has no norm behind its last block"):
        direct_effects(Lens(backend, WholePassEngine(backend), FirstToken()), PROMPTS)
