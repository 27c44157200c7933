"""Attention patterns of prompts, in bounded memory."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.lens.lens import Lens
from tvlens.lens.sites import Site
from tvlens.models.batch import Batch

# Numbers that are held at once: as many layers are read together as these allow.
_MOST = 2**25


class Patterns(NamedTuple):
    """With what weights some prompts' positions attend to columns, in one layer.

    Attributes:
        rows: which of the prompts.
        layer: of which layer.
        weights: the weights.
    """

    rows: slice
    layer: int
    weights: Float[Tensor, "batch pos head key"]


def patterns(lens: Lens, batch: Batch) -> Iterator[Patterns]:
    """The patterns of all layers that have heads, a piece of at most `max_tokens` at a time.

    Args:
        lens: the model.
        batch: the prompts.

    Raises:
        UnknownNameError: the model has no patterns that could be read.
        ShapeError: a layer has none.
    """
    layers, width = lens.backend.attention_layers, batch.inputs.shape[1]
    step = min(len(batch), max(1, lens.max_tokens // width))
    at_once = max(1, _MOST // (step * lens.n_head * width**2))
    with lens.frozen(), torch.no_grad():
        for start in range(0, len(batch), step):
            rows = slice(start, start + step)
            for first in range(0, len(layers), at_once):
                sites = [Site("pattern", n) for n in layers[first : first + at_once]]
                found = lens.engine.anywhere.record(batch[rows], sites)
                for site in sites:
                    yield Patterns(rows, site.layer, found.pop(site))
