"""The whole text study of one task: mediation, function vectors, LTV, evaluation, comparison.

Each stage is a step of a run, saved when it is done, so an interrupted study resumes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor

from tvlens import figures
from tvlens.evaluate import KINDS, RESULT_COLUMNS, Method, evaluate
from tvlens.heads import HeadMeans, mean_head_outputs
from tvlens.headsets import (
    compare_head_sets,
    layer_profile,
    overlap_curve,
    split_half,
    stability,
)
from tvlens.lens import Lens
from tvlens.mediation import IndirectEffects, indirect_effects, mediation_prompts
from tvlens.methods.fit import FitSettings, fit_ltv
from tvlens.methods.fv import DEFAULT_KS, DEFAULT_SCALES, choose_function_vectors
from tvlens.methods.ltv import LearnableTaskVector, permuted_controls, random_controls
from tvlens.methods.vector import TaskVector
from tvlens.progress import progress_bar
from tvlens.runs import Run
from tvlens.tasks.prompts import PromptKind, Prompts
from tvlens.tasks.task import Task

HEAD_COLUMNS = ["task", "layer", "head", "aie", "aie_low", "aie_high", "omega", "contribution"]
CHOICE_KINDS: tuple[PromptKind, ...] = ("zero", "shuffled")
CURVE_KS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 75, 100)


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
    function_vectors: dict[str, dict[PromptKind, TaskVector]]


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
    heads = effects.to_frame(seed=settings.seed).merge(
        ltv_frame(ltv), on=["task", "layer", "head"], validate="one_to_one"
    )
    history = pd.concat(
        [made.history.assign(seed=s) for made, s in zip(ltvs, _ltv_seeds(settings), strict=True)]
    )
    return TaskStudy(
        results[RESULT_COLUMNS],
        heads[HEAD_COLUMNS],
        compare(task.name, effects, ltvs, settings),
        _curve(task.name, effects, ltv, settings),
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
            "means": {"z": means.z, "variance": means.variance, "outputs": means.outputs},
            "kept": {"kept": list(means.kept), "offered": means.offered},
        }

    saved = run.step(f"{task.name}/means", compute)
    kept, offered = tuple(saved["kept"]["kept"]), saved["kept"]["offered"]
    run.note_filter(
        f"{task.name}: head means over the {len(kept)} of {offered} clean {settings.shots}-shot "
        f"train prompts that {lens.name} answers (first token); mediation asks only their queries"
    )
    return HeadMeans(**saved["means"], kept=kept, offered=offered, model=lens.name)


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
    checkpoint = run.folder / "checkpoints" / f"{task.name}-ltv-{seed}.safetensors"

    def compute() -> dict[str, Any]:
        with progress_bar(f"{task.name}: LTV, seed {seed}", settings.ltv.steps) as advance:
            ltv = fit_ltv(
                lens,
                task,
                means,
                settings=settings.ltv,
                seed=seed,
                checkpoint=checkpoint,
                progress=advance,
            )
        tensors = {name: tensor.detach().cpu() for name, tensor in ltv.state_dict().items()}
        return {"ltv": tensors, "history": ltv.history}

    saved = run.step(f"{task.name}/ltv-{seed}", compute)
    checkpoint.unlink(missing_ok=True)
    ltv = LearnableTaskVector(saved["ltv"]["outputs"], model=lens.name, task=task.name)
    ltv.load_state_dict(saved["ltv"])
    ltv.granularity = settings.ltv.granularity
    ltv.history = saved["history"]
    return ltv


def ltv_frame(ltv: LearnableTaskVector) -> pd.DataFrame:
    """One row per head: task, layer, head, omega, contribution (signed norm of omega ā)."""
    n_layer, n_head = ltv.omega.shape
    index = pd.MultiIndex.from_product([range(n_layer), range(n_head)], names=["layer", "head"])
    columns = {"omega": ltv.weights.detach(), "contribution": ltv.contributions()}
    frame = pd.DataFrame({k: x.flatten().tolist() for k, x in columns.items()}, index=index)
    frame = frame.reset_index()
    frame.insert(0, "task", ltv.task)
    return frame


def compare(
    task: str,
    effects: IndirectEffects,
    ltvs: list[LearnableTaskVector],
    settings: StudySettings,
) -> pd.DataFrame:
    """Every comparison of head sets on one task.

    Columns: task, comparison, measure, k, value, low, high, chance, p_value. Comparisons: `aie and
    ltv`; `aie halves`, the agreement of the AIE of random halves of its prompts, which is the
    ceiling of any other; `ltv seeds`, the agreement of LTVs trained with other seeds.
    """
    ltv = ltvs[0]
    ks = fitting_ks(settings.compare_ks, effects.scores.numel())
    both = compare_head_sets(effects, ltv, ks=ks, names=("aie", "ltv"))
    frames = [both.assign(comparison="aie and ltv")]
    halves = split_half(effects.values, ks, seed=settings.seed)
    frames.append(halves.assign(comparison="aie halves"))
    if len(ltvs) > 1:
        seeds = stability(torch.stack([made.scores for made in ltvs]), ks)
        frames.append(seeds.assign(comparison="ltv seeds"))
    # Columns that are empty in one of the frames would warn in concat; reindexing says so.
    columns = ["task", "comparison", "measure", "k", "value", "low", "high", "chance", "p_value"]
    rows = [row for frame in frames for row in frame.to_dict("records")]
    return pd.DataFrame(rows).assign(task=task).reindex(columns=columns).astype({"k": "Int64"})


def fitting_ks(ks: Sequence[int], n_heads: int) -> list[int]:
    """The k of `ks` that a model of so many heads allows; all heads where none does."""
    return [k for k in ks if k <= n_heads] or [n_heads]


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
) -> tuple[dict[str, dict[PromptKind, TaskVector]], pd.DataFrame]:
    names = {"fv_layer": "one_layer", "fv_per_layer": "per_layer"}

    def compute() -> dict[str, Any]:
        validation = {
            kind: task.prompts("validation", shots=settings.shots, seed=settings.seed, kind=kind)
            for kind in CHOICE_KINDS
        }
        ks = fitting_ks(settings.ks, effects.scores.numel())
        choice = choose_function_vectors(
            lens, means, effects, validation, ks=ks, scales=settings.scales
        )
        tensors: dict[str, Tensor] = {}
        notes: dict[str, Any] = {}
        for name, attribute in names.items():
            for kind, vector in getattr(choice, attribute).items():
                tensors[f"{name}.{kind}"] = vector.vectors
                notes[f"{name}.{kind}"] = {"layers": vector.layers, "origin": vector.origin}
        return {"vectors": tensors, "notes": notes, "sweep": choice.sweep.assign(task=task.name)}

    saved = run.step(f"{task.name}/function-vectors", compute)
    vectors: dict[str, dict[PromptKind, TaskVector]] = {name: {} for name in names}
    for key, note in saved["notes"].items():
        name, kind = key.split(".")
        vectors[name][cast(PromptKind, kind)] = TaskVector(
            saved["vectors"][key], tuple(note["layers"]), lens.name, note["origin"]
        )
    for chosen in vectors.values():
        # No vector is chosen on clean prompts: they get the one chosen on shuffled prompts.
        chosen["clean"] = chosen["shuffled"]
    return vectors, saved["sweep"]


def _curve(
    task: str, effects: IndirectEffects, ltv: LearnableTaskVector, settings: StudySettings
) -> pd.DataFrame:
    ks = [k for k in CURVE_KS if k <= effects.scores.numel()]
    curve = overlap_curve(effects, ltv, ks=ks)
    halves = split_half(effects.values, ks, splits=30, seed=settings.seed)
    curve["ceiling"] = halves.loc[halves["measure"] == "overlap", "value"].to_numpy()
    curve.insert(0, "task", task)
    return curve


def _write(run: Run, found: Mapping[str, TaskStudy]) -> None:
    def joined(name: str) -> pd.DataFrame:
        return pd.concat([getattr(study, name) for study in found.values()], ignore_index=True)

    run.write_table("results", joined("results"))
    heads = joined("heads")
    run.write_table("heads", heads)
    run.write_table("headsets", joined("headsets"))
    run.write_table("overlap_curves", joined("curve"))
    run.write_table("fv_sweep", joined("sweep"))
    histories = [study.history.assign(task=name) for name, study in found.items()]
    run.write_table("ltv_history", pd.concat(histories, ignore_index=True))
    profiles = []
    for name, study in found.items():
        shape = study.ltvs[0].omega.shape
        maps = {
            score: torch.tensor(study.heads[score].to_numpy()).view(shape)
            for score in ("aie", "contribution")
        }
        run.write_figure(
            f"heads-{name}",
            figures.head_maps(
                maps["aie"], maps["contribution"], task=name, k=min(10, maps["aie"].numel())
            ),
        )
        first = study.history[study.history["seed"] == study.history["seed"].iloc[0]]
        run.write_figure(f"ltv-training-{name}", figures.training_history(first))
        for score, scores in maps.items():
            shares = layer_profile(scores).tolist()
            profiles += [(name, layer, score, share) for layer, share in enumerate(shares)]
        _save_vectors(run.folder / "vectors", name, study)
    table = pd.DataFrame(profiles, columns=["task", "layer", "score", "share"])
    run.write_table("layer_profiles", table)
    run.write_figure("layer-profiles", figures.layer_profiles(table))
    run.write_figure("methods", figures.method_dots(joined("results")))
    run.write_figure("overlap", figures.overlap_curve(joined("curve")))


def _save_vectors(folder: Path, task: str, study: TaskStudy) -> None:
    """Every vector in a file of its own, which `tvlens evaluate` reads."""
    for made, seed in zip(study.ltvs, study.history["seed"].unique(), strict=True):
        suffix = "" if made is study.ltvs[0] else f"-seed{seed}"
        made.save(folder / f"{task}-ltv{suffix}.safetensors")
    for method, chosen in study.function_vectors.items():
        for kind in CHOICE_KINDS:
            chosen[kind].save(folder / f"{task}-{method}-{kind}.safetensors")
