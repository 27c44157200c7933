"""Indirect effects of heads to first order: all of them from one backward pass a prompt.

The effect of putting a mean in a head's place is taken as <mean - z, d score / d z> at the query
position (Nanda 2023; Syed et al. 2023, arXiv 2310.10348).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.lens.edits import NoEdit
from tvlens.lens.engine import Reading
from tvlens.lens.heads import HeadMeans, donor_outputs
from tvlens.lens.lens import Lens
from tvlens.lens.patches import Shift
from tvlens.lens.sites import Site
from tvlens.scores.score import Scores
from tvlens.tasks.base import PromptSet


def attributed_heads(
    lens: Lens,
    reading: Reading,
    z: Float[Tensor, "#batch layer head d_head"],
    *,
    steps: int = 0,
) -> tuple[Float[Tensor, "batch layer head"], Float[Tensor, " batch"]]:
    """Indirect effects of heads at the query position to first order, and the score before.

    Args:
        lens: the model.
        reading: prompts that the lens' engine has read.
        z: what heads would be replaced by.
        steps: as in `attribution_patch`.

    Returns:
        <z - z_prompt, d score / d z_prompt> of every head; NaN in layers without heads.
    """
    layers = lens.backend.attention_layers
    moved = {Site("z", n): (z[:, n] - reading.z[:, n])[:, None, None] for n in layers}
    if steps:
        shares = ((torch.arange(steps) + 0.5) / steps).to(z.device)
        n = len(layers)
        active = torch.zeros(n * steps, lens.n_layer, dtype=torch.bool)
        active[torch.arange(n * steps), torch.tensor(layers).repeat_interleave(steps)] = True
        share = shares.repeat(n)[None, :, None, None, None]
        added = {site: share * x for site, x in moved.items()}
    else:
        active = torch.zeros(1, lens.n_layer, dtype=torch.bool)
        active[0, list(layers)] = True
        added = {site: torch.zeros_like(x) for site, x in moved.items()}
    leaves = {site: x.detach().requires_grad_() for site, x in added.items()}
    edit = Shift(lens.n_layer, leaves, active, query_only=True)
    total = {site: torch.zeros_like(x[:, 0]) for site, x in leaves.items()}
    before = None
    for piece in lens.variants(reading, edit):
        score = lens.readout.score(lens.engine.run(reading, piece), reading.batch)
        gradients = torch.autograd.grad(score.sum(), list(leaves.values()), allow_unused=True)
        for site, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:
                total[site] += gradient.sum(dim=1)
        before = score.detach()[:, 0] if before is None else before
    if steps:
        with torch.no_grad():
            clean = lens.engine.run(reading, NoEdit(lens.n_layer))
            before = lens.readout.score(clean, reading.batch)[:, 0]
    assert before is not None
    found = z.new_full((len(reading), lens.n_layer, lens.n_head), torch.nan)
    for site, x in total.items():
        found[:, site.layer] = (x * moved[site][:, 0]).sum(dim=(1, 3)) / max(1, steps)
    return found, before


def attributed_effects(
    lens: Lens,
    prompts: PromptSet,
    means: HeadMeans | None,
    *,
    steps: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """What `indirect_effects` gives, to first order: all heads from one backward pass a prompt.

    Args:
        lens: the model.
        prompts: label-shuffled prompts.
        means: mean head outputs over clean prompts of the same task; None takes each prompt's own
            donor.
        steps: as in `attribution_patch`.
        progress: called with the number of prompts finished.

    Raises:
        ShapeError: the means are of another model.
        TaskError: no means are given, and the prompts have no donors.
    """
    if means is None:
        z = donor_outputs(lens, prompts).z
    else:
        means.require_fit(lens)
        z = means.z[None]
    z = z.to(lens.backend.device, lens.backend.dtype)
    found, before, done = [], [], 0
    with lens.frozen():
        for reading in lens.readings(lens.encode(prompts)):
            own = z if len(z) == 1 else z[done : done + len(reading)]
            effects, score = attributed_heads(lens, reading, own, steps=steps)
            found.append(effects.cpu())
            before.append(score.cpu())
            done += len(reading)
            if progress is not None:
                progress(len(reading))
    return Scores.of_prompts(
        torch.cat(found),
        name="attribution",
        unit=lens.readout.score_name,
        task=prompts.task,
        model=lens.name,
        baseline=torch.cat(before),
    )
