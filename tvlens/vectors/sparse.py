"""Sparse Learnable Task Vectors: how few heads are enough."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.console import progress_bar
from tvlens.lens.edits import AddToResidual
from tvlens.lens.fitting import Posed, Schedule, fit_edit
from tvlens.lens.lens import Lens
from tvlens.scores.ranking import top_heads
from tvlens.vectors.choice import Candidates, Training, chosen
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.sample import FitPrompts, Sample
from tvlens.vectors.materials import ByKind, Materials, fitting_ks
from tvlens.vectors.vector import Vector

KS = (1, 2, 3, 5, 10, 20, 30)
"""Numbers of heads that are tried."""

DEFAULT_SCHEDULE = Schedule(learning_rate=0.1)


def sparse_path(
    lens: Lens,
    ltv: LearnableTaskVector,
    read: FitPrompts,
    *,
    ks: Sequence[int] = KS,
    schedule: Schedule = DEFAULT_SCHEDULE,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[dict[str, float | int], Vector]]:
    """The vector of the k heads that contribute most to a trained one, trained further, for each k.

    Heads are ranked by ‖omega ā‖; the weights of the chosen ones start where they are, all others
    are zero and stay so. All are trained at once.

    Args:
        lens: the model.
        ltv: a Learnable Task Vector of all heads.
        read: prompts to train and select on.
        ks: numbers of heads.
        schedule: how to train.
        seed: seed of the order of batches.
        progress: called with the number of steps finished.

    Returns:
        Number of heads, validation loss and vector, in the order of `ks`.

    Raises:
        ShapeError: a k is not between 1 and the number of heads.
        NumericalError: training diverges.
    """
    sizes = ltv.contributions(signed=False)
    masks = torch.zeros(len(ks), *sizes.shape)
    for mask, k in zip(masks, ks, strict=True):
        for head in top_heads(sizes, k):
            mask[head] = 1
    device = lens.backend.device
    masks = masks.to(device)

    def posed(sample: Sample) -> Posed:
        def edit(omega: Float[Tensor, "variant layer head"], rows: slice) -> AddToResidual:
            weights = omega * masks
            own = sample.outputs[rows] if ltv.per_prompt and sample.outputs is not None else None
            outputs = ltv.outputs[None] if own is None else own
            vectors = torch.einsum("vlh,blhd->bvld", weights, outputs.to(weights))
            return AddToResidual(vectors.to(lens.backend.dtype), masks.any(dim=2))

        return Posed(sample.reading, edit)

    ltv.to(device)
    found = fit_edit(
        lens,
        posed(read.training),
        ltv.weights.detach()[None] * masks,
        what=f"sparse LTV of {ltv.task!r}",
        schedule=schedule,
        validation=posed(read.validation),
        seed=seed,
        progress=progress,
    )
    return [
        (
            {"k": k, "validation_loss": float(loss)},
            ltv.with_weights((omega * mask).cpu(), f"LTV of {ltv.task}, {k} heads"),
        )
        for k, loss, omega, mask in zip(ks, found.loss, found.values, masks, strict=True)
    ]


def make(materials: Materials) -> ByKind:
    """The number of heads is chosen on validation; of equals, the fewest."""

    def candidates(training: Training) -> Candidates:
        kind = next(k for k, fit in materials.fits.items() if fit == training.settings)
        with progress_bar(training.title, training.settings.steps) as advance:
            return sparse_path(
                materials.lens,
                materials.trained["ltv"][kind],
                training.prompts(),
                ks=fitting_ks(KS, materials.means.n_heads),
                schedule=training.schedule(training.settings.learning_rate),
                seed=materials.seed,
                progress=advance,
            )

    return chosen(materials, "ltv_sparse", candidates)
