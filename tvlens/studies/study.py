"""A whole study, read from top to bottom: means, mediation, vectors, scores, evaluation,
comparison. What differs between modalities is in its plans (`tvlens.studies.plan`).

Each stage is a step of a run, saved when it is done, so an interrupted study resumes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from tvlens.console import progress_bar
from tvlens.display import Displayed
from tvlens.lens.heads import HeadMeans
from tvlens.runs.run import Run
from tvlens.runs.steps import Steps
from tvlens.runs.tables import write_texts
from tvlens.scores.catalogue import STUDIED
from tvlens.scores.mediation import IndirectEffects
from tvlens.scores.score import Scores, join_scores
from tvlens.studies import comparison, stages, summary
from tvlens.studies.plan import Plan, View
from tvlens.vectors.catalogue import METHODS, WHOSE, methods_for, variant_name
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.materials import ByKind, Materials

STAGES = 5
"""What takes time in the study of a task: means, mediation, training, vectors, evaluation."""


@dataclass(frozen=True)
class Study(Displayed):
    """What a study found on one task: tidy tables and the vectors behind them.

    Attributes:
        results: every method on test prompts.
        heads: every score of every head.
        headsets: agreement of head sets.
        curve: their overlap at every size.
        sweep: every candidate among the function vectors.
        rivals: every candidate among those of other methods that are chosen on validation.
        history: training of every Learnable Task Vector.
        methods: what each method adds, by its name in `results` and by kind of prompts.
        ltvs: every trained vector.
    """

    results: pd.DataFrame
    heads: pd.DataFrame
    headsets: pd.DataFrame
    curve: pd.DataFrame
    sweep: pd.DataFrame
    rivals: pd.DataFrame
    history: pd.DataFrame
    methods: dict[str, ByKind]
    ltvs: stages.Trained


@dataclass(frozen=True)
class _Found:
    """What heads are scored by, in one view."""

    effects: IndirectEffects
    ltv: LearnableTaskVector


def study_all(
    plans: Mapping[str, Plan], run: Run, *, say: Callable[[str], None] = lambda _: None
) -> dict[str, Study]:
    """The study of every task, with the run folder's tables, vectors and figures written.

    Args:
        plans: what is studied, by name of the task.
        run: where steps and results are kept.
        say: called with a line of text when something begins.

    Returns:
        What was found, by task. The run folder holds it as `results`, `heads`, `headsets`,
        `overlap_curves`, `fv_sweep`, `sweeps` (of rivals), `ltv_history` and `layer_profiles` (CSV
        and Parquet), its `summary` and `headset_summary` (CSV, Markdown and LaTeX), figures and
        vectors.
    """
    found = {}
    with progress_bar("study, stages", STAGES * len(plans)) as advance:
        for number, (name, plan) in enumerate(plans.items(), start=1):
            say(f"{plan.title} ({number} of {len(plans)})" if len(plans) > 1 else plan.title)
            found[name] = study_task(plan, run, progress=advance)
    write(plans, run, found)
    return found


def study_task(
    plan: Plan, run: Steps, *, progress: Callable[[int], None] = lambda _: None
) -> Study:
    """The study of one task, its stages kept as steps of `run`.

    Args:
        plan: what is studied.
        run: where steps are kept: a run folder, or `Memory`.
        progress: called with 1 after each of the `STAGES` that take time.
    """
    s = plan.settings
    means = stages.head_means(plan, run)
    progress(1)
    effects = {view: stages.mediate(plan, run, means, view) for view in plan.views}
    progress(1)
    ltvs = stages.train(plan, run, means)
    progress(1)
    materials = _materials(plan, run, means, effects, ltvs)
    methods = {name: made for each in materials for name, made in _made(plan, each).items()}
    progress(1)
    scores = {view: _scores(plan, view, effects[view], ltvs) for view in plan.views}
    tables = [table for each in materials for table in each.tables.values()]
    results = plan.evaluate(run, methods)
    progress(1)
    return Study(
        results,
        _joined(join_scores(scores[view], seed=s.seed) for view in plan.views),
        _joined(
            comparison.compare(scores[view], _seeds(plan, view, ltvs), ks=s.compare_ks, seed=s.seed)
            for view in plan.views
        ),
        _joined(comparison.overlap(scores[view], seed=s.seed) for view in plan.views),
        _joined(table for table in tables if "method" not in table),
        _joined(table for table in tables if "method" in table),
        _joined(_history(plan, ltvs)),
        methods,
        ltvs,
    )


def name_in_tables(plan: Plan, view: View) -> str:
    """The task as tables of heads call it, where it is asked in one way or in several."""
    return plan.task.name if len(plan.views) == 1 else f"{plan.task.name}-{view}"


def _materials(
    plan: Plan,
    run: Steps,
    means: HeadMeans,
    effects: Mapping[View, IndirectEffects],
    ltvs: stages.Trained,
) -> list[Materials]:
    s = plan.settings
    return [
        Materials(
            plan.lens,
            plan.task,
            run,
            means,
            whose,
            # Heads are ranked where the prompt does not carry the task (Todd et al. 2024).
            effects[View(whose, "uninformative")],
            stages.trained_for(plan, ltvs, whose),
            plan.clean,
            {kind: plan.fits[name] for kind, name in plan.uses["ltv"].items()},
            plan.validation,
            s.ks,
            s.scales,
            s.control_draws,
            s.seed,
        )
        for whose in WHOSE
        if View(whose, "uninformative") in effects
    ]


def _made(plan: Plan, materials: Materials) -> dict[str, ByKind]:
    """Every method that can be made of the materials, by its name in tables."""
    several = len({view.whose for view in plan.views}) > 1
    found = {}
    for method in methods_for(plan.modality, materials.whose, plan.settings.methods):
        made = method.make(materials)
        if made:
            name = variant_name(method, materials.whose) if several else method.name
            found[name] = made
    return found


def _scores(plan: Plan, view: View, effects: IndirectEffects, ltvs: stages.Trained) -> list[Scores]:
    """Every score that studies make, in one view."""
    found = _Found(effects, _seeds(plan, view, ltvs)[0])
    name = name_in_tables(plan, view)
    return [replace(score.of(found), name=score.name, task=name) for score in STUDIED]


def _seeds(plan: Plan, view: View, ltvs: stages.Trained) -> list[LearnableTaskVector]:
    return [
        ltv for (fit, whose, _), ltv in ltvs.items() if (fit, whose) == (view.prompts, view.whose)
    ]


def _history(plan: Plan, ltvs: stages.Trained) -> list[pd.DataFrame]:
    """Training of every vector, with columns that say which it is."""
    frames = []
    for (fit, whose, seed), ltv in ltvs.items():
        names = {"task": plan.task.name, "whose": whose, "prompts": fit, "seed": seed}
        frames.append(ltv.history.assign(**names))
    return frames


def _joined(frames: Iterable[pd.DataFrame]) -> pd.DataFrame:
    every = list(frames)
    return pd.concat(every, ignore_index=True) if every else pd.DataFrame()


def write(plans: Mapping[str, Plan], run: Run, found: Mapping[str, Study]) -> None:
    """Tables, vectors and figures of a study into its run folder."""
    tables = {"results": "results", "heads": "heads", "headsets": "headsets"}
    tables |= {"fv_sweep": "sweep", "ltv_history": "history"}
    joined = {
        name: _joined(getattr(each, field) for each in found.values())
        for name, field in (tables | {"overlap_curves": "curve"}).items()
    }
    for name in tables:
        run.write_table(name, joined[name], whole=name in ("results", "heads"))
    rivals = _joined(each.rivals for each in found.values())
    if len(rivals):
        run.write_table("sweeps", rivals)
    several = any(len(plan.views) > 1 for plan in plans.values())
    comparison.write_figures(
        run,
        joined["heads"],
        joined["overlap_curves"],
        unit=" / ".join(sorted({plan.lens.readout.score_name for plan in plans.values()})),
        groups={f"-{name}": list(each.heads["task"].unique()) for name, each in found.items()}
        if several
        else None,
    )
    facts = [facts for plan in plans.values() if (facts := plan.facts())]
    if facts:
        run.write_table("models", pd.DataFrame(facts))
    summaries = {"headset_summary": summary.head_sets(joined["headsets"])}
    summaries |= next(iter(plans.values())).summaries(plans.values(), joined["results"])
    for name, (values, shown) in summaries.items():
        run.write_table(name, values)
        write_texts(run.folder, name, shown)
    figures: dict[str, Callable[[], Figure]] = {}
    for name, plan in plans.items():
        _save_vectors(run.folder / "vectors", plan, found[name])
        figures |= plan.figures(found[name].history, joined["results"])
    for name, draw in figures.items():
        run.write_figure(name, draw())


def _save_vectors(folder: Path, plan: Plan, found: Study) -> None:
    """Every vector in a file of its own, which `tvlens evaluate` reads; no controls.

    TASK-METHOD.safetensors where a method adds the same on all kinds of prompts, else
    TASK-METHOD-KIND for each that differs; a vector trained with a further seed N ends in -seedN.
    """
    controls = {
        name
        for method in METHODS
        if method.family == "control"
        for name in (method.name, *(variant_name(method, whose) for whose in WHOSE))
    }
    files: dict[int, str] = {}
    for name, kinds in found.methods.items():
        if name in controls:
            continue
        distinct = {id(made[0]): (kind, made[0]) for kind, made in reversed([*kinds.items()])}
        for kind, vector in distinct.values():
            files[id(vector)] = f"{plan.task.name}-{name}" + (
                f"-{kind}" if len(distinct) > 1 else ""
            )
            vector.save(folder / f"{files[id(vector)]}.safetensors")
    for (fit, whose, seed), ltv in found.ltvs.items():
        if seed != plan.settings.seed:
            first = files[id(found.ltvs[fit, whose, plan.settings.seed])]
            ltv.save(folder / f"{first}-seed{seed}.safetensors")
