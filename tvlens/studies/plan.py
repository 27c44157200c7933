"""What a study needs to know of a modality: a small protocol with two answers, text and regression.

Everything else of a study is the same for both (`tvlens.studies.study`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import pandas as pd
from matplotlib.figure import Figure

from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.runs.steps import Steps
from tvlens.tasks.base import PromptKind, PromptSet, PromptSource
from tvlens.vectors.catalogue import STANDARD, Modality
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.materials import ByKind, Whose

Asked = Literal["informative", "uninformative"]
"""Whether prompts carry the task: clean ones do; zero-shot and label-shuffled ones do not."""


@dataclass(frozen=True)
class StudySettings:
    """What every study does to each task.

    Attributes:
        seed: seed of every draw.
        n_means: clean prompts that head means are taken over.
        n_mediation: prompts of each causal mediation.
        ltv: how Learnable Task Vectors are trained.
        ltv_seeds: how many are trained, with seeds seed, seed + 1, …; the first is reported.
        ks: numbers of heads tried for function vectors.
        scales: scales tried for function vectors.
        control_draws: random and permuted weights drawn.
        compare_ks: sizes of the head sets compared.
        methods: names of the methods that are made.
    """

    ks: tuple[int, ...]
    scales: tuple[float, ...]
    compare_ks: tuple[int, ...]
    n_means: int
    n_mediation: int
    ltv_seeds: int
    seed: int = 0
    ltv: FitSettings = field(default_factory=FitSettings)
    control_draws: int = 3
    methods: tuple[str, ...] = STANDARD


@dataclass(frozen=True)
class View:
    """One way of asking which heads matter: whose outputs, and on which prompts.

    Attributes:
        whose: whose head outputs are patched in and weighed.
        prompts: whether the prompts that are patched and trained on carry the task.
    """

    whose: Whose
    prompts: Asked

    def __str__(self) -> str:
        return f"{self.whose}-{self.prompts}"


@runtime_checkable
class Plan(Protocol):
    """One task of a study: which prompts, which trainings, which tests."""

    @property
    def modality(self) -> Modality:
        """Which methods belong to the study."""
        ...

    @property
    def lens(self) -> Lens:
        """The model."""
        ...

    @property
    def task(self) -> PromptSource:
        """Where prompts are drawn from."""
        ...

    @property
    def settings(self) -> StudySettings:
        """What is done."""
        ...

    @property
    def title(self) -> str:
        """What is studied, in a line."""
        ...

    @property
    def views(self) -> tuple[View, ...]:
        """The ways in which heads are scored."""
        ...

    @property
    def fits(self) -> Mapping[str, FitSettings]:
        """Trainings of Learnable Task Vectors by name; that of a view is called as its prompts."""
        ...

    @property
    def uses(self) -> Mapping[str, Mapping[PromptKind, str]]:
        """Which training makes the vector of a method for each kind of prompts."""
        ...

    def clean(self) -> PromptSet:
        """Prompts that head means are taken over."""
        ...

    def note(self, means: HeadMeans) -> str | None:
        """What was left out of the means, in a sentence."""
        ...

    def mediation(self, view: View, means: HeadMeans) -> PromptSet:
        """Prompts whose heads are patched."""
        ...

    def validation(self) -> Mapping[PromptKind, PromptSet]:
        """Prompts that settings of vectors are chosen on."""
        ...

    def asked(self, n: int | None) -> PromptSet:
        """So many clean test prompts, on which heads are ablated; as many as usual if None."""
        ...

    def evaluate(self, run: Steps, methods: Mapping[str, ByKind]) -> pd.DataFrame:
        """Every method on test prompts: the rows of `results.csv`, kept as steps of the run."""
        ...

    def facts(self) -> Mapping[str, Any] | None:
        """A row of `models.csv`, where every task has a model of its own."""
        ...

    def summaries(
        self, plans: "Iterable[Plan]", results: pd.DataFrame
    ) -> Mapping[str, tuple[pd.DataFrame, pd.DataFrame]]:
        """Tables for a paper over all tasks, by name: in numbers, and as text with intervals.

        Args:
            plans: the plans of all tasks.
            results: the results of all tasks.
        """
        ...

    def figures(
        self, history: pd.DataFrame, results: pd.DataFrame
    ) -> Mapping[str, Callable[[], Figure]]:
        """What draws the figures of this modality, by name.

        Args:
            history: training of the vectors of this task.
            results: the results of all tasks.
        """
        ...
