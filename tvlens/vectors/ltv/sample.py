"""Prompts that vectors are trained and attributed on: read once, with what is weighed for each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import TaskError
from tvlens.lens.engine import Reading
from tvlens.lens.heads import donor_outputs
from tvlens.lens.lens import Lens
from tvlens.tasks.base import PromptSet


@dataclass(frozen=True)
class Sample:
    """Prompts read once, with the head outputs of each prompt's donor where those are weighed.

    Attributes:
        reading: the prompts.
        outputs: head outputs of their donors; None where all prompts share the means.
    """

    reading: Reading
    outputs: Float[Tensor, "batch layer head d_model"] | None

    def __len__(self) -> int:
        return len(self.reading)

    @classmethod
    def read(cls, lens: Lens, prompts: Sequence[PromptSet], per_prompt: bool) -> "Sample":
        """All prompts in one sample, set after set.

        Raises:
            TaskError: there are no prompts of some kind, or `per_prompt` asks for donors that they
                do not have.
        """
        if not prompts or not all(len(p) for p in prompts):
            raise TaskError("fit_ltv got no prompts of some kind; expected at least one of each")
        with lens.frozen():
            pieces = list(read_samples(lens, prompts, per_prompt, lens.max_rows))
        own = [piece.outputs for piece in pieces if piece.outputs is not None]
        joined: Reading = lens.engine.join([piece.reading for piece in pieces])
        return cls(joined, torch.cat(own) if own else None)

    def rows(self, index: slice | Int[Tensor, " chosen"]) -> "Sample":
        """The prompts at `index`, in that order."""
        outputs = None if self.outputs is None else self.outputs[index]
        return Sample(self.reading.rows(index), outputs)

    def without_donors(self) -> "Sample":
        """The same prompts without what their donors say."""
        return Sample(self.reading, None)

    def in_turn(self, n_sets: int) -> "Sample":
        """The prompts of so many equal sets in turn, so that every span of them holds each."""
        if n_sets == 1:
            return self
        order = torch.arange(len(self)).view(n_sets, -1).T.flatten()
        return self.rows(order.to(self.reading.batch.inputs.device))

    def pieces(self, rows: int) -> Iterator["Sample"]:
        """The prompts in order, at most so many at a time."""
        for start in range(0, len(self), rows):
            yield self.rows(slice(start, start + rows))


def read_samples(
    lens: Lens, prompts: Sequence[PromptSet], per_prompt: bool, rows: int
) -> Iterator[Sample]:
    """The prompts read in pieces of at most so many rows, one piece at a time."""
    for of_kind in prompts:
        own = donor_outputs(lens, of_kind).outputs if per_prompt else None
        done = 0
        for reading in lens.readings(lens.encode(of_kind), max_prompts=rows):
            span = slice(done, done + len(reading))
            yield Sample(reading, None if own is None else own[span])
            done = span.stop
