"""DataFrames and score maps to matplotlib figures, in one style fit for print.

Every function returns a `matplotlib.figure.Figure` that belongs to no window and no global state:
show it in a notebook, or save it with `Run.write_figure`. Colours are the Okabe-Ito palette, which
colour-blind readers can tell apart; marker and line shapes repeat what the colours say.
"""

import itertools
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
from tvlens.headsets import top_heads

# The underscores leave comparing sizes to `head_maps`, whose message names both shapes.
ScoreMap = Float[np.ndarray, "_layer _head"] | Float[Tensor, "_layer _head"]

_BLUE, _ORANGE, _GREEN, _PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
_SKY, _RED, _GREY, _PALE = "#56B4E9", "#D55E00", "#666666", "#E3E3E3"
_COLOURS = (_BLUE, _RED, _GREEN, _ORANGE, _PINK, _SKY, _GREY, "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_METHODS: dict[str, tuple[str, str, str]] = {
    "none": ("no vector", _GREY, "X"),
    "fv_layer": ("FV, one layer", _ORANGE, "^"),
    "fv_per_layer": ("FV, per layer", _RED, "v"),
    "ltv": ("LTV", _BLUE, "o"),
    "random": ("random ω", _SKY, "s"),
    "permuted": ("permuted ω", _PINK, "D"),
}
_BARE = ("bare model", "black", "-")
_VECTORS = {
    "fv_layer": ("FV, one layer", _ORANGE, "-"),
    "fv_per_layer": ("FV, per layer", _RED, "-"),
    "fv_published": ("FV, published", _GREEN, "--"),
    "ltv": ("LTV, one length", _BLUE, "-"),
    "ltv_lengths": ("LTV, several lengths", _SKY, "-"),
    "random": ("random ω", _PINK, ":"),
    "permuted": ("permuted ω", _GREY, ":"),
}
_CURVES: dict[str, dict[str, tuple[str, str, str]]] = {
    "model and estimators": {
        "truncation": ("last points only", _BLUE, "-"),
        "least_squares": ("least squares", _GREEN, "--"),
        "ridge": ("ridge", _SKY, "--"),
        "lasso": ("lasso", _PINK, "--"),
        "nearest_neighbours": ("3-NN", _ORANGE, "--"),
        "averaging": ("averaging", _GREY, "--"),
        "tree": ("tree", _RED, "--"),
        "boosting": ("boosted trees", _RED, ":"),
        "network": ("MLP", _BLUE, ":"),
    },
    "vectors of the class": {
        **{f"{method}_class": look for method, look in _VECTORS.items()},
        "bare_dummies": ("bare, dummies", "black", ":"),
        "fv_layer_class_dummies": ("FV, dummies", _ORANGE, ":"),
        "fv_published_class_dummies": ("published, dummies", _GREEN, ":"),
        "ltv_class_dummies": ("LTV, dummies", _BLUE, ":"),
    },
    "vectors of each prompt": {f"{method}_prompt": look for method, look in _VECTORS.items()},
}
_METRICS = {"exact_match": "exact match", "cross_entropy": "cross-entropy (nats)"}
_PROMPTS = {"zero": "zero-shot prompts", "shuffled": "shuffled-label prompts"}
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 8.0,
    "figure.labelsize": 8.0,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.0,
    "grid.color": _PALE,
    "legend.frameon": False,
}


@rc_context(_STYLE)
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
        bar.set_label(label)
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


@rc_context(_STYLE)
def overlap_curve(curve: DataFrame) -> Figure:
    """Overlap of the two top-k sets against k, with its chance level and 95% band.

    Args:
        curve: columns `k, overlap, chance, chance_low, chance_high`, as shares of k; optionally
            `ceiling` (the overlap that prompt noise allows) and `task` (one line each).

    Raises:
        UnknownNameError: a column is missing.
        ShapeError: tasks have different chance levels at the same k.
    """
    _require(curve, "overlap curve", "k", "overlap", "chance", "chance_low", "chance_high")
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
    axes.fill_between(chance["k"], *band, color=_PALE, lw=0, label="chance, 95%")
    axes.plot(chance["k"], chance["chance"], color=_GREY, lw=1, ls="--", label="chance, mean")
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
    axes.xaxis.set_major_locator(_whole_numbers())
    if several:
        figure.legend(loc="outside right center")
    else:
        figure.legend(loc="outside lower center", ncols=2)
    return figure


