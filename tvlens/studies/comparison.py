"""Head sets against head sets: tables and figures of how far scores of heads agree."""

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from tvlens import figures
from tvlens.runs.run import Run
from tvlens.scores.agreement import (
    compare_head_sets,
    overlap_curve,
    split_half,
    stability,
)
from tvlens.scores.catalogue import RANKED
from tvlens.scores.ranking import layer_profile
from tvlens.scores.score import Scores
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.materials import fitting_ks

CURVE_KS = (1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 75, 100)
COLUMNS = ["task", "comparison", "measure", "k", "value", "low", "high", "chance", "p_value"]


def compare(
    scores: Sequence[Scores], ltvs: Sequence[LearnableTaskVector], *, ks: Sequence[int], seed: int
) -> pd.DataFrame:
    """Every comparison of head sets on one task, with the columns `COLUMNS`.

    Comparisons: the heads of every other score against those of the first of the catalogue, such as
    `aie and ltv`; the agreement of a score with itself on random halves of its prompts, such as
    `aie halves`, which is the ceiling of any other; `ltv seeds`, the agreement of LTVs trained with
    other seeds.

    Args:
        scores: every score of the catalogue.
        ltvs: Learnable Task Vectors of several seeds.
        ks: sizes of the head sets.
        seed: seed of the halves.
    """
    ranked = _ranked(scores)
    (first, one), *others = ranked.items()
    ks = fitting_ks(ks, one.n_heads)
    frames = [
        compare_head_sets(one, other, ks=ks, names=(first, heads)).assign(
            comparison=f"{first} and {heads}"
        )
        for heads, other in others
    ]
    for heads, score in ranked.items():
        if score.values is not None:
            halves = split_half(score.values, ks, seed=seed)
            frames.append(halves.assign(comparison=f"{heads} halves"))
    if len(ltvs) > 1:
        seeds = stability(torch.stack([made.scores for made in ltvs]), ks)
        frames.append(seeds.assign(comparison="ltv seeds"))
    # Columns that are empty in one of the frames would warn in concat; reindexing says so.
    rows = [row for frame in frames for row in frame.to_dict("records")]
    table = pd.DataFrame(rows).assign(task=one.task)
    return table.reindex(columns=COLUMNS).astype({"k": "Int64"})


def overlap(scores: Sequence[Scores], *, seed: int) -> pd.DataFrame:
    """Overlap of the AIE and LTV heads at every k of `CURVE_KS`, with its split-half ceiling."""
    ranked = _ranked(scores)
    effects, ltv = ranked["aie"], ranked["ltv"]
    ks = fitting_ks(CURVE_KS, effects.n_heads)
    curve = overlap_curve(effects, ltv, ks=ks)
    if effects.values is not None:
        halves = split_half(effects.values, ks, splits=30, seed=seed)
        curve["ceiling"] = halves.loc[halves["measure"] == "overlap", "value"].to_numpy()
    curve.insert(0, "task", effects.task)
    return curve


def write_figures(
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
        heads: every score of every head.
        curve: the rows of `overlap`.
        unit: unit of the AIE.
        groups: tasks that share a figure, by what is put behind the figure's name; all by default.
    """
    layers = sorted(heads["layer"].unique().tolist())
    maps = {
        score.name: Scores.from_frame(heads, score.name, unit=unit, layers=layers)
        for score in RANKED
    }
    profiles = []
    for task in heads["task"].unique():
        own = {name: found[task].scores for name, found in maps.items()}
        k = max(1, min(10, maps[RANKED[0].name][task].n_heads // 4))
        run.write_figure(f"heads-{task}", figures.score_maps(own, task=task, k=k, unit=unit))
        for name, grid in own.items():
            shares = layer_profile(grid).tolist()
            profiles += [(task, layer, name, shares[layer]) for layer in layers]
    table = pd.DataFrame(profiles, columns=["task", "layer", "score", "share"])
    run.write_table("layer_profiles", table)
    run.write_table("overlap_curves", curve)
    for suffix, tasks in (groups or {"": list(heads["task"].unique())}).items():
        parts = [frame[frame["task"].isin(tasks)] for frame in (table, curve)]
        run.write_figure(f"layer-profiles{suffix}", figures.layer_profiles(parts[0]))
        run.write_figure(f"overlap{suffix}", figures.overlap_curve(parts[1]))


def _ranked(scores: Sequence[Scores]) -> dict[str, Scores]:
    """The scores that heads are ranked by, by what their best heads are called."""
    by_name = {score.name: score for score in scores}
    return {str(score.heads): by_name[score.name] for score in RANKED}
