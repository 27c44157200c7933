"""What heads attend to: the token after an earlier occurrence of this one, or given columns."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import NumericalError, ShapeError
from tvlens.lens.lens import Lens
from tvlens.lens.patterns import patterns
from tvlens.scores.score import Scores
from tvlens.tasks.base import PromptSet

UNIT = "attention weight"


def induction_scores(lens: Lens, *, n: int = 16, length: int = 24, seed: int = 0) -> Scores:
    """How much heads attend to what came after this token last time (Olsson et al. 2022).

    The model reads random tokens r1 … rn r1 … rn, behind the prefix it is used to; the score is the
    attention from each token of the second half to the token after its first occurrence, mean over
    positions ("prefix matching", arXiv 2209.11895). Regression models read random points x₁, y₁, …
    and the same again, as many as they have positions for.

    Example:
        >>> induction_scores(lens).top(5)  # doctest: +SKIP

    Args:
        lens: the model.
        n: number of sequences, which are the score's prompts.
        length: number of tokens, or points, that are repeated.
        seed: seed of the draws.

    Raises:
        ShapeError: the model has not as many tokens or positions.
        UnknownNameError: it has no attention patterns that could be read.
        NumericalError: a weight is not finite.
    """
    batch, period = lens.backend.repeated_prompts(n, length, prefix=lens.prefix, seed=seed)
    width = batch.inputs.shape[1]
    second = torch.arange(width - period, width)
    values = _no_values(lens, n)
    for rows, layer, weights in patterns(lens, batch):
        at = second.to(weights.device)
        values[rows, layer] = weights[:, at, :, at - period + 1].mean(dim=0).float().cpu()
    return _scores(lens, values, "induction", "")


def answer_attention(lens: Lens, prompts: PromptSet, columns: Int[Tensor, "_batch at"]) -> Scores:
    """How much heads attend, from the query position, to given columns, such as shown answers.

    Args:
        lens: the model.
        prompts: what the model is asked.
        columns: columns of each prompt as `lens.encode` gives it, padding included, none of them
            twice; -1 fills up. Their weights are summed.

    Raises:
        ShapeError: there are not as many rows as prompts, or a prompt lacks a column, or has it
            twice, or it lies behind the query.
        UnknownNameError: the model has no attention patterns that could be read.
        NumericalError: a weight is not finite.
    """
    batch = lens.encode(prompts)
    given = columns.to(lens.backend.device)
    if len(given) != len(batch):
        raise ShapeError(
            f"columns of {len(given)} prompts are given for {len(batch)} prompts of task "
            f"{prompts.task!r}; expected a row for each"
        )
    query = batch.query.to(given.device)
    ordered = given.sort(dim=1).values
    twice = ((ordered.diff(dim=1) == 0) & (ordered[:, 1:] >= 0)).any(dim=1)
    wrong = ((given > query[:, None]) | (given < -1)).any(dim=1) | twice
    if wrong.any():
        first = int(wrong.int().argmax())
        raise ShapeError(
            f"prompt {first} of task {prompts.task!r} is asked at column {int(query[first])}, and "
            f"attention to its columns {given[first].tolist()} is wanted; expected different "
            "columns from 0 to that one, or -1 to fill up: count them in lens.encode(prompts), "
            "padding included"
        )

    values = _no_values(lens, len(batch))
    for rows, layer, weights in patterns(lens, batch):
        at, here = given[rows].to(weights.device), query[rows].to(weights.device)
        prompt = torch.arange(len(weights), device=weights.device)
        seen = weights[prompt[:, None], here[:, None], :, at.clamp(min=0)]
        seen = seen.where((at >= 0)[..., None], 0.0)
        values[rows, layer] = seen.sum(dim=1).float().cpu()
    return _scores(lens, values, "answer_attention", prompts.task)


def _no_values(lens: Lens, n: int) -> Float[Tensor, "prompt layer head"]:
    return torch.full((n, lens.n_layer, lens.n_head), torch.nan)


def _scores(lens: Lens, values: Tensor, name: str, task: str) -> Scores:
    if not torch.isfinite(values[:, list(lens.backend.attention_layers)]).all():
        raise NumericalError(
            f"attention patterns of {lens.name!r} are not finite; expected weights from 0 to 1; "
            "try dtype=torch.float32"
        )
    return Scores.of_prompts(values, name=name, unit=UNIT, task=task, model=lens.name)
