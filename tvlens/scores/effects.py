"""Effects of patches: one number for every layer, head, place and prompt, and what they restore."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.display import Displayed
from tvlens.errors import NumericalError, ShapeError, UnknownNameError
from tvlens.lens.sites import PER_HEAD, PER_KEY_VALUE_HEAD, SiteKind, site_kind
from tvlens.runs.facts import text_of
from tvlens.runs.labelled import labelled
from tvlens.runs.storage import Kept
from tvlens.scores.score import Scores
from tvlens.stats import bootstrap_mean_axis

if TYPE_CHECKING:
    import xarray

Direction = Literal["denoising", "noising"]

COLUMNS = (
    *("task", "site", "layer", "head", "position", "role", "method", "metric"),
    *("value", "ci_low", "ci_high", "normalised", "n"),
)
"""Columns of a table of effects."""


@dataclass(frozen=True, eq=False)
class PatchEffects(Kept, Displayed):
    """Effects of putting activations of source prompts into target prompts.

    Attributes:
        values: metric of the patched target minus metric of the target; NaN in layers that lack the
            site and at places that a prompt lacks. Sites without heads have a head axis of size 1.
        before: metric of each target prompt as it is.
        source: metric of each source prompt as it is, by the target's answers.
        site: what was patched.
        places: names of the places: roles, or positions as numbers, or "query".
        by: whether places are "roles", the "query" position, "all" positions or some ("columns").
        metric: name of the metric.
        unit: what it is measured in.
        direction: "denoising" where the source prompts are the clean ones, "noising" where the
            target prompts are.
        method: "exact" or "attribution".
        task: name of the task.
        model: name of the model.
        tokens: tokens of the first target prompt, where places are its positions.
    """

    values: Float[Tensor, "prompt layer head place"]
    before: Float[Tensor, " prompt"]
    source: Float[Tensor, " prompt"]
    site: SiteKind
    places: tuple[str, ...]
    by: str
    metric: str
    unit: str
    direction: Direction = "denoising"
    method: str = "exact"
    task: str = ""
    model: str = ""
    tokens: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.values.ndim != 4 or self.values.shape[3] != len(self.places):
            raise ShapeError(
                f"effects at {self.site} have shape {tuple(self.values.shape)}; expected (prompt, "
                f"layer, head, place) with {len(self.places)} places"
            )
        if not len(self.values) == len(self.before) == len(self.source):
            raise ShapeError(
                f"effects at {self.site}: {len(self.values)} prompts with {len(self.before)} "
                f"metrics before and {len(self.source)} of the source; expected as many of each"
            )

    @property
    def has_heads(self) -> bool:
        """Whether the site has heads."""
        return self.site in PER_HEAD | PER_KEY_VALUE_HEAD

    @property
    def mean(self) -> Float[Tensor, "layer head place"]:
        """Mean over the prompts that have the place."""
        return self.values.double().nanmean(dim=0).to(self.values.dtype)

    @property
    def gap(self) -> float:
        """Mean metric of the clean prompts minus that of the corrupted ones."""
        difference = (self.source - self.before).double().mean()
        return float(difference if self.direction == "denoising" else -difference)

    @property
    def towards(self) -> Literal["high", "low"]:
        """Where effects of patches that bring the source run over stand: high or low.

        They are low where the source prompts have the lower metric, as in noising, or of a KL.
        """
        return "high" if float((self.source - self.before).double().mean()) >= 0 else "low"

    @property
    def normalised(self) -> Float[Tensor, "layer head place"]:
        """Share of the gap between clean and corrupted prompts that a patched run shows.

        (m(patched) - m(corrupted)) / (m(clean) - m(corrupted)), means over prompts: 0 where nothing
        of the clean run is there, 1 where all is. Never clipped.

        Raises:
            NumericalError: clean and corrupted prompts do not differ, so the share is not defined.
        """
        gap = self.gap
        typical = float(torch.stack([self.source, self.before]).double().abs().mean())
        if not abs(gap) > 1e-6 * typical:
            raise NumericalError(
                f"task {self.task!r}: the mean {self.metric} of clean and corrupted prompts does "
                f"not differ ({float(self.before.double().mean()):.3g} in both), so shares of the "
                "difference are not defined; use the raw effects, or prompts that differ more"
            )
        share = self.mean.double() / gap
        return (share if self.direction == "denoising" else 1 + share).to(self.values.dtype)

    @classmethod
    def joined(cls, parts: Sequence["PatchEffects"]) -> "PatchEffects":
        """The effects on several sets of prompts as one, at all places that any of them has.

        Raises:
            ShapeError: they are of different sites, metrics, models or ways.
        """
        first = max(parts, key=lambda part: len(part.places))
        same = ("site", "by", "metric", "direction", "method", "model")
        for name in same:
            several = {str(getattr(part, name)) for part in parts}
            if len(several) > 1:
                raise ShapeError(
                    f"effects of different {name} cannot be joined: {', '.join(sorted(several))}; "
                    "patch all prompts alike"
                )
        names = list(dict.fromkeys([*first.places, *(n for part in parts for n in part.places)]))
        found = []
        for part in parts:
            values = part.values.new_full((*part.values.shape[:3], len(names)), torch.nan)
            values[..., [names.index(name) for name in part.places]] = part.values
            found.append(values)
        return replace(
            first,
            values=torch.cat(found),
            before=torch.cat([part.before for part in parts]),
            source=torch.cat([part.source for part in parts]),
            places=tuple(names),
            tokens=parts[0].tokens,
        )

    def at(self, place: str | int) -> "PatchEffects":
        """The effects at one place.

        Args:
            place: its name, or its position as a number.

        Raises:
            UnknownNameError: there is none of this name.
        """
        if str(place) not in self.places:
            raise UnknownNameError(
                f"effects at {self.site} have no place {place!r}; they have "
                f"{', '.join(self.places[:12])}{', …' if len(self.places) > 12 else ''}"
            )
        i = self.places.index(str(place))
        return replace(self, values=self.values[..., i : i + 1], places=(self.places[i],))

    @property
    def scores(self) -> Scores:
        """The effects of one place as a score of heads, with what each prompt says.

        Raises:
            ShapeError: the site has no heads, or there are several places.
        """
        if not self.has_heads:
            raise ShapeError(
                f"{self.site} has no heads to score; patch one of "
                f"{', '.join(sorted(PER_HEAD | PER_KEY_VALUE_HEAD))}, or use to_frame()"
            )
        if len(self.places) != 1:
            raise ShapeError(
                f"effects at {self.site} are of {len(self.places)} places, a score of heads is of "
                f"one; choose one: effects.at({self.places[-1]!r}).scores"
            )
        there = ~self.values[:, :, :, 0].isnan().all(dim=(1, 2))
        return Scores.of_prompts(
            self.values[there, :, :, 0],
            name=f"{self.site}_{self.method}",
            unit=self.unit,
            task=self.task,
            model=self.model,
            baseline=self.before[there],
        )

    def interval(
        self, *, seed: int = 0
    ) -> tuple[Float[Tensor, "layer head place"], Float[Tensor, "layer head place"]]:
        """Ends of the 95% bootstrap interval over the prompts that have the place."""
        flat = self.values.flatten(1)
        ends = torch.full((2, flat.shape[1]), torch.nan, dtype=torch.float64)
        patterns: dict[bytes, list[int]] = {}
        there = ~flat.isnan()
        for column, has in enumerate(there.T.numpy()):
            patterns.setdefault(has.tobytes(), []).append(column)
        for pattern, columns in patterns.items():
            rows = torch.from_numpy(np.frombuffer(pattern, dtype=bool).copy())
            if rows.any():
                _, low, high = bootstrap_mean_axis(flat[rows][:, columns], seed=seed)
                ends[:, columns] = torch.stack([low, high]).double()
        low, high = ends.to(self.values.dtype).unflatten(1, self.values.shape[1:])
        return low, high

    def to_frame(self, *, seed: int = 0) -> pd.DataFrame:
        """One row for every layer, head and place that was patched, with the columns of `COLUMNS`.

        `value` is the mean over prompts, `n` how many had the place. Shares that are not defined
        are empty, and so are heads of sites without any, positions of roles and roles of positions.

        Args:
            seed: seed of the bootstrap.
        """
        low, high = self.interval(seed=seed)
        try:
            shares = self.normalised
        except NumericalError:
            shares = torch.full_like(low, torch.nan)
        n = (~self.values.isnan()).sum(dim=0)
        layers, heads, at = (x.tolist() for x in n.nonzero().T)
        rows = len(layers)
        names = [self.places[i] for i in at]
        roles = self.by == "roles"
        numbers = [None if roles or name == "query" else int(name) for name in names]
        index = layers, heads, at
        table = pd.DataFrame(
            {
                "task": [self.task] * rows,
                "site": [self.site] * rows,
                "layer": layers,
                "head": pd.array(heads if self.has_heads else [None] * rows, dtype="Int64"),
                "position": pd.array(numbers, dtype="Int64"),
                "role": [name if roles or name == "query" else "" for name in names],
                "method": [self.method] * rows,
                "metric": [self.metric] * rows,
                **{
                    name: x[index].tolist()
                    for name, x in (
                        ("value", self.mean),
                        ("ci_low", low),
                        ("ci_high", high),
                        ("normalised", shares),
                        ("n", n),
                    )
                },
            }
        )
        return table[list(COLUMNS)]

    def to_xarray(self) -> "xarray.DataArray":
        """The effects of single prompts with names on their axes; needs xarray.

        Raises:
            ImportError: xarray is not installed.
        """
        return labelled(
            self.values,
            ("prompt", "layer", "head", "place"),
            self.metric,
            coords={"place": list(self.places)},
            facts={"site": self.site, "task": self.task, "unit": self.unit, "method": self.method},
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Effects and metrics; what was patched, where and how."""
        tensors = {"values": self.values, "before": self.before, "source": self.source}
        facts = {name: getattr(self, name) for name in _WORDS}
        return tensors, facts | {"places": list(self.places), "tokens": list(self.tokens)}

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "PatchEffects":
        """The effects that have this state."""
        words = {name: text_of(facts, name) for name in _WORDS}
        kind, direction = site_kind(words.pop("site")), words.pop("direction")
        return cls(
            tensors["values"],
            tensors["before"],
            tensors["source"],
            kind,
            tuple(map(str, facts["places"])),
            direction="noising" if direction == "noising" else "denoising",
            tokens=tuple(map(str, facts["tokens"])),
            **words,
        )


_WORDS: Sequence[str] = (*("site", "by", "metric", "unit", "direction", "method", "task", "model"),)
