"""The layer average: what the heads write together, without asking which of them matter."""

import torch

from tvlens.lens.heads import HeadMeans
from tvlens.vectors.materials import ByKind, Materials, for_every_kind
from tvlens.vectors.vector import HeadMixture, TaskVector


def layer_average(means: HeadMeans) -> TaskVector:
    """The mean outputs of all heads, each added at its own layer: v[l] = Σ_j ā[l,j].

    Todd et al. (2024) compare function vectors with such an average; here it is that of the
    attention heads, so that it differs from a Learnable Task Vector in its weights alone, which
    are all 1.

    Args:
        means: mean head outputs on clean prompts.
    """
    return average_mixture(means).of_means(means)


def average_mixture(means: HeadMeans) -> HeadMixture:
    """The recipe of the layer average, to be made of the outputs of each prompt's own heads."""
    weights = torch.ones(means.outputs.shape[:2])
    return HeadMixture.in_place(weights, means.model, "layer average of all heads")


def make(materials: Materials) -> ByKind:
    """The layer average, the same for every kind of prompts."""
    means = materials.means
    vector = average_mixture(means) if materials.per_prompt else layer_average(means)
    return for_every_kind(vector)
