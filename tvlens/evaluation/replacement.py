"""What ablated heads are set to: means, nothing, or what they are on another prompt."""

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens.errors import TaskError, UnknownNameError
from tvlens.lens.edits import Edit, ReplaceHeads
from tvlens.lens.engine import Engine, Reading
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.lens.patches import ReplaceHeadsAt
from tvlens.lens.sites import Site
from tvlens.models.batch import Batch
from tvlens.tasks.streams import stream

SetTo = Literal["mean", "zero", "other", "resample"]
SET_TO: tuple[SetTo, ...] = get_args(SetTo)
"""What heads are set to: their means over clean prompts of the task, nothing, their means over
those of other tasks, or what they are on another prompt."""
At = Literal["query", "all"]
POSITIONS: tuple[At, ...] = get_args(At)
"""Where: at the query position, or at every position of the prompt."""


def way_of(name: str) -> SetTo:
    """What heads are set to, by its name.

    Raises:
        UnknownNameError: there is no such way.
    """
    for known in SET_TO:
        if known == name:
            return known
    raise UnknownNameError(f"heads cannot be set to {name!r}; expected some of {', '.join(SET_TO)}")


def place_of(name: str) -> At:
    """Where heads are ablated, by its name.

    Raises:
        UnknownNameError: there is no such place.
    """
    for known in POSITIONS:
        if known == name:
            return known
    raise UnknownNameError(
        f"heads cannot be ablated at positions {name!r}; expected {' or '.join(POSITIONS)}"
    )


class Replacement:
    """What heads are set to on every prompt."""

    def __init__(
        self,
        lens: Lens,
        engine: Engine[Any],
        batch: Batch,
        set_to: SetTo,
        means: HeadMeans | Sequence[HeadMeans] | None,
        positions: At,
        seed: int,
    ) -> None:
        self.lens, self.engine, self.batch = lens, engine, batch
        sizes = lens.n_layer, lens.n_head, lens.backend.d_head
        self.z = torch.zeros(1, 1, *sizes)
        self.partners: Tensor | None = None
        if set_to in ("mean", "other"):
            self.z = _mean_of(lens, set_to, means, positions)[None, None]
        elif set_to == "resample":
            self.partners = partners(batch, seed).to(lens.backend.device)
        self.z = self.z.to(lens.backend.device, lens.backend.dtype)

    def edit(
        self, masks: Bool[Tensor, "set layer head"], reading: Reading, rows: slice, positions: At
    ) -> Edit:
        """The edit of the prompts of a reading that are `rows` of all."""
        if self.partners is None:
            edit = ReplaceHeads(masks, self.z)
            if positions == "query":
                return edit
            return edit.and_at(range(int(reading.batch.query.max()) + 1))
        others = self.batch.to(self.lens.backend.device).take(self.partners[rows])
        if positions == "query":
            pieces = [reading.z for reading in self.lens.readings(others)]
            return ReplaceHeads(masks, torch.cat(pieces)[:, None])
        sites = [Site("z", layer) for layer in self.lens.backend.attention_layers]
        found = self.engine.record(others, sites)
        none = torch.zeros_like(found[sites[0]])
        every = [found.get(Site("z", layer), none) for layer in range(self.lens.n_layer)]
        at, source = aligned(reading.batch, others)
        row = torch.arange(len(at), device=at.device)[:, None]
        return ReplaceHeadsAt(masks, at, torch.stack(every, dim=2)[row, source])


def _mean_of(
    lens: Lens, set_to: str, means: HeadMeans | Sequence[HeadMeans] | None, positions: At
) -> Float[Tensor, "layer head d_head"]:
    each = [means] if isinstance(means, HeadMeans) else list(means or ())
    if not each or (set_to == "mean" and len(each) > 1):
        raise TaskError(
            f"set_to={set_to!r} needs mean head outputs over clean prompts of "
            f"{'the task' if set_to == 'mean' else 'one or more other tasks'}, and {len(each)} are "
            "given; pass means=, of mean_head_outputs"
        )
    for one in each:
        one.require_fit(lens)
        if one.at != positions:
            raise TaskError(
                f"heads are to be set to their means at positions {positions!r}, and the means are "
                f"those at {one.at!r}; pass mean_head_outputs(…, at={positions!r})"
            )
    return torch.stack([one.z.double() for one in each]).mean(dim=0).float()


def partners(batch: Batch, seed: int) -> Int[Tensor, " batch"]:
    """Another prompt for every prompt, drawn at random; rows that share one go to its like.

    Raises:
        TaskError: there is one prompt only.
    """
    n = len(batch) // batch.shared
    if n < 2:
        raise TaskError(
            f"set_to='resample' takes heads from another prompt, and there is {n}; give two or "
            "more prompts"
        )
    drawn = stream("resampled prompts", seed=seed, n=n)
    chosen = torch.tensor([(i + drawn.randrange(1, n)) % n for i in range(n)])
    rows = torch.arange(batch.shared)
    return (chosen[:, None] * batch.shared + rows).flatten()


def aligned(batch: Batch, others: Batch) -> tuple[Int[Tensor, "batch at"], Int[Tensor, "batch at"]]:
    """Columns of prompts up to their queries, -1 for none, and those of others that match them.

    Columns match that are as far from the query; behind the start of a shorter prompt they go on at
    its query again.
    """
    end = int(batch.query.max()) + 1
    at = torch.arange(end, device=batch.mask.device).expand(len(batch), -1)
    back = batch.query[:, None] - at
    first = others.mask.int().argmax(dim=1)
    length = (others.query - first + 1)[:, None]
    source = others.query[:, None] - back.clamp(min=0) % length
    return at.where(batch.mask[:, :end] & (back >= 0), -1), source
