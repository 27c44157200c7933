"""Models that see pictures: their text part is looked at, and nothing is installed or fetched."""

import socket
import subprocess
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers

import tvlens
from helpers import zoo
from tvlens.errors import ModelError
from tvlens.lens.edits import ReplaceHeads

SIZES = {
    "vocab_size": zoo.D_VOCAB,
    "hidden_size": zoo.D_MODEL,
    "intermediate_size": 24,
    "num_hidden_layers": zoo.N_LAYER,
    "num_attention_heads": zoo.N_HEAD,
    "num_key_value_heads": 2,
    "max_position_embeddings": zoo.N_CTX,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
EYES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_EYES = {"depth": 1, "num_heads": 2, "hidden_size": 16, "intermediate_size": 16}
BY_SECTION = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
MODELS: dict[str, dict[str, Any]] = {
    "Gemma3": {
        "text_config": SIZES | {"head_dim": 6, "sliding_window": 4},
        "vision_config": EYES,
        "mm_tokens_per_image": 4,
    },
    "Mistral3": {
        "text_config": SIZES | {"model_type": "mistral", "sliding_window": None},
        "vision_config": EYES | {"model_type": "pixtral", "head_dim": 8},
        "image_token_index": 5,
    },
    # As its checkpoints have it.
    "Qwen2VL": {
        "text_config": SIZES | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
        "vision_config": {"embed_dim": 16, "depth": 1, "num_heads": 2, "hidden_size": 32},
    },
    "Qwen2_5_VL": {
        "text_config": SIZES | {"rope_parameters": BY_SECTION},
        "vision_config": QWEN_EYES | {"out_hidden_size": 32},
    },
    "Qwen3VL": {
        "text_config": SIZES | {"head_dim": 8, "rope_parameters": BY_SECTION},
        "vision_config": QWEN_EYES | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
    },
    "Llama4": {
        "text_config": SIZES
        | {
            "head_dim": 6,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 24,
            "attention_chunk_size": 8,
        },
        "vision_config": EYES
        | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
    },
    "Llava": {
        "text_config": SIZES | {"model_type": "llama"},
        "vision_config": EYES | {"model_type": "clip_vision_model"},
        "image_token_index": 5,
    },
}
SLOW = {"Llama4"}
KINDS = pytest.mark.parametrize("family", MODELS)


def made(family: str, **changes: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**(MODELS[family] | changes))
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval()
    zoo.randomise(model)
    return model


@pytest.fixture
def calls(monkeypatch):
    """What was started or reached for; it fails, whoever asks."""
    found: list[str] = []

    def refuse(what: str) -> Any:
        def call(*given: Any, **_: Any) -> None:
            found.append(f"{what} {given[1:]}")
            raise OSError(f"{what} is not allowed here")

        return call

    monkeypatch.setattr(subprocess.Popen, "__init__", refuse("process"))
    monkeypatch.setattr(socket.socket, "connect", refuse("connection"))
    monkeypatch.setattr(socket, "getaddrinfo", refuse("address"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return found


def replaced(model: Any, row: list[int], layer: int, head: int, value: torch.Tensor) -> Any:
    """Logits of the original at the end, with one head replaced there by a hook of torch."""
    text = next(m for name, m in model.named_modules() if name.endswith("language_model"))
    layers = next(m for name, m in text.named_modules() if name.split(".")[-1] == "layers")

    def put(_: Any, inputs: tuple[torch.Tensor, ...]) -> Any:
        z = inputs[0].clone()
        z[0, -1].view(zoo.N_HEAD, -1)[head] = value
        return (z, *inputs[1:])

    handle = layers[layer].self_attn.o_proj.register_forward_pre_hook(put)
    with torch.no_grad():
        logits = model(torch.tensor([row]), use_cache=False).logits[0, -1]
    handle.remove()
    return logits


@KINDS
@pytest.mark.filterwarnings("ignore:.*is run by whole forward passes")
def test_the_text_part_is_looked_at_and_nothing_is_fetched(family, tmp_path, calls):
    made(family).save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    lenses = [tvlens.load(tmp_path), tvlens.load(made(family), tokenizer=zoo.tokenizer())]
    assert calls == []
    model, batch = made(family), zoo.batch()
    for lens in lenses:
        assert lens.engine.name == ("whole passes" if family in SLOW else "replay")
        values = torch.randn(3, 4, lens.backend.d_head, generator=torch.Generator().manual_seed(1))
        edit = ReplaceHeads.each_head(values).of_variants(torch.tensor([1, 10]))
        found = lens.outputs(batch, edit, lambda x, _: x)
        for i, row in enumerate(zoo.ROWS):
            for variant, (layer, head) in enumerate([(0, 1), (2, 2)]):
                expected = replaced(model, row, layer, head, values[layer, head])
                assert zoo.off(found[i, variant], expected) < zoo.TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_nothing_is_fetched_for_a_folder_of_text_alone(name, tmp_path, calls):
    zoo.huggingface(name).save_pretrained(tmp_path)
    zoo.tokenizer(bos=True).save_pretrained(tmp_path)
    for kind in zoo.KINDS if name != "gemma2" else ["bridge"]:
        tvlens.load(tmp_path, backend=kind)
    assert calls == []


def test_a_text_part_without_a_model_of_its_own_is_refused(calls):
    config = transformers.MllamaConfig(
        text_config=SIZES | {"cross_attention_layers": [1], "pad_token_id": 0},
        vision_config={"hidden_size": 16, "num_hidden_layers": 1, "num_global_layers": 1}
        | {"attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_output_dim": 32}
        | {"intermediate_layers_indices": [0], "intermediate_size": 16},
    )
    model = transformers.MllamaForConditionalGeneration(config).eval()
    with pytest.raises(ModelError, match="no causal language model of its text part") as refused:
        tvlens.load(model, tokenizer=zoo.tokenizer())
    assert "\n" not in str(refused.value)
    assert calls == []
