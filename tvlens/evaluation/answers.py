"""Whether a model generates the whole answer, and ends it there."""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.lens.edits import Edit
from tvlens.lens.engine import Engine, Reading
from tvlens.tasks.text.prompts import Template


def whole_answers(
    engine: Engine[Any],
    reading: Reading,
    edit: Edit,
    started: Bool[Tensor, "batch variant"],
    template: Template | None,
) -> Float[Tensor, "batch variant"]:
    """1 where the greedy continuation is a whole right answer and nothing else, else 0.

    An answer ends where the text does (an end token), where its line does, or where what the
    template puts between two pairs begins. Answers of several lines end behind their last one.
    Without a tokenizer or a template, tokens are compared: the continuation begins with the answer.

    Args:
        engine: continues the prompts.
        reading: the prompts.
        edit: the variants.
        started: where the first token is right; a variant that starts no answer right is not
            continued.
        template: the layout of the prompts.
    """
    right = torch.zeros(started.shape, dtype=torch.float64)
    alive = started.any(dim=0).nonzero().flatten()
    if not len(alive):
        return right
    tokenizer, answers = engine.backend.tokenizer, reading.batch.answers
    as_text = tokenizer is not None and template is not None
    behind = _behind(template) if template is not None else ""
    # So many tokens more than the answer that what ends it is seen whole.
    more = len(tokenizer(behind, add_special_tokens=False).input_ids) if as_text else 0
    length = max(len(answer) for each in answers for answer in each) + max(1, more)
    tokens = engine.generate(reading, edit.of_variants(alive), length).cpu()
    texts = [texts_of(engine, each) for each in answers] if as_text else []
    for column, variant in enumerate(alive.tolist()):
        said = tokens[:, column].tolist()
        if as_text:
            pairs = zip(texts_of(engine, said), texts, strict=True)
            found = [any(_is_whole(text, a, behind) for a in each) for text, each in pairs]
        else:
            found = [
                any(ids[: len(a)] == list(a) for a in each)
                for ids, each in zip(said, answers, strict=True)
            ]
        right[:, variant] = torch.tensor(found, dtype=right.dtype)
    return right


def first_tokens_tell(answers: Sequence[Sequence[Sequence[int]]]) -> tuple[int, bool]:
    """How many first tokens the answers begin with, and whether these tell answers apart.

    They do unless more than half of the prompts have an answer that begins as another answer does.

    Args:
        answers: token ids of all right answers, for every prompt; those shown first are looked at.
    """
    asked = [tuple(each[0]) for each in answers]
    begun = Counter(answer[0] for answer in set(asked))
    ties = sum(begun[answer[0]] > 1 for answer in asked)
    return len(begun), 2 * ties <= len(asked)


def texts_of(engine: Engine[Any], rows: Sequence[Sequence[int]]) -> list[str]:
    """What tokens say, each row up to the first that ends a text."""
    ends, decode = end_tokens(engine), engine.backend.tokenizer.decode
    kept = [list(takewhile(lambda token: token not in ends, row)) for row in rows]
    return [str(decode(row, clean_up_tokenization_spaces=False)) for row in kept]


def _behind(template: Template) -> str:
    """What the template puts behind an answer before anything else."""
    return template.pair_separator or template.query_prefix


def _is_whole(text: str, answer: str, behind: str) -> bool:
    text, answer = text.lstrip(), answer.strip()
    if not text.startswith(answer):
        return False
    rest = text[len(answer) :]
    ended = not rest.strip() or rest.lstrip(" \t").startswith("\n")
    return ended or (bool(behind) and rest.startswith(behind))


def end_tokens(engine: Engine[Any]) -> set[int]:
    """Tokens that end a text: special ones, and those that the model's generation stops at."""
    backend = engine.backend
    found = {*backend.tokenizer.all_special_ids} - {backend.tokenizer.unk_token_id}
    original = getattr(backend.model, "original_model", None)
    stops = getattr(getattr(original, "generation_config", None), "eos_token_id", None)
    found |= set(stops) if isinstance(stops, list | tuple) else {stops}
    return found - {None}
