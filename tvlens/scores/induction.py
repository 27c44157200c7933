"""Where heads look: induction scores, and attention to the answers that a prompt shows."""

from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.errors import ShapeError
from tvlens.lens.lens import Lens
from tvlens.lens.positions import places
from tvlens.lens.sites import Site
from tvlens.models.batch import Batch
from tvlens.scores.score import Scores
from tvlens.tasks.base import PromptSet

Read = Callable[[Float[Tensor, "batch pos head key"], slice], Float[Tensor, "batch head"]]


def induction_scores(lens: Lens, *, n: int = 16, length: int = 24, seed: int = 0) -> Scores:
    """How much each head looks for what came after the same thing before (Olsson et al. 2022).

    Sequences of random tokens r1 … rn r1 … rn, behind the special tokens that the lens puts before
    prompts: the attention from each token of the second half to the token after its first
    occurrence, its mean over positions. Models that read points are given random points twice.

    Args:
        lens: the model.
        n: number of sequences.
        length: tokens of each half; fewer where the model has no room for so many.
        seed: seed of the sequences.

    Raises:
        ShapeError: the model has no room for two tokens twice, or there is no sequence.
        UnknownNameError: the model's patterns cannot be read.
    """
    room = (lens.backend.n_ctx - len(lens.prefix)) // 2
    length = min(length, room)
    if n < 1 or length < 2:
        raise ShapeError(
            f"{n} sequences of {length} tokens twice asked for; {lens.name!r} has room for {room} "
            "tokens twice: ask for at least 1 sequence of at least 2"
        )
    batch = lens.backend.repeated(n, length, prefix=lens.prefix, seed=seed)
    # Points come in pairs, so that a half may be one shorter.
    length = (batch.inputs.shape[1] - len(lens.prefix)) // 2
    second = torch.arange(batch.inputs.shape[1])[-length:]

    def read(pattern: Tensor, rows: slice) -> Tensor:
        return pattern[:, second, :, second - length + 1].mean(dim=0)

    values = _by_layer(lens, batch, read)
    return Scores.of_prompts(values, name="induction", unit="attention", model=lens.name)


def answer_attention(lens: Lens, prompts: PromptSet) -> Scores:
    """How much each head attends from the query position to the answers that are shown.

    The weights on all tokens of all demonstrations' answers, or on all y, together.

    Args:
        lens: the model.
        prompts: prompts with demonstrations.

    Raises:
        TaskError: the prompts have no roles, or show no answer.
        UnknownNameError: the model's patterns cannot be read.
    """
    batch = lens.encode(prompts)
    shown = _answers(lens, prompts, batch)

    def read(pattern: Tensor, rows: slice) -> Tensor:
        query = batch.query[rows].to(pattern.device)
        at_query = pattern[torch.arange(len(query), device=pattern.device), query]
        return at_query.where(shown[rows].to(pattern.device)[:, None], 0.0).sum(dim=-1)

    values = _by_layer(lens, batch, read)
    return Scores.of_prompts(
        values, name="answer_attention", unit="attention", task=prompts.task, model=lens.name
    )


def _answers(lens: Lens, prompts: PromptSet, batch: Batch) -> Bool[Tensor, "batch pos"]:
    """Columns of the answers that prompts show."""
    roles = places(lens, prompts, batch, "roles").names
    names = [name for name in roles if name.split(" ")[0] in ("answer", "y")]
    columns = places(
        lens, prompts, batch, [name for name in names if name != "answer prefix"]
    ).columns.flatten(1)
    found = torch.zeros_like(batch.mask)
    rows = torch.arange(len(batch))[:, None].expand(columns.shape)
    found[rows[columns >= 0], columns[columns >= 0]] = True
    return found


def _by_layer(lens: Lens, batch: Batch, read: Read) -> Float[Tensor, "prompt layer head"]:
    """What is read of every layer's pattern, a layer and a few prompts at a time."""
    engine, layers = lens.engine.anywhere, lens.backend.attention_layers
    engine.require_sites([Site("pattern", n) for n in layers])
    step = max(1, lens.max_tokens // batch.inputs.shape[1])
    found = torch.full((len(batch), lens.n_layer, lens.n_head), torch.nan)
    with lens.frozen(), torch.no_grad():
        for start in range(0, len(batch), step):
            rows = slice(start, min(start + step, len(batch)))
            few = replace(batch[rows], shared=1)
            # A pattern of every layer at once would take memory by the square of the length.
            for n in layers:
                pattern = engine.record(few, [Site("pattern", n)])[Site("pattern", n)]
                found[rows, n] = read(pattern, rows).float().cpu()
    return found
