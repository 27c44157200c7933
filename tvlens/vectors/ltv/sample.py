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
from tvlens.tasks.base import PromptSet, PromptSource
from tvlens.vectors.ltv.settings import FitSettings


@dataclass(frozen=True)
class Sample:
    """Prompts read once, with the head outputs of each prompt's donor where those are weighed.

    Attributes:
        reading: the prompts.
        outputs: head outputs of their donors; None where all prompts share the means.
        z: `hook_z` of their donors, alike.
    """

    reading: Reading
    outputs: Float[Tensor, "batch layer head d_model"] | None
    z: Float[Tensor, "batch layer head d_head"] | None = None

    def __len__(self) -> int:
        return len(self.reading)

    @property
    def donors_z(self) -> Float[Tensor, "batch layer head d_head"]:
        """`hook_z` of the donors.

        Raises:
            TaskError: the prompts were read without.
        """
        if self.z is None:
            raise TaskError(
                "the prompts of this training were read without donors; read them with "
                "read_fit_prompts and settings of per_prompt=True"
            )
        return self.z

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
        z = [piece.z for piece in pieces if piece.z is not None]
        joined: Reading = lens.engine.join([piece.reading for piece in pieces])
        return cls(joined, torch.cat(own) if own else None, torch.cat(z) if z else None)

    def rows(self, index: slice | Int[Tensor, " chosen"]) -> "Sample":
        """The prompts at `index`, in that order."""
        own = [None if x is None else x[index] for x in (self.outputs, self.z)]
        return Sample(self.reading.rows(index), *own)

    def without_donors(self) -> "Sample":
        """The same prompts without what their donors say."""
        return Sample(self.reading, None)

    def in_turn(self, n_sets: int) -> "Sample":
        """The prompts of so many equal sets in turn, so that every span of them holds each."""
        if n_sets == 1:
            return self
        order = torch.arange(len(self)).view(n_sets, -1).T.flatten()
        return self.rows(order.to(self.reading.batch.inputs.device))

    def by_answer(self) -> "Sample":
        """The prompts of whole answers, short ones first: a span of them is no wider than it must
        be. Others as they are."""
        following = self.reading.batch.following
        if following is None:
            return self
        return self.rows((following >= 0).sum(dim=1).argsort(stable=True))

    def pieces(self, rows: int) -> Iterator["Sample"]:
        """The prompts in order, at most so many at a time."""
        for start in range(0, len(self), rows):
            yield self.rows(slice(start, start + rows))


def read_samples(
    lens: Lens, prompts: Sequence[PromptSet], per_prompt: bool, rows: int
) -> Iterator[Sample]:
    """The prompts read in pieces of at most so many rows, one piece at a time."""
    for of_kind in prompts:
        own = donor_outputs(lens, of_kind) if per_prompt else None
        done = 0
        for reading in lens.readings(lens.encode(of_kind), max_prompts=rows):
            span = slice(done, done + len(reading))
            given = (None, None) if own is None else (own.outputs[span], own.z[span])
            yield Sample(reading, *given)
            done = span.stop


@dataclass(frozen=True)
class FitPrompts:
    """Prompts that Learnable Task Vectors are trained and selected on, read once.

    Attributes:
        training: prompts of every kind and length in turn.
        validation: prompts of the validation split.
        drawn: what they were drawn by.
    """

    training: Sample
    validation: Sample
    drawn: tuple[object, ...]

    def require_fit(self, task: PromptSource, settings: FitSettings, seed: int) -> None:
        """Refuse prompts that a training with these settings would not have drawn.

        Raises:
            TaskError: they are of another task, seed, kind, length or number, or lack donors.
        """
        expected = _drawn(task, settings, seed)
        if self.drawn != expected or (settings.per_prompt and self.training.outputs is None):
            donors = "with" if self.training.outputs is not None else "without"
            raise TaskError(
                f"fit_ltv got prompts read {donors} donors for {self.drawn}; expected those of "
                f"{expected}{', with donors' if settings.per_prompt else ''}: read them with "
                "read_fit_prompts and the same settings and seed"
            )


def _drawn(task: PromptSource, settings: FitSettings, seed: int) -> tuple[object, ...]:
    s = settings
    return task.digest, s.kinds, s.lengths, s.n_prompts, s.n_validation, s.answer, seed


def read_fit_prompts(
    lens: Lens, task: PromptSource, settings: FitSettings, seed: int
) -> FitPrompts:
    """The prompts that `fit_ltv` trains and selects on.

    Args:
        lens: the model.
        task: where prompts are drawn from.
        settings: how vectors are trained.
        seed: seed of the training.

    Raises:
        TaskError: `settings.per_prompt` is asked of a task whose prompts have no donors.
    """
    lens = lens.answering(settings.answer)
    training, validation = (
        Sample.read(lens, prompts, settings.per_prompt)
        for prompts in (
            training_prompts(task, settings, seed),
            validation_prompts(task, settings, seed),
        )
    )
    n_sets = len(settings.kinds) * len(settings.lengths)
    training = training.in_turn(n_sets).by_answer()
    return FitPrompts(training, validation, _drawn(task, settings, seed))


def training_prompts(task: PromptSource, settings: FitSettings, seed: int) -> list[PromptSet]:
    """The prompts that `fit_ltv` trains on, one set per length and kind."""
    return [
        task.prompts("train", shots=shots, n=settings.n_prompts, seed=seed, kind=kind)
        for shots in settings.lengths
        for kind in settings.kinds
    ]


def validation_prompts(task: PromptSource, settings: FitSettings, seed: int) -> list[PromptSet]:
    """The prompts that `fit_ltv` selects on: every validation pair once per length and kind."""
    n = settings.n_validation
    return [
        task.prompts("validation", shots=shots, n=n, seed=seed, kind=kind)
        for shots in settings.lengths
        for kind in settings.kinds
    ]
