"""Weights that were published with Saglam et al. (2025), to be looked at beside those of tvlens."""

from pathlib import Path

import torch
from torch import Tensor

from tvlens.errors import NumericalError, ShapeError, VectorError
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.runs.storage import load_weights
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.settings import Granularity

_NAME = "weights"


def load_released(
    path: Path | str,
    lens: Lens,
    means: HeadMeans,
    *,
    granularity: Granularity,
    task: str = "",
) -> LearnableTaskVector:
    """The Learnable Task Vector of a released file of weights, such as `ltv_layer_5.pth`.

    Such a file holds one number per layer and head, and neither says which model it is for nor
    what the numbers weigh. As in the released code, what is weighed holds the bias of the output
    projection: once with every head, or once in the sum of all heads.

    Args:
        path: a file of torch.save; only weights are read.
        lens: the model that they were trained on.
        means: mean head outputs of that model; the released code takes them over clean prompts.
        granularity: "head" for the released regression weights, which weigh heads; "block" for the
            released text weights, which weigh contiguous slices of the summed head outputs.
        task: name of the task.

    Returns:
        The vector. Where its training began is not in the file: `start` holds the weights.

    Raises:
        RunError: the file is missing, damaged, or holds more than weights.
        VectorError: it holds no such weights.
        ShapeError: they are of another number of layers or heads, or the means are of another
            model.
        NumericalError: they are not finite.
        UnknownNameError: there is no such granularity.
    """
    means.require_fit(lens)
    state = load_weights(path)
    found = state.get(_NAME) if isinstance(state, dict) and list(state) == [_NAME] else None
    if not isinstance(found, Tensor) or found.ndim != 2 or not found.is_floating_point():
        raise VectorError(
            f"{path} holds no released weights; expected {_NAME!r}, real numbers of (layer, head), "
            "and nothing else"
        )
    if tuple(found.shape) != (lens.n_layer, lens.n_head):
        raise ShapeError(
            f"{path} holds weights of {tuple(found.shape)} (layer, head), model {lens.name!r} has "
            f"{(lens.n_layer, lens.n_head)}; load the model that they were trained on"
        )
    if not torch.isfinite(found).all():
        raise NumericalError(f"{path} holds NaN or infinite weights; expected finite ones")
    bias = lens.backend.b_o[:, None].to(means.outputs)
    with_bias = means.outputs + (bias if granularity == "head" else bias / lens.n_head)
    return LearnableTaskVector(
        with_bias,
        start=found.detach().float().clone(),
        granularity=granularity,
        layers=means.layers,
        model=lens.name,
        task=task,
    )
