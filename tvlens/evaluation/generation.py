"""What a model says under a vector."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from tvlens.errors import ModelError, ShapeError, UnknownNameError
from tvlens.evaluation.answers import texts_of
from tvlens.lens.lens import Lens
from tvlens.tasks.base import PromptSet
from tvlens.vectors.vector import TaskVector, Vector, edits_of

Positions = Literal["own", "first", "all"] | range
"""Where a vector acts while tokens are generated."""


def generate(
    lens: Lens,
    prompts: PromptSet,
    vector: Vector | None = None,
    *,
    n_tokens: int = 16,
    positions: Positions = "own",
    progress: Callable[[int], None] | None = None,
) -> list[str]:
    """Greedy continuations of prompts under a vector, up to the first token that ends a text.

    Example:
        >>> tvlens.generate(lens, task.prompts("test", kind="zero"), ltv)  # doctest: +SKIP

    Args:
        lens: the model.
        prompts: what it is asked.
        vector: what is added; None for the model as it is.
        n_tokens: tokens at most.
        positions: where it is added: at its "own" positions, as it was trained and is evaluated;
            "first" at the query position alone; "all" there and at every new position; a range of
            them, counted from the query position, which is 0.
        progress: called with the number of prompts finished.

    Raises:
        ModelError: the model has no tokenizer.
        UnknownNameError: there are no such positions.
        ShapeError: fewer than one token is asked for, the vector does not fit the model, or a
            prompt with its continuation is longer than the context.
    """
    if lens.backend.tokenizer is None:
        raise ModelError(
            f"model {lens.name!r} has no tokenizer to write text with; use generate_tokens"
        )
    tokens = generate_tokens(
        lens, prompts, vector, n_tokens=n_tokens, positions=positions, progress=progress
    )
    return texts_of(lens.engine, tokens.tolist())


def generate_tokens(
    lens: Lens,
    prompts: PromptSet,
    vector: Vector | None = None,
    *,
    n_tokens: int = 16,
    positions: Positions = "own",
    progress: Callable[[int], None] | None = None,
) -> Int[Tensor, "prompt n_tokens"]:
    """As `generate`, in tokens, all of them.

    Raises:
        UnknownNameError: there are no such positions.
        ShapeError: fewer than one token is asked for, the vector does not fit the model, or a
            prompt with its continuation is longer than the context.
    """
    steps = _steps(positions, n_tokens)
    batch = lens.encode(prompts)
    longest = int(batch.mask.sum(dim=1).max())
    if n_tokens < 1 or longest + n_tokens - 1 > lens.backend.n_ctx:
        raise ShapeError(
            f"{n_tokens} tokens asked for behind prompts of up to {longest}; expected at least 1, "
            f"and no more than the {lens.backend.n_ctx} that the context of {lens.name!r} holds"
        )
    ((edit, _),) = edits_of([TaskVector.none(lens) if vector is None else vector], lens, prompts)
    engine, found, done = lens.engine_for(edit), [], 0
    with lens.frozen(), torch.no_grad():
        for reading in lens.readings(batch, engine=engine):
            piece = edit.of_prompts(done, done + len(reading))
            found.append(engine.generate(reading, piece, n_tokens, steps)[:, 0].cpu())
            done += len(reading)
            if progress is not None:
                progress(len(reading))
    return torch.cat(found)


def _steps(positions: Any, n_tokens: int) -> range | None:
    if positions == "own":
        return None
    if positions == "first":
        return range(1)
    if positions == "all":
        return range(n_tokens)
    if isinstance(positions, range) and all(step >= 0 for step in positions):
        return positions
    raise UnknownNameError(
        f"unknown positions {positions!r}; expected 'first', 'all', 'own' or a range, counted from "
        "the query position, which is 0"
    )