@rc_context(_STYLE)
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
    _require(results, "results", "task", "method", "prompt", "metric", "value", "ci_low", "ci_high")
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
        axes.add_patch(Rectangle(*interval, color=_PALE, lw=0))
        label = "in context (clean prompts)" if number == 0 else None
        axes.plot([row.value] * 2, [y - 0.42, y + 0.42], color="black", lw=1.2, label=label)


@rc_context(_STYLE)
def error_curves(
    results: DataFrame, *, functions: str, train_points: int | None, shift: str = "none"
) -> Figure:
    """Squared error against the number of points: oracles, vectors of the class, of each prompt.

    Lines are means over clean test prompts, bands their 95% intervals. The bare model is in every
    panel, and a line marks the longest prompts that it was trained on.

    Args:
        results: columns `functions, shift, prompt, points, method, metric, value, ci_low, ci_high`.
        functions: which function class to draw.
        train_points: T_train.
        shift: which shift to draw.

    Raises:
        UnknownNameError: a column is missing, or nothing of this class and shift is there.
    """
    columns = ("functions", "shift", "prompt", "points", "method", "metric")
    _require(results, "results", *columns, "value", "ci_low", "ci_high")
    rows = results[
        (results["functions"] == functions)
        & (results["shift"] == shift)
        & (results["prompt"] == "clean")
        & (results["metric"] == "squared_error")
    ]
    if rows.empty:
        there = results[["functions", "shift"]].drop_duplicates().to_records(index=False).tolist()
        raise UnknownNameError(
            f"results hold no squared_error of {functions!r} under shift {shift!r} on clean "
            f"prompts; there are {there}"
        )
    known = {"bare"}.union(*_CURVES.values())
    others = {m: (m, _GREY, ":") for m in rows["method"].unique() if m not in known}
    figure = Figure(figsize=(7.2, 3.8))
    figure.subplots_adjust(left=0.075, right=0.99, top=0.87, bottom=0.4, wspace=0.08)
    panels = figure.subplots(1, len(_CURVES), sharex=True, sharey=True)
    for axes, (title, group) in zip(panels, _CURVES.items(), strict=True):
        shown = {"bare": _BARE} | group | (others if axes is panels[0] else {})
        for method, look in shown.items():
            _curve(axes, rows[rows["method"] == method], look)
        if train_points is not None:
            label = "longest in training"
            axes.axvline(train_points, color=_GREY, lw=0.8, ls=(0, (1, 2)), zorder=0, label=label)
        axes.set(title=title, yscale="log", xlabel="points in the prompt")
        axes.xaxis.set_major_locator(_whole_numbers(6))
        axes.grid(axis="y")
        axes.legend(
            loc="upper center", bbox_to_anchor=(0.5, -0.2), fontsize=6, ncols=2, columnspacing=0.8
        )
    top = float(rows.loc[rows["method"] == "bare", "value"].max())
    bottom = float(rows.loc[rows["method"].isin(["bare", "truncation"]), "ci_low"].min())
    last = max(2, int(rows["points"].max()))
    panels[0].set(ylim=(max(bottom / 2, 1e-5), max(top * 2.5, 1.5)), xlim=(1, last))
    panels[0].set_ylabel("squared error / variance of f(x)")
    under = "" if shift == "none" else f", shift: {shift}"
    figure.suptitle(f"{functions}{under}")
    return figure


def _curve(axes: Axes, part: DataFrame, look: tuple[str, str, str]) -> None:
    """One method's means and intervals; nothing where there are none."""
    # An estimator that makes no error has no place on a logarithmic axis.
    part = part[part["value"] > 1e-6].sort_values("points")
    if part.empty:
        return
    label, colour, dash = look
    low = part["ci_low"].clip(lower=1e-6)
    axes.fill_between(part["points"], low, part["ci_high"], color=colour, alpha=0.12, lw=0)
    (line,) = axes.plot(part["points"], part["value"], color=colour, ls=dash, lw=1.1, label=label)
    if look is _BARE:
        line.set(lw=1.6)
    if len(part) < 8:
        line.set(marker="o", ms=2.5)


