"""Scores of heads, each as a step of a run, and how far they agree."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure

from tvlens import figures
from tvlens.console import progress_bar
from tvlens.lens.heads import HeadMeans, mean_head_outputs
from tvlens.lens.positions import places, spread
from tvlens.runs.run import Run
from tvlens.scores.agreement import compare_head_sets, overlap_curve, spearman_interval
from tvlens.scores.attributed import attributed_effects
from tvlens.scores.catalogue import HeadScore
from tvlens.scores.direct import direct_effects
from tvlens.scores.gating import HeadGates, head_gates, steps_of
from tvlens.scores.induction import answer_attention, induction_scores
from tvlens.scores.matrices import COLUMNS as MATRIX
from tvlens.scores.matrices import agreement_matrix
from tvlens.scores.mediation import IndirectEffects
from tvlens.scores.score import Scores
from tvlens.scores.significance import COLUMNS as SIGNIFICANCE
from tvlens.scores.significance import permutation_test, pooled
from tvlens.studies import stages
from tvlens.studies.comparison import COLUMNS, CURVE_KS
from tvlens.studies.plan import Plan, View
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.materials import fitting_ks

GATED = 48
"""Prompts that gates are trained on, at most."""

SCORE_COLUMNS = ["task", "score", "layer", "head", "value", "ci_low", "ci_high"]


@dataclass(frozen=True)
class Found:
    """What is found of one task, when it is asked for; kept in the run."""

    plan: Plan
    run: Run

    @property
    def view(self) -> View:
        """On prompts that do not carry the task; of each prompt's own heads where each has its own.

        That is where every prompt has a function of its own, which class means know nothing of.
        """
        views = [view for view in self.plan.views if view.prompts == "uninformative"]
        return max(views, key=lambda view: view.whose == "prompt")

    @cached_property
    def means(self) -> HeadMeans:
        """Mean head outputs on clean prompts."""
        return stages.head_means(self.plan, self.run)

    def means_at(self, positions: Literal["query", "all"]) -> HeadMeans:
        """Mean head outputs on clean prompts, at the query or at every position."""
        return self.means if positions == "query" else self._means_everywhere

    @cached_property
    def _means_everywhere(self) -> HeadMeans:
        plan, prompts = self.plan, self.plan.clean()

        def compute() -> HeadMeans:
            with progress_bar(f"{plan.task.name}: head means, all", len(prompts)) as advance:
                return mean_head_outputs(plan.lens, prompts, at="all", progress=advance)

        return self.run.kept(f"{plan.task.name}/means-all", HeadMeans, compute)

    @cached_property
    def effects(self) -> IndirectEffects:
        """Indirect effects on label-shuffled prompts."""
        return stages.mediate(self.plan, self.run, self.means, self.view)

    @cached_property
    def ltv(self) -> LearnableTaskVector:
        """The vector that was trained, of the first seed."""
        plan, view = self.plan, self.view
        fit = replace(plan.fits[view.prompts], per_prompt=view.whose == "prompt")
        return stages.train_one(plan.lens, plan.task, self.run, self.means, fit, plan.settings.seed)

    @cached_property
    def attributed(self) -> Scores:
        """Indirect effects to first order, on the prompts of `effects`."""
        prompts = self.plan.mediation(self.view, self.means)
        means = self.means if self.view.whose == "class" else None

        def compute(advance: Callable[[int], None]) -> Scores:
            return attributed_effects(self.plan.lens, prompts, means, progress=advance)

        return self._kept("attribution", len(prompts), compute)

    @cached_property
    def direct(self) -> Scores:
        """Direct logit attribution on clean prompts that the model answers."""
        prompts = self._answered()

        def compute(advance: Callable[[int], None]) -> Scores:
            return direct_effects(self.plan.lens, prompts, progress=advance).scores

        return self._kept("direct", len(prompts), compute)

    @cached_property
    def induction(self) -> Scores:
        """Attention to what came after the same token before; of no task."""
        seed = self.plan.settings.seed
        return self._kept("induction", 1, lambda _: induction_scores(self.plan.lens, seed=seed))

    @cached_property
    def answers(self) -> Scores:
        """Attention of the query position to the answers that clean prompts show."""
        lens, prompts = self.plan.lens, self.plan.clean()

        def compute(_: Callable[[int], None]) -> Scores:
            batch = lens.encode(prompts)
            role = "answers" if lens.readout.has_text else "ys"
            shown, _groups = spread(role, lambda: places(lens, prompts, batch, "roles").names)
            return answer_attention(
                lens, prompts, places(lens, prompts, batch, shown).columns.flatten(1)
            )

        return self._kept("answers", 1, compute)

    @cached_property
    def gates(self) -> HeadGates:
        """Gates of heads at the query position, trained on clean prompts that are answered."""
        plan, prompts = self.plan, self._answered(GATED)

        def compute() -> HeadGates:
            with progress_bar(f"{plan.task.name}: gates", steps_of()) as advance:
                return head_gates(plan.lens, prompts, seed=plan.settings.seed, progress=advance)

        return self.run.kept(f"{plan.task.name}/gates", HeadGates, compute)

    def _answered(self, n: int | None = None) -> Any:
        """The clean prompts that the model answers, or so many of them; of points all."""
        prompts: Any = self.plan.clean()
        kept = list(self.means.kept)[:n]
        return prompts[kept] if self.plan.lens.readout.has_text else prompts

    def _kept(
        self, name: str, total: int, compute: Callable[[Callable[[int], None]], Scores]
    ) -> Scores:
        def with_bar() -> Scores:
            with progress_bar(f"{self.plan.task.name}: {name}", total) as advance:
                return compute(advance)

        return self.run.kept(f"{self.plan.task.name}/{name}", Scores, with_bar)


def made(found: Found, chosen: Sequence[HeadScore]) -> dict[str, Scores]:
    """The chosen scores of one task, by what they are called on the command line."""
    task = found.plan.task.name
    return {
        str(score.heads): replace(score.of(found), name=score.name, task=task) for score in chosen
    }


def table_of(scores: Mapping[str, Scores], *, seed: int) -> pd.DataFrame:
    """One row for each score and head, with the columns `SCORE_COLUMNS`.

    Scores without values of single prompts have no interval.
    """
    frames = []
    for name, score in scores.items():
        table = score.to_frame(seed=seed)
        ends = [table.get(f"{score.name}_{end}", np.nan) for end in ("low", "high")]
        part = table[["task", "layer", "head"]].assign(
            score=name, value=table[score.name], ci_low=ends[0], ci_high=ends[1]
        )
        frames.append(part[SCORE_COLUMNS].astype({"ci_low": float, "ci_high": float}))
    return pd.concat(frames, ignore_index=True)


def agreement_of(scores: Mapping[str, Scores], ks: Sequence[int]) -> pd.DataFrame:
    """Every two scores against each other, as `RUN/headsets.csv` has it.

    Spearman's correlation has an interval (`low`, `high`), over heads.
    """
    frames = []
    for first, second in combinations(scores, 2):
        a, b = scores[first], scores[second]
        table = compare_head_sets(a, b, ks=fitting_ks(ks, a.n_heads), names=(first, second))
        ends = spearman_interval(a, b)
        own = table["measure"] == "spearman"
        low, high = (own.map({True: end, False: np.nan}) for end in ends)
        names = {"task": a.task, "comparison": f"{first} and {second}"}
        frames.append(table.assign(**names, low=low, high=high))
    if not frames:
        return pd.DataFrame(columns=COLUMNS)
    # Columns that are empty in one of the frames would warn in concat; reindexing says so.
    rows = [row for frame in frames for row in frame.to_dict("records")]
    return pd.DataFrame(rows).reindex(columns=COLUMNS).astype({"k": "Int64"})


def significance_of(scores: Mapping[str, Scores], *, seed: int) -> pd.DataFrame:
    """Which heads are more than chance, by every score that can be of either sign on a prompt."""
    tables = [
        permutation_test(score, seed=seed, name=name)
        for name, score in scores.items()
        if score.values is not None and len(score.values) > 1 and bool((score.values < 0).any())
    ]
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame(columns=SIGNIFICANCE)


def across_tasks(
    scores: Mapping[str, Mapping[str, Scores]], ks: Sequence[int], *, seed: int
) -> pd.DataFrame:
    """Every two tasks against each other, by each score, beside chance and ceiling.

    Scores that are the same for all tasks, as induction is, say nothing of them and are left out.

    Args:
        scores: scores of one model, by task and name.
        ks: sizes of the head sets.
        seed: seed of the halves that the ceiling is of.
    """
    frames = []
    for name, first in next(iter(scores.values())).items():
        of_tasks = {task: each[name] for task, each in scores.items()}
        if _same([*of_tasks.values()]):
            continue
        table = agreement_matrix(of_tasks, fitting_ks(ks, first.n_heads), seed=seed)
        table.insert(0, "score", name)
        frames.append(table)
    if not frames:
        return pd.DataFrame(columns=["score", *MATRIX])
    return pd.concat(frames, ignore_index=True)


def pooled_of(scores: Mapping[str, Mapping[str, Scores]]) -> dict[str, Scores]:
    """Every score over all tasks together; intervals are over tasks.

    Those that are the same for all tasks, or for all heads of one, are left out.

    Args:
        scores: scores of one model, by task and name.
    """
    found = {}
    for name in next(iter(scores.values())):
        each = [of_task[name] for of_task in scores.values()]
        if not _same(each) and all(score.scores.nan_to_num().std() > 0 for score in each):
            found[name] = pooled(each)
    return found


def _same(scores: Sequence[Scores]) -> bool:
    maps = [score.scores.nan_to_num() for score in scores]
    return all(torch.equal(maps[0], other) for other in maps[1:])


def curves_of(scores: Mapping[str, Scores]) -> pd.DataFrame:
    """Overlap of the best heads of every two scores at every size of `CURVE_KS`."""
    frames = []
    for first, second in combinations(scores, 2):
        a, b = scores[first], scores[second]
        curve = overlap_curve(a, b, ks=fitting_ks(CURVE_KS, a.n_heads))
        curve.insert(0, "comparison", f"{first} and {second}")
        curve.insert(0, "task", a.task)
        frames.append(curve)
    return pd.concat(frames, ignore_index=True)


def curves_figure(curves: pd.DataFrame, scores: Mapping[str, Scores]) -> Figure:
    """Overlap of the first score's best heads with those of every other."""
    first, *others = scores
    shown = curves[curves["comparison"].isin([f"{first} and {other}" for other in others])]
    return figures.overlap_curve(shown.assign(task=shown["comparison"]))


def maps_of(scores: Mapping[str, Scores], *, unit: str) -> Figure:
    """Maps of two or more scores side by side."""
    first = next(iter(scores.values()))
    k = max(1, min(10, first.n_heads // 4))
    grids = {score.name: score.scores for score in scores.values()}
    return figures.score_maps(grids, task=first.task, k=k, unit=unit)
