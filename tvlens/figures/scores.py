"""DataFrames and score maps to matplotlib figures, in one style fit for print.

Every function returns a `matplotlib.figure.Figure` that belongs to no window and no global state:
show it in a notebook, or save it with `Run.write_figure`. Marker and line shapes repeat what the
colours say.
"""

import itertools
import textwrap
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from pandas import DataFrame
from torch import Tensor

from tvlens.errors import ShapeError, UnknownNameError
from tvlens.figures.style import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PINK,
    RED,
    SKY,
    STYLE,
    require_columns,
    whole_numbers,
)
from tvlens.scores.agreement import top_heads

# The underscores leave comparing sizes to `head_maps`, whose message names both shapes.
ScoreMap = Float[np.ndarray, "_layer _head"] | Float[Tensor, "_layer _head"]

_COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY, "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_METHODS: dict[str, tuple[str, str, str]] = {
    "none": ("no vector", GREY, "X"),
    "fv_layer": ("FV, one layer", ORANGE, "^"),
    "fv_per_layer": ("FV, per layer", RED, "v"),
    "ltv": ("LTV", BLUE, "o"),
    "random": ("random ω", SKY, "s"),
    "permuted": ("permuted ω", PINK, "D"),
}
_METRICS = {"exact_match": "exact match", "cross_entropy": "cross-entropy (nats)"}
_PROMPTS = {"zero": "zero-shot prompts", "shuffled": "shuffled-label prompts"}


@rc_context(STYLE)
def head_maps(
    aie: ScoreMap,
    contribution: ScoreMap,
    *,
    task: str,
    k: int = 10,
    unit: str = "probability",
) -> Figure:
    """Two maps over layers and heads side by side: causal effect and learned contribution.

    In both maps a frame marks the k heads of highest AIE and a dot the k of highest contribution
    (signed: a head that works against the task ranks last), so agreement is a dot in a frame.

    Args:
        aie: average indirect effect of each head.
        contribution: signed norm of each head's weighted contribution.
        task: what to call it in the title.
        k: how many heads of each to mark.
        unit: unit of the effects.

    Raises:
        ShapeError: the two maps differ in shape, or have fewer than k heads.
        NumericalError: a score is not finite.
    """
    maps = [torch.as_tensor(scores).detach().cpu().double() for scores in (aie, contribution)]
    if maps[0].shape != maps[1].shape:
        raise ShapeError(
            f"the AIE map has shape {[*maps[0].shape]} (layer, head), the LTV contribution map "
            f"{[*maps[1].shape]}; both must come from the same model"
        )
    best = [top_heads(scores, k) for scores in maps]
    n_layers, n_heads = maps[0].shape
    width, height = np.clip(0.26 * n_heads, 2.1, 3.2), np.clip(0.14 * n_layers, 1.6, 5.5)
    figure = Figure(figsize=(0.5 + 2 * width, 1.5 + height), layout="constrained")
    figure.suptitle(task)
    titles = ("Causal mediation (AIE)", "Learnable Task Vector (LTV)")
    units = (f"average indirect effect ({unit})", "LTV contribution, signed norm")
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, scores, title, label in zip(panels, maps, titles, units, strict=True):
        limit = float(scores.abs().max()) or 1.0
        image = axes.imshow(
            scores.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto"
        )
        bar = figure.colorbar(image, ax=axes, location="bottom", aspect=28, pad=0.1 / height)
        bar.set_label(textwrap.fill(label, 40))
        bar.locator = MaxNLocator(5, symmetric=True)
        for layer, head in best[0]:
            corner = head - 0.5, layer - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec="black", lw=1.1))
        layers, heads = zip(*best[1], strict=True)
        axes.plot(heads, layers, "o", ms=3.6, mfc="black", mec="white", mew=0.7)
        axes.spines[:].set_visible(True)
        axes.locator_params(nbins=10, integer=True, steps=[1, 2, 5, 10])
        axes.set(
            title=title, xlabel="head", xlim=(-0.5, n_heads - 0.5), ylim=(-0.5, n_layers - 0.5)
        )
    panels[0].set_ylabel("layer")
    shared = len(set(best[0]) & set(best[1]))
    labels = [f"top {k} by AIE", f"top {k} by LTV contribution ({shared} in both)"]
    figure.legend([axes.patches[0], axes.lines[0]], labels, loc="outside lower center", ncols=2)
    return figure


