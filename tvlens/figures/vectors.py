"""Figures of vectors: what they do on prompts, and how they were trained."""

from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pandas import DataFrame

from tvlens.errors import UnknownNameError
from tvlens.figures.scores import _COLOURS
from tvlens.figures.style import (
    BLUE,
    GREY,
    PALE,
    PALETTE,
    RED,
    SKY,
    STYLE,
    Width,
    inches,
    keep_panels,
    outside_legend,
    panels_in,
    require_columns,
    whole_numbers,
)
from tvlens.vectors.catalogue import BASELINES, METHODS, Look

_METRICS = {"exact_match": "exact match", "cross_entropy": "cross-entropy (nats)"}


_PROMPTS = {"zero": "zero-shot prompts", "shuffled": "shuffled-label prompts"}


@rc_context(STYLE)
def method_dots(results: DataFrame, *, metric: str = "accuracy", width: Width = "double") -> Figure:
    """A dot with its 95% interval for each task and method; one panel per kind of prompt.

    In-context learning on clean prompts is the black bar behind each task's dots.

    Args:
        results: columns `task, method, prompt, metric, value, ci_low, ci_high`.
        metric: which of the metrics to draw.
        width: how wide, "single" or "double" column; panels stand below each other in a single one.

    Raises:
        UnknownNameError: a column is missing, no row has this metric on zero-shot or
            shuffled-label prompts, or there is no such width.
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
    looks = {"none": BASELINES["none"]} | {method.name: method.look for method in METHODS}
    others = [name for name in dict.fromkeys(rows["method"]) if name not in {*looks, "icl"}]
    styles = looks | {name: Look(name, "black", "d") for name in others}
    methods = [method for method in styles if (rows["method"] == method).any()]
    icl = rows[(rows["method"] == "icl") & (rows["prompt"] == "clean")]
    lines, across = panels_in(width, 3.0, len(prompts))
    height = 0.5 + (0.1 + 0.52 * len(tasks)) * lines
    figure = Figure(figsize=(inches(width), height), layout="constrained")
    panels = figure.subplots(lines, across, sharex=True, sharey=True, squeeze=False).ravel()
    offsets = np.linspace(-0.32, 0.32, len(methods)) if len(methods) > 1 else np.zeros(1)
    for axes, prompt in zip(panels, prompts, strict=True):
        _icl_bars(axes, icl, tasks)
        for method, offset in zip(methods, offsets, strict=True):
            part = rows[(rows["method"] == method) & (rows["prompt"] == prompt)]
            look = styles[method]
            colour = PALETTE[look.colour]
            y = np.array([tasks.index(task) for task in part["task"]]) + offset
            axes.hlines(y, part["ci_low"], part["ci_high"], color=colour, lw=1.1)
            axes.plot(part["value"], y, look.marker, color=colour, mew=1.1, label=look.label)
        axes.set_title(_PROMPTS[prompt])
        axes.set_yticks(range(len(tasks)), tasks)
        axes.set_yticks(np.arange(len(tasks) - 1) + 0.5, minor=True)
        axes.grid(axis="y", which="minor")
        axes.grid(axis="x")
        axes.tick_params(axis="y", which="both", length=0)
        axes.set_ylim(len(tasks) - 0.5, -0.5)
    if metric in ("accuracy", "exact_match"):
        panels[0].set_xlim(-0.03, 1.03)
    handles, labels = panels[0].get_legend_handles_labels()
    measured = f"{_METRICS.get(metric, metric)}, 95% interval"
    for axes in panels[-across:]:
        axes.set_xlabel(measured)
    outside_legend(figure, handles, labels)
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
def weight_travel(travel: DataFrame, weights: DataFrame, *, width: Width = "double") -> Figure:
    """How far training moves the weights: start against end per preset, and distance per step.

    Args:
        travel: columns `preset, seed, step, travel, norm`: the distance of the weights from their
            start at each step, and their own norm.
        weights: columns `preset, seed, start, end`, one row per weight.
        width: how wide, "single" or "double" column; panels stand below each other in a single one.

    Raises:
        UnknownNameError: a column is missing, the two tables name different presets, or there is no
            such width.
    """
    require_columns(travel, "weight travel", "preset", "seed", "step", "travel", "norm")
    require_columns(weights, "weights", "preset", "seed", "start", "end")
    presets = list(dict.fromkeys(travel["preset"]))
    if {*presets} != {*weights["preset"]}:
        raise UnknownNameError(
            f"the weight travel table has presets {presets}, the weights table "
            f"{sorted(set(weights['preset']))}; both need the same"
        )
    lines, across = panels_in(width, 2.2, len(presets) + 1)
    wide = min(inches(width), 2.3 * across + 0.2)
    figure = Figure(figsize=(wide, 0.05 + 2.2 * lines), layout="constrained")
    panels = keep_panels(figure.subplots(lines, across, squeeze=False), len(presets) + 1)
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
    outside_legend(figure, *panels[-1].get_legend_handles_labels())
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
def training_history(history: DataFrame, *, unit: str = "nats", width: Width = "single") -> Figure:
    """Training and validation loss per step, with the step of lowest validation loss marked.

    Args:
        history: columns `step, train_loss, validation_loss`; NaN where a loss was not measured.
        unit: unit of the loss.
        width: how wide, "single" or "double" column.

    Raises:
        UnknownNameError: a column is missing, or there is no such width.
    """
    require_columns(history, "history", "step", "train_loss", "validation_loss")
    figure = Figure(figsize=(inches(width), 2.15), layout="constrained")
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
    outside_legend(figure, *axes.get_legend_handles_labels())
    return figure
