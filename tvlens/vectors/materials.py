"""What the vectors of one task are made of, and where they are kept while they are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

import pandas as pd

from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.runs.steps import Steps
from tvlens.scores.mediation import IndirectEffects
from tvlens.tasks.base import KINDS, PromptKind, PromptSet, PromptSource
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.sample import FitPrompts, read_fit_prompts
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.vector import Vector

Whose = Literal["class", "prompt"]
"""Whose head outputs make a vector: means over the task, or those of each prompt's own donor."""

ByKind: TypeAlias = Mapping[PromptKind, Sequence[Vector]]
"""What a method adds on each kind of prompts; several vectors are draws to average over."""


@dataclass(frozen=True)
class Materials:
    """What the vectors of one task are made of.

    Attributes:
        lens: the model.
        task: where prompts are drawn from.
        run: where what takes long is kept.
        means: mean head outputs on clean prompts.
        whose: whose head outputs are weighed.
        effects: indirect effects that rank the heads.
        trained: Learnable Task Vectors by method and kind of prompts.
        clean: makes the clean prompts that the means were offered.
        fits: how vectors are trained for each kind of prompts.
        validation: makes the prompts that settings are chosen on, by kind.
        ks: numbers of heads to try.
        scales: factors to try.
        control_draws: draws of every control.
        seed: seed of all draws.
    """

    lens: Lens
    task: PromptSource
    run: Steps
    means: HeadMeans
    whose: Whose
    effects: IndirectEffects
    trained: Mapping[str, Mapping[PromptKind, LearnableTaskVector]]
    clean: Callable[[], Any]
    fits: Mapping[PromptKind, FitSettings]
    validation: Callable[[], Mapping[PromptKind, PromptSet]]
    ks: Sequence[int]
    scales: Sequence[float]
    control_draws: int
    seed: int
    _done: dict[str, tuple[dict[str, Vector], pd.DataFrame]] = field(default_factory=dict)
    _read: dict[FitSettings, FitPrompts] = field(default_factory=dict)

    @property
    def per_prompt(self) -> bool:
        """Whether vectors are made of each prompt's own donor."""
        return self.whose == "prompt"

    def answered(self) -> PromptSet:
        """The clean prompts that entered the means."""
        prompts, kept = self.clean(), list(self.means.kept)
        answered: PromptSet = prompts if len(kept) == len(prompts) else prompts[kept]
        return answered

    def fit_prompts(self, settings: FitSettings) -> FitPrompts:
        """The prompts of a training, read once for all methods; with donors where these weigh."""
        own = replace(settings, per_prompt=self.per_prompt)
        if own not in self._read:
            self._read[own] = read_fit_prompts(self.lens, self.task, own, self.seed)
        return self._read[own]

    def kept(
        self, name: str, compute: Callable[[], tuple[Mapping[str, Vector], pd.DataFrame]]
    ) -> tuple[dict[str, Vector], pd.DataFrame]:
        """Vectors by name and a table of how they were chosen, as a step of the run.

        Args:
            name: what tells the step from others of the task; methods that name the same one share
                it.
            compute: makes them, when the run does not hold them.
        """
        name = f"{name}-{self.whose}"
        if name in self._done:
            return self._done[name]

        def outputs() -> dict[str, Any]:
            vectors, table = compute()
            states = {name: vector.state() for name, vector in vectors.items()}
            tensors = {
                f"{n}/{key}": x for n, (held, _) in states.items() for key, x in held.items()
            }
            return {
                "vectors": tensors,
                "facts": {name: facts for name, (_, facts) in states.items()},
                "table": table,
            }

        saved = self.run.step(f"{self.task.name}/{name}", outputs)
        found = {}
        for key, facts in saved["facts"].items():
            own = f"{key}/"
            tensors = {n[len(own) :]: x for n, x in saved["vectors"].items() if n.startswith(own)}
            found[key] = Vector.of_state(tensors, facts)
        self._done[name] = found, saved["table"].assign(task=self.task.name, whose=self.whose)
        return self._done[name]

    @property
    def tables(self) -> dict[str, pd.DataFrame]:
        """How what was kept so far was chosen, by name of the step."""
        return {name: table for name, (_, table) in self._done.items()}


def fitting_ks(ks: Sequence[int], n_heads: int) -> list[int]:
    """The k of `ks` that a model of so many heads allows; all heads where none does."""
    return [k for k in ks if k <= n_heads] or [n_heads]


def for_every_kind(vector: Vector) -> ByKind:
    """One vector, whatever the kind of prompts."""
    return {kind: [vector] for kind in KINDS}
