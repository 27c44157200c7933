"""Prompts that are tokens already, tokenizers that do not fit, and what is put before a text."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import tvlens
from helpers import zoo
from tvlens.errors import ModelError, TaskError, UnknownNameError
from tvlens.lens.edits import NoEdit
from tvlens.tasks import Prompts, TokenPrompts
from tvlens.vectors.ltv.settings import FitSettings

HOOKED = pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no such class")
P = 11
"""The toy adds two numbers modulo this; the token of this number is the sign behind them."""


class Addition:
    """Modular addition: every pair of numbers, and their sum."""

    name = digest = "addition"

    def prompts(
        self, split: Any, *, shots: int = 0, n: int | None = None, seed: int = 0, kind: Any = "zero"
    ) -> TokenPrompts:
        generator = torch.Generator().manual_seed(seed)
        pairs = torch.randint(P, (n or 20, 2), generator=generator).tolist()
        rows, answers = [[a, b, P] for a, b in pairs], [(a + b) % P for a, b in pairs]
        return Prompts.of_tokens(rows, answers, task=self.name, split=split, kind=kind, seed=seed)


def toy(**changes: Any) -> Any:
    """A HookedTransformer without a tokenizer, for three positions and fewer answers than words."""
    sizes = {"n_ctx": 3, "d_vocab": P + 1, "d_vocab_out": P, "n_layers": 2}
    model = zoo.attention_only(**(sizes | changes))
    model.tokenizer = None
    return model


@HOOKED
@pytest.mark.parametrize("n_ctx", [1, 2, 3, 5])
def test_models_of_few_positions_and_without_a_tokenizer(n_ctx):
    lens = tvlens.load(toy(n_ctx=n_ctx), name="toy")
    assert (lens.prefix, lens.engine.name) == ((), "replay")


@HOOKED
def test_a_toy_is_asked_in_tokens():
    model = toy()
    lens, task = tvlens.load(model, name="toy"), Addition()
    prompts = task.prompts("train", n=6)
    batch = lens.encode(prompts)
    assert batch.inputs.tolist() == [list(row) for row in prompts.rows]
    with torch.no_grad():
        expected = model(batch.inputs)[:, -1]
    found = lens.outputs(prompts, NoEdit(2), lambda x, _: x)
    assert zoo.off(found[:, 0], expected) < zoo.TOLERANCE[torch.float32]
    means = tvlens.mean_head_outputs(lens, prompts, answered_only=False)
    effects = tvlens.indirect_effects(lens, prompts[:4], means)
    right = torch.tensor(prompts[:4].answers)
    assert torch.allclose(effects.baseline[:, None], expected[:4].softmax(-1).gather(1, right))
    settings = FitSettings(steps=3, shots=0, n_prompts=8, n_validation=8)
    ltv = tvlens.fit_ltv(lens, task, means, settings=settings)
    assert ltv.history["validation_loss"].iloc[-1] < ltv.history["validation_loss"].iloc[0]


def test_token_prompts_are_values():
    prompts = Prompts.of_tokens([[1, 2], [3], [4, 5, 6]], [7, [8, 9], 1], task="mine", seed=3)
    assert len(prompts) == 3
    assert (prompts.rows[1], prompts.answers) == ((3,), ((7,), (8, 9), (1,)))
    assert prompts[1:].rows == prompts[[1, 2]].rows == ((3,), (4, 5, 6))
    assert prompts.digest != prompts[[1, 0, 2]].digest
    assert prompts.digest == Prompts.of_tokens(prompts.rows, prompts.answers).digest


@pytest.mark.parametrize(
    ("rows", "answers", "words"),
    [
        ([], [], "0 rows of tokens and 0 answers; expected one answer for each of at least one"),
        ([[1], [2]], [3], "2 rows of tokens and 1 answers"),
        ([[1], []], [3, 4], r"row 1 is \[\]; expected one token id or more"),
        ([[1], [-2]], [3, 4], r"row 1 is \[-2\]; .* none of them negative"),
        ([[1]], [[]], r"answer 0 is \[\]"),
    ],
)
def test_token_prompts_that_are_none_are_refused(rows, answers, words):
    with pytest.raises(TaskError, match=words):
        Prompts.of_tokens(rows, answers)


@pytest.mark.parametrize(("row", "words"), [([99], "up to 99"), ([1] * 129, "has 129 tokens")])
def test_tokens_that_the_model_does_not_take_are_refused(row, words):
    with pytest.raises(TaskError, match=f"row 1 has .*{words}|row 1 .*{words}"):
        zoo.lens().encode(Prompts.of_tokens([[1], row], [2, 3]))


def larger(pad: int) -> PreTrainedTokenizerFast:
    """A tokenizer with more tokens than the model, whose padding is one of them."""
    words = {f"w{i}": i for i in range(zoo.D_VOCAB + 10)}
    inner = Tokenizer(WordLevel(words, unk_token="w1"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w1", pad_token=f"w{pad}")


def raw(*texts: str) -> Prompts:
    """Prompts of these texts alone."""
    template = tvlens.tasks.Template("", "", "", "", " ")
    pairs = (tvlens.tasks.Pair(text, "w5") for text in texts)
    items = [tvlens.tasks.Prompt((), pair, "zero", template) for pair in pairs]
    return zoo.prompts(*items)


def test_padding_that_the_model_does_not_have_is_hidden():
    model = zoo.huggingface("llama")
    lens = tvlens.load(model, tokenizer=larger(zoo.D_VOCAB + 5))
    both = lens.outputs(raw("w7 w8 w9", "w3"), NoEdit(3), lambda x, _: x)
    alone = lens.outputs(raw("w3"), NoEdit(3), lambda x, _: x)
    assert zoo.off(both[1], alone[0]) < zoo.TOLERANCE[torch.float32]


def test_tokens_that_the_model_does_not_have_are_refused():
    lens = tvlens.load(zoo.huggingface("llama"), tokenizer=larger(0))
    words = r"holds the token 56 \('w56'\), the model has tokens up to 53; the tokenizer is larger"
    with pytest.raises(TaskError, match=words):
        lens.encode(raw("w7 w56"))


def test_a_tokenizer_in_a_folder_for_a_model_in_memory(tmp_path):
    zoo.tokenizer(bos=True).save_pretrained(tmp_path)
    assert tvlens.load(zoo.huggingface("llama"), tokenizer=tmp_path).prefix == (2,)
    with pytest.raises(UnknownNameError, match=r"tokenizer 'nowhere' cannot be loaded: .*; expect"):
        tvlens.load(zoo.huggingface("llama"), tokenizer="nowhere")


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_folder_gives_the_same_prompts_by_name_and_handed_in(bos, kind, tmp_path):
    zoo.huggingface("llama").save_pretrained(tmp_path)
    zoo.tokenizer(bos=bos).save_pretrained(tmp_path)
    by_name = tvlens.load(tmp_path, backend=kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    handed = tvlens.load(model, tokenizer=zoo.tokenizer(bos=bos), backend=kind)
    wrapped = by_name.backend.model
    again = tvlens.load(wrapped, tokenizer=wrapped.tokenizer)
    assert by_name.prefix == handed.prefix == again.prefix == ((2,) if bos else ())


def own(kind: str, folder: Path, *, bos: bool, prepend: bool) -> Any:
    """A model of transformer-lens with a tokenizer that puts a token before a text, or not."""
    model = zoo.new_backend("llama", kind).model
    zoo.tokenizer(bos=bos).save_pretrained(folder)
    model.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model.cfg.tokenizer_prepends_bos = bos
    model.cfg.default_prepend_bos = prepend
    return model


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_model_of_ones_own_is_asked_as_it_is_set_to_be(bos, kind, tmp_path):
    model = own(kind, tmp_path, bos=bos, prepend=False)
    assert tvlens.load(model).prefix == ()
    model = own(kind, tmp_path, bos=bos, prepend=True)
    with pytest.warns(UserWarning, match="begin with '<bos>', as its cfg.default_prepend_bos says"):
        lens = tvlens.load(model)
    assert lens.prefix == (2,)
    if kind == "hooked":
        tokens = model.to_tokens("Q", move_to_device=False)[0].tolist()
        assert tokens == [2, *model.tokenizer("Q", add_special_tokens=False).input_ids]


class Adapted(torch.nn.Module):
    """As peft wraps a model."""

    def merge_and_unload(self) -> None: ...


def test_adapters_and_quantised_weights_are_refused():
    with pytest.raises(ModelError, match=r"a Adapted carries an adapter .*: merge it first"):
        tvlens.load(Adapted())
    model = zoo.huggingface("llama")
    model._hf_peft_config_loaded = True
    with pytest.raises(ModelError, match="a LlamaForCausalLM carries an adapter"):
        tvlens.load(model)
    model = zoo.huggingface("llama")
    model.is_quantized = True
    with pytest.raises(ModelError, match="has quantised weights; expected plain ones"):
        tvlens.load(model)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mpt", "olmo2"])
@pytest.mark.parametrize("kind", zoo.KINDS)
def test_double_precision(name, kind):
    if kind == "hooked" and name not in zoo.CONFIGS:
        pytest.skip("no HookedTransformer is made of it")
    lens = tvlens.load(
        zoo.huggingface(name), tokenizer=zoo.tokenizer(), dtype="float64", backend=kind
    )
    assert (lens.backend.dtype, lens.engine.name) == (torch.float64, "replay")
    model = zoo.huggingface(name).double()
    found = lens.outputs(zoo.batch(), NoEdit(3), lambda x, _: x)
    for i, row in enumerate(zoo.ROWS):
        with torch.no_grad():
            expected = model(torch.tensor([row])).logits[0, -1]
        assert zoo.off(found[i, 0], expected) < 1e-5


def test_blocks_stay_where_a_device_map_puts_them(tmp_path):
    zoo.huggingface("llama").save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    lens = tvlens.load(tmp_path, device_map="cpu")
    plain = tvlens.load(tmp_path)
    found, expected = (x.outputs(zoo.batch(), NoEdit(3), lambda y, _: y) for x in (lens, plain))
    assert torch.equal(found, expected)
    with pytest.raises(UnknownNameError, match="device='cpu' and device_map='auto' both say"):
        tvlens.load(tmp_path, device="cpu", device_map="auto")


def test_loading_by_name_says_nothing(tmp_path):
    zoo.huggingface("llama").save_pretrained(tmp_path)
    zoo.tokenizer(bos=True).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tvlens.load(tmp_path).prefix == (2,)
