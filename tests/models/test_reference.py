"""A wrapped model that is not the model that was given is refused."""

import warnings
from typing import Any

import pytest
import torch
import transformers

import tvlens
from helpers import zoo
from tvlens.errors import ModelError
from tvlens.models.batch import Batch
from tvlens.models.bridge import BridgeBackend, bridge_from_huggingface
from tvlens.models.reference import read_reference, require_same

_BASE = {
    "vocab_size": zoo.D_VOCAB,
    "hidden_size": zoo.D_MODEL,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
_FALCON = {key: x for key, x in _BASE.items() if not key.startswith(("intermediate", "num_key"))}
_FALCON |= {"multi_query": False}
_WINDOW = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}


def made(family: str, **config: Any) -> Any:
    model = getattr(transformers, f"{family}ForCausalLM", None) or transformers.GPT2LMHeadModel
    found = model(getattr(transformers, f"{family}Config")(**config)).eval()
    zoo.randomise(found)
    return found


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("Falcon", _FALCON | {"alibi": True, "parallel_attn": False}),
        ("Falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
        ("GPT2", {"vocab_size": 54, "n_embd": 32, "n_layer": 2, "n_head": 4}
         | {"scale_attn_weights": False}),
    ],
    ids=["falcon-alibi", "falcon-new", "gpt2-unscaled"],
)  # fmt: skip
def test_a_bridge_with_other_logits_is_refused(family, config):
    words = (
        "TransformerBridge made of a .* gives other logits than the original: they differ by "
        r"\d\.\de-0\d standard deviations on 24 tokens, expected less than 1e-04; use"
    )
    with pytest.raises(ModelError, match=words):
        tvlens.load(made(family, **config), tokenizer=zoo.tokenizer())


@pytest.mark.parametrize("family", ["Cohere", "Cohere2", "HunYuanDenseV1"])
def test_a_bridge_that_only_transformer_lens_4_has_right(family):
    model = made(family, **_BASE | ({"head_dim": 8} if family == "HunYuanDenseV1" else {}))
    with torch.no_grad():
        expected = model(torch.tensor([zoo.ROWS[0]])).logits[0, -1]
    if zoo.HAS_HOOKED:
        with pytest.raises(ModelError, match=f"made of a {family}ForCausalLM gives other logits"):
            tvlens.load(model, tokenizer=zoo.tokenizer())
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lens = tvlens.load(model, tokenizer=zoo.tokenizer())
    found = lens.outputs(zoo.batch(), tvlens.NoEdit(2), lambda x, _: x)[0, 0]
    assert zoo.off(found, expected) < 1e-4


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
def test_a_window_that_a_hooked_transformer_leaves_out_is_seen():
    """It shows beyond the window alone, on prompts of more than eight tokens."""
    model = made("Qwen2", **_BASE, **_WINDOW)
    with pytest.raises(ModelError, match=r"HookedTransformer made of a Qwen2.*backend='bridge'"):
        tvlens.load(model, tokenizer=zoo.tokenizer(), backend="hooked")


@pytest.mark.parametrize(
    ("changes", "longest"),
    [
        ({}, 24),
        ({"sliding_window": 40, "use_sliding_window": True}, 82),
        ({"sliding_window": 4096, "use_sliding_window": True}, 24),
        ({"max_position_embeddings": 6}, 6),
    ],
)
def test_prompts_are_longer_than_windows_and_fit_the_model(changes, longest):
    reference = read_reference(made("Qwen2", **_BASE | changes))
    assert [len(row) for row in reference.rows] == [longest, longest // 2, 3]
    assert reference.architecture == "Qwen2ForCausalLM"


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_prompts_are_compared_alone_and_padded(kind):
    sound = zoo.backend("llama", kind)
    reference = read_reference(zoo.huggingface("llama"))
    require_same(sound, reference)

    class Padded(type(sound)):
        """Lets padding through."""

        def forward(self, inputs, mask):
            return super().forward(inputs, torch.ones_like(mask))

    words = f"{type(sound.model).__name__} made of a Llama.* standard deviations beside a longer"
    with pytest.raises(ModelError, match=words):
        require_same(Padded(sound.model, "llama"), reference)


def test_low_precision_has_more_room_than_single():
    reference = read_reference(zoo.huggingface("llama").to(torch.bfloat16))
    half = zoo.new_backend("llama", "bridge", torch.bfloat16)
    require_same(half, reference)
    with pytest.raises(ModelError, match="expected less than 1e-04"):
        require_same(zoo.backend("llama", "bridge"), reference)


def test_what_is_the_same_for_every_token_changes_no_answer():
    class Shifted(BridgeBackend):
        def forward(self, inputs, mask):
            logits = super().forward(inputs, mask)
            return logits + torch.arange(logits.shape[1])[:, None]

    sound = zoo.backend("llama", "bridge")
    require_same(Shifted(sound.model, "llama"), read_reference(zoo.huggingface("llama")))


def test_a_model_that_does_not_read_tokens_alone_is_refused():
    sizes = {"vocab_size": 54, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_heads=4))
    words = "a T5ForConditionalGeneration does not give logits of tokens alone .*expected a causal"
    with pytest.raises(ModelError, match=words):
        tvlens.load(model, tokenizer=zoo.tokenizer())


def test_prompts_on_both_sides_of_a_switch_of_rotary_angles_are_refused():
    rope = {"rope_type": "longrope", "rope_theta": 1e4}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    sizes = _BASE | {"original_max_position_embeddings": 16, "max_position_embeddings": 32}
    model = made("Phi3", **sizes, rope_parameters=rope)
    rows = [list(range(20, 40)), list(range(20, 30))]
    with torch.no_grad():
        expected = [model(torch.tensor([row])).logits[0, -1] for row in rows]
    backend = BridgeBackend(bridge_from_huggingface(model, None, torch.float32), "mine")
    for row, logits in zip(rows, expected, strict=True):
        alone = Batch.pad([row], [[[0]]])
        assert zoo.off(backend.forward(alone.inputs, alone.mask)[0, -1], logits) < 1e-4
    both = Batch.pad(rows, [[[0]], [[0]]])
    words = "'mine' turns queries and keys by other angles in prompts of more than 16 tokens, and "
    with pytest.raises(ModelError, match=words + "these are of 10 to 20"):
        backend.forward(both.inputs, both.mask)


def test_logits_that_are_no_numbers_beside_a_longer_prompt_are_refused(monkeypatch):
    backend = zoo.new_backend("llama", "bridge")
    reference = read_reference(zoo.huggingface("llama"))
    require_same(backend, reference)
    forward = BridgeBackend.forward

    def spoilt(self: BridgeBackend, inputs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = forward(self, inputs, mask).clone()
        logits[1:] = torch.nan
        return logits

    monkeypatch.setattr(BridgeBackend, "forward", spoilt)
    with pytest.raises(ModelError, match="differ by nan standard deviations beside a longer"):
        require_same(backend, reference)