@rc_context(_STYLE)
def layer_profiles(profiles: DataFrame) -> Figure:
    """Where in depth the score mass lies: share per layer, one panel per task.

    Args:
        profiles: columns `task, layer, score, share`; score is "aie" or "contribution".

    Raises:
        UnknownNameError: a column is missing.
    """
    _require(profiles, "layer profiles", "task", "layer", "score", "share")
    tasks = list(dict.fromkeys(profiles["task"]))
    lines, columns = -(-len(tasks) // 4), min(len(tasks), 4)
    figure = Figure(figsize=(max(3.4, 1.75 * columns), 0.6 + 1.35 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    looks = (("aie", "AIE", _RED, "-"), ("contribution", "LTV contribution", _BLUE, "--"))
    for axes, task in zip(panels, tasks, strict=False):
        for score, label, colour, dash in looks:
            chosen = (profiles["task"] == task) & (profiles["score"] == score)
            part = profiles[chosen].sort_values("layer")
            xy = part["layer"], part["share"]
            axes.fill_between(*xy, step="mid", color=colour, alpha=0.15, lw=0)
            axes.step(*xy, where="mid", color=colour, ls=dash, lw=1, label=label)
        axes.set_title(task)
        axes.xaxis.set_major_locator(_whole_numbers(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylim(bottom=0)
    for empty in panels[len(tasks) :]:
        empty.remove()
    figure.supxlabel("layer")
    figure.supylabel("share of positive score")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


@rc_context(_STYLE)
def weight_travel(travel: DataFrame, weights: DataFrame) -> Figure:
    """How far training moves the weights: start against end per preset, and distance per step.

    Args:
        travel: columns `preset, seed, step, travel, norm`: the distance of the weights from their
            start at each step, and their own norm.
        weights: columns `preset, seed, start, end`, one row per weight.

    Raises:
        UnknownNameError: a column is missing, or the two tables name different presets.
    """
    _require(travel, "weight travel", "preset", "seed", "step", "travel", "norm")
    _require(weights, "weights", "preset", "seed", "start", "end")
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
    panels[-1].xaxis.set_major_locator(_whole_numbers(5))
    figure.legend(loc="outside lower center", ncols=2 * len(presets))
    return figure


def _start_against_end(axes: Axes, weights: DataFrame, colour: str) -> None:
    limit = 1.08 * float(weights[["start", "end"]].abs().max().max() or 1.0)
    axes.axline((0, 0), slope=1, color=_GREY, lw=0.8, ls="--")
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


@rc_context(_STYLE)
def training_history(history: DataFrame, *, unit: str = "nats") -> Figure:
    """Training and validation loss per step, with the step of lowest validation loss marked.

    Args:
        history: columns `step, train_loss, validation_loss`; NaN where a loss was not measured.
        unit: unit of the loss.

    Raises:
        UnknownNameError: a column is missing.
    """
    _require(history, "history", "step", "train_loss", "validation_loss")
    figure = Figure(figsize=(3.6, 2.5), layout="constrained")
    axes = figure.subplots()
    train = history.dropna(subset=["train_loss"])
    axes.plot(train["step"], train["train_loss"], color=_SKY, lw=1, label="training")
    validation = history.dropna(subset=["validation_loss"])
    axes.plot(validation["step"], validation["validation_loss"], color=_BLUE, label="validation")
    if len(validation):
        best = validation.loc[validation["validation_loss"].idxmin()]
        label = f"lowest, step {best['step']:.0f}"
        axes.plot(best["step"], best["validation_loss"], "o", color=_RED, label=label)
    axes.set(xlabel="step", ylabel=f"loss ({unit})", ylim=(0, None))
    axes.xaxis.set_major_locator(_whole_numbers())
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def _whole_numbers(at_most: int = 10) -> MaxNLocator:
    return MaxNLocator(at_most, integer=True, steps=[1, 2, 5, 10])


def _require(table: DataFrame, name: str, *columns: str) -> None:
    missing = [column for column in columns if column not in table]
    if missing:
        raise UnknownNameError(
            f"the {name} table lacks {missing}; expected {list(columns)}, got {list(table.columns)}"
        )
