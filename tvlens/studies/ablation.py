"""Ablation of the heads that several scores call best: which of two sets of heads a model needs.

Heads are scored on train prompts and ablated on test prompts. Scores and ablations are steps of a
run, so that a command that was stopped goes on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

import pandas as pd
import torch

from tvlens import figures
from tvlens.console import progress_bar
from tvlens.errors import TaskError
from tvlens.evaluation.ablation import Ablation, ablate
from tvlens.evaluation.replacement import At, SetTo
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.runs.run import Run
from tvlens.scores.ablation import SHARES, HeadSet, heads_in, require_rules, sets_of
from tvlens.scores.catalogue import scores_named
from tvlens.scores.score import Scores
from tvlens.studies import scoring
from tvlens.studies.plan import Plan, StudySettings
from tvlens.tasks.base import PromptSet
from tvlens.tasks.regression.prompts import PointCurves

AT_ONCE: dict[At, int] = {"query": 256, "all": 16}
"""Sets of a step; a command that was stopped does at most so many again."""


@dataclass(frozen=True)
class AblationSettings:
    """What is ablated.

    Attributes:
        scoring: how heads are scored.
        scores: names of scores.
        rules: how sets are chosen by them.
        set_to: what heads are set to.
        positions: where.
        shares: shares of heads.
        draws: random sets beside each "top" set.
        n_test: test prompts of each task; of text every test pair once if None, else 256.
        exact_match: whether whole answers are generated too, at the query position.

    Raises:
        UnknownNameError: there is no such score or rule, or exclusive sets are asked of one score.
        ShapeError: a share is not from 0 to 1.
    """

    scoring: StudySettings
    scores: tuple[str, ...]
    rules: tuple[str, ...] = ("top", "exclusive", "keep")
    set_to: tuple[SetTo, ...] = ("mean",)
    positions: tuple[At, ...] = ("query",)
    shares: tuple[float, ...] = SHARES
    draws: int = 20
    n_test: int | None = None
    exact_match: bool = False

    def __post_init__(self) -> None:
        require_rules(self.rules, len(scores_named(self.scores)))
        for share in self.shares:
            heads_in(share, 1)

    @property
    def seed(self) -> int:
        """Seed of every draw."""
        return self.scoring.seed


@dataclass(frozen=True)
class Ablated:
    """What was found of one task.

    Attributes:
        scores: its scores, by name.
        ablations: one for everything that heads are set to, and where.
    """

    scores: dict[str, Scores]
    ablations: list[Ablation]


def require_ablatable(plans: Mapping[str, Plan], settings: AblationSettings) -> None:
    """Refuse what cannot be ablated, before a run folder is claimed for it.

    Raises:
        TaskError: means over other tasks are asked for, and the model does no other.
    """
    for name, plan in plans.items():
        if "other" in settings.set_to and not _others(plans, name):
            raise TaskError(
                f"heads are to be set to their means over tasks other than {name!r}, and no other "
                f"task of {plan.lens.name!r} is given; name two or more tasks of one model, or set "
                "heads to something else"
            )


def ablate_all(
    plans: Mapping[str, Plan],
    run: Run,
    settings: AblationSettings,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, Ablated]:
    """Scores and ablations of every task, with the tables and figures of the run written.

    Args:
        plans: what is studied, by name of the task; all of text, or all of regression.
        run: where steps and results are kept: `ablation` and `ablation_areas`, `scores` and their
            `agreement` (CSV and Parquet), and figures.
        settings: what is ablated.
        say: called with a line of text when something begins.

    Raises:
        TvlensError: as `require_ablatable` and `tvlens.ablate`.
    """
    require_ablatable(plans, settings)
    chosen = scores_named(settings.scores)
    found = {name: scoring.Found(plan, run) for name, plan in plans.items()}
    done = {}
    for number, (name, plan) in enumerate(plans.items(), start=1):
        say(f"{plan.title} ({number} of {len(plans)})" if len(plans) > 1 else plan.title)
        scores = scoring.made(found[name], chosen)
        others = [found[other] for other in _others(plans, name)]
        done[name] = Ablated(scores, _ablated(found[name], others, scores, settings))
    write(run, done, settings)
    return done


def _others(plans: Mapping[str, Plan], name: str) -> list[str]:
    """Other tasks of the same model."""
    return [other for other in plans if other != name and plans[other].lens is plans[name].lens]


def _ablated(
    found: scoring.Found,
    others: Sequence[scoring.Found],
    scores: Mapping[str, Scores],
    settings: AblationSettings,
) -> list[Ablation]:
    """One task ablated in every way."""
    plan, run = found.plan, found.run
    sets = sets_of(
        scores, settings.rules, shares=settings.shares, draws=settings.draws, seed=settings.seed
    )
    prompts = plan.asked(settings.n_test)
    run.note_filter(
        f"{plan.task.name}: heads are scored on train prompts and ablated on {len(prompts)} clean "
        "test prompts"
    )
    ablations = []
    for set_to, positions in product(settings.set_to, settings.positions):
        means: HeadMeans | list[HeadMeans] | None = None
        if set_to in ("mean", "other"):
            means = (
                found.means_at(positions)
                if set_to == "mean"
                else [other.means_at(positions) for other in others]
            )
        parts = _in_steps(
            plan.lens, run, plan.task.name, prompts, sets, settings, set_to, positions, means
        )
        whole = replace(Ablation.joined(parts), task=plan.task.name)
        if isinstance(prompts, PointCurves):
            whole = by_length(whole, prompts.points)
        ablations.append(whole)
    return ablations


def _in_steps(
    lens: Lens,
    run: Run,
    task: str,
    prompts: PromptSet,
    sets: Sequence[HeadSet],
    settings: AblationSettings,
    set_to: SetTo,
    positions: At,
    means: HeadMeans | list[HeadMeans] | None,
) -> list[Ablation]:
    """Some sets to each step."""
    pieces = [sets[i : i + AT_ONCE[positions]] for i in range(0, len(sets), AT_ONCE[positions])]
    title = f"{task}: heads set to {set_to}, {positions}"
    parts: list[Ablation] = []
    with progress_bar(title, len(pieces) * len(prompts)) as advance:
        for number, piece in enumerate(pieces):
            told: list[int] = []

            def tell(n: int, told: list[int] = told) -> None:
                told.append(n)
                advance(n)

            def compute(piece: Sequence[HeadSet] = piece) -> Ablation:
                return ablate(
                    lens,
                    prompts,
                    piece,
                    set_to=set_to,
                    means=means,
                    positions=positions,
                    seed=settings.seed,
                    exact_match=settings.exact_match and positions == "query",
                    progress=tell,
                )

            name = f"{task}/ablation/{set_to}-{positions}/{number}"
            parts.append(run.kept(name, Ablation, compute))
            advance(len(prompts) - sum(told))
    return parts


def by_length(found: Ablation, points: Sequence[int]) -> Ablation:
    """Errors of curves at T_train points, and their mean over the lengths past it.

    Args:
        found: the ablation of curves, prompt after prompt.
        points: numbers of points that every prompt was asked at, T_train first.
    """
    (name,) = found.measures
    values, before = (x.unflatten(0, (-1, len(points))) for x in (found.values, found.unablated))
    measures = {name: slice(0, 1)}
    if len(points) > 1:
        measures[f"{name}_past"] = slice(1, None)
    return replace(
        found,
        values=torch.cat([values[:, part].mean(dim=1) for part in measures.values()], dim=-1),
        unablated=torch.cat([before[:, part].mean(dim=1) for part in measures.values()], dim=-1),
        measures=tuple(measures),
    )


def write(run: Run, found: Mapping[str, Ablated], settings: AblationSettings) -> None:
    """Tables and figures of ablations, and the agreement of the scores beside them."""
    seed = settings.seed
    ablations = [one for each in found.values() for one in each.ablations]
    table = pd.concat([one.to_frame(seed=seed) for one in ablations], ignore_index=True)
    areas = pd.concat([one.areas(seed=seed) for one in ablations], ignore_index=True)
    run.write_table("ablation", table)
    run.write_table("ablation_areas", areas)
    scores = [scoring.table_of(each.scores, seed=seed) for each in found.values()]
    run.write_table("scores", pd.concat(scores, ignore_index=True))
    ks = settings.scoring.compare_ks
    agreement = [scoring.agreement_of(each.scores, ks) for each in found.values()]
    run.write_table("agreement", pd.concat(agreement, ignore_index=True))
    if len({*settings.shares}) < 2:
        return
    for rule, set_to, positions in product(settings.rules, settings.set_to, settings.positions):
        for metric in main_metrics(ablations[0].measures):
            drawn = figures.ablation_curves(
                table, rule=rule, set_to=set_to, positions=positions, metric=metric
            )
            run.write_figure(f"{rule}-{set_to}-{positions}-{metric}", drawn)


def main_metrics(measures: Sequence[str]) -> list[str]:
    """The measures that are drawn: of text the accuracy, of regression both errors."""
    return [name for name in measures if name not in ("cross_entropy", "exact_match")]
