"""Patching of several sites, step by step, so that a command that was stopped goes on."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import pandas as pd
from matplotlib.figure import Figure

from tvlens import figures
from tvlens.console import progress_bar
from tvlens.lens.lens import Lens
from tvlens.lens.positions import Positions
from tvlens.lens.sites import SiteKind
from tvlens.runs.run import Run
from tvlens.scores.attribution import attribution_patch
from tvlens.scores.effects import PatchEffects
from tvlens.scores.pairing import paired
from tvlens.scores.patching import patch
from tvlens.tasks.text.pairs import PromptPairs
from tvlens.tasks.text.prompts import Prompts
from tvlens.tasks.text.task import Task

WAYS: dict[str, Callable[..., PatchEffects]] = {"exact": patch, "attribution": attribution_patch}
"""Methods of patching by name."""


@dataclass(frozen=True)
class PatchSettings:
    """What is patched.

    Attributes:
        sites: sites, each at all layers.
        positions: where (`tvlens.lens.positions.Positions`).
        methods: exactly, or to first order.
        metric: what effects are differences of.
        n: prompts of each task.
        shots: examples in a prompt.
        seed: seed of the prompts.
        noising: whether corrupted activations go into clean prompts.
        at_once: prompts of a step; a command that was stopped does at most so many again.
    """

    sites: tuple[SiteKind, ...]
    positions: Positions
    methods: tuple[str, ...] = ("exact",)
    metric: str = "probability"
    n: int = 16
    shots: int = 10
    seed: int = 0
    noising: bool = False
    at_once: int = 4


@dataclass(frozen=True)
class Twins:
    """Prompts that are patched into each other.

    Attributes:
        name: what they are called.
        clean: prompts that carry the task.
        corrupted: as many that do not.
        wrong: the target prompts with wrong answers, or None.
    """

    name: str
    clean: Prompts
    corrupted: Prompts
    wrong: Prompts | None = None

    def __len__(self) -> int:
        return len(self.clean)

    @classmethod
    def of_pairs(cls, pairs: PromptPairs, n: int) -> "Twins":
        """The first `n` pairs of one's own."""
        rows = slice(n)
        wrong = None if pairs.wrong is None else pairs.wrong[rows]
        return cls(pairs.name, pairs.clean[rows], pairs.corrupted[rows], wrong)

    def ways(self, settings: PatchSettings) -> tuple[Prompts, Prompts]:
        """Source and target prompts."""
        both = self.clean, self.corrupted
        return both[::-1] if settings.noising else both


def twins(lens: Lens, task: Task, settings: PatchSettings) -> tuple[Twins, int]:
    """Clean prompts of the train split and their label-shuffled twins, and how many were left out.

    Where positions are numbers, twins that differ in length are left out, as long as others can be
    drawn: four times as many as are wanted.
    """
    by_number = settings.positions == "all" or not isinstance(settings.positions, str)
    by_number = by_number and not _are_roles(settings.positions)

    def drawn(n: int) -> tuple[Prompts, Prompts]:
        clean, shuffled = (
            task.prompts("train", shots=settings.shots, n=n, seed=settings.seed, kind=kind)
            for kind in ("clean", "shuffled")
        )
        return clean, shuffled

    clean, shuffled = drawn(4 * settings.n if by_number else settings.n)
    if not by_number:
        return Twins(task.name, clean, shuffled), 0
    lengths = [lens.encode(each).mask.sum(dim=1) for each in (clean, shuffled)]
    same = (lengths[0] == lengths[1]).nonzero().flatten().tolist()[: settings.n]
    if not same:
        return Twins(task.name, *drawn(settings.n)), 0
    return Twins(task.name, clean[same], shuffled[same]), same[-1] + 1 - len(same)


def _are_roles(positions: Positions) -> bool:
    return isinstance(positions, Sequence) and all(isinstance(each, str) for each in positions)


def require_patchable(lens: Lens, prompts: Twins, settings: PatchSettings) -> None:
    """Refuse what cannot be patched, before a run folder is claimed for it.

    Raises:
        TvlensError: as `tvlens.patch`.
    """
    source, target = prompts.ways(settings)
    for site in settings.sites:
        paired(lens, source, target, site=site, positions=settings.positions)


def patched(
    lens: Lens, prompts: Twins, site: SiteKind, method: str, settings: PatchSettings, run: Run
) -> PatchEffects:
    """The effects at one site, a few prompts to each step of the run."""
    source, target = prompts.ways(settings)
    parts: list[PatchEffects] = []
    told: list[int] = []
    with progress_bar(f"{prompts.name}: {site}, {method}", len(prompts)) as advance:

        def tell(n: int) -> None:
            told.append(n)
            advance(n)

        for start in range(0, len(prompts), settings.at_once):
            rows = slice(start, start + settings.at_once)

            def compute(rows: slice = rows) -> PatchEffects:
                return WAYS[method](
                    lens,
                    source[rows],
                    target[rows],
                    site=site,
                    positions=settings.positions,
                    metric=settings.metric,
                    wrong=None if prompts.wrong is None else prompts.wrong[rows],
                    direction="noising" if settings.noising else "denoising",
                    progress=tell,
                )

            told.clear()
            name = f"{prompts.name}/{site}/{method}/{start}"
            parts.append(run.kept(name, PatchEffects, compute))
            advance(len(parts[-1].values) - sum(told))
    return replace(PatchEffects.joined(parts), task=prompts.name)


def write_figures(run: Run, table: pd.DataFrame, effects: Sequence[PatchEffects]) -> list[str]:
    """Maps of every site, and exact against approximate effects; returns their names."""
    names = []

    def write(name: str, figure: Figure) -> None:
        run.write_figure(name, figure)
        names.append(name)

    methods = set(table["method"])
    for each in effects:
        task, site, method = each.task, each.site, each.method
        name = f"{task}-{site}" + ("" if len(methods) == 1 else f"-{method}")
        several = len(each.places) > 1
        if several and not each.has_heads:
            fitting = each.by == "all" and len(each.tokens) == len(each.places)
            tokens = each.tokens if fitting else None
            figure = figures.position_map(table, task=task, site=site, method=method, tokens=tokens)
            write(name, figure)
        if each.has_heads:
            over: Literal["max"] | None = "max" if several else None
            write(name, figures.head_map(table, task=task, site=site, method=method, over=over))
        if each.method == "attribution" and "exact" in methods:
            write(
                f"{each.task}-{each.site}-approximation",
                figures.approximation(table, task=each.task, site=each.site),
            )
    return names
