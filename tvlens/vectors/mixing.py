"""Head mixing: every head moved towards what it says when the task is in the prompt (SITE)."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.console import progress_bar
from tvlens.errors import NumericalError, ShapeError
from tvlens.lens.fitting import Posed, Schedule, fit_edit
from tvlens.lens.heads import HeadMeans, donor_outputs
from tvlens.lens.lens import Lens
from tvlens.lens.steering import BlendHeads, blend_heads
from tvlens.runs.facts import text_of
from tvlens.tasks.base import PromptSet
from tvlens.vectors.choice import Candidates, Training, chosen
from tvlens.vectors.ltv.sample import FitPrompts, Sample
from tvlens.vectors.materials import ByKind, Materials
from tvlens.vectors.vector import Vector

STARTS = (-3.0, 0.0)
"""Logits that training starts from: shares of .05 and of one half."""

DEFAULT_SCHEDULE = Schedule(learning_rate=0.3)


@dataclass(frozen=True)
class HeadBlend(Vector):
    """Every head's z at the query position moved towards its clean mean by a share of its own.

    z becomes (1 - α) z + α z̄ at `hook_z`.

    Attributes:
        alpha: the shares, from 0 to 1.
        z: what heads are moved towards; None for the z of each prompt's own donor.
        model: name of the model.
        origin: how it was made, in words.
    """

    held: ClassVar[str] = "alpha"
    alpha: Float[Tensor, "layer head"]
    z: Float[Tensor, "layer head d_head"] | None
    model: str
    origin: str

    def __post_init__(self) -> None:
        if self.alpha.ndim != 2 or (self.z is not None and self.z.shape[:2] != self.alpha.shape):
            given = "" if self.z is None else f", z of shape {tuple(self.z.shape)}"
            raise ShapeError(
                f"{self.origin}: shares of shape {tuple(self.alpha.shape)}{given}; expected one "
                "number and one z for each (layer, head)"
            )
        for name, tensor in (("shares", self.alpha), ("z", self.z)):
            if tensor is not None and not torch.isfinite(tensor).all():
                raise NumericalError(
                    f"{name} of {self.origin} hold NaN or infinite numbers; expected finite ones"
                )

    @property
    def group(self) -> Hashable:
        """Blends towards means, or those towards donors."""
        return super().group, self.z is None

    @classmethod
    def stack(cls, vectors: Sequence[Any], lens: Lens, prompts: PromptSet) -> BlendHeads:
        """The edit whose variants are the given blends: of means all, or of donors all."""
        for blend in vectors:
            if tuple(blend.alpha.shape) != (lens.n_layer, lens.n_head):
                raise ShapeError(
                    f"{blend.origin} of {blend.model!r} is for {tuple(blend.alpha.shape)} (layer, "
                    f"head), model {lens.name!r} has {(lens.n_layer, lens.n_head)}; make it on the "
                    "model it is used on"
                )
        own = [blend.z for blend in vectors if blend.z is not None]
        z = torch.stack(own)[None] if own else donor_outputs(lens, prompts).z[:, None]
        weights = torch.stack([blend.alpha for blend in vectors])
        device, dtype = lens.backend.device, lens.backend.dtype
        return blend_heads(weights.to(device, dtype), z.to(device, dtype))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Shares and z; model and origin."""
        tensors = {"alpha": self.alpha} | ({} if self.z is None else {"z": self.z})
        return tensors, {"model": self.model, "origin": self.origin}

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "HeadBlend":
        """The blend that has this state."""
        return cls(
            tensors["alpha"], tensors.get("z"), text_of(facts, "model"), text_of(facts, "origin")
        )


def fit_head_mixing(
    lens: Lens,
    means: HeadMeans,
    read: FitPrompts,
    *,
    per_prompt: bool = False,
    starts: Sequence[float] = STARTS,
    schedule: Schedule = DEFAULT_SCHEDULE,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[dict[str, float], HeadBlend]]:
    """A trained share for every head, one blend for each start.

    α = sigmoid of a logit for each head, trained by Adam on the loss of prompts that do not carry
    the task (soft injection of task embeddings, arXiv 2507.20906). All are trained at once.

    Args:
        lens: the model.
        means: mean head outputs on clean prompts of the task.
        read: prompts to train and select on.
        per_prompt: move heads towards the z of each prompt's own donor instead of the means.
        starts: logits to start from.
        schedule: how to train.
        seed: seed of the order of batches.
        progress: called with the number of steps finished.

    Returns:
        Start, validation loss and blend, in the order of starts.

    Raises:
        ShapeError: the means are of another model.
        NumericalError: training diverges.
        TaskError: `per_prompt` is asked of prompts that were read without donors.
    """
    means.require_fit(lens)
    device, dtype = lens.backend.device, lens.backend.dtype
    mean = means.z[None, None].to(device, dtype)

    def posed(sample: Sample) -> Posed:
        def edit(logits: Float[Tensor, "variant layer head"], rows: slice) -> BlendHeads:
            z = sample.donors_z[rows, None].to(dtype) if per_prompt else mean
            return blend_heads(logits.sigmoid().to(dtype), z)

        return Posed(sample.reading, edit)

    start = torch.tensor(starts)[:, None, None].expand(-1, lens.n_layer, lens.n_head)
    found = fit_edit(
        lens,
        posed(read.training),
        start,
        what=f"head mixing on {lens.name!r}",
        schedule=schedule,
        validation=posed(read.validation),
        seed=seed,
        progress=progress,
    )
    there = torch.zeros(lens.n_layer, 1)
    there[list(means.has_heads)] = 1
    z = None if per_prompt else means.z
    return [
        (
            {"start": begun, "validation_loss": float(loss)},
            HeadBlend(logits.sigmoid().cpu() * there, z, lens.name, "head mixing"),
        )
        for begun, loss, logits in zip(starts, found.loss, found.values, strict=True)
    ]


def make(materials: Materials) -> ByKind:
    """The start is chosen on validation."""

    def candidates(training: Training) -> Candidates:
        with progress_bar(training.title, training.settings.steps) as advance:
            return fit_head_mixing(
                materials.lens,
                materials.means,
                training.prompts(),
                per_prompt=materials.per_prompt,
                schedule=training.schedule(DEFAULT_SCHEDULE.learning_rate),
                seed=materials.seed,
                progress=advance,
            )

    return chosen(materials, "mixing", candidates)
