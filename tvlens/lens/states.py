"""Residual streams of prompts: what stands behind every block at chosen columns."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import NumericalError
from tvlens.lens.lens import Lens
from tvlens.lens.sites import Site
from tvlens.tasks.base import PromptSet


def residual_states(
    lens: Lens,
    prompts: PromptSet,
    columns: Int[Tensor, "prompt at"] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Float[Tensor, "prompt at layer d_model"]:
    """Residual streams behind every block of unedited prompts, in bounded memory.

    Args:
        lens: the model.
        prompts: what it is asked.
        columns: columns of the encoded prompts, padding included; the query position by default.
        progress: called with the number of prompts finished.

    Raises:
        NumericalError: a stream is not finite.
    """
    batch = lens.encode(prompts)
    columns = batch.query[:, None] if columns is None else columns
    sites = [Site("resid_post", layer) for layer in range(lens.n_layer)]
    step = max(1, lens.max_tokens // batch.inputs.shape[1])
    found = []
    with lens.frozen(), torch.no_grad():
        for start in range(0, len(batch), step):
            rows = slice(start, start + step)
            at = columns[rows].to(lens.backend.device)
            streams = lens.engine.record(batch.take(torch.arange(len(batch))[rows]), sites)
            prompt = torch.arange(len(at), device=at.device)[:, None]
            found.append(torch.stack([streams[site][prompt, at] for site in sites], dim=2))
            if progress is not None:
                progress(len(at))
    states = torch.cat(found)
    if not torch.isfinite(states).all():
        raise NumericalError(
            f"residual streams of {lens.name!r} on task {prompts.task!r} are not finite; expected "
            "finite activations; try dtype=torch.float32"
        )
    return states
