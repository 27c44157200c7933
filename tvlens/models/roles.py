"""Which role every token of a prompt plays."""

from collections.abc import Iterator, Sequence
from typing import Any

from tvlens.errors import ModelError, TaskError
from tvlens.models.encode import require_tokenizer
from tvlens.tasks.text.prompts import Prompts, Span

Roles = tuple[tuple[str, ...], ...]
"""Of each prompt the role of every token, or column, in order; special tokens included."""


def roles_of_text(tokenizer: Any, prompts: Prompts, *, prefix: Sequence[int]) -> Roles:
    """The role of every token of each prompt.

    A token plays the role of its last character that is not white space, or of its last one where
    all are. Special tokens before the text belong to the start; a token without characters, such
    as those that some tokenizers put before a word, to the role of the one before.

    Args:
        tokenizer: a fast Hugging Face tokenizer, which says what characters tokens stand for.
        prompts: prompts of a text task.
        prefix: special tokens put before every prompt.

    Raises:
        ModelError: there is no tokenizer, or it does not say what its tokens stand for.
        TaskError: a prompt is a text without roles.
    """
    require_tokenizer(tokenizer)
    spans = [prompt.spans for prompt in prompts]
    if not all(spans):
        raise no_roles(prompts.task, f"prompt {spans.index(())} is a text that no layout surrounds")
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"the tokenizer {type(tokenizer).__name__} does not say which characters its tokens "
            "stand for, which roles need; load the model with a fast tokenizer, or give positions "
            'as numbers, "query" or "all"'
        )
    texts = prompts.texts
    found = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    return tuple(
        (*("start" for _ in prefix), *_of_tokens(text, each, offsets, bool(prefix)))
        for text, each, offsets in zip(texts, spans, found.offset_mapping, strict=True)
    )


def no_roles(task: str, why: str) -> TaskError:
    """What to raise where prompts have no roles, and why they have none."""
    return TaskError(
        f"prompts of {task!r} have no roles besides the query position: {why}; give positions as "
        'numbers, "query" or "all"'
    )


def _of_tokens(
    text: str, spans: Sequence[Span], offsets: Sequence[tuple[int, int]], special: bool
) -> Iterator[str]:
    of_character = [span.role for span in spans for _ in range(span.start, span.stop)]
    role, end = "start" if special else of_character[0], 0
    for start, stop in offsets:
        # Byte-level tokenizers may leave white space out of offsets, the whole token if need be.
        first = min(start, end) if start == stop else start
        own = range(first, stop)
        told = [i for i in own if not text[i].isspace()] or own
        role = of_character[told[-1]] if told else role
        yield role
        end = stop
