"""What users give to `tvlens.load`, and what they are told."""

from typing import Any

import pytest
import torch
import transformers

import tvlens
from helpers import zoo
from tvlens.errors import ModelError, UnknownNameError

SIZES = {"vocab_size": zoo.D_VOCAB, "hidden_size": 32, "num_hidden_layers": 3}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}


@pytest.fixture
def folder(tmp_path):
    zoo.huggingface("llama").to(torch.bfloat16).save_pretrained(tmp_path)
    zoo.tokenizer(bos=True).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, torch.float32),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("auto", torch.bfloat16),
    ],
)
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_precisions_of_a_folder(given, expected, kind, folder):
    lens = tvlens.load(folder, dtype=given, backend=kind)
    assert lens.backend.dtype == expected
    assert {p.dtype for p in lens.backend.parameters()} == {expected}


def test_a_model_in_memory_keeps_its_precision_unless_asked():
    model = zoo.huggingface("llama").to(torch.bfloat16)
    assert tvlens.load(model, tokenizer=zoo.tokenizer()).backend.dtype == torch.bfloat16
    assert model.dtype == torch.bfloat16
    model = zoo.huggingface("llama").to(torch.bfloat16)
    lens = tvlens.load(model, tokenizer=zoo.tokenizer(), dtype="float32")
    assert lens.backend.dtype == torch.float32


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", ["int8", torch.int8, "float8", "relu"])
def test_unknown_precisions_are_refused(wrong):
    with pytest.raises(UnknownNameError, match=r"unknown dtype .*; expected 'float32'"):
        tvlens.load(zoo.huggingface("llama"), dtype=wrong)


@pytest.mark.parametrize("wrong", ["gpu", "meta", "cuda:7", 7, torch.device("meta")])
def test_devices_that_are_not_there_are_refused(wrong):
    with pytest.raises(UnknownNameError, match=r"there is no device .* here; expected one of"):
        tvlens.load(zoo.huggingface("llama"), device=wrong)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_a_device_that_is_there(device):
    assert tvlens.load(zoo.huggingface("llama"), device=device).backend.device.type == "cpu"


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_nothing_of_a_model_is_kept_before_it_is_where_it_shall_be(kind, monkeypatch):
    done = []
    backend = type(zoo.backend("llama", kind))
    wrapper = type(zoo.backend("llama", kind).model)
    read, to = backend.w_o.func, wrapper.to
    monkeypatch.setattr(backend.w_o, "func", lambda self: done.append("read") or read(self))
    monkeypatch.setattr(
        wrapper, "to", lambda self, *where, **say: done.append("moved") or to(self, *where, **say)
    )
    tvlens.load(zoo.huggingface("llama"), device="cpu", backend=kind)
    assert done.count("read") == 1
    assert done.index("read") > max(i for i, what in enumerate(done) if what == "moved")


def test_a_tokenizer_in_a_folder(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("tokenizer")
    zoo.tokenizer().save_pretrained(other)
    assert tvlens.load(folder).prefix == (2,)
    assert tvlens.load(folder, tokenizer=other).prefix == ()


def test_further_arguments_reach_transformers(folder):
    lens = tvlens.load(folder, attn_implementation="eager", revision="main")
    assert lens.backend.config._attn_implementation == "eager"


def made(family: str, **config: Any) -> Any:
    cls = getattr(transformers, f"{family}ForCausalLM")
    text = "Text" if family == "Gemma4" else ""
    return cls(getattr(transformers, f"{family}{text}Config")(**config)).eval()


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("Mamba", SIZES | {"state_size": 4}, "'mine' has no attention heads in any of its 3 lay"),
        (
            "Lfm2",
            SIZES | HEADS | {"layer_types": ["conv", "conv", "conv"]},
            "'mine' has no attention heads in any of its 3 layers",
        ),
        (
            "Gemma4",
            SIZES | HEADS,
            "'mine' cannot be looked at: when its output projections are read, .* of one size",
        ),
        (
            "BioGpt",
            SIZES | {"num_attention_heads": 4, "intermediate_size": 24},
            r"TransformerBridge cannot wrap a BioGptForCausalLM: .{0,120}; see transformer-lens'",
        ),
    ],
)
def test_models_that_heads_cannot_be_told_of_are_refused_in_a_line(family, config, words):
    with pytest.raises(ModelError, match=words) as refused:
        tvlens.load(made(family, **config), tokenizer=zoo.tokenizer(), name="mine")
    assert "\n" not in str(refused.value)


def test_weights_that_were_cut_short_are_said_so(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    words = f"model '{folder}' is there and cannot be read .*cut short, copy or fetch it again"
    with pytest.raises(ModelError, match=words) as refused:
        tvlens.load(folder)
    assert "\n" not in str(refused.value)


def test_a_folder_without_weights_is_said_so(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"is there and cannot be read .*; expected a"):
        tvlens.load(folder)


def test_an_encoder_with_a_decoder_is_refused(tmp_path):
    sizes = {"vocab_size": 54, "d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_heads=4))
    model.save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"is there and cannot be read .*; expected a"):
        tvlens.load(tmp_path)
