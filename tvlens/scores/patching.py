"""Activation patching: what an activation of one run does to another, place by place, exactly."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tvlens.lens.lens import Lens
from tvlens.lens.positions import Positions
from tvlens.lens.sites import Site
from tvlens.scores.effects import Direction, PatchEffects
from tvlens.scores.metrics import MetricFunction, metric_of, wrong_tokens
from tvlens.scores.pairing import Ready, paired
from tvlens.tasks.base import PromptSet


def patch(
    lens: Lens,
    source: PromptSet,
    target: PromptSet,
    *,
    site: str | Site = "resid_post",
    positions: Positions = "query",
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    metric: str | MetricFunction | None = None,
    wrong: PromptSet | None = None,
    direction: Direction = "denoising",
    progress: Callable[[int], None] | None = None,
) -> PatchEffects:
    """Effects of putting activations of source prompts into target prompts, one place at a time.

    The effect at a place is metric(patched target) - metric(target), by the target's own answers.
    *Denoising* puts clean activations into corrupted prompts, *noising* corrupted ones into clean
    prompts (Meng et al. 2022, arXiv 2202.05262; Wang et al. 2023, arXiv 2211.00593). Every patch is
    exact: prompts are read once and replayed from the place on (`tvlens.lens.suffix`), or run whole
    where the model's architecture asks for it.

    Example:
        >>> clean = task.prompts("train", n=8)
        >>> shuffled = task.prompts("train", n=8, kind="shuffled")
        >>> tvlens.patch(lens, clean, shuffled, site="resid_post", positions="roles").to_frame()

    Args:
        lens: the model.
        source: prompts that activations are taken from.
        target: as many prompts that they are put into.
        site: a site of every layer (`tvlens.lens.sites`), or one `Site`.
        positions: the query position, all positions, numbers, or roles (`Positions`). Roles allow
            prompts of different lengths: their tokens are matched from the last one backwards.
        layers: layers that are patched, each on its own; all that have the site by default.
        heads: heads that are patched, each on its own; all by default.
        metric: a name of `METRICS`, or a function of outputs `[batch variant d_out]` and their
            `Batch`; by default the probability of the answer, or the squared error.
        wrong: target prompts with wrong answers, for the logit difference; the mean over the
            vocabulary is taken without.
        direction: which of the two prompts is the clean one.
        progress: called with the number of prompts finished.

    Raises:
        UnknownNameError: there is no such site or metric, or the model lacks the site.
        ShapeError: a layer or head is not there, prompts differ in number or, where positions are
            numbers, in length; or the metric gives something of another shape.
        TaskError: positions or roles are not there, or no source differs from its target.
        NumericalError: a metric is not finite.
    """
    measure = metric_of(lens, metric)
    pairing = paired(
        lens,
        source,
        target,
        site=site,
        positions=positions,
        layers=layers,
        heads=heads,
        wrong=wrong_tokens(lens, wrong, len(target)),
    )

    @torch.no_grad()
    def exact(ready: Ready) -> Tensor:
        edit = pairing.patch(ready.piece)
        parts = [ready.measure(few) for few in lens.variants(ready.reading, edit)]
        return torch.cat(parts, dim=1) - ready.before[:, None]

    return pairing.effects(
        exact, metric=measure, direction=direction, method="exact", progress=progress
    )
