"""What a model still does without sets of its heads.

A head is ablated by setting its `hook_z`: to zero; to its mean over clean prompts of the task, or
of other tasks; or to what it is on another prompt of the same kind, drawn at random. At the query
position all sets are replayed as rows of one reading; at every position rows start at the first
layer that a set ablates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.display import Displayed
from tvlens.errors import ModelError, ShapeError, UnknownNameError
from tvlens.evaluation.answers import whole_answers
from tvlens.evaluation.methods import SHARES
from tvlens.evaluation.replacement import At, Replacement, SetTo, place_of, way_of
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.runs.facts import text_of
from tvlens.runs.labelled import labelled
from tvlens.runs.storage import Kept
from tvlens.scores.ablation import HeadSet
from tvlens.stats import bootstrap_mean_axis, share_interval
from tvlens.tasks.base import PromptSet
from tvlens.tasks.text.prompts import Prompts

if TYPE_CHECKING:
    import xarray

COLUMNS = ["task", "score", "rule", "set_to", "positions", "share", "k", "draw"]
COLUMNS += ["metric", "value", "ci_low", "ci_high", "n"]
AREA_COLUMNS = ["task", "score", "rule", "set_to", "positions"]
AREA_COLUMNS += ["metric", "value", "ci_low", "ci_high", "n"]


@dataclass(frozen=True, eq=False)
class Ablation(Kept, Displayed):
    """What a model does on every prompt without each of several sets of heads.

    Attributes:
        sets: the sets.
        values: the measures.
        unablated: the same of the model as it is.
        measures: their names.
        set_to: what heads were set to.
        positions: where.
        task: name of the task.
        model: name of the model.
    """

    sets: tuple[HeadSet, ...]
    values: Float[Tensor, "prompt set measure"]
    unablated: Float[Tensor, "prompt measure"]
    measures: tuple[str, ...]
    set_to: str
    positions: str
    task: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        expected = (len(self.unablated), len(self.sets), len(self.measures))
        if self.values.shape != expected or self.unablated.shape[1] != len(self.measures):
            raise ShapeError(
                f"ablation on task {self.task!r}: values have shape {tuple(self.values.shape)}, "
                f"those without ablation {tuple(self.unablated.shape)}; expected {expected} "
                "(prompt, set, measure)"
            )

    @classmethod
    def joined(cls, parts: Sequence["Ablation"]) -> "Ablation":
        """The ablation of further sets on the same prompts."""
        sets = tuple(one for part in parts for one in part.sets)
        values = torch.cat([part.values for part in parts], dim=1)
        return replace(parts[0], sets=sets, values=values)

    def of(self, name: str, measure: str) -> Float[Tensor, "prompt set"]:
        """One measure of every set of this name.

        Raises:
            UnknownNameError: there is no set of this name, or no such measure.
        """
        index = [i for i, one in enumerate(self.sets) if one.name == name]
        if not index or measure not in self.measures:
            raise UnknownNameError(
                f"ablation on task {self.task!r} has no {measure!r} of sets {name!r}; expected "
                f"{', '.join(self.measures)} of {', '.join({one.name: 0 for one in self.sets})}"
            )
        return self.values[:, index, self.measures.index(measure)]

    def to_frame(self, *, seed: int = 0) -> pd.DataFrame:
        """One row for each set and metric, with 95% intervals over prompts: `COLUMNS`.

        `share` is the share of heads that was asked for, which "keep" sets leave alone, and `k` how
        many heads are ablated. Metrics are the measures, and `MEASURE_change`: the difference that
        ablation makes, on the same prompts. Intervals are of the bootstrap; those of shares of
        prompts that are 0 or 1 are Wilson's.

        Args:
            seed: seed of the bootstrap.
        """
        frames = []
        for m, measure in enumerate(self.measures):
            of_sets, before = self.values[:, :, m], self.unablated[:, m, None]
            for metric, values in ((measure, of_sets), (f"{measure}_change", of_sets - before)):
                ends = _intervals(values, metric, seed)
                frame = pd.DataFrame(dict(zip(COLUMNS[9:12], ends, strict=True)))
                labels = {
                    "score": [one.name for one in self.sets],
                    "rule": [one.rule for one in self.sets],
                    "share": [np.nan if one.share is None else one.share for one in self.sets],
                    "k": [one.k for one in self.sets],
                    "draw": pd.array([one.draw for one in self.sets], dtype="Int64"),
                }
                frames.append(frame.assign(**labels, metric=metric))
        table = pd.concat(frames, ignore_index=True)
        kept = {"task": self.task, "set_to": self.set_to, "positions": self.positions}
        return table.assign(**kept, n=len(self.values))[COLUMNS]

    def to_xarray(self) -> "xarray.Dataset":
        """`values` and `unablated` with names on their axes; needs xarray.

        Their axes are (prompt, set, measure) and (prompt, measure); along the sets stand `score`,
        `rule`, `share`, `draw` (both NaN where there is none) and `k`.

        Raises:
            ImportError: xarray is not installed.
        """
        sets = {
            "score": [one.name for one in self.sets],
            "rule": [one.rule for one in self.sets],
            "share": [np.nan if one.share is None else one.share for one in self.sets],
            "draw": [np.nan if one.draw is None else one.draw for one in self.sets],
            "k": [one.k for one in self.sets],
        }
        measures = {"measure": list(self.measures)}
        along = measures | {name: ("set", column) for name, column in sets.items()}
        values = labelled(self.values, ("prompt", "set", "measure"), "values", coords=along)
        before = labelled(self.unablated, ("prompt", "measure"), "unablated", coords=measures)
        facts = {"set_to": self.set_to, "positions": self.positions}
        facts |= {"task": self.task, "model": self.model}
        return values.to_dataset().assign(unablated=before).assign_attrs(facts)

    def areas(self, *, seed: int = 0) -> pd.DataFrame:
        """Area under each curve over the share of heads, with intervals: `AREA_COLUMNS`.

        An area is over the width of its range of shares, so it is the mean height of the curve. Of
        random sets it is the mean over draws. `MEASURE_minus_random` is the difference of a "top"
        curve to that of the random sets matched to it, prompt by prompt. Curves of fewer than two
        shares have none.

        Args:
            seed: seed of the bootstrap.
        """
        rows: list[dict[str, Any]] = []
        curves = {(one.name, one.rule): None for one in self.sets if one.share is not None}
        for m, measure in enumerate(self.measures):
            found: dict[tuple[str, str], Tensor] = {}
            for curve in curves:
                shares, heights = self._curve(curve, m)
                if len(shares) > 1:
                    found[curve] = area(shares, heights)
            for (name, rule), values in found.items():
                asked = {measure: values}
                if rule == "top" and (name, "random") in found:
                    asked[f"{measure}_minus_random"] = values - found[name, "random"]
                for metric, each in asked.items():
                    ends = [float(end) for end in bootstrap_mean_axis(each, seed=seed)]
                    labels = {"task": self.task, "score": name, "rule": rule, "metric": metric}
                    rows.append(labels | dict(zip(COLUMNS[9:12], ends, strict=True)))
        kept = {"set_to": self.set_to, "positions": self.positions, "n": len(self.values)}
        return pd.DataFrame(rows, columns=AREA_COLUMNS).assign(**kept)[AREA_COLUMNS]

    def _curve(
        self, curve: tuple[str, str], measure: int
    ) -> tuple[list[float], Float[Tensor, "prompt share"]]:
        """The shares of a curve and its heights there, means over draws."""
        of_share: dict[float, list[int]] = {}
        for i, one in enumerate(self.sets):
            if (one.name, one.rule) == curve and one.share is not None:
                of_share.setdefault(one.share, []).append(i)
        heights = {s: self.values[:, i, measure].mean(dim=1) for s, i in of_share.items()}
        top = [one.share for one in self.sets if (one.name, one.rule) == (curve[0], "top")]
        if curve[1] == "random" and 0.0 in top:
            heights[0.0] = self.unablated[:, measure]
        shares = sorted(heights)
        return shares, torch.stack([heights[share] for share in shares], dim=1)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Measures and heads of the sets; what the sets are called, and what was done."""
        heads = [[*layer_head] for one in self.sets for layer_head in one.heads]
        tensors = {"values": self.values, "unablated": self.unablated}
        tensors["heads"] = torch.tensor(heads, dtype=torch.long).reshape(-1, 2)
        labels = [[one.name, one.rule, one.share, one.draw, one.k] for one in self.sets]
        facts = {"sets": labels, "measures": list(self.measures), "set_to": self.set_to}
        facts |= {"positions": self.positions, "task": self.task, "model": self.model}
        return tensors, facts

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "Ablation":
        """The ablation that has this state."""
        sets, start = [], 0
        for name, rule, share, draw, k in facts["sets"]:
            heads = tuple((int(i), int(j)) for i, j in tensors["heads"][start : start + k].tolist())
            sets.append(HeadSet(name, heads, rule, share, draw))
            start += k
        return cls(
            tuple(sets),
            tensors["values"],
            tensors["unablated"],
            tuple(facts["measures"]),
            text_of(facts, "set_to"),
            text_of(facts, "positions"),
            text_of(facts, "task"),
            text_of(facts, "model"),
        )


