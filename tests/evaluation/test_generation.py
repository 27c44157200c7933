"""Text generated under a vector: at the query position, at every new one, or at some."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import tvlens
from helpers import zoo
from tvlens.errors import ModelError, ShapeError, UnknownNameError
from tvlens.evaluation import answers as module
from tvlens.evaluation import generate_tokens
from tvlens.lens.edits import ReplaceHeads
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.tasks import Prompts
from tvlens.vectors.vector import TaskVector

PLACES = {"first": [0], "all": [0, 1, 2, 3, 4], "new ones": [1, 2, 3, 4], "two": [1, 3]}
GIVEN: dict[str, Any] = {"first": "first", "all": "all"}
GIVEN |= {"new ones": range(1, 9), "two": range(1, 5, 2)}
CASES = pytest.mark.parametrize(
    ("name", "kind"), [("llama", kind) for kind in zoo.KINDS] + [("gemma3", "bridge")]
)


def vector(lens: Lens) -> TaskVector:
    generator = torch.Generator().manual_seed(5)
    vectors = 3 * torch.randn(lens.n_layer, lens.d_model, generator=generator)
    return TaskVector(vectors, (0, 2), lens.name, "made")


def prompts(n: int = 4) -> Prompts:
    return zoo.TASK.prompts("test", shots=2, n=n)


def by_hand(lens: Lens, text: str, places: list[int]) -> list[int]:
    """A plain loop over whole passes of one prompt, with hooks of TransformerLens itself."""
    tokens = zoo.tokenizer()(text, add_special_tokens=False).input_ids
    start, vectors = len(tokens) - 1, vector(lens).vectors
    for _ in range(5):
        columns = [start + p for p in places if start + p < len(tokens)]

        def add(residual: torch.Tensor, hook: Any, columns: list[int] = columns) -> torch.Tensor:
            changed = residual.clone()
            changed[:, columns] += vectors[int(hook.name.split(".")[1])]
            return changed

        hooks = [(f"blocks.{n}.hook_resid_post", add) for n in (0, 2)]
        with torch.no_grad():
            logits = lens.backend.model.run_with_hooks(torch.tensor([tokens]), fwd_hooks=hooks)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[start + 1 :]


@CASES
@pytest.mark.parametrize("places", PLACES)
def test_tokens_are_those_of_a_plain_loop_on_both_engines(name, kind, places):
    lens = zoo.lens(name, kind)
    expected = [by_hand(lens, text, PLACES[places]) for text in prompts().texts]
    whole = WholePassEngine(lens.backend, scaled=lens.engine.scaled)
    for each in (lens, replace(lens, engine=whole, max_tokens=40)):
        found = generate_tokens(each, prompts(), vector(lens), n_tokens=5, positions=GIVEN[places])
        assert found.tolist() == expected


@CASES
@pytest.mark.parametrize("steps", [range(1), range(5), range(1, 4)])
def test_heads_are_replaced_at_new_positions_too(name, kind, steps):
    lens = zoo.lens(name, kind)
    generator = torch.Generator().manual_seed(6)
    sizes = (lens.n_layer, lens.n_head, lens.backend.d_head)
    values = 5 * torch.randn(sizes, generator=generator)
    edit = ReplaceHeads(torch.ones(1, *sizes[:2], dtype=torch.bool), values[None, None])
    slow, batch = WholePassEngine(lens.backend, scaled=lens.engine.scaled), lens.encode(prompts())
    with torch.no_grad():
        found, expected, once = (
            engine.generate(engine.read(batch), edit, 5, where)
            for engine, where in ((lens.engine, steps), (slow, steps), (slow, range(1)))
        )
    assert torch.equal(found, expected)
    # Gemma 3, given such heads, says one token whatever comes behind.
    if name == "llama":
        assert torch.equal(expected, once) == (steps == range(1))


def test_where_a_vector_acts_makes_a_difference():
    lens = zoo.lens("llama")
    found = {
        tuple(map(tuple, (by_hand(lens, text, places) for text in prompts().texts)))
        for places in PLACES.values()
    }
    assert len(found) == len(PLACES)


@CASES
def test_without_a_vector_it_is_the_greedy_generation_of_the_original(name, kind):
    lens, model = zoo.lens(name, kind), zoo.huggingface(name)
    found = generate_tokens(lens, prompts(), n_tokens=5)
    greedy = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    for row, text in zip(found, prompts().texts, strict=True):
        ids = torch.tensor([zoo.tokenizer()(text, add_special_tokens=False).input_ids])
        model.generation_config.eos_token_id = None
        made = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy)
        assert row.tolist() == made[0, ids.shape[1] :].tolist()


def test_text_ends_where_a_token_ends_it(monkeypatch):
    lens = zoo.lens("llama")
    tokens = generate_tokens(lens, prompts(), vector(lens), n_tokens=9, positions="all").tolist()
    whole = tvlens.generate(lens, prompts(), vector(lens), n_tokens=9, positions="all")
    assert whole == ["".join(zoo.WORDS[token] for token in row) for row in tokens]
    ending = tokens[0][4]
    monkeypatch.setattr(module, "end_tokens", lambda _: {ending})
    texts = tvlens.generate(lens, prompts(), vector(lens), n_tokens=9, positions="all")
    for row, text in zip(tokens, texts, strict=True):
        kept = row[: row.index(ending)] if ending in row else row
        assert text == "".join(zoo.WORDS[token] for token in kept)
    assert len(texts[0]) < len(whole[0])


def test_pieces_of_few_prompts_say_the_same():
    lens, done = zoo.lens("llama"), []
    whole = generate_tokens(lens, prompts(5), vector(lens), n_tokens=3, positions="all")
    small = replace(lens, max_tokens=1)
    pieces = generate_tokens(
        small, prompts(5), vector(lens), n_tokens=3, positions="all", progress=done.append
    )
    assert torch.equal(whole, pieces)
    assert done == [1] * 5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("wrong", ["last", "query", range(-1, 2), 3, None])
def test_positions_that_are_none_are_refused(wrong):
    with pytest.raises(UnknownNameError, match=r"unknown positions .*; expected 'first', 'all'"):
        tvlens.generate(zoo.lens("llama"), prompts(), positions=wrong)


@pytest.mark.parametrize("n_tokens", [0, -1, 128])
def test_too_many_or_too_few_tokens_are_refused(n_tokens):
    with pytest.raises(ShapeError, match=f"{n_tokens} tokens asked for behind prompts of up to"):
        tvlens.generate(zoo.lens("llama"), prompts(), n_tokens=n_tokens)


def test_vectors_of_another_model_and_models_without_words_are_refused():
    other = TaskVector(torch.zeros(2, 16), (0,), "other", "made")
    with pytest.raises(ShapeError, match="task vector of 'other'"):
        tvlens.generate(zoo.lens("llama"), prompts(), other)
    mute = tvlens.load(zoo.huggingface("llama"), name="mute")
    asked = Prompts.of_tokens(zoo.ROWS, [1] * len(zoo.ROWS))
    with pytest.raises(ModelError, match="model 'mute' has no tokenizer to write text with"):
        tvlens.generate(mute, asked)
    assert generate_tokens(mute, asked, n_tokens=2).shape == (len(zoo.ROWS), 2)
