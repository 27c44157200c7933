"""Patching of several sites, step by step, so that a command that was stopped goes on."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import pandas as pd

from tvlens import figures
from tvlens.console import progress_bar
from tvlens.errors import ModelError
from tvlens.lens.lens import Lens
from tvlens.lens.positions import Positions
from tvlens.lens.sites import SiteKind
from tvlens.runs.run import Run
from tvlens.scores.attribution import attribution_patch, require_possible
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
        steps: points of integrated gradients of attribution; 0 for the gradient at the target.
        fix_softmax: whether attribution attends anew with patched queries and keys.
    """

    sites: tuple[SiteKind, ...]
    positions: Positions
    methods: tuple[str, ...] = ("exact",)
    metric: str = "probability"
    n: int = 16
    shots: int = 10
    seed: int = 0
    noising: bool = False
    steps: int = 0
    fix_softmax: bool = False

    @property
    def at_once(self) -> int:
        """Prompts of a step; a command that was stopped does at most so many again."""
        return 4 if self.positions == "query" else 1

    @property
    def by_number(self) -> bool:
        """Whether positions are counted, so that prompts must be of one length to be patched."""
        if isinstance(self.positions, str):
            return self.positions == "all"
        return isinstance(self.positions, int) or isinstance(self.positions[0], int)

    def options(self, method: str) -> dict[str, Any]:
        """What a method of patching takes besides."""
        if method == "exact":
            return {}
        return {"steps": self.steps, "fix_softmax": self.fix_softmax}


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


def twins(lens: Lens, task: Task, settings: PatchSettings) -> tuple[Twins, list[str]]:
    """Clean prompts of the train split and their label-shuffled twins, and what to know of them.

    Where positions are counted, twins that differ in length are left out, and others drawn in their
    place: up to four times as many as are wanted. Where all differ, none is left out, so that
    whoever patches them is told of it.
    """

    def drawn(n: int) -> tuple[Prompts, Prompts]:
        clean, shuffled = (
            task.prompts("train", shots=settings.shots, n=n, seed=settings.seed, kind=kind)
            for kind in ("clean", "shuffled")
        )
        return clean, shuffled

    clean, shuffled = drawn(4 * settings.n if settings.by_number else settings.n)
    if not settings.by_number:
        return Twins(task.name, clean, shuffled), []
    lengths = [lens.encode(each).mask.sum(dim=1) for each in (clean, shuffled)]
    same = (lengths[0] == lengths[1]).nonzero().flatten().tolist()[: settings.n]
    if not same:
        return Twins(task.name, *drawn(settings.n)), []
    found = Twins(task.name, clean[same], shuffled[same])
    notes = []
    if left_out := same[-1] + 1 - len(same):
        notes.append(
            f"{task.name}: {left_out} prompts are left out, whose label-shuffled twins differ from "
            f"them in length; {len(found)} remain"
        )
    if moved := _moved(lens, found):
        notes.append(
            f"{task.name}: in {moved} of {len(found)} prompts, answers that change places differ "
            "in length, so that one position is not always one role; --positions roles matches them"
        )
    return found, notes


def _moved(lens: Lens, prompts: Twins) -> int:
    """Of how many prompts the tokens play other roles in the twin; 0 where none can tell."""
    both = prompts.clean, prompts.corrupted
    with suppress(ModelError):
        roles = [lens.backend.roles(each, prefix=lens.prefix) for each in both]
        return sum(a != b for a, b in zip(*roles, strict=True))
    return 0


def require_patchable(lens: Lens, prompts: Twins, settings: PatchSettings) -> None:
    """Refuse what cannot be patched, before a run folder is claimed for it.

    Raises:
        TvlensError: as `tvlens.patch`.
    """
    source, target = prompts.ways(settings)
    for site in settings.sites:
        pairing = paired(lens, source, target, site=site, positions=settings.positions)
        if "attribution" in settings.methods:
            require_possible(pairing, settings.steps, settings.fix_softmax)
        for rows in _pieces(prompts, settings):
            paired(lens, source[rows], target[rows], site=site, positions=settings.positions)


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

        for rows in _pieces(prompts, settings):

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
                    **settings.options(method),
                )

            told.clear()
            name = f"{prompts.name}/{site}/{method}/{rows.start}"
            parts.append(run.kept(name, PatchEffects, compute))
            advance(len(parts[-1].values) - sum(told))
    return replace(PatchEffects.joined(parts), task=prompts.name)


def _pieces(prompts: Twins, settings: PatchSettings) -> list[slice]:
    """Prompts of every step."""
    n = settings.at_once
    return [slice(start, start + n) for start in range(0, len(prompts), n)]


def write_figures(run: Run, table: pd.DataFrame, effects: Sequence[PatchEffects]) -> None:
    """Maps of every site, and exact against approximate effects.

    Of sites that have heads, and of several places, maps show the greatest effect of each head at
    any place; where patches lower the metric, the sum over places.
    """
    methods = set(table["method"])
    for each in effects:
        task, site, method = each.task, each.site, each.method
        name = f"{task}-{site}" + ("" if len(methods) == 1 else f"-{method}")
        top = each.towards
        if each.has_heads:
            over: Literal["max", "sum"] | None = "max" if top == "high" else "sum"
            figure = figures.head_map(
                table,
                task=task,
                site=site,
                method=method,
                over=over if len(each.places) > 1 else None,
                top=top,
            )
        else:
            fitting = each.by == "all" and len(each.tokens) == len(each.places)
            tokens = each.tokens if fitting else None
            figure = figures.position_map(table, task=task, site=site, method=method, tokens=tokens)
        run.write_figure(name, figure)
        if method == "attribution" and "exact" in methods:
            figure = figures.approximation(table, task=task, site=site, top=top)
            run.write_figure(f"{task}-{site}-approximation", figure)
