"""Causal mediation: how much each head, put back alone, restores the task (Todd et al., 2024)."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import NumericalError, TaskError
from tvlens.lens.edits import ReplaceHeads
from tvlens.lens.heads import HeadMeans, donor_outputs
from tvlens.lens.lens import Lens
from tvlens.scores.score import Scores
from tvlens.tasks.base import PromptSet
from tvlens.tasks.text.prompts import Prompts
from tvlens.tasks.text.task import Task


@dataclass(frozen=True, eq=False)
class IndirectEffects(Scores):
    """Indirect effect of every head on every prompt; their mean `scores` is the AIE.

    Attributes:
        values: score with the head's z replaced minus score without, per prompt.
        baseline: score of each prompt without a replacement.
    """

    values: Float[Tensor, "prompt _layer _head"] = field(kw_only=True)

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "prompt layer head"],
        baseline: Float[Tensor, " prompt"],
        *,
        task: str,
        model: str,
        unit: str,
    ) -> "IndirectEffects":
        """The effects with these values; `unit` is that of the score, "probability" for text."""
        return cls.of_prompts(
            values, name="aie", unit=unit, task=task, model=model, baseline=baseline
        )


def mediation_prompts(
    task: Task, clean: Prompts, means: HeadMeans, *, n: int = 25, seed: int = 0
) -> Prompts:
    """Label-shuffled prompts whose queries the model answers when the prompt is clean.

    They are laid out as the clean ones.

    Args:
        task: where demonstrations are drawn from.
        clean: the prompts that `means` was offered.
        means: mean head outputs; its `kept` says which prompts were answered.
        n: number of prompts; Todd et al. (2024) use 25.
        seed: seed of the draws.

    Raises:
        TaskError: the means were offered other prompts than `clean`, or `clean` has several
            layouts.
    """
    if means.prompts not in ("", clean.digest):
        raise TaskError(
            f"the means were offered {means.offered} other prompts than these {len(clean)} of task "
            f"{clean.task!r}; give the prompts that mean_head_outputs was given"
        )
    queries = list(dict.fromkeys(clean[i].query for i in means.kept))
    return task.prompts(
        clean.split,
        shots=clean.shots,
        n=n,
        seed=seed,
        kind="shuffled",
        template=clean.template,
        queries=queries,
    )


def indirect_effects(
    lens: Lens,
    prompts: PromptSet,
    means: HeadMeans | None,
    *,
    progress: Callable[[int], None] | None = None,
) -> IndirectEffects:
    """Indirect effects of all heads on prompts that do not carry the task.

    For head (l, j) and a prompt: the score of the right answer with the head's `hook_z` at the
    query position replaced by its mean over clean prompts, minus the score without replacement
    (Todd et al. 2024, section 2.2; their protocol is 25 label-shuffled 10-shot prompts whose
    queries the model answers when the prompt is clean).

    Args:
        lens: the model.
        prompts: label-shuffled prompts.
        means: mean head outputs over clean prompts of the same task; None replaces each prompt's
            heads by those of its own donor.
        progress: called with the number of prompts finished.

    Raises:
        ShapeError: the means are of another model.
        TaskError: no means are given, and the prompts have no donors.
        NumericalError: an effect is not finite.
    """
    if means is None:
        z = donor_outputs(lens, prompts).z
    else:
        means.require_fit(lens)
        z = means.z[None]
    batch = lens.encode(prompts)
    layers = lens.backend.attention_layers
    each = ReplaceHeads.each_head(z.to(lens.backend.device, lens.backend.dtype), layers)
    # One more variant, which replaces nothing, gives the baseline from the same reading.
    edit = replace(each, mask=torch.cat([each.mask, torch.zeros_like(each.mask[:1])]))
    scores = lens.outputs(batch, edit, lens.readout.score, advance=progress).cpu()
    patched, baseline = scores[:, :-1], scores[:, -1:]
    found = (patched - baseline).unflatten(1, (len(layers), lens.n_head))
    if not torch.isfinite(found).all():
        raise NumericalError(
            f"indirect effects on task {prompts.task!r} are not finite; expected finite "
            f"probabilities from {lens.name!r}; try dtype=torch.float32"
        )
    values = found.new_full((len(found), lens.n_layer, lens.n_head), torch.nan)
    values[:, list(layers)] = found
    return IndirectEffects.of(
        values,
        baseline[:, 0],
        task=prompts.task,
        model=lens.name,
        unit=lens.readout.score_name,
    )
