"""The text study: what it asks of a task, and how it judges vectors."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from tvlens import figures
from tvlens.console import progress_bar
from tvlens.evaluation.methods import evaluate
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.runs.steps import Steps
from tvlens.scores.mediation import mediation_prompts
from tvlens.studies import summary
from tvlens.studies.plan import Plan, StudySettings, View
from tvlens.tasks.base import KINDS, PromptKind, PromptSet
from tvlens.tasks.text.prompts import Prompts
from tvlens.tasks.text.task import Task
from tvlens.vectors.catalogue import Modality
from tvlens.vectors.fv import DEFAULT_KS, DEFAULT_SCALES
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.materials import ByKind

CHOICE_KINDS: tuple[PromptKind, ...] = ("zero", "shuffled")


@dataclass(frozen=True)
class TextSettings(StudySettings):
    """What a text study does to each task.

    Attributes:
        shots: examples in clean and shuffled prompts.
        n_test: test prompts of each kind; every test pair once if None.
    """

    ks: tuple[int, ...] = DEFAULT_KS
    scales: tuple[float, ...] = DEFAULT_SCALES
    compare_ks: tuple[int, ...] = (5, 10, 20)
    n_means: int = 100
    n_mediation: int = 25
    ltv_seeds: int = 3
    shots: int = 10
    n_test: int | None = None


@dataclass(frozen=True)
class TextPlan:
    """The study of one text task: one vector for the task, on prompts that do not carry it."""

    modality: ClassVar[Modality] = "text"
    lens: Lens
    task: Task
    settings: TextSettings

    @property
    def title(self) -> str:
        """The task and its size."""
        return f"{self.task.name}: {len(self.task.pairs)} pairs"

    @property
    def views(self) -> tuple[View, ...]:
        """Heads are scored in one way."""
        return (View("class", "uninformative"),)

    @property
    def fits(self) -> Mapping[str, FitSettings]:
        """One training."""
        return {"uninformative": self.settings.ltv}

    @property
    def uses(self) -> Mapping[str, Mapping[PromptKind, str]]:
        """The one training serves all kinds of prompts."""
        return {"ltv": dict.fromkeys(KINDS, "uninformative")}

    def clean(self) -> Prompts:
        """Clean prompts of the train split."""
        s = self.settings
        return self.task.prompts("train", shots=s.shots, n=s.n_means, seed=s.seed)

    def note(self, means: HeadMeans) -> str:
        """How many of the clean prompts the model answers."""
        return (
            f"{self.task.name}: head means over the {means.count} of {means.offered} clean "
            f"{self.settings.shots}-shot train prompts that {self.lens.name} answers (first "
            "token); mediation asks only their queries"
        )

    def mediation(self, view: View, means: HeadMeans) -> Prompts:
        """Label-shuffled prompts whose queries the model answers when the prompt is clean."""
        s = self.settings
        return mediation_prompts(self.task, self.clean(), means, n=s.n_mediation, seed=s.seed)

    def validation(self) -> dict[PromptKind, PromptSet]:
        """Prompts of the validation split that do not carry the task, as many as stop an LTV."""
        s = self.settings
        return {
            kind: self.task.prompts(
                "validation", shots=s.shots, n=s.ltv.n_validation, seed=s.seed, kind=kind
            )
            for kind in CHOICE_KINDS
        }

    def asked(self, n: int | None) -> Prompts:
        """Clean prompts of the test split, every pair asked once if None."""
        s = self.settings
        return self.task.prompts("test", shots=s.shots, n=n, seed=s.seed)

    def evaluate(self, run: Steps, methods: Mapping[str, ByKind]) -> pd.DataFrame:
        """Accuracy, cross-entropy and exact match on every kind of test prompts."""
        s = self.settings

        def compute() -> dict[str, Any]:
            n = s.n_test or len(self.task.split("test"))
            with progress_bar(f"{self.task.name}: evaluation", len(KINDS) * n) as advance:
                table = evaluate(
                    self.lens,
                    self.task,
                    methods,
                    shots=s.shots,
                    n=s.n_test,
                    seed=s.seed,
                    kinds=KINDS,
                    progress=advance,
                )
            return {"results": table}

        return run.step(f"{self.task.name}/evaluation", compute)["results"]

    def facts(self) -> None:
        """All tasks have the same model, which the manifest names."""

    def summaries(self, plans: Iterable[Plan], results: pd.DataFrame) -> dict[str, summary.Summary]:
        """Accuracy of every method on every task."""
        return {"summary": summary.text_methods(results)}

    def figures(
        self, history: pd.DataFrame, results: pd.DataFrame
    ) -> dict[str, Callable[[], Figure]]:
        """The training of the reported vector, and every method on every task."""
        reported = history[history["seed"] == self.settings.seed]
        return {
            f"ltv-training-{self.task.name}": lambda: figures.training_history(reported),
            "methods": lambda: figures.method_dots(results),
        }


def text_plans(
    lens: Lens, tasks: Mapping[str, Task], settings: TextSettings
) -> dict[str, TextPlan]:
    """The plans of a study of several text tasks, by name."""
    return {name: TextPlan(lens, task, settings) for name, task in tasks.items()}
