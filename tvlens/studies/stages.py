"""Stages that the studies of both modalities share: steps of a run, and what is made of them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import pandas as pd
import torch
from torch import Tensor

from tvlens import figures
from tvlens.console import progress_bar
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.runs.run import Run
from tvlens.scores.agreement import (
    compare_head_sets,
    layer_profile,
    overlap_curve,
    split_half,
    stability,
)
from tvlens.scores.mediation import IndirectEffects
from tvlens.tasks.base import PromptKind, PromptSet, PromptSource
from tvlens.vectors.fv import choose_function_vectors
from tvlens.vectors.ltv.fit import FitPrompts, FitSettings, fit_ltv
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.vector import HeadMixture, TaskVector, Vector

HEAD_COLUMNS = ["task", "layer", "head", "aie", "aie_low", "aie_high", "omega", "contribution"]
CURVE_KS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 75, 100)
CHOSEN = {"fv_layer": "one_layer", "fv_per_layer": "per_layer"}
"""Function vectors that are chosen, by the name of the method."""


def ltv_step(
    lens: Lens,
    task: PromptSource,
    run: Run,
    means: HeadMeans,
    settings: FitSettings,
    seed: int,
    name: str = "ltv",
    read: Callable[[], FitPrompts] | None = None,
) -> LearnableTaskVector:
    """One trained Learnable Task Vector, as a step of `run` that resumes within training.

    Args:
        lens: the model.
        task: where prompts are drawn from.
        run: where the step is kept.
        means: mean head outputs on clean prompts.
        settings: how to train.
        seed: seed of the training.
        name: what tells the vector from others of the same task and seed.
        read: gives the prompts to train on, where several trainings share them.
    """
    checkpoint = run.folder / "checkpoints" / f"{task.name}-{name}-{seed}.safetensors"

    def compute() -> dict[str, Any]:
        title = f"{task.name}: {name.replace('ltv', 'LTV')}, seed {seed}"
        with progress_bar(title, settings.steps) as advance:
            ltv = fit_ltv(
                lens,
                task,
                means,
                settings=settings,
                seed=seed,
                read=None if read is None else read(),
                checkpoint=checkpoint,
                progress=advance,
            )
        tensors = {name: tensor.detach().cpu() for name, tensor in ltv.state_dict().items()}
        return {"ltv": tensors, "history": ltv.history}

    saved = run.step(f"{task.name}/{name}-{seed}", compute)
    checkpoint.unlink(missing_ok=True)
    norms = saved["ltv"]["norms"] if settings.per_prompt else None
    ltv = LearnableTaskVector(saved["ltv"]["outputs"], norms=norms, model=lens.name, task=task.name)
    ltv.load_state_dict(saved["ltv"])
    ltv.granularity = settings.granularity
    ltv.history = saved["history"]
    return ltv


def function_vector_step(
    lens: Lens,
    task: str,
    run: Run,
    means: HeadMeans,
    effects: IndirectEffects,
    validation: Callable[[], Mapping[PromptKind, PromptSet]],
    *,
    ks: Sequence[int],
    scales: Sequence[float],
    per_prompt: bool = False,
    name: str = "function-vectors",
) -> tuple[dict[str, dict[PromptKind, Vector]], pd.DataFrame]:
    """Function vectors chosen on validation, by method and kind of prompt, as a step of `run`.

    Args:
        lens: the model.
        task: name of the task.
        run: where the step is kept.
        means: mean head outputs on clean prompts.
        effects: indirect effects that rank the heads.
        validation: makes the prompts to choose on.
        ks: numbers of heads to try.
        scales: factors to try.
        per_prompt: make vectors of the head outputs of each prompt's own donor.
        name: what tells the step from others of the same task.

    Returns:
        The vectors of `CHOSEN`, and every candidate's measures.
    """

    def compute() -> dict[str, Any]:
        choice = choose_function_vectors(
            lens,
            means,
            effects,
            validation(),
            ks=fitting_ks(ks, effects.scores.numel()),
            scales=scales,
            per_prompt=per_prompt,
        )
        tensors: dict[str, Tensor] = {}
        notes: dict[str, Any] = {}
        for method, attribute in CHOSEN.items():
            for kind, vector in getattr(choice, attribute).items():
                stored = vector.mix if isinstance(vector, HeadMixture) else vector.vectors
                tensors[f"{method}.{kind}"] = stored
                notes[f"{method}.{kind}"] = {"layers": vector.layers, "origin": vector.origin}
        return {"vectors": tensors, "notes": notes, "sweep": choice.sweep.assign(task=task)}

    saved = run.step(f"{task}/{name}", compute)
    made = HeadMixture if per_prompt else TaskVector
    vectors: dict[str, dict[PromptKind, Vector]] = {method: {} for method in CHOSEN}
    for key, note in saved["notes"].items():
        method, kind = key.split(".")
        vectors[method][cast(PromptKind, kind)] = made(
            saved["vectors"][key], tuple(note["layers"]), lens.name, note["origin"]
        )
    return vectors, saved["sweep"]


def head_frame(effects: IndirectEffects, ltv: LearnableTaskVector, *, seed: int) -> pd.DataFrame:
    """One row per head with the columns `HEAD_COLUMNS`; `seed` is that of the bootstrap."""
    heads = effects.to_frame(seed=seed).merge(
        ltv_frame(ltv).drop(columns="task"), on=["layer", "head"], validate="one_to_one"
    )
    return heads[HEAD_COLUMNS]


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
    ltvs: Sequence[LearnableTaskVector],
    *,
    ks: Sequence[int],
    seed: int,
) -> pd.DataFrame:
    """Every comparison of head sets on one task.

    Columns: task, comparison, measure, k, value, low, high, chance, p_value. Comparisons: `aie and
    ltv`; `aie halves`, the agreement of the AIE of random halves of its prompts, which is the
    ceiling of any other; `ltv seeds`, the agreement of LTVs trained with other seeds.

    Args:
        task: name of the task.
        effects: indirect effects of the heads.
        ltvs: Learnable Task Vectors of several seeds; the first is compared.
        ks: sizes of the head sets.
        seed: seed of the halves.
    """
    ks = fitting_ks(ks, effects.scores.numel())
    both = compare_head_sets(effects, ltvs[0], ks=ks, names=("aie", "ltv"))
    frames = [both.assign(comparison="aie and ltv")]
    halves = split_half(effects.values, ks, seed=seed)
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


def overlap_frame(
    task: str, effects: IndirectEffects, ltv: LearnableTaskVector, *, seed: int
) -> pd.DataFrame:
    """Overlap of the AIE and LTV heads at every k of `CURVE_KS`, with its split-half ceiling."""
    ks = fitting_ks(CURVE_KS, effects.scores.numel())
    curve = overlap_curve(effects, ltv, ks=ks)
    halves = split_half(effects.values, ks, splits=30, seed=seed)
    curve["ceiling"] = halves.loc[halves["measure"] == "overlap", "value"].to_numpy()
    curve.insert(0, "task", task)
    return curve


def write_head_figures(
    run: Run,
    heads: pd.DataFrame,
    curve: pd.DataFrame,
    *,
    unit: str,
    groups: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Head maps of every task, layer profiles and overlap curves, as tables and figures of a run.

    Args:
        run: where they are written.
        heads: columns `HEAD_COLUMNS`.
        curve: the rows of `overlap_frame`.
        unit: unit of the AIE.
        groups: tasks that share a figure, by what is put behind the figure's name; all by default.
    """
    profiles = []
    for name, rows in heads.groupby("task", sort=False):
        maps = {
            score: torch.tensor(
                rows.pivot(index="layer", columns="head", values=score).to_numpy(dtype=float)
            )
            for score in ("aie", "contribution")
        }
        k = max(1, min(10, maps["aie"].numel() // 4))
        figure = figures.head_maps(
            maps["aie"], maps["contribution"], task=str(name), k=k, unit=unit
        )
        run.write_figure(f"heads-{name}", figure)
        for score, scores in maps.items():
            shares = layer_profile(scores).tolist()
            profiles += [(name, layer, score, share) for layer, share in enumerate(shares)]
    table = pd.DataFrame(profiles, columns=["task", "layer", "score", "share"])
    run.write_table("layer_profiles", table)
    run.write_table("overlap_curves", curve)
    for suffix, tasks in (groups or {"": list(heads["task"].unique())}).items():
        parts = [frame[frame["task"].isin(tasks)] for frame in (table, curve)]
        run.write_figure(f"layer-profiles{suffix}", figures.layer_profiles(parts[0]))
        run.write_figure(f"overlap{suffix}", figures.overlap_curve(parts[1]))
