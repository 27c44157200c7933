"""The whole text study of one task: mediation, function vectors, LTV, evaluation, comparison.

Each stage is a step of a run, saved when it is done, so an interrupted study resumes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from tvlens import figures
from tvlens.console import progress_bar
from tvlens.evaluation.methods import KINDS, RESULT_COLUMNS, Method, evaluate
from tvlens.lens.heads import HeadMeans, mean_head_outputs
from tvlens.lens.lens import Lens
from tvlens.runs.run import Run
from tvlens.scores.mediation import IndirectEffects, indirect_effects, mediation_prompts
from tvlens.studies.stages import (
    compare,
    function_vector_step,
    head_frame,
    ltv_step,
    overlap_frame,
    write_head_figures,
)
from tvlens.tasks.base import PromptKind, PromptSet
from tvlens.tasks.text.prompts import Prompts
from tvlens.tasks.text.task import Task
from tvlens.vectors.controls import permuted_controls, random_controls
from tvlens.vectors.fv import DEFAULT_KS, DEFAULT_SCALES
from tvlens.vectors.ltv.fit import FitSettings
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.vector import Vector

CHOICE_KINDS: tuple[PromptKind, ...] = ("zero", "shuffled")


@dataclass(frozen=True)
class StudySettings:
    """What a text study does to each task.

    Attributes:
        seed: seed of every draw.
        shots: examples in clean and shuffled prompts.
        n_clean: clean prompts that head means are taken over.
        n_mediation: label-shuffled prompts of the causal mediation.
        n_test: test prompts of each kind; every test pair once if None.
        ltv: how Learnable Task Vectors are trained.
        ltv_seeds: how many are trained, with seeds seed, seed + 1, …; the first is reported.
        ks: numbers of heads tried for function vectors.
        scales: scales tried for function vectors.
        control_draws: random and permuted weights drawn.
        compare_ks: sizes of the head sets compared.
    """

    seed: int = 0
    shots: int = 10
    n_clean: int = 100
    n_mediation: int = 25
    n_test: int | None = None
    ltv: FitSettings = field(default_factory=FitSettings)
    ltv_seeds: int = 3
    ks: tuple[int, ...] = DEFAULT_KS
    scales: tuple[float, ...] = DEFAULT_SCALES
    control_draws: int = 3
    compare_ks: tuple[int, ...] = (5, 10, 20)


@dataclass(frozen=True)
class TaskStudy:
    """What a study found on one task: tidy tables and the objects behind them."""

    results: pd.DataFrame
    heads: pd.DataFrame
    headsets: pd.DataFrame
    curve: pd.DataFrame
    sweep: pd.DataFrame
    history: pd.DataFrame
    ltvs: list[LearnableTaskVector]
    function_vectors: dict[str, dict[PromptKind, Vector]]


def study_tasks(
    lens: Lens,
    tasks: Mapping[str, Task],
    run: Run,
    settings: StudySettings,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, TaskStudy]:
    """The study of every task, with the run folder's tables, vectors and figures written.

    Args:
        lens: the model.
        tasks: what is studied, by name.
        run: where steps and results are kept.
        settings: what is done.
        say: called with a line of text when something begins.

    Returns:
        What was found, by task. The run folder holds it as `results`, `heads`, `headsets`,
        `overlap_curves`, `fv_sweep`, `ltv_history` and `layer_profiles` (CSV and Parquet), figures,
        and vectors: TASK-ltv, the same trained with the other seeds (TASK-ltv-seedN),
        TASK-fv_layer-KIND and TASK-fv_per_layer-KIND.
    """
    found = {}
    for name, task in tasks.items():
        say(f"{name}: {len(task.pairs)} pairs")
        found[name] = study_task(lens, task, run, settings)
    _write(run, found)
    return found


def study_task(lens: Lens, task: Task, run: Run, settings: StudySettings) -> TaskStudy:
    """The study of one task, its stages kept as steps of `run`."""
    means = head_means(lens, task, run, settings)
    effects = mediate(lens, task, run, settings, means)
    vectors, sweep = _function_vectors(lens, task, run, settings, means, effects)
    ltvs = [fit(lens, task, run, settings, means, seed) for seed in _ltv_seeds(settings)]
    ltv = ltvs[0]
    methods: dict[str, Method] = {
        **vectors,
        "ltv": ltv,
        "random": random_controls(ltv, n=settings.control_draws, seed=settings.seed),
        "permuted": permuted_controls(ltv, n=settings.control_draws, seed=settings.seed),
    }
    results = run.step(
        f"{task.name}/evaluation",
        lambda: {
            "results": evaluate(
                lens,
                task,
                methods,
                shots=settings.shots,
                n=settings.n_test,
                seed=settings.seed,
                kinds=KINDS,
            )
        },
    )["results"]
    history = pd.concat(
        [made.history.assign(seed=s) for made, s in zip(ltvs, _ltv_seeds(settings), strict=True)]
    )
    return TaskStudy(
        results[RESULT_COLUMNS],
        head_frame(effects, ltv, seed=settings.seed),
        compare(task.name, effects, ltvs, ks=settings.compare_ks, seed=settings.seed),
        overlap_frame(task.name, effects, ltv, seed=settings.seed),
        sweep,
        history,
        ltvs,
        vectors,
    )


def head_means(lens: Lens, task: Task, run: Run, settings: StudySettings) -> HeadMeans:
    """Mean head outputs of one task, as a step of `run`."""

    def compute() -> dict[str, Any]:
        means = mean_head_outputs(lens, _clean_prompts(task, settings))
        return {
            "means": {"z": means.z, "outputs": means.outputs},
            "kept": {"kept": list(means.kept), "offered": means.offered},
        }

    saved = run.step(f"{task.name}/means", compute)
    kept, offered = tuple(saved["kept"]["kept"]), saved["kept"]["offered"]
    run.note_filter(
        f"{task.name}: head means over the {len(kept)} of {offered} clean {settings.shots}-shot "
        f"train prompts that {lens.name} answers (first token); mediation asks only their queries"
    )
    means = saved["means"]
    return HeadMeans(means["z"], means["outputs"], kept, offered, lens.name)


def mediate(
    lens: Lens, task: Task, run: Run, settings: StudySettings, means: HeadMeans
) -> IndirectEffects:
    """Indirect effects of all heads on one task, as a step of `run`."""

    def compute() -> dict[str, Any]:
        clean = _clean_prompts(task, settings)
        prompts = mediation_prompts(task, clean, means, n=settings.n_mediation, seed=settings.seed)
        with progress_bar(f"{task.name}: mediation", len(prompts)) as advance:
            effects = indirect_effects(lens, prompts, means, progress=advance)
        return {"effects": {"values": effects.values, "baseline": effects.baseline}}

    saved = run.step(f"{task.name}/mediation", compute)["effects"]
    return IndirectEffects(
        **saved, task=task.name, model=lens.name, score_name=lens.readout.score_name
    )


def fit(
    lens: Lens, task: Task, run: Run, settings: StudySettings, means: HeadMeans, seed: int
) -> LearnableTaskVector:
    """One trained Learnable Task Vector, as a step of `run` that resumes within training."""
    return ltv_step(lens, task, run, means, settings.ltv, seed)


def _clean_prompts(task: Task, settings: StudySettings) -> Prompts:
    return task.prompts("train", shots=settings.shots, n=settings.n_clean, seed=settings.seed)


def _ltv_seeds(settings: StudySettings) -> list[int]:
    return [settings.seed + i for i in range(settings.ltv_seeds)]


def _function_vectors(
    lens: Lens,
    task: Task,
    run: Run,
    settings: StudySettings,
    means: HeadMeans,
    effects: IndirectEffects,
) -> tuple[dict[str, dict[PromptKind, Vector]], pd.DataFrame]:
    def validation() -> dict[PromptKind, PromptSet]:
        return {
            kind: task.prompts("validation", shots=settings.shots, seed=settings.seed, kind=kind)
            for kind in CHOICE_KINDS
        }

    vectors, sweep = function_vector_step(
        lens,
        task.name,
        run,
        means,
        effects,
        validation,
        ks=settings.ks,
        scales=settings.scales,
    )
    for chosen in vectors.values():
        # No vector is chosen on clean prompts: they get the one chosen on shuffled prompts.
        chosen["clean"] = chosen["shuffled"]
    return vectors, sweep


def _write(run: Run, found: Mapping[str, TaskStudy]) -> None:
    def joined(name: str) -> pd.DataFrame:
        return pd.concat([getattr(study, name) for study in found.values()], ignore_index=True)

    run.write_table("results", joined("results"))
    run.write_table("heads", joined("heads"))
    run.write_table("headsets", joined("headsets"))
    write_head_figures(run, joined("heads"), joined("curve"), unit="probability")
    run.write_table("fv_sweep", joined("sweep"))
    histories = [study.history.assign(task=name) for name, study in found.items()]
    run.write_table("ltv_history", pd.concat(histories, ignore_index=True))
    for name, study in found.items():
        first = study.history[study.history["seed"] == study.history["seed"].iloc[0]]
        run.write_figure(f"ltv-training-{name}", figures.training_history(first))
        _save_vectors(run.folder / "vectors", name, study)
    run.write_figure("methods", figures.method_dots(joined("results")))


def _save_vectors(folder: Path, task: str, study: TaskStudy) -> None:
    """Every vector in a file of its own, which `tvlens evaluate` reads."""
    for made, seed in zip(study.ltvs, study.history["seed"].unique(), strict=True):
        suffix = "" if made is study.ltvs[0] else f"-seed{seed}"
        made.save(folder / f"{task}-ltv{suffix}.safetensors")
    for method, chosen in study.function_vectors.items():
        for kind in CHOICE_KINDS:
            chosen[kind].save(folder / f"{task}-{method}-{kind}.safetensors")
