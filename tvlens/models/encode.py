"""Text prompts to token batches."""

from collections.abc import Sequence
from typing import Any

from tvlens.errors import ModelError, TaskError
from tvlens.models.batch import Batch


def special_prefix(tokenizer: Any) -> list[int]:
    """Tokens that the tokenizer itself puts before a text, such as a beginning-of-text token."""
    with_special = list(tokenizer("a").input_ids)
    without = list(tokenizer("a", add_special_tokens=False).input_ids)
    starts = range(len(with_special) - len(without) + 1)
    # Some tokenizers also put a token behind a text, which no prompt wants.
    first = next((i for i in starts if with_special[i : i + len(without)] == without), 0)
    return with_special[:first]


def require_tokenizer(tokenizer: Any) -> None:
    """Refuse prompts of text where nothing turns them into tokens.

    Raises:
        ModelError: there is no tokenizer.
    """
    if tokenizer is None:
        raise ModelError(
            "the lens has no tokenizer, which prompts of text need; load the model with one "
            "(tvlens.load(model, tokenizer=...)), or give tokens (Prompts.of_tokens)"
        )


def encode_text(
    tokenizer: Any,
    texts: Sequence[str],
    continuations: Sequence[Sequence[str]],
    *,
    prefix: Sequence[int],
    n_ctx: int,
    d_vocab: int,
) -> Batch:
    """The batch of prompts and of the answers that should follow them.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: prompts.
        continuations: right answers of each, with the space that precedes them.
        prefix: special tokens put before every prompt.
        n_ctx: longest sequence that the model takes.
        d_vocab: number of tokens that the model has.

    Raises:
        ModelError: there is no tokenizer.
        TaskError: there are no prompts, an answer tokenises to nothing, a prompt's end does not
            fall between two tokens, a token is none of the model's, or a prompt with its answer is
            longer than the context.
    """
    require_tokenizer(tokenizer)
    if not texts:
        raise TaskError("no prompts to encode: expected at least one, got 0; ask for n >= 1")
    prompts = tokenizer(list(texts), add_special_tokens=False).input_ids
    asked = [
        (i, continuation) for i, several in enumerate(continuations) for continuation in several
    ]
    whole = tokenizer([texts[i] + after for i, after in asked], add_special_tokens=False).input_ids
    answers: list[list[list[int]]] = [[] for _ in texts]
    for (i, continuation), full in zip(asked, whole, strict=True):
        text, prompt = texts[i], prompts[i]
        answer = full[len(prompt) :]
        if full[: len(prompt)] != prompt:
            raise TaskError(
                f"prompt ending in {text[-20:]!r} and its answer {continuation!r} share a token; "
                "expected a token boundary between them; change the template's answer_space"
            )
        if not answer or not continuation.strip():
            raise TaskError(
                f"answer {continuation.strip()!r} to the prompt ending in {text[-20:]!r} "
                "tokenises to nothing; expected at least one token; remove or mend this pair"
            )
        if len(prefix) + len(full) > n_ctx:
            raise TaskError(
                f"prompt ending in {text[-20:]!r} has {len(prefix) + len(full)} tokens with its "
                f"answer, the model's context holds {n_ctx}; use fewer shots or shorter pairs"
            )
        beyond = next((token for token in (*prefix, *full) if token >= d_vocab), None)
        if beyond is not None:
            raise TaskError(
                f"prompt ending in {text[-20:]!r} holds the token {beyond} "
                f"({tokenizer.convert_ids_to_tokens(beyond)!r}), the model has tokens up to "
                f"{d_vocab - 1}; the tokenizer is larger than the model: give the one it was "
                "trained with, or leave this prompt out"
            )
        answers[i].append(answer)
    pad_id = tokenizer.pad_token_id
    # Padding is hidden, but it must be a token of the model.
    rows = [[*prefix, *prompt] for prompt in prompts]
    return Batch.pad(rows, answers, pad_id=pad_id if pad_id and pad_id < d_vocab else 0)


def ends_of_texts(tokenizer: Any, texts: Sequence[str], behind: Sequence[str]) -> list[list[int]]:
    """The first token of what stands behind each text, as they tokenise together.

    Args:
        tokenizer: a Hugging Face tokenizer.
        texts: prompts with their answers.
        behind: what a layout puts behind each of them; empty for nothing, which has no token.
    """
    own = tokenizer(list(texts), add_special_tokens=False).input_ids
    joined = [text + after for text, after in zip(texts, behind, strict=True)]
    whole = tokenizer(joined, add_special_tokens=False).input_ids
    ends = []
    for tokens, full, after in zip(own, whole, behind, strict=True):
        rest = full[len(tokens) :]
        if full[: len(tokens)] != tokens:
            # The end of the answer and what follows share a token, which no answer is read off.
            rest = tokenizer(after, add_special_tokens=False).input_ids
        ends.append(list(rest[:1]))
    return ends


def encode_tokens(
    rows: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    *,
    n_ctx: int,
    d_vocab: int,
) -> Batch:
    """The batch of prompts that are tokens already.

    Args:
        rows: token ids of each prompt.
        answers: token ids of each right answer.
        n_ctx: longest sequence that the model takes.
        d_vocab: number of tokens that the model has.

    Raises:
        TaskError: a token is none of the model's, or a prompt is longer than the context.
    """
    for i, row in enumerate(rows):
        if max(row) >= d_vocab or len(row) > n_ctx:
            raise TaskError(
                f"row {i} has {len(row)} tokens up to {max(row)}; the model's context holds "
                f"{n_ctx}, and its tokens are 0 to {d_vocab - 1}"
            )
    return Batch.pad(rows, [[answer] for answer in answers])