@rc_context(STYLE)
def overlap_curve(curve: DataFrame) -> Figure:
    """Overlap of the two top-k sets against k, with its chance level and 95% band.

    Args:
        curve: columns `k, overlap, chance, chance_low, chance_high`, as shares of k; optionally
            `ceiling` (the overlap that prompt noise allows) and `task` (one line each).

    Raises:
        UnknownNameError: a column is missing.
        ShapeError: tasks have different chance levels at the same k.
    """
    require_columns(curve, "overlap curve", "k", "overlap", "chance", "chance_low", "chance_high")
    parts = list(curve.groupby("task", sort=False)) if "task" in curve else [("AIE and LTV", curve)]
    several = len(parts) > 1
    figure = Figure(figsize=(4.9 if several else 3.8, 2.7), layout="constrained")
    axes = figure.subplots()
    chance = curve.drop_duplicates(["k", "chance", "chance_low", "chance_high"]).sort_values("k")
    if chance["k"].duplicated().any():
        raise ShapeError(
            "the overlap curves have different chance levels at one k, so they are of models with "
            "different numbers of heads; draw one figure for each"
        )
    band = chance["chance_low"], chance["chance_high"]
    axes.fill_between(chance["k"], *band, color=PALE, lw=0, label="chance, 95%")
    axes.plot(chance["k"], chance["chance"], color=GREY, lw=1, ls="--", label="chance, mean")
    if "ceiling" in curve and curve["ceiling"].notna().any():
        ceiling = curve.groupby("k")["ceiling"].mean()
        label = "split-half ceiling" + (", mean" if several else "")
        axes.plot(ceiling.index, ceiling, color="black", lw=1, ls=":", label=label)
    looks = zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False)
    for (task, part), (colour, marker) in zip(parts, looks, strict=False):
        part = part.sort_values("k")
        (line,) = axes.plot(part["k"], part["overlap"], color=colour, marker=marker, label=task)
        line.set_markevery(max(1, len(part) // 8))
    axes.set(xlabel="k, heads in each set", ylabel="overlap of the top k (share of k)")
    axes.set_ylim(0, 1.02)
    if curve["k"].nunique() > 1:  # a model of one head has a single k
        axes.set_xlim(curve["k"].min(), curve["k"].max())
    axes.xaxis.set_major_locator(whole_numbers())
    if several:
        figure.legend(loc="outside right center")
    else:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


@rc_context(STYLE)
def method_dots(results: DataFrame, *, metric: str = "accuracy") -> Figure:
    """A dot with its 95% interval for each task and method; one panel per kind of prompt.

    In-context learning on clean prompts is the black bar behind each task's dots.

    Args:
        results: columns `task, method, prompt, metric, value, ci_low, ci_high`.
        metric: which of the metrics to draw.

    Raises:
        UnknownNameError: a column is missing, or no row has this metric on zero-shot or
            shuffled-label prompts.
    """
    require_columns(
        results, "results", "task", "method", "prompt", "metric", "value", "ci_low", "ci_high"
    )
    rows = results[results["metric"] == metric]
    prompts = [prompt for prompt in _PROMPTS if (rows["prompt"] == prompt).any()]
    if not prompts:
        known = sorted(map(str, results["metric"].unique()))
        raise UnknownNameError(
            f"results hold no {metric!r} on {' or '.join(_PROMPTS)} prompts; metrics there: {known}"
        )
    tasks = list(dict.fromkeys(rows["task"]))
    others = [method for method in dict.fromkeys(rows["method"]) if method not in _METHODS]
    styles = _METHODS | {m: (m, "black", "d") for m in others if m != "icl"}
    methods = [method for method in styles if (rows["method"] == method).any()]
    icl = rows[(rows["method"] == "icl") & (rows["prompt"] == "clean")]
    figure = Figure(figsize=(6.8, 1.0 + 0.52 * len(tasks)), layout="constrained")
    panels = figure.subplots(1, len(prompts), sharex=True, sharey=True, squeeze=False)[0]
    offsets = np.linspace(-0.32, 0.32, len(methods)) if len(methods) > 1 else np.zeros(1)
    for axes, prompt in zip(panels, prompts, strict=True):
        _icl_bars(axes, icl, tasks)
        for method, offset in zip(methods, offsets, strict=True):
            part = rows[(rows["method"] == method) & (rows["prompt"] == prompt)]
            label, colour, marker = styles[method]
            y = np.array([tasks.index(task) for task in part["task"]]) + offset
            axes.hlines(y, part["ci_low"], part["ci_high"], color=colour, lw=1.1)
            axes.plot(part["value"], y, marker, color=colour, mew=1.1, label=label)
        axes.set(title=_PROMPTS[prompt], xlabel=f"{_METRICS.get(metric, metric)}, 95% interval")
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_yticks(np.arange(len(tasks) - 1) + 0.5, minor=True)
        axes.grid(axis="y", which="minor")
        axes.grid(axis="x")
        axes.tick_params(axis="y", which="both", length=0)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
    if metric in ("accuracy", "exact_match"):
        panels[0].set_xlim(-0.03, 1.03)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), columnspacing=1.2)
    return figure


