import pytest
import torch

from helpers import zoo
from tvlens.errors import ModelError, TaskError
from tvlens.models.batch import Batch
from tvlens.models.encode import encode_text, special_prefix

TEXT = "Q: ab\nA:"


def encode(texts, continuations, **options):
    options = {"prefix": (), "n_ctx": zoo.N_CTX, "d_vocab": zoo.D_VOCAB} | options
    return encode_text(zoo.tokenizer(), texts, [(text,) for text in continuations], **options)


def words(ids):
    return [zoo.WORDS[i] for i in ids]


def test_prompts_and_answers_are_tokens_in_their_order():
    batch = encode([TEXT, "A:"], [" lm", " k"])
    assert words(batch.inputs[0]) == ["Q", ":", " a", "b", "\n", "A", ":"]
    assert words(batch.inputs[1, -2:]) == ["A", ":"]
    assert batch.mask.tolist() == [[True] * 7, [False] * 5 + [True] * 2]
    assert [words(answer) for (answer,) in batch.answers] == [[" l", "m"], [" k"]]
    assert words(batch.target) == [" l", " k"]
    assert batch.query.tolist() == [6, 6]
    assert len(batch) == 2


def test_padding_holds_the_pad_token_or_else_zero():
    tokenizer = zoo.tokenizer()
    tokenizer.pad_token = "<eos>"
    options = {"prefix": (), "n_ctx": zoo.N_CTX, "d_vocab": zoo.D_VOCAB}
    batch = encode_text(tokenizer, [TEXT, "A:"], [[" k"], [" k"]], **options)
    assert batch.inputs[1, 0] == 3
    tokenizer.pad_token = None
    batch = encode_text(tokenizer, [TEXT, "A:"], [[" k"], [" k"]], **options)
    assert batch.inputs[1, 0] == 0


def test_a_prefix_stands_before_every_prompt():
    batch = encode([TEXT, "A:"], [" k", " k"], prefix=(2,))
    assert words(batch.inputs[0, :2]) == ["<bos>", "Q"]
    assert words(batch.inputs[1, -3:]) == ["<bos>", "A", ":"]


def test_the_prefix_is_what_the_tokenizer_itself_puts_before_a_text():
    assert special_prefix(zoo.tokenizer()) == []
    assert special_prefix(zoo.tokenizer(bos=True)) == [2]
    assert special_prefix(zoo.tokenizer(eos=True)) == []
    assert special_prefix(zoo.tokenizer(bos=True, eos=True)) == [2]


def test_special_tokens_come_from_the_prefix_alone():
    options = {"prefix": (), "n_ctx": zoo.N_CTX, "d_vocab": zoo.D_VOCAB}
    plain = encode([TEXT], [" k"])
    marked = encode_text(zoo.tokenizer(bos=True, eos=True), [TEXT], [[" k"]], **options)
    assert torch.equal(plain.inputs, marked.inputs)
    assert plain.answers == marked.answers


@pytest.mark.parametrize("answer", [" ", " ~", " \n"])
def test_an_answer_that_tokenises_to_nothing_is_refused(answer):
    words = (
        r"answer .* to the prompt ending in 'Q: ab\\nA:' tokenises to nothing; expected at least"
    )
    with pytest.raises(TaskError, match=words):
        encode([TEXT, TEXT], [" k", answer])


def test_an_answer_that_merges_with_the_prompt_is_refused():
    tokenizer = zoo.tokenizer()
    tokenizer.add_tokens([":k"])
    words = "prompt ending in 'Q: ab\\\\nA:' and its answer 'k' share a token; .* answer_space"
    with pytest.raises(TaskError, match=words):
        encode_text(tokenizer, [TEXT], ["k"], prefix=(), n_ctx=zoo.N_CTX, d_vocab=9)


def test_the_context_holds_prefix_prompt_and_answer():
    encode([TEXT], [" lm"], prefix=(2,), n_ctx=10)
    words = "ending in .* has 10 tokens with its answer, the model's context holds 9; use fewer"
    with pytest.raises(TaskError, match=words):
        encode(["A:", TEXT], [" k", " lm"], prefix=(2,), n_ctx=9)


def test_without_a_tokenizer_there_is_no_text():
    words = r"the lens has no tokenizer.*tvlens.load\(model, tokenizer=\.\.\.\)"
    with pytest.raises(ModelError, match=words):
        encode_text(None, [TEXT], [" k"], prefix=(), n_ctx=10, d_vocab=9)


def test_no_prompts_are_refused():
    with pytest.raises(TaskError, match="no prompts to encode: expected at least one, got 0"):
        encode([], [])


def test_a_slice_of_a_batch():
    batch = zoo.batch()
    some = batch[1:3]
    assert torch.equal(some.inputs, batch.inputs[1:3])
    assert torch.equal(some.query, batch.query[1:3])
    assert some.answers == batch.answers[1:3]


def test_joined_batches_keep_prompts_queries_and_answers():
    parts = [zoo.batch(zoo.ROWS[:2]), zoo.batch(zoo.ROWS[2:3]), zoo.batch()]
    joined = Batch.join(parts)
    rows = [*zoo.ROWS[:3], *zoo.ROWS]
    assert [inputs[mask].tolist() for inputs, mask in zip(joined.inputs, joined.mask)] == rows  # noqa: B905
    last = joined.inputs[torch.arange(len(joined)), joined.query]
    assert last.tolist() == [row[-1] for row in rows]
    assert joined.answers == tuple(a for part in parts for a in part.answers)
    assert joined.target.tolist() == [answer[0] for (answer,) in joined.answers]
