"""Example prompts of a task, and what some heads do on them: for pages that people read."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from tvlens.errors import ModelError, NumericalError
from tvlens.figures.report.contents import Example, Head
from tvlens.lens.attention import attention_of
from tvlens.lens.lens import Lens
from tvlens.scores.direct import direct_effects
from tvlens.tasks.base import PromptSource

PROMPTS = 2
"""Prompts that are shown of every task."""

SHOTS = 5
"""Examples in each, at most: longer prompts could not be read."""

MOST_HEADS = 40
"""Heads that are looked at, at most: a page must not grow with every score."""


def examples_of(
    lens: Lens, source: PromptSource, heads: Iterable[Head], *, shots: int, seed: int
) -> tuple[Example, ...]:
    """What heads attend to on clean test prompts, and what each adds to the answer by itself.

    Args:
        lens: the model.
        source: where prompts are drawn from.
        heads: the heads that are looked at; those beyond `MOST_HEADS` are left out.
        shots: examples that the study put into prompts; at most `SHOTS` of text are shown.
        seed: seed of the prompts.

    Raises:
        UnknownNameError: the model has no attention patterns that could be read.
        TaskError: the task has not as many pairs as a prompt needs.
    """
    text = lens.readout.has_text
    prompts: Any = source.prompts(
        "test", shots=min(shots, SHOTS) if text else shots, n=PROMPTS, seed=seed
    )
    chosen = [head for head in heads if head[0] in lens.backend.attention_layers][:MOST_HEADS]
    seen = attention_of(lens, prompts, chosen)
    added: list[dict[Head, float]] = [{} for _ in seen]
    # Of some models what parts add cannot be told; their patterns can be shown without.
    with suppress(ModelError, NumericalError):
        parts = direct_effects(lens, prompts).heads
        added = [
            {(layer, head): float(row[layer, head]) for layer, head in chosen} for row in parts
        ]
    return tuple(
        Example(each.tokens, answer, _in_255ths(each.patterns), own, unit)
        for each, own, (answer, unit) in zip(seen, added, _answers(lens, prompts), strict=True)
    )


def _in_255ths(patterns: Mapping[Head, Tensor]) -> dict[Head, Any]:
    return {
        head: (pattern.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
        for head, pattern in patterns.items()
    }


def _answers(lens: Lens, prompts: Any) -> list[tuple[str, str]]:
    """The right answer of every prompt, and what parts of the model add to it, in words."""
    if lens.readout.has_text:
        unit = "the logit of the answer, over the mean of the vocabulary"
        return [(answer, unit) for answer in prompts.answers]
    unit = "the prediction, with the sign of the answer, in standard deviations of f(x)"
    return [(f"{float(value):.3f}", unit) for value in prompts.target]
