"""Learnable Task Vectors of whole answers, among the methods that studies make."""

from dataclasses import replace
from typing import get_args

import pandas as pd

from tvlens.console import progress_bar
from tvlens.lens.edits import ActsAt
from tvlens.vectors.ltv.fit import fit_ltv
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.materials import ByKind, Materials
from tvlens.vectors.vector import Vector

NAME = "ltv_whole"


def make(materials: Materials) -> ByKind:
    """Trained on all tokens of answers and their end, as the study trains vectors of first tokens.

    Whether it is added once, at the query, or at every new position too is chosen by the loss on
    validation prompts.
    """

    def trained(settings: FitSettings) -> LearnableTaskVector:
        title = f"{materials.task.name}: whole answers, {settings.positions}"
        # Prompts are the same wherever the vector acts, and are read once.
        read = materials.fit_prompts(replace(settings, positions="query"))
        with progress_bar(title, settings.steps) as advance:
            return fit_ltv(
                materials.lens,
                materials.task,
                materials.means,
                settings=settings,
                seed=materials.seed,
                read=read,
                progress=advance,
            )

    def compute() -> tuple[dict[str, Vector], pd.DataFrame]:
        found: dict[str, Vector] = {}
        rows = []
        for fit in dict.fromkeys(materials.fits.values()):
            tried: dict[ActsAt, LearnableTaskVector] = {
                at: trained(replace(fit, answer="whole", positions=at)) for at in get_args(ActsAt)
            }
            losses = {at: ltv.history["validation_loss"].min() for at, ltv in tried.items()}
            best = tried[min(losses, key=losses.__getitem__)]
            kinds = [kind for kind, own in materials.fits.items() if own == fit]
            found |= dict.fromkeys(kinds, best)
            rows += [{"positions": at, "validation_loss": loss} for at, loss in losses.items()]
        return found, pd.DataFrame(rows).assign(method=NAME)

    vectors, _ = materials.kept(NAME, compute)
    return {kind: [vectors[kind]] for kind in materials.fits}
