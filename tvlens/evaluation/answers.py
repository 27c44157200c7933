"""Whether a model generates the whole answer, and ends it there."""

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
    """1 where the greedy continuation is the whole answer and nothing else, else 0.

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
    length = max(len(answer) for answer in answers) + max(1, more)
    tokens = engine.generate(reading, edit.of_variants(alive), length).cpu()
    ends = end_tokens(engine) if as_text else set()

    def text(ids: list[int]) -> str:
        kept = next((n for n, token in enumerate(ids) if token in ends), len(ids))
        return str(tokenizer.decode(ids[:kept], clean_up_tokenization_spaces=False))

    for column, variant in enumerate(alive.tolist()):
        for row, answer in enumerate(answers):
            ids = tokens[row, column].tolist()
            same = ids[: len(answer)] == list(answer)
            if as_text:
                same = _is_whole(text(ids), text(list(answer)), behind)
            right[row, variant] = float(same)
    return right


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
