"""What chosen heads attend to on whole prompts, and the prompts' tokens as text."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import ShapeError
from tvlens.lens.lens import Lens
from tvlens.lens.patterns import patterns
from tvlens.models.batch import Batch

Head = tuple[int, int]


@dataclass(frozen=True)
class Attention:
    """What some heads attend to on one prompt.

    Attributes:
        tokens: the prompt's tokens as text, special ones put before it included; of points, the
            role of every column.
        patterns: with what weight every token attends to every token, by head as (layer, head).
    """

    tokens: tuple[str, ...]
    patterns: dict[Head, Float[Tensor, "pos key"]]


def attention_of(lens: Lens, prompts: Any, heads: Sequence[Head]) -> tuple[Attention, ...]:
    """What these heads attend to on each prompt, without padding.

    Args:
        lens: the model.
        prompts: a `PromptSet` that it reads.
        heads: the heads as (layer, head).

    Raises:
        UnknownNameError: the model has no attention patterns that could be read.
        ShapeError: the model lacks one of the heads.
    """
    require_heads(lens, heads)
    batch = lens.encode(prompts)
    columns = _columns(batch)
    seen: list[dict[Head, Tensor]] = [{} for _ in columns]
    for rows, layer, weights in patterns(lens, batch):
        own = [head for at, head in heads if at == layer]
        for i, pattern in zip(range(len(columns))[rows], weights, strict=True):
            there = columns[i]
            for head in own:
                found = pattern[:, head].float().cpu()[there][:, there]
                seen[i][layer, head] = found
    tokens = _tokens(lens, prompts, batch, columns)
    return tuple(
        Attention(said, {head: own[head] for head in dict.fromkeys(heads)})
        for said, own in zip(tokens, seen, strict=True)
    )


def prompt_tokens(lens: Lens, prompts: Any) -> list[tuple[str, ...]]:
    """The tokens of each prompt as text, special ones put before it included, without padding.

    Of points it is the role of every column.
    """
    batch = lens.encode(prompts)
    return _tokens(lens, prompts, batch, _columns(batch))


def require_heads(lens: Lens, heads: Sequence[Head]) -> None:
    """Refuse heads that a model lacks.

    Raises:
        ShapeError: there is no such layer or head, or the layer has none.
    """
    there = lens.backend.attention_layers
    for layer, head in heads:
        if not (0 <= layer < lens.n_layer and 0 <= head < lens.n_head):
            raise ShapeError(
                f"head ({layer}, {head}) was asked for, and {lens.name!r} has layers 0 to "
                f"{lens.n_layer - 1} with heads 0 to {lens.n_head - 1}; expected (layer, head) "
                "among these"
            )
        if layer not in there:
            raise ShapeError(
                f"head ({layer}, {head}) was asked for, and layer {layer} of {lens.name!r} has no "
                f"heads; layers that have are {', '.join(map(str, there))}"
            )


def _columns(batch: Batch) -> list[Int[Tensor, " _pos"]]:
    """Where the tokens of each prompt stand, from the first to the one where it is asked."""
    return [
        torch.arange(int(mask.int().argmax()), int(query) + 1)
        for mask, query in zip(batch.mask.cpu(), batch.query.cpu(), strict=True)
    ]


def _tokens(
    lens: Lens, prompts: Any, batch: Batch, columns: Sequence[Int[Tensor, " _pos"]]
) -> list[tuple[str, ...]]:
    if not lens.readout.has_text:
        roles = lens.backend.roles(prompts, prefix=lens.prefix)
        return [tuple(each[: len(own)]) for each, own in zip(roles, columns, strict=True)]
    rows = [batch.inputs[i, own.to(batch.inputs.device)].tolist() for i, own in enumerate(columns)]
    tokenizer = lens.backend.tokenizer
    if tokenizer is None:
        return [tuple(map(str, row)) for row in rows]
    return [tuple(tokenizer.decode([token]) for token in row) for row in rows]
