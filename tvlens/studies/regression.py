"""The stages of the regression study of one function class, each kept as a step of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import pandas as pd

from tvlens.evaluation.curves import (
    BARE,
    DUMMY_PLACES,
    Errors,
    dummy_errors,
    error_table,
    method_errors,
    oracle_errors,
    prompt_sets,
    truncation_errors,
)
from tvlens.evaluation.methods import Method
from tvlens.lens.heads import HeadMeans, mean_head_outputs
from tvlens.lens.lens import Lens
from tvlens.runs.run import Run
from tvlens.scores.mediation import IndirectEffects, indirect_effects
from tvlens.studies.stages import (
    function_vector_step,
    ltv_step,
)
from tvlens.tasks.base import PromptKind, PromptSet
from tvlens.tasks.regression import oracles
from tvlens.tasks.regression.inputs import SHIFTS
from tvlens.tasks.regression.oracles import Oracle
from tvlens.tasks.regression.prompts import PointCurves
from tvlens.tasks.regression.task import FunctionTask
from tvlens.vectors.controls import permuted_controls, random_controls
from tvlens.vectors.fv import published_mixture
from tvlens.vectors.ltv.fit import FitPrompts, FitSettings, read_fit_prompts
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.vector import Vector

Unit = Literal["class", "prompt"]
"""Whose head outputs make a vector: means over the function class, or each prompt's own donor."""
CONTROLS = ("random", "permuted")
"""How the names of controls begin."""
UNITS: tuple[Unit, ...] = ("class", "prompt")
Asked = Literal["long", "untold"]
_LASSO_ALPHAS = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class RegressionSettings:
    """What a regression study does to each function class.

    Attributes:
        seed: seed of every draw.
        n_means: clean prompts of T_train points that head means are taken over.
        n_mediation: prompts of each causal mediation.
        n_test: test prompts of each kind and shift.
        n_oracle: how many of them the estimators are fitted to.
        n_slow: how many of them those that take long are (boosting, network).
        n_dummy: how many of them get dummy pairs, which need whole forward passes.
        reach: longest prompts, as a multiple of T_train, if the model has so many positions.
        n_lengths: lengths past T_train that vectors are trained and chosen on, if on several.
        ltv: how Learnable Task Vectors are trained; kinds, shots and whose outputs are filled in.
        ltv_seeds: how many are trained for the comparison, with seeds seed, seed + 1, …
        ks: numbers of heads tried for function vectors.
        scales: scales tried for function vectors.
        control_draws: random and permuted weights drawn.
        compare_ks: sizes of the head sets compared.
        shifts: how test prompts differ from those of training.
    """

    seed: int = 0
    n_means: int = 1024
    n_mediation: int = 256
    n_test: int = 512
    n_oracle: int = 64
    n_slow: int = 32
    n_dummy: int = 128
    reach: float = 2.5
    n_lengths: int = 5
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
    ltv_seeds: int = 2
    ks: tuple[int, ...] = (2, 4, 9)
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    control_draws: int = 3
    compare_ks: tuple[int, ...] = (3, 5, 10)
    shifts: tuple[str, ...] = tuple(SHIFTS)


@dataclass(frozen=True)
class View:
    """One way of asking which heads matter: whose outputs, and on which prompts.

    Attributes:
        unit: whose head outputs are patched in and weighed.
        prompts: "long", clean prompts past T_train, as the paper trains on; or "untold", zero-shot
            and label-shuffled prompts, as the text study does. Mediation patches long prompts for
            the first and shuffled ones for the second.
    """

    unit: Unit
    prompts: Asked

    def name(self, functions: str) -> str:
        """The name in tables of heads, such as `linear-prompt-untold`."""
        return f"{functions}-{self.unit}-{self.prompts}"


VIEWS = tuple(View(unit, prompts) for prompts in ("long", "untold") for unit in UNITS)


