"""Indirect effects of heads to first order: all of them from one backward pass a prompt.

The effect of putting a mean in a head's place is taken as <mean - z, d score / d z> at the query
position (Nanda 2023; Syed et al. 2023, arXiv 2310.10348).
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.lens.edits import Edit, NoEdit
from tvlens.lens.engine import Reading
from tvlens.lens.heads import HeadMeans, donor_outputs
from tvlens.lens.lens import Lens
from tvlens.lens.sites import Site
from tvlens.models.gradients import with_gradients
from tvlens.scores.gradients import at_run, on_the_way
from tvlens.scores.score import Scores
from tvlens.tasks.base import PromptSet


@with_gradients
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

    Raises:
        ModelError: the reading was made in inference mode.
    """
    layers, n = lens.backend.attention_layers, lens.n_layer
    own = {Site("z", layer): reading.z[:, layer][:, None] for layer in layers}
    moved = {site: z[:, site.layer][:, None] - x for site, x in own.items()}

    def measure(edit: Edit) -> Tensor:
        return lens.readout.score(lens.engine.run(reading, edit), reading.batch)

    if steps:
        at_once = lens.max_rows // len(reading)
        gradients = on_the_way(n, moved, measure, steps=steps, at_once=at_once, query_only=True)
        with torch.no_grad():
            before = measure(NoEdit(n))[:, 0]
    else:
        gradients, before = at_run(n, own, measure, query_only=True)
    found = z.new_full((len(reading), n, lens.n_head), torch.nan)
    for site, gradient in gradients.items():
        found[:, site.layer] = (gradient * moved[site]).sum(dim=(1, 3))
    return found, before


@with_gradients
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
        ModelError: the model was made in inference mode.
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