def _icl_bars(axes: Axes, icl: DataFrame, tasks: list[Any]) -> None:
    """Draws each task's in-context result as an upright line with its interval as a pale box."""
    for number, row in enumerate(icl.itertuples()):
        y = tasks.index(row.task)
        interval = (row.ci_low, y - 0.42), row.ci_high - row.ci_low, 0.84
        axes.add_patch(Rectangle(*interval, color=PALE, lw=0))
        label = "in context (clean prompts)" if number == 0 else None
        axes.plot([row.value] * 2, [y - 0.42, y + 0.42], color="black", lw=1.2, label=label)


@rc_context(STYLE)
def layer_profiles(profiles: DataFrame) -> Figure:
    """Where in depth the score mass lies: share per layer, one panel per task.

    Args:
        profiles: columns `task, layer, score, share`; score is "aie" or "contribution".

    Raises:
        UnknownNameError: a column is missing.
    """
    require_columns(profiles, "layer profiles", "task", "layer", "score", "share")
    tasks = list(dict.fromkeys(profiles["task"]))
    lines, columns = -(-len(tasks) // 4), min(len(tasks), 4)
    figure = Figure(figsize=(max(3.4, 1.75 * columns), 0.6 + 1.35 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    looks = (("aie", "AIE", RED, "-"), ("contribution", "LTV contribution", BLUE, "--"))
    for axes, task in zip(panels, tasks, strict=False):
        for score, label, colour, dash in looks:
            chosen = (profiles["task"] == task) & (profiles["score"] == score)
            part = profiles[chosen].sort_values("layer")
            xy = part["layer"], part["share"]
            axes.fill_between(*xy, step="mid", color=colour, alpha=0.15, lw=0)
            axes.step(*xy, where="mid", color=colour, ls=dash, lw=1, label=label)
        axes.set_title(task)
        axes.xaxis.set_major_locator(whole_numbers(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylim(bottom=0)
    for empty in panels[len(tasks) :]:
        empty.remove()
    figure.supxlabel("layer")
    figure.supylabel("share of positive score")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


@rc_context(STYLE)
def weight_travel(travel: DataFrame, weights: DataFrame) -> Figure:
    """How far training moves the weights: start against end per preset, and distance per step.

    Args:
        travel: columns `preset, seed, step, travel, norm`: the distance of the weights from their
            start at each step, and their own norm.
        weights: columns `preset, seed, start, end`, one row per weight.

    Raises:
        UnknownNameError: a column is missing, or the two tables name different presets.
    """
    require_columns(travel, "weight travel", "preset", "seed", "step", "travel", "norm")
    require_columns(weights, "weights", "preset", "seed", "start", "end")
    presets = list(dict.fromkeys(travel["preset"]))
    if {*presets} != {*weights["preset"]}:
        raise UnknownNameError(
            f"the weight travel table has presets {presets}, the weights table "
            f"{sorted(set(weights['preset']))}; both need the same"
        )
    figure = Figure(figsize=(2.2 * (len(presets) + 1) + 0.2, 2.5), layout="constrained")
    panels = figure.subplots(1, len(presets) + 1)
    for axes, preset, colour in zip(panels, presets, _COLOURS, strict=False):
        _start_against_end(axes, weights[weights["preset"] == preset], colour)
        part = travel[travel["preset"] == preset]
        for number, (_, run) in enumerate(part.groupby("seed")):
            run = run.sort_values("step")
            label = str(preset) if number == 0 else None
            panels[-1].plot(run["step"], run["travel"], color=colour, lw=1, label=label)
        norm = float(part.loc[part["step"] == part["step"].min(), "norm"].mean())
        if norm > 0:
            label = rf"$\|\omega_0\|$, {preset}"
            panels[-1].axhline(norm, color=colour, lw=1, ls=":", label=label)
    panels[-1].set(title="distance from the start", box_aspect=1, xlim=(0, None), ylim=(0, None))
    panels[-1].set(xlabel="step", ylabel=r"$\|\omega - \omega_0\|$")
    panels[-1].xaxis.set_major_locator(whole_numbers(5))
    figure.legend(loc="outside lower center", ncols=2 * len(presets))
    return figure


def _start_against_end(axes: Axes, weights: DataFrame, colour: str) -> None:
    limit = 1.08 * float(weights[["start", "end"]].abs().max().max() or 1.0)
    axes.axline((0, 0), slope=1, color=GREY, lw=0.8, ls="--")
    axes.plot(weights["start"], weights["end"], ".", ms=2, color=colour, alpha=0.5, mew=0)
    seeds = [part for _, part in weights.groupby("seed")]
    if any(part["start"].nunique() == 1 for part in seeds):
        text = "all start at one value"
    else:
        values = [part["start"].corr(part["end"]) for part in seeds]
        low, high = f"{min(values):.2f}", f"{max(values):.2f}"
        text = f"r = {low}" if low == high else f"r = {low} to {high}"
    axes.set_title(f"{weights['preset'].iloc[0]}\n{text}, seeds: {len(seeds)}")
    axes.set(xlabel="weight at the start", ylabel="weight at the end")
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), box_aspect=1)


@rc_context(STYLE)
def training_history(history: DataFrame, *, unit: str = "nats") -> Figure:
    """Training and validation loss per step, with the step of lowest validation loss marked.

    Args:
        history: columns `step, train_loss, validation_loss`; NaN where a loss was not measured.
        unit: unit of the loss.

    Raises:
        UnknownNameError: a column is missing.
    """
    require_columns(history, "history", "step", "train_loss", "validation_loss")
    figure = Figure(figsize=(3.6, 2.5), layout="constrained")
    axes = figure.subplots()
    train = history.dropna(subset=["train_loss"])
    axes.plot(train["step"], train["train_loss"], color=SKY, lw=1, label="training")
    validation = history.dropna(subset=["validation_loss"])
    axes.plot(validation["step"], validation["validation_loss"], color=BLUE, label="validation")
    if len(validation):
        best = validation.loc[validation["validation_loss"].idxmin()]
        label = f"lowest, step {best['step']:.0f}"
        axes.plot(best["step"], best["validation_loss"], "o", color=RED, label=label)
    axes.set(xlabel="step", ylabel=f"loss ({unit})", ylim=(0, None))
    axes.xaxis.set_major_locator(whole_numbers())
    figure.legend(loc="outside lower center", ncols=3)
    return figure