class Plan:
    """The stages of the study of one function class."""

    def __init__(self, lens: Lens, task: FunctionTask, settings: RegressionSettings) -> None:
        """Settles the numbers of points that are trained on, chosen on and tested at.

        Raises:
            TaskError: the task does not know its T_train.
        """
        task.require_train_points()
        self.lens, self.task, self.settings = lens, task, settings
        self.trained = task.require_train_points()
        positions = lens.backend.n_ctx // 2
        self.longest = max(self.trained, min(positions, round(settings.reach * self.trained) + 1))
        self.points = tuple(range(1, self.longest + 1))
        step = max(1, (self.longest - self.trained) // settings.n_lengths)
        self.lengths = tuple(range(self.longest, self.trained, -step))[: settings.n_lengths][::-1]
        self.lengths = self.lengths or (self.longest,)

    def head_means(self, run: Run) -> HeadMeans:
        """Mean head outputs over clean prompts of T_train points."""
        s = self.settings

        def compute() -> dict[str, Any]:
            shots = self.trained - 1
            clean = self.task.prompts("train", shots=shots, n=s.n_means, seed=s.seed)
            means = mean_head_outputs(self.lens, clean)
            return {"means": {"z": means.z, "outputs": means.outputs}}

        saved = run.step(f"{self.task.name}/means", compute)["means"]
        kept = tuple(range(s.n_means))
        return HeadMeans(saved["z"], saved["outputs"], kept, s.n_means, self.lens.name)

    def mediate(self, run: Run, means: HeadMeans, view: View) -> IndirectEffects:
        """Indirect effects of all heads on the prompts of this view."""
        s = self.settings

        def compute() -> dict[str, Any]:
            untold = view.prompts == "untold"
            prompts = self.task.prompts(
                "train",
                shots=(self.trained if untold else self.longest) - 1,
                n=s.n_mediation,
                seed=s.seed,
                kind="shuffled" if untold else "clean",
            )
            effects = indirect_effects(self.lens, prompts, means if view.unit == "class" else None)
            return {"effects": {"values": effects.values, "baseline": effects.baseline}}

        step = view.name(f"{self.task.name}/mediation")
        saved = run.step(step, compute)["effects"]
        return IndirectEffects(
            **saved,
            task=self.task.name,
            model=self.lens.name,
            score_name=self.lens.readout.score_name,
        )

    def function_vectors(
        self, run: Run, means: HeadMeans, effects: IndirectEffects, unit: Unit
    ) -> tuple[dict[str, dict[PromptKind, Vector]], pd.DataFrame]:
        """Function vectors for each kind of prompt, those for clean ones chosen past T_train."""
        s = self.settings

        def validation() -> dict[PromptKind, PromptSet]:
            shots = self.trained - 1
            return {
                "clean": self.task.curves("validation", points=self.lengths, seed=s.seed),
                "zero": self.task.prompts("validation", shots=shots, seed=s.seed, kind="zero"),
                "shuffled": self.task.prompts(
                    "validation", shots=shots, seed=s.seed, kind="shuffled"
                ),
            }

        return function_vector_step(
            self.lens,
            self.task.name,
            run,
            means,
            effects,
            validation,
            ks=s.ks,
            scales=s.scales,
            per_prompt=unit == "prompt",
            name=f"function-vectors-{unit}",
        )

    def train(
        self, run: Run, means: HeadMeans
    ) -> tuple[dict[str, LearnableTaskVector], dict[View, list[LearnableTaskVector]]]:
        """Every trained vector by name, and for each view those of further seeds."""
        s, longest = self.settings, self.longest - 1
        each = len(self.lengths)
        # As many prompts in all as at one length.
        several = replace(
            s.ltv,
            kinds=("clean",),
            shots=tuple(points - 1 for points in self.lengths),
            n_prompts=max(1, s.ltv.n_prompts // each),
            n_validation=s.ltv.n_validation and max(1, s.ltv.n_validation // each),
        )
        fits: dict[Asked | Literal["lengths"], FitSettings] = {
            "long": replace(s.ltv, kinds=("clean",), shots=longest),
            "untold": replace(s.ltv, kinds=("zero", "shuffled"), shots=self.trained - 1),
            "lengths": several,
        }
        ltvs: dict[str, LearnableTaskVector] = {}
        extra: dict[View, list[LearnableTaskVector]] = {view: [] for view in VIEWS}
        for prompts, fit in fits.items():
            for i in range(1 if prompts == "lengths" else s.ltv_seeds):
                read = self._reader(fit, s.seed + i)
                for unit in UNITS:
                    own = replace(fit, per_prompt=unit == "prompt")
                    name = f"ltv-{unit}-{prompts}"
                    made = ltv_step(self.lens, self.task, run, means, own, s.seed + i, name, read)
                    if i and prompts != "lengths":
                        extra[View(unit, prompts)].append(made)
                    else:
                        ltvs[name] = made
        return ltvs, extra

    def _reader(self, fit: FitSettings, seed: int) -> Callable[[], FitPrompts]:
        """Reads the prompts of a training when they are first asked for, and keeps them."""
        return cache(
            lambda: read_fit_prompts(self.lens, self.task, replace(fit, per_prompt=True), seed)
        )

    def methods(
        self,
        means: HeadMeans,
        effects: IndirectEffects,
        function_vectors: Mapping[str, Mapping[PromptKind, Vector]],
        ltvs: Mapping[str, LearnableTaskVector],
    ) -> dict[str, Method]:
        """Everything that is tested, by its name in `results.csv`."""
        s = self.settings
        published = published_mixture(means, effects).of_means(means)
        methods: dict[str, Method] = {**function_vectors, "fv_published_class": published}
        for unit in UNITS:
            long, untold = (ltvs[View(unit, p).name("ltv")] for p in ("long", "untold"))
            methods[f"ltv_{unit}"] = {
                "clean": long.task_vector,
                "zero": untold.task_vector,
                "shuffled": untold.task_vector,
            }
            methods[f"ltv_lengths_{unit}"] = {"clean": ltvs[f"ltv-{unit}-lengths"].task_vector}
            for name, draw in (("random", random_controls), ("permuted", permuted_controls)):
                of_untold = draw(untold, n=s.control_draws, seed=s.seed)
                methods[f"{name}_{unit}"] = {
                    "clean": draw(long, n=s.control_draws, seed=s.seed),
                    "zero": of_untold,
                    "shuffled": of_untold,
                }
        return methods

    def fidelity(self, run: Run, methods: Mapping[str, Method]) -> pd.DataFrame:
        """Errors of everything on test prompts of every kind and shift: rows of `results.csv`."""
        frames = []
        for shift in self.settings.shifts:
            kinds: tuple[PromptKind, ...] = (
                ("clean", "zero", "shuffled") if shift == "none" else ("clean",)
            )
            for kind in kinds:

                def compute(shift: str = shift, kind: PromptKind = kind) -> dict[str, Any]:
                    return {"results": self._errors(methods, shift, kind)}

                name = f"{self.task.name}/fidelity-{shift}-{kind}"
                frames.append(run.step(name, compute)["results"])
        return pd.concat(frames, ignore_index=True)

    def _errors(self, methods: Mapping[str, Method], shift: str, kind: PromptKind) -> pd.DataFrame:
        s, lens = self.settings, self.lens
        task = replace(self.task, shift=shift)
        sets = prompt_sets(task, "test", kind=kind, points=self.points, n=s.n_test, seed=s.seed)
        # Controls say what chance does; under a shift they would say it once more.
        kept = {
            name: method
            for name, method in methods.items()
            if shift == "none" or not name.startswith(CONTROLS)
        }
        errors = method_errors(lens, sets, kept, kind=kind)
        (first, *_) = sets
        if isinstance(first, PointCurves):
            errors["truncation"] = truncation_errors(lens, first, self.trained, errors[BARE])
            if shift == "none":
                errors |= self._with_dummies(first, methods)
        if kind == "clean":
            slow = shift == "none"
            errors |= self._oracles(sets, slow=slow)
        return error_table(
            errors,
            functions=self.task.name,
            shift=shift,
            prompt=kind,
            train_points=self.trained,
            seed=s.seed,
        )

    def _with_dummies(
        self, curves: PointCurves, methods: Mapping[str, Method]
    ) -> dict[str, Errors]:
        """Dummy pairs at the lengths that leave positions for them."""
        room = min(self.longest, self.lens.backend.n_ctx // 2 - len(DUMMY_PLACES))
        if room <= len(DUMMY_PLACES):
            return {}
        points = {min(self.trained, room), (self.trained + room) // 2, room}
        few = curves.first(self.settings.n_dummy)
        chosen = replace(few, points=tuple(sorted(p for p in points if p <= room)))
        names = ("fv_layer_class", "fv_published_class", "ltv_class")
        return dummy_errors(self.lens, chosen, {name: methods[name] for name in names})

    def _oracles(self, sets: list[Any], *, slow: bool) -> dict[str, Errors]:
        s = self.settings
        variance = self.task.functions.variance
        chosen: dict[str, tuple[Oracle, int]] = {
            "least_squares": (oracles.least_squares(), s.n_oracle),
            "ridge": (oracles.ridge(1.0), s.n_oracle),
            "lasso": (self._lasso(), s.n_oracle),
            "nearest_neighbours": (oracles.nearest_neighbours(), s.n_oracle),
            "averaging": (oracles.averaging(), s.n_test),
            "tree": (oracles.decision_tree(), s.n_oracle),
        }
        found = {
            name: oracle_errors(sets, oracle, variance, n) for name, (oracle, n) in chosen.items()
        }
        if slow:
            few = replace(sets[0], points=tuple(sorted({self.trained, *self.lengths})))
            for name, oracle in (
                ("boosting", oracles.boosting()),
                ("network", oracles.network()),
            ):
                found[name] = oracle_errors([few], oracle, variance, s.n_slow)
        return found

    def _lasso(self) -> Oracle:
        """Lasso with the penalty that is best on validation prompts of T_train points."""
        prompts = self.task.prompts(
            "validation", shots=self.trained - 1, n=self.settings.n_oracle, seed=self.settings.seed
        )
        candidates = {str(alpha): oracles.lasso(alpha) for alpha in _LASSO_ALPHAS}
        best = oracles.choose_oracle(
            candidates, prompts.xs[:, :-1], prompts.ys[:, :-1], prompts.xs[:, -1], prompts.target
        )
        return candidates[best]
