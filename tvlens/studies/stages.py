"""The stages of a study, each kept as a step of a run, so that an interrupted study resumes."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache

from tvlens.console import progress_bar
from tvlens.lens.heads import HeadMeans, mean_head_outputs
from tvlens.lens.lens import Lens
from tvlens.runs.steps import Steps
from tvlens.scores.mediation import IndirectEffects, indirect_effects
from tvlens.studies.plan import Plan, View
from tvlens.tasks.base import PromptKind, PromptSource
from tvlens.vectors.catalogue import WHOSE
from tvlens.vectors.ltv.fit import fit_ltv
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.sample import FitPrompts, read_fit_prompts
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.materials import Whose

Trained = dict[tuple[str, Whose, int], LearnableTaskVector]
"""Trained vectors by name of the training, whose head outputs they weigh, and seed."""


def head_means(plan: Plan, run: Steps) -> HeadMeans:
    """Mean head outputs over the plan's clean prompts."""

    def compute() -> HeadMeans:
        prompts = plan.clean()
        with progress_bar(f"{plan.task.name}: head means", len(prompts)) as advance:
            return mean_head_outputs(plan.lens, prompts, progress=advance)

    means = run.kept(f"{plan.task.name}/means", HeadMeans, compute)
    if note := plan.note(means):
        run.note_filter(note)
    return means


def mediate(plan: Plan, run: Steps, means: HeadMeans, view: View) -> IndirectEffects:
    """Indirect effects of all heads on the prompts of this view."""

    def compute() -> IndirectEffects:
        prompts = plan.mediation(view, means)
        patched = means if view.whose == "class" else None
        with progress_bar(f"{plan.task.name}: mediation", len(prompts)) as advance:
            return indirect_effects(plan.lens, prompts, patched, progress=advance)

    return run.kept(f"{plan.task.name}/mediation-{view}", IndirectEffects, compute)


def train(plan: Plan, run: Steps, means: HeadMeans) -> Trained:
    """Every Learnable Task Vector of the plan; those of the same prompts share one reading."""
    settings = plan.settings
    wanted = [whose for whose in WHOSE if any(view.whose == whose for view in plan.views)]
    of_views = {view.prompts for view in plan.views}
    trained: Trained = {}
    for name, fit in plan.fits.items():
        # Further seeds tell how stable the heads of a view are.
        for i in range(settings.ltv_seeds if name in of_views else 1):
            seed = settings.seed + i
            own = replace(fit, per_prompt="prompt" in wanted)
            read = reader(plan.lens, plan.task, own, seed)
            for whose in wanted:
                label = f"ltv-{whose}-{name}" if len(wanted) > 1 else "ltv"
                chosen = replace(fit, per_prompt=whose == "prompt")
                trained[name, whose, seed] = train_one(
                    plan.lens, plan.task, run, means, chosen, seed, label, read
                )
    return trained


def reader(
    lens: Lens, task: PromptSource, settings: FitSettings, seed: int
) -> Callable[[], FitPrompts]:
    """Reads the prompts of a training when they are first asked for, and keeps them."""
    return cache(lambda: read_fit_prompts(lens, task, settings, seed))


def train_one(
    lens: Lens,
    task: PromptSource,
    run: Steps,
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
    checkpoint = run.checkpoint(f"{task.name}-{name}-{seed}")

    def compute() -> LearnableTaskVector:
        title = f"{task.name}: {name.replace('ltv', 'LTV')}, seed {seed}"
        with progress_bar(title, settings.steps) as advance:
            return fit_ltv(
                lens,
                task,
                means,
                settings=settings,
                seed=seed,
                read=None if read is None else read(),
                checkpoint=checkpoint,
                progress=advance,
            )

    ltv = run.kept(f"{task.name}/{name}-{seed}", LearnableTaskVector, compute)
    if checkpoint is not None:
        checkpoint.unlink(missing_ok=True)
    return ltv


def trained_for(
    plan: Plan, trained: Trained, whose: Whose
) -> dict[str, dict[PromptKind, LearnableTaskVector]]:
    """The trained vectors of each method by kind of prompts, those of the first seed."""
    seed = plan.settings.seed
    return {
        method: {kind: trained[name, whose, seed] for kind, name in kinds.items()}
        for method, kinds in plan.uses.items()
    }
