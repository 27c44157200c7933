"""The regression study: what it asks of a function class, and how it judges vectors: the fidelity
benchmark.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import pandas as pd
from matplotlib.figure import Figure

from tvlens import figures
from tvlens.console import progress_bar
from tvlens.evaluation.curves import (
    DUMMY_PLACES,
    Errors,
    dummy_errors,
    error_table,
    method_errors,
    oracle_errors,
    prompt_sets,
    truncation_errors,
)
from tvlens.evaluation.methods import BARE, Draws
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.runs.steps import Steps
from tvlens.studies import summary
from tvlens.studies.plan import Plan, StudySettings, View
from tvlens.tasks.base import KINDS, PromptKind, PromptSet
from tvlens.tasks.regression.inputs import SHIFTS
from tvlens.tasks.regression.oracles import ORACLES, choose_lasso
from tvlens.tasks.regression.prompts import PointCurves, PointPrompts
from tvlens.tasks.regression.task import FunctionTask
from tvlens.vectors.catalogue import WHOSE, Modality, variants
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.materials import ByKind

VIEWS = tuple(View(whose, asked) for asked in ("informative", "uninformative") for whose in WHOSE)


@dataclass(frozen=True)
class RegressionSettings(StudySettings):
    """What a regression study does to each function class.

    Attributes:
        n_means: clean prompts of T_train points that head means are taken over.
        ltv: how Learnable Task Vectors are trained; kinds, shots and whose outputs are filled in.
        n_test: test prompts of each kind and shift.
        n_oracle: how many of them the estimators are fitted to.
        n_slow: how many of them those that take long are (boosting, network).
        n_dummy: how many of them get dummy pairs, which need whole forward passes.
        reach: longest prompts, as a multiple of T_train, if the model has so many positions.
        n_lengths: lengths past T_train that vectors are trained and chosen on, if on several.
        shifts: how test prompts differ from those of training.
    """

    ks: tuple[int, ...] = (2, 4, 9)
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    compare_ks: tuple[int, ...] = (3, 5, 10)
    n_means: int = 1024
    n_mediation: int = 256
    ltv_seeds: int = 2
    ltv: FitSettings = field(
        default_factory=lambda: FitSettings(
            learning_rate=0.3,
            steps=200,
            batch_size=128,
            n_prompts=2048,
            n_validation=1024,
            evaluate_every=20,
            patience=None,
        )
    )
    n_test: int = 512
    n_oracle: int = 64
    n_slow: int = 32
    n_dummy: int = 128
    reach: float = 2.5
    n_lengths: int = 5
    shifts: tuple[str, ...] = tuple(SHIFTS)


class RegressionPlan:
    """The study of one function class: vectors of the class and of each prompt, on prompts longer
    than those of training and on prompts that do not carry the function.
    """

    modality: ClassVar[Modality] = "regression"

    def __init__(self, lens: Lens, task: FunctionTask, settings: RegressionSettings) -> None:
        """Settles the numbers of points that are trained on, chosen on and tested at.

        Raises:
            TaskError: the task does not know its T_train.
        """
        self.lens, self.task, self.settings = lens, task, settings
        self.trained = task.require_train_points()
        positions = lens.backend.n_ctx // 2
        self.longest = max(self.trained, min(positions, round(settings.reach * self.trained) + 1))
        self.points = tuple(range(1, self.longest + 1))
        step = max(1, (self.longest - self.trained) // settings.n_lengths)
        self.lengths = tuple(range(self.longest, self.trained, -step))[: settings.n_lengths][::-1]
        self.lengths = self.lengths or (self.longest,)

    @property
    def title(self) -> str:
        """The class, its model, and how far that was trained."""
        return f"{self.task.name}: {self.lens!r}, trained on up to {self.trained} points"

    @property
    def views(self) -> tuple[View, ...]:
        """Heads of the class and of each prompt, on prompts of either kind."""
        return VIEWS

    @property
    def fits(self) -> Mapping[str, FitSettings]:
        """Long prompts, prompts that do not carry the function, and long ones of several lengths.

        Trainings on several lengths see as many prompts in all as those on one.
        """
        ltv, each = self.settings.ltv, len(self.lengths)
        asked = {
            "informative": replace(ltv, kinds=("clean",), shots=self.longest - 1),
            "uninformative": replace(ltv, kinds=("zero", "shuffled"), shots=self.trained - 1),
        }
        lengths = replace(
            ltv,
            kinds=("clean",),
            shots=tuple(points - 1 for points in self.lengths),
            n_prompts=max(1, ltv.n_prompts // each),
            n_validation=ltv.n_validation and max(1, ltv.n_validation // each),
        )
        return {**asked, "lengths": lengths}

    @property
    def uses(self) -> Mapping[str, Mapping[PromptKind, str]]:
        """Clean prompts get the vector of long ones, others that of their like."""
        of_kind = dict.fromkeys(KINDS, "uninformative") | {"clean": "informative"}
        return {"ltv": of_kind, "ltv_lengths": {"clean": "lengths"}}

    def clean(self) -> PointPrompts:
        """Clean prompts of T_train points."""
        s = self.settings
        return self.task.prompts("train", shots=self.trained - 1, n=s.n_means, seed=s.seed)

    def note(self, means: HeadMeans) -> None:
        """Nothing: no prompt is left out of the means."""

    def mediation(self, view: View, means: HeadMeans) -> PointPrompts:
        """Long clean prompts, or label-shuffled ones of T_train points."""
        s, informative = self.settings, view.prompts == "informative"
        return self.task.prompts(
            "train",
            shots=(self.longest if informative else self.trained) - 1,
            n=s.n_mediation,
            seed=s.seed,
            kind="clean" if informative else "shuffled",
        )

    def validation(self) -> dict[PromptKind, PromptSet]:
        """Prompts of every kind; clean ones at the lengths past T_train."""
        seed, shots = self.settings.seed, self.trained - 1
        return {
            "clean": self.task.curves("validation", points=self.lengths, seed=seed),
            "zero": self.task.prompts("validation", shots=shots, seed=seed, kind="zero"),
            "shuffled": self.task.prompts("validation", shots=shots, seed=seed, kind="shuffled"),
        }

    def asked(self, n: int | None) -> PointCurves:
        """Clean test prompts, each asked at T_train points and at the lengths past it."""
        points = (self.trained, *(p for p in self.lengths if p > self.trained))
        return self.task.curves("test", points=points, n=n, seed=self.settings.seed)

    def evaluate(self, run: Steps, methods: Mapping[str, ByKind]) -> pd.DataFrame:
        """Errors of everything on test prompts of every kind and shift."""
        frames = []
        for shift in self.settings.shifts:
            # Under a shift only prompts that carry the function are asked.
            for kind in ("clean", "zero", "shuffled") if shift == "none" else ("clean",):

                def compute(shift: str = shift, kind: PromptKind = kind) -> dict[str, Any]:
                    return {"results": self._errors(methods, shift, kind)}

                name = f"{self.task.name}/fidelity-{shift}-{kind}"
                frames.append(run.step(name, compute)["results"])
        return pd.concat(frames, ignore_index=True)

    def facts(self) -> dict[str, Any]:
        """The class and the sizes of its model."""
        functions = self.task.functions
        return {
            "functions": self.task.name,
            "n_dims": functions.n_dims,
            "train_points": self.trained,
            "variance": functions.variance,
            "layers": self.lens.n_layer,
            "heads": self.lens.n_head,
        }

    def summaries(self, plans: Iterable[Plan], results: pd.DataFrame) -> dict[str, summary.Summary]:
        """Errors and gains of every method on every class."""
        trained = {p.task.name: p.trained for p in plans if isinstance(p, RegressionPlan)}
        return {"summary": summary.regression_methods(results, trained)}

    def figures(
        self, history: pd.DataFrame, results: pd.DataFrame
    ) -> dict[str, Callable[[], Figure]]:
        """Error against number of points."""
        name, points = self.task.name, self.trained
        return {
            f"fidelity-{name}": lambda: figures.error_curves(
                results, functions=name, train_points=points
            )
        }

    def _errors(self, methods: Mapping[str, ByKind], shift: str, kind: PromptKind) -> pd.DataFrame:
        s, lens = self.settings, self.lens
        task = replace(self.task, shift=shift)
        sets = prompt_sets(task, "test", kind=kind, points=self.points, n=s.n_test, seed=s.seed)
        known = variants()
        # Controls say what chance does; under a shift they would say it once more.
        asked: dict[str, Draws] = {
            name: made[kind]
            for name, made in methods.items()
            if kind in made and (shift == "none" or known[name].method.family != "control")
        }
        what = kind if shift == "none" else shift
        with progress_bar(f"{task.name}: errors, {what}", sum(map(len, sets))) as advance:
            errors = method_errors(lens, sets, asked, progress=advance)
        (first, *_) = sets
        if isinstance(first, PointCurves):
            errors["truncation"] = truncation_errors(lens, first, self.trained, errors[BARE])
            if shift == "none":
                errors |= self._with_dummies(first, asked)
        if kind == "clean":
            errors |= self._oracles(sets, slow=shift == "none")
        return error_table(
            errors,
            functions=self.task.name,
            shift=shift,
            prompt=kind,
            train_points=self.trained,
            seed=s.seed,
        )

    def _with_dummies(self, curves: PointCurves, methods: Mapping[str, Draws]) -> dict[str, Errors]:
        """Dummy pairs at the lengths that leave positions for them."""
        room = min(self.longest, self.lens.backend.n_ctx // 2 - len(DUMMY_PLACES))
        if room <= len(DUMMY_PLACES):
            return {}
        points = {min(self.trained, room), (self.trained + room) // 2, room}
        few = curves.first(self.settings.n_dummy)
        chosen = replace(few, points=tuple(sorted(p for p in points if p <= room)))
        known = variants()
        own = {
            name: made
            for name, made in methods.items()
            if known[name].method.dummies and known[name].whose == "class"
        }
        with progress_bar(f"{self.task.name}: dummy pairs", len(chosen)) as advance:
            return dummy_errors(self.lens, chosen, own, progress=advance)

    def _oracles(self, sets: list[PointCurves | PointPrompts], *, slow: bool) -> dict[str, Errors]:
        """Classical estimators on the first of the same prompts."""
        s, variance = self.settings, self.task.functions.variance
        (first, *_) = sets
        few: list[PointCurves | PointPrompts] = []
        if slow and isinstance(first, PointCurves):
            few = [replace(first, points=tuple(sorted({self.trained, *self.lengths})))]
        counts = {"fast": s.n_oracle, "slow": s.n_slow, "closed": s.n_test}
        asked = {name: oracle for name, oracle in ORACLES.items() if few or oracle.cost != "slow"}
        found = {}
        with progress_bar(f"{self.task.name}: estimators", len(asked)) as advance:
            for name, oracle in asked.items():
                fitted = self._lasso() if name == "lasso" else oracle.make()
                chosen = few if oracle.cost == "slow" else sets
                found[name] = oracle_errors(chosen, fitted, variance, counts[oracle.cost])
                advance(1)
        return found

    def _lasso(self) -> Any:
        """Lasso with the penalty that is best on validation prompts of T_train points."""
        s = self.settings
        prompts = self.task.prompts("validation", shots=self.trained - 1, n=s.n_oracle, seed=s.seed)
        return choose_lasso(
            prompts.xs[:, :-1], prompts.ys[:, :-1], prompts.xs[:, -1], prompts.target
        )


def regression_plans(
    models: Mapping[str, tuple[Lens, FunctionTask]], settings: RegressionSettings
) -> dict[str, RegressionPlan]:
    """The plans of a study of several function classes, by name.

    Args:
        models: the model of each class and the class as a task that knows its T_train, by name.
        settings: what is done.
    """
    return {name: RegressionPlan(lens, task, settings) for name, (lens, task) in models.items()}
