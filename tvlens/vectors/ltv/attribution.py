"""What each head's term of a Learnable Task Vector does for the answer."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.lens.edits import ActsAt, AddToResidual
from tvlens.lens.lens import Lens
from tvlens.models.gradients import with_gradients
from tvlens.tasks.base import PromptSet
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.sample import Sample, read_samples

STEPS = 8
"""Midpoints of the path of integrated gradients."""


@with_gradients
def attribute(
    lens: Lens, ltv: LearnableTaskVector, prompts: Sequence[PromptSet], *, steps: int = STEPS
) -> Float[Tensor, "layer head"]:
    """What each head's term adds to the log-probability of the answer, averaged over prompts.

    Integrated gradients along alpha * omega from alpha 0 to 1, by the midpoint rule
    (Sundararajan, Taly and Yan, ICML 2017): the attributions sum to the whole gain of the vector.
    They are also stored in `ltv.attribution` and give contributions their sign.

    Args:
        lens: the model; `lens.answering("whole")` for whole answers.
        ltv: a trained vector.
        prompts: prompts that do not carry the task, of the validation split.
        steps: midpoints of the path.
    """
    rows = max(1, lens.max_rows // steps)
    with lens.frozen():
        return attribute_samples(
            lens, ltv, read_samples(lens, prompts, ltv.per_prompt, rows), steps
        )


def attribute_samples(
    lens: Lens, ltv: LearnableTaskVector, samples: Iterable[Sample], steps: int
) -> Float[Tensor, "layer head"]:
    """As `attribute`, over prompts that were read; the model must be frozen."""
    alphas = ((torch.arange(steps) + 0.5) / steps).to(ltv.omega.device)
    weights = ltv.weights.detach()
    total, count = torch.zeros_like(weights), 0
    for sample in samples:
        along = (alphas[:, None, None] * weights).requires_grad_()
        given = ltv.outputs[None] if sample.outputs is None else sample.outputs
        vectors = torch.einsum("vlh,blhd->bvld", along, given)
        reading = sample.reading
        outputs = lens.engine.run(reading, add_vectors(vectors, ltv.positions))
        loss = lens.readout.loss(outputs, reading.batch)
        (gradient,) = torch.autograd.grad(-loss.sum() / steps, along)
        total += weights * gradient.sum(dim=0)
        count += len(reading)
    ltv.attribution.copy_(total / count)
    return ltv.attribution


def add_vectors(
    vectors: Float[Tensor, "some_batch variant layer d_model"], positions: ActsAt
) -> AddToResidual:
    """The edit that adds such vectors after every block."""
    active = vectors.new_ones(vectors.shape[1:3], dtype=torch.bool)
    return AddToResidual(vectors, active, positions=positions)
