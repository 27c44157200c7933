"""Free vectors: trained without heads, an upper bound for any weighted sum of head outputs."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.console import progress_bar
from tvlens.lens.edits import AddToResidual
from tvlens.lens.fitting import Posed, Schedule, fit_edit
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.vectors.choice import Candidates, Training, chosen
from tvlens.vectors.ltv.sample import FitPrompts
from tvlens.vectors.materials import ByKind, Materials
from tvlens.vectors.vector import TaskVector

RATES = (0.1, 0.3)
"""Step sizes that are tried, in units of the size of what a layer's heads write together."""

DEFAULT_SCHEDULE = Schedule(learning_rate=1.0)

MOST_LAYERS = 5
"""Layers at which a vector of one layer is tried, at most, evenly spaced."""


def free_vectors(
    lens: Lens,
    means: HeadMeans,
    read: FitPrompts,
    *,
    layers: Sequence[Sequence[int]],
    rates: Sequence[float] = RATES,
    schedule: Schedule = DEFAULT_SCHEDULE,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[dict[str, float], TaskVector]]:
    """Trained vectors with a number for every coordinate, one for each set of layers and step size.

    v[l], added to the output of block l at the query position as a Learnable Task Vector is, is
    itself the parameter (Dong et al. 2025, arXiv 2509.24169). All are trained at once, from zero.

    Args:
        lens: the model.
        means: mean head outputs on clean prompts, which say how large a step is.
        read: prompts to train and select on.
        layers: where each vector acts.
        rates: step sizes of Adam, in units of the root mean square of a layer's average vector.
        schedule: how to train; its learning rate multiplies `rates`.
        seed: seed of the order of batches.
        progress: called with the number of steps finished.

    Returns:
        Step size, validation loss and vector, in the order of layers and rates.

    Raises:
        ShapeError: the means are of another model.
        NumericalError: training diverges.
    """
    means.require_fit(lens)
    size = means.outputs.sum(dim=1).square().mean(dim=1).sqrt()
    # Layers without heads take the mean of the others.
    size = size.where(size > 0, size[size > 0].mean()).to(lens.backend.device)
    tried = [(chosen, rate) for chosen in layers for rate in rates]
    active = torch.zeros(len(tried), lens.n_layer, dtype=torch.bool, device=size.device)
    for row, (where, _) in zip(active, tried, strict=True):
        row[list(where)] = True
    # Steps of Adam do not depend on the size of gradients, so a factor on parameters is a rate.
    unit = size[None] * torch.tensor([rate for _, rate in tried]).to(size)[:, None]

    def vectors(values: Float[Tensor, "variant layer d_model"]) -> Tensor:
        return values * (unit * active)[:, :, None]

    def edit(values: Float[Tensor, "variant layer d_model"], _: slice) -> AddToResidual:
        return AddToResidual(vectors(values)[None].to(lens.backend.dtype), active)

    found = fit_edit(
        lens,
        Posed(read.training.reading, edit),
        torch.zeros(len(tried), lens.n_layer, lens.d_model),
        what=f"free vectors of {lens.name!r}",
        schedule=schedule,
        validation=Posed(read.validation.reading, edit),
        seed=seed,
        progress=progress,
    )
    return [
        (
            {"rate": rate, "validation_loss": float(loss)},
            TaskVector(vector, tuple(where), lens.name, f"free vector of {len(where)} layers"),
        )
        for (where, rate), loss, vector in zip(
            tried, found.loss, vectors(found.values).detach().cpu(), strict=True
        )
    ]


def make(one_layer: bool) -> Callable[[Materials], ByKind]:
    """How free vectors at one layer, or at all, are made; layer and rate chosen on validation."""

    def make(materials: Materials) -> ByKind:
        lens = materials.lens
        step = -(-lens.n_layer // MOST_LAYERS)
        every = range(lens.n_layer)
        # Of layers that are left out the last is none.
        layers = [[layer] for layer in sorted(every[::-step])] if one_layer else [[*every]]

        def candidates(training: Training) -> Candidates:
            with progress_bar(training.title, training.settings.steps) as advance:
                found = free_vectors(
                    lens,
                    materials.means,
                    training.prompts(),
                    layers=layers,
                    schedule=training.schedule(1.0),
                    seed=materials.seed,
                    progress=advance,
                )
            return [
                ({"layer": vector.layers[0] if one_layer else -1, **row}, vector)
                for row, vector in found
            ]

        return chosen(materials, "free_layer" if one_layer else "free", candidates)

    return make
