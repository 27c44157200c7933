"""What heads add to the residual stream, where blocks scale it on the way."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tvlens
from helpers import zoo
from tvlens.errors import ModelError
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken

SCALED = [*zoo.SCALED_CONFIGS]
KINDS = pytest.mark.parametrize("name", [*SCALED, "bloom"])
TOLERANCE = zoo.TOLERANCE[torch.float32]


def loaded(name: str, **options: Any) -> Lens:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tvlens.load(zoo.huggingface(name), tokenizer=zoo.tokenizer(), name=name, **options)


def plain(name: str, row: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """What attention adds at the last position of one prompt, what its projection gives and reads.

    By hooks of torch on the original model, `[layer d_model]`, `[layer d_model]` and
    `[layer head_d_head]`.
    """
    model = zoo.huggingface(name)
    layers = getattr(model, "model", None) or model.transformer
    layers = layers.layers if hasattr(layers, "layers") else layers.h
    found: dict[tuple[str, int], Tensor] = {}

    def keep(what: str, n: int, x: Any) -> None:
        found[what, n] = (x[0] if isinstance(x, tuple) else x)[0, -1]

    for n, layer in enumerate(layers):
        attention = layer.self_attn if hasattr(layer, "self_attn") else layer.self_attention
        projection = attention.o_proj if hasattr(attention, "o_proj") else attention.dense
        behind = getattr(layer, zoo.READS_BEHIND_ATTENTION[name])
        layer.register_forward_pre_hook(lambda _, x, n=n: keep("before", n, x))
        behind.register_forward_pre_hook(lambda _, x, n=n: keep("behind", n, x))
        projection.register_forward_pre_hook(lambda _, x, n=n: keep("z", n, x))
        projection.register_forward_hook(lambda _, x, y, n=n: keep("projected", n, y))
    with torch.no_grad():
        model(torch.tensor([row]))
    before, behind, projected, z = (
        torch.stack([found[what, n] for n in range(zoo.N_LAYER)])
        for what in ("before", "behind", "projected", "z")
    )
    return behind - before, projected, z


def close(found: Tensor, expected: Tensor, share: float) -> bool:
    """Whether no factor is off by more than this share of the largest."""
    return bool((found - expected).abs().max() < share * expected.abs().max())


@KINDS
def test_contributions_and_bias_sum_to_what_attention_adds(name):
    lens = loaded(name)
    reading = lens.engine.read(zoo.batch())
    outputs = tvlens.lens.contributions(lens, reading)
    for i, row in enumerate(zoo.ROWS):
        added, projected, z = plain(name, row)
        bias = lens.backend.b_o
        if reading.factor is not None:
            bias = bias * reading.factor[i]
            assert close(reading.factor[i], added / projected, 1e-3)
        assert zoo.off(reading.z[i].flatten(1), z) < TOLERANCE
        assert zoo.off(outputs[i].sum(dim=1) + bias, added) < TOLERANCE


@pytest.mark.parametrize("name", SCALED)
def test_the_part_of_one_head_is_scaled_as_the_whole(name):
    lens = loaded(name)
    outputs = tvlens.lens.contributions(lens, lens.engine.read(zoo.batch()))
    added, projected, z = plain(name, zoo.ROWS[0])
    of_head = z.view(zoo.N_LAYER, zoo.N_HEAD, -1)[1, 2] @ lens.w_o[1, 2]
    assert zoo.off(outputs[0, 1, 2], of_head * added[1] / projected[1]) < 1e-4
    assert zoo.off(outputs[0, 1, 2], of_head) > 0.1


def test_the_factor_of_gemma_is_that_of_its_norm_and_of_granite_its_multiplier():
    lens, norm = loaded("gemma2"), zoo.huggingface("gemma2").model.layers[1]
    reading = lens.engine.read(zoo.batch())
    _, projected, _ = plain("gemma2", zoo.ROWS[0])
    weight = 1 + norm.post_attention_layernorm.weight.detach()
    expected = weight / (projected[1].square().mean() + 1e-6).sqrt()
    assert zoo.off(reading.factor[0, 1], expected) < 1e-4
    granite = loaded("granite")
    factor = granite.engine.read(zoo.batch()).factor
    assert torch.allclose(factor, torch.tensor(0.22), rtol=1e-5)


@KINDS
def test_means_are_means_of_contributions(name):
    lens = loaded(name)
    prompts = zoo.TASK.prompts("train", shots=2, n=6)
    means = tvlens.mean_head_outputs(lens, prompts, answered_only=False)
    reading = lens.engine.read(lens.encode(prompts))
    expected = tvlens.lens.contributions(lens, reading).mean(dim=0)
    assert zoo.off(means.outputs, expected) < TOLERANCE
    assert zoo.off(means.z, reading.z.mean(dim=0)) < TOLERANCE
    small = replace(lens, max_tokens=40)
    parts = tvlens.mean_head_outputs(small, prompts, answered_only=False)
    assert zoo.off(parts.outputs, means.outputs) < 1e-4
    product = torch.einsum("lhd,lhdm->lhm", means.z, lens.w_o)
    assert (zoo.off(means.outputs, product) < TOLERANCE) == (name == "bloom")


def test_means_leave_out_what_is_not_answered():
    class Some(FirstToken):
        """Counts one kind of answer as right, whatever the model says."""

        def answered(self, outputs, batch):
            return (batch.target == batch.target[0])[:, None].expand(-1, outputs.shape[1])

    lens = replace(loaded("gemma2"), readout=Some(), max_tokens=1000)
    prompts = zoo.TASK.prompts("train", shots=2, n=12)
    whole = tvlens.mean_head_outputs(lens, prompts)
    assert 0 < whole.count < 12
    reading = lens.engine.read(lens.encode(prompts)).rows(torch.tensor(whole.kept))
    expected = tvlens.lens.contributions(lens, reading).mean(dim=0)
    assert zoo.off(whole.outputs, expected) < TOLERANCE


@pytest.mark.parametrize("name", SCALED)
def test_scaled_models_are_looked_at_in_low_precision_too(name):
    lens = loaded(name, dtype=torch.bfloat16)
    assert lens.engine.scaled
    factor = lens.engine.read(zoo.batch()).factor.float()
    expected = loaded(name).engine.read(zoo.batch()).factor
    assert close(factor, expected, 0.3)


def test_readings_joined_and_taken_apart_keep_their_factors():
    lens = loaded("olmo2")
    engine = lens.engine
    whole = engine.read(zoo.batch())
    parts = [engine.read(zoo.batch([row])) for row in zoo.ROWS]
    joined = engine.join(parts)
    assert zoo.off(joined.factor, whole.factor) < 1e-4
    assert torch.equal(whole.rows(torch.tensor([2, 0])).factor, whole.factor[[2, 0]])
    assert torch.equal(whole.rows(slice(1, 3)).factor, whole.factor[1:3])


def test_models_that_add_what_attention_writes_have_no_factor():
    lens = loaded("llama")
    assert not lens.engine.scaled
    assert WholePassEngine(lens.backend).read(zoo.batch()).factor is None
    assert lens.engine.read(zoo.batch()).factor is None


def test_what_is_no_scaling_is_refused():
    model = zoo.huggingface("gemma2")
    model.model.layers[1].post_attention_layernorm = nn.LayerNorm(zoo.D_MODEL)
    with pytest.raises(ModelError, match="between attention and the residual stream is no scaling"):
        tvlens.load(model, tokenizer=zoo.tokenizer())


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
@pytest.mark.parametrize("norm", ["RMS", "RMSPre"])
def test_a_hooked_transformer_with_norms_behind_attention(norm):
    model = zoo.attention_only(
        normalization_type=norm,
        use_normalization_before_and_after=True,
        attn_only=False,
        act_fn="silu",
        d_mlp=20,
    )
    with pytest.warns(UserWarning, match="does not know use_normalization_before"):
        lens = tvlens.load(model)
    reading = lens.engine.read(zoo.batch())
    outputs = tvlens.lens.contributions(lens, reading)
    row = torch.tensor([zoo.ROWS[0]])
    with torch.no_grad():
        _, cache = model.run_with_cache(row, prepend_bos=False)
    for layer in range(zoo.N_LAYER):
        added = (cache["resid_mid", layer] - cache["resid_pre", layer])[0, -1]
        z = cache["z", layer][0, -1]
        written = torch.einsum("hd,hdm->m", z, model.W_O[layer]) + model.b_O[layer]
        scale = (written.square().mean() + model.cfg.eps).sqrt()
        weight = getattr(model.blocks[layer].ln1_post, "w", torch.ones(()))
        assert zoo.off(reading.factor[0, layer], (weight / scale).expand(zoo.D_MODEL)) < 1e-3
        bias = model.b_O[layer] * reading.factor[0, layer]
        assert zoo.off(outputs[0, layer].sum(dim=0) + bias, added) < TOLERANCE
