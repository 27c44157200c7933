"""Choice among candidate vectors on validation prompts, for each kind of prompts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.console import progress_bar
from tvlens.lens.fitting import Schedule
from tvlens.lens.lens import Lens
from tvlens.tasks.base import KINDS, PromptKind, PromptSet
from tvlens.vectors.ltv.sample import FitPrompts
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.materials import ByKind, Materials
from tvlens.vectors.vector import Vector, edits_of

Candidates: TypeAlias = Sequence[tuple[Mapping[str, Any], Vector]]
"""What is tried: settings, as columns of a table, and the vector."""


@dataclass(frozen=True)
class Training:
    """How the candidates for some kinds of prompts are trained, where they are.

    Attributes:
        settings: numbers of prompts and steps, and what prompts are asked.
        prompts: reads the prompts.
        title: what is trained, in words.
    """

    settings: FitSettings
    prompts: Callable[[], FitPrompts]
    title: str

    def schedule(self, learning_rate: float) -> Schedule:
        """As long as Learnable Task Vectors are trained, with steps of this size."""
        s = self.settings
        return Schedule(s.steps, learning_rate, s.batch_size, s.evaluate_every, s.patience)


def chosen(materials: Materials, name: str, candidates: Callable[[Training], Candidates]) -> ByKind:
    """The candidate that is best on the validation prompts of each kind, as a step of the run.

    Kinds whose vectors are trained alike share their candidates. A kind without validation prompts
    gets what is chosen on label-shuffled ones.

    Args:
        materials: what vectors are made of.
        name: name of the method.
        candidates: makes what is tried, of a training.
    """

    def compute() -> tuple[dict[str, Vector], pd.DataFrame]:
        validation = materials.validation()
        found: dict[str, Vector] = {}
        tables = []
        for settings in dict.fromkeys(materials.fits.values()):
            own = {k: p for k, p in validation.items() if materials.fits.get(k) == settings}
            if not own:
                continue
            title = f"{materials.task.name}: {name}"
            training = Training(settings, partial(materials.fit_prompts, settings), title)
            tried = candidates(training)
            with progress_bar(f"{title}, choice", sum(map(len, own.values()))) as advance:
                order, table = ranked(materials.lens, tried, own, progress=advance)
            found |= {kind: tried[best[0]][1] for kind, best in order.items()}
            tables.append(table)
        return found, pd.concat(tables, ignore_index=True).assign(method=name)

    vectors, _ = materials.kept(name, compute)
    there = [kind for kind in KINDS if kind in materials.fits]
    return {kind: [vectors.get(kind, vectors["shuffled"])] for kind in there}


def ranked(
    lens: Lens,
    candidates: Candidates,
    validation: Mapping[PromptKind, PromptSet],
    *,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[PromptKind, list[int]], pd.DataFrame]:
    """Candidates in the order of what they do on the validation prompts of each kind.

    By the first measure of the lens' readout (accuracy for text), ties broken by the next
    (cross-entropy), so that a vector is never judged on a setting chosen for another kind.

    Args:
        lens: the model.
        candidates: what is tried.
        validation: prompts of the validation split, by kind.
        progress: called with the number of prompts finished, of all kinds together.

    Returns:
        Numbers of the candidates by kind, best first; and a table of every candidate on every kind:
        its settings, prompt, and the measures.
    """
    measures = lens.readout.measures
    order: dict[PromptKind, list[int]] = {}
    frames = []
    for kind, prompts in validation.items():
        values = _measured(lens, prompts, [vector for _, vector in candidates], progress)
        frame = pd.DataFrame([settings for settings, _ in candidates])
        frame["prompt"] = kind
        for column, measure in enumerate(measures):
            frame[measure.name] = values[:, column].tolist()
        frames.append(frame)
        order[kind] = frame.sort_values(
            [m.name for m in measures], ascending=[not m.higher_is_better for m in measures]
        ).index.tolist()
    return order, pd.concat(frames, ignore_index=True)


def _measured(
    lens: Lens,
    prompts: PromptSet,
    vectors: Sequence[Vector],
    progress: Callable[[int], None] | None,
) -> Float[Tensor, "vector measure"]:
    """Mean over prompts of every measure under every vector."""
    found = torch.empty(len(vectors), len(lens.readout.measures), dtype=torch.float64)
    # All vectors are of one kind, so there is one edit.
    for edit, index in edits_of(vectors, lens, prompts):
        measures = lens.outputs(prompts, edit, lens.readout.measure, advance=progress)
        found[index] = measures.double().mean(0).cpu()
    return found
