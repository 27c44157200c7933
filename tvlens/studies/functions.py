"""The whole regression study of one function class: the same heads, vectors and comparison as for
text, and the fidelity benchmark.

Each stage is a step of a run, saved when it is done, so an interrupted study resumes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pandas as pd

from tvlens.figures import curves as figures_regression
from tvlens.lens.lens import Lens
from tvlens.runs.run import Run
from tvlens.studies.regression import UNITS, VIEWS, Plan, RegressionSettings, View
from tvlens.studies.stages import (
    compare,
    head_frame,
    overlap_frame,
    write_head_figures,
)
from tvlens.tasks.base import PromptKind
from tvlens.tasks.regression.task import FunctionTask
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.vector import Vector


@dataclass(frozen=True)
class FunctionStudy:
    """What a study found on one function class: tidy tables and the vectors behind them."""

    results: pd.DataFrame
    heads: pd.DataFrame
    headsets: pd.DataFrame
    curve: pd.DataFrame
    sweep: pd.DataFrame
    history: pd.DataFrame
    ltvs: dict[str, LearnableTaskVector]
    function_vectors: dict[str, dict[PromptKind, Vector]]


def study_functions(
    models: Mapping[str, tuple[Lens, FunctionTask]],
    run: Run,
    settings: RegressionSettings,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, FunctionStudy]:
    """The study of every function class, with the run folder's tables, vectors and figures written.

    Args:
        models: the model of each class and the class as a task that knows its T_train, by name.
        run: where steps and results are kept.
        settings: what is done.
        say: called with a line of text when something begins.

    Returns:
        What was found, by name. The run folder holds it as `results`, `models`, `heads`,
        `headsets`, `overlap_curves`, `fv_sweep`, `ltv_history` and `layer_profiles` (CSV and
        Parquet), figures, and vectors.
    """
    found = {}
    for name, (lens, task) in models.items():
        say(f"{name}: {lens!r}, trained on up to {task.train_points} points")
        found[name] = study_function(lens, task, run, settings)
    _write(run, found, models)
    return found


def study_function(
    lens: Lens, task: FunctionTask, run: Run, settings: RegressionSettings
) -> FunctionStudy:
    """The study of one function class, its stages kept as steps of `run`."""
    plan = Plan(lens, task, settings)
    means = plan.head_means(run)
    effects = {view: plan.mediate(run, means, view) for view in VIEWS}
    vectors: dict[str, dict[PromptKind, Vector]] = {}
    sweeps = []
    for unit in UNITS:
        chosen, sweep = plan.function_vectors(run, means, effects[View(unit, "untold")], unit)
        vectors |= {f"{method}_{unit}": kinds for method, kinds in chosen.items()}
        sweeps.append(sweep.assign(unit=unit))
    ltvs, extra = plan.train(run, means)
    methods = plan.methods(means, effects[View("class", "untold")], vectors, ltvs)
    results = plan.fidelity(run, methods)
    names = {view: view.name(task.name) for view in VIEWS}
    seed, ks = settings.seed, settings.compare_ks
    heads = [
        head_frame(effects[v], ltvs[v.name("ltv")], seed=seed).assign(task=names[v]) for v in VIEWS
    ]
    headsets = [
        compare(names[v], effects[v], [ltvs[v.name("ltv")], *extra[v]], ks=ks, seed=seed)
        for v in VIEWS
    ]
    curves = [overlap_frame(names[v], effects[v], ltvs[v.name("ltv")], seed=seed) for v in VIEWS]
    history = [ltv.history.assign(vector=name) for name, ltv in ltvs.items()]
    return FunctionStudy(
        results,
        pd.concat(heads, ignore_index=True),
        pd.concat(headsets, ignore_index=True),
        pd.concat(curves, ignore_index=True),
        pd.concat(sweeps, ignore_index=True),
        pd.concat(history, ignore_index=True).assign(task=task.name),
        ltvs,
        vectors,
    )


def _write(
    run: Run,
    found: Mapping[str, FunctionStudy],
    models: Mapping[str, tuple[Lens, FunctionTask]],
) -> None:
    def joined(name: str) -> pd.DataFrame:
        return pd.concat([getattr(study, name) for study in found.values()], ignore_index=True)

    facts = [
        {
            "functions": name,
            "n_dims": task.functions.n_dims,
            "train_points": task.train_points,
            "variance": task.functions.variance,
            "layers": lens.n_layer,
            "heads": lens.n_head,
        }
        for name, (lens, task) in models.items()
    ]
    run.write_table("models", pd.DataFrame(facts))
    for table in ("results", "heads", "headsets"):
        run.write_table(table, joined(table))
    run.write_table("fv_sweep", joined("sweep"))
    run.write_table("ltv_history", joined("history"))
    units = {lens.readout.score_name for lens, _ in models.values()}
    write_head_figures(
        run,
        joined("heads"),
        joined("curve"),
        unit=" / ".join(sorted(units)),
        groups={f"-{name}": list(study.heads["task"].unique()) for name, study in found.items()},
    )
    for name, study in found.items():
        train_points = models[name][1].train_points
        run.write_figure(
            f"fidelity-{name}",
            figures_regression.error_curves(
                study.results, functions=name, train_points=train_points
            ),
        )
        for ltv_name, ltv in study.ltvs.items():
            ltv.save(run.folder / "vectors" / f"{name}-{ltv_name}.safetensors")
        for method, kinds in study.function_vectors.items():
            for kind, vector in kinds.items():
                vector.save(run.folder / "vectors" / f"{name}-{method}-{kind}.safetensors")