def area(
    shares: Sequence[float], heights: Float[Tensor, "prompt share"]
) -> Float[Tensor, " prompt"]:
    """Area under a curve by trapezoids, over the width of its range.

    Args:
        shares: where the curve is known, ascending.
        heights: how high it is there, on every prompt.
    """
    at = torch.tensor(shares, dtype=heights.dtype)
    return torch.trapezoid(heights, at, dim=1) / (at[-1] - at[0])


def _intervals(values: Float[Tensor, "prompt set"], metric: str, seed: int) -> list[Tensor]:
    """Mean and ends of the interval of every set."""
    found = [end.clone() for end in bootstrap_mean_axis(values, seed=seed)]
    if metric in SHARES:
        for i in ((found[0] == 0) | (found[0] == 1)).nonzero().flatten().tolist():
            ends = share_interval(values[:, i], seed=seed)
            found[1][i], found[2][i] = ends.low, ends.high
    return found


def ablate(
    lens: Lens,
    prompts: PromptSet,
    sets: Sequence[HeadSet],
    *,
    set_to: SetTo = "mean",
    means: HeadMeans | Sequence[HeadMeans] | None = None,
    positions: At = "query",
    seed: int = 0,
    exact_match: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Ablation:
    """What the model does on prompts without each set of heads, and as it is.

    Example:
        >>> heads = [tvlens.scores.top_share(effects, 0.05)]  # doctest: +SKIP
        >>> tvlens.ablate(lens, task.prompts("test"), heads, means=means)  # doctest: +SKIP

    Args:
        lens: the model.
        prompts: what it is asked; not those that heads were scored on.
        sets: which heads are ablated.
        set_to: what they are set to: "mean", their means of `means`; "other", the same, `means`
            being those of other tasks; "zero"; or "resample", what they are on another of the
            prompts, drawn for each.
        means: mean head outputs over clean prompts of the task, or of each of the other tasks,
            whose mean is taken; taken where they are put, `mean_head_outputs(at="all")` for all
            positions.
        positions: "query", the query position alone, or "all". At all positions, resampled heads
            are taken from the other prompt counted from its query, again from the start of a
            shorter one.
        seed: seed of the draws.
        exact_match: also generate whole answers; heads are ablated at the query, which the first
            token is read off.
        progress: called with the number of prompts finished.

    Raises:
        UnknownNameError: heads cannot be set to that, or at such positions.
        ShapeError: there is no set, or the model lacks a head of one, or the means are of another.
        TaskError: means are needed and not given, or taken elsewhere, or there is no other prompt.
        ModelError: whole answers are asked of a model of numbers, or at all positions.
    """
    set_to, positions = way_of(set_to), place_of(positions)
    if exact_match and not (lens.readout.has_text and positions == "query"):
        raise ModelError(
            f"exact_match compares answers generated from the query position on, but {lens.name!r} "
            + ("is ablated at all positions" if lens.readout.has_text else "answers with numbers")
            + "; pass exact_match=False"
        )
    masks = _masks(lens, sets)
    batch = lens.encode(prompts)
    template = prompts.template if isinstance(prompts, Prompts) else None
    engine = lens.engine if positions == "query" else lens.engine.anywhere
    names = [measure.name for measure in lens.readout.measures]
    # Sets of the same heads, and none, are run once.
    distinct, which = masks.unique(dim=0, return_inverse=True)
    distinct = distinct.to(lens.backend.device)
    found, done = [], 0
    with lens.frozen(), torch.no_grad():
        put = Replacement(lens, engine, batch, set_to, means, positions, seed)
        for reading in lens.readings(batch, engine=engine):
            rows = slice(done, done + len(reading))
            edit = put.edit(distinct, reading, rows, positions)
            parts = []
            for piece in lens.variants(reading, edit):
                outputs = engine.run(reading, piece)
                values = lens.readout.measure(outputs, reading.batch).double().cpu()
                if exact_match:
                    started = lens.readout.answered(outputs, reading.batch)
                    right = whole_answers(engine, reading, piece, started, template)
                    values = torch.cat([values, right[..., None]], dim=-1)
                parts.append(values)
            found.append(torch.cat(parts, dim=1))
            done = rows.stop
            if progress is not None:
                progress(len(reading))
    values = torch.cat(found)[:, which]
    return Ablation(
        tuple(sets),
        values[:, 1:],
        values[:, 0],
        (*names, "exact_match") if exact_match else tuple(names),
        set_to,
        positions,
        prompts.task,
        lens.name,
    )


def _masks(lens: Lens, sets: Sequence[HeadSet]) -> Bool[Tensor, "set_and_none layer head"]:
    """No head, and the heads of every set."""
    if not sets:
        raise ShapeError("no head set is given to ablate; expected one or more")
    there = lens.backend.attention_layers
    for one in sets:
        for layer, head in one.heads:
            if layer < lens.n_layer and layer not in there:
                raise ShapeError(
                    f"head set {one.name!r} names head ({layer}, {head}), and layer {layer} of "
                    f"{lens.name!r} has no heads; layers that have are {', '.join(map(str, there))}"
                )
    masks = [one.mask(lens.n_layer, lens.n_head) for one in sets]
    return torch.stack([torch.zeros_like(masks[0]), *masks])
