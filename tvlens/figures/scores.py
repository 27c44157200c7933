"""DataFrames and score maps to matplotlib figures, in one style fit for print.

Every function returns a `matplotlib.figure.Figure` that belongs to no window and no global state:
show it in a notebook, or save it with `Run.write_figure`. Marker and line shapes repeat what the
colours say.
"""

import itertools
import textwrap
from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import rc_context
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
    PALETTE,
    PINK,
    RED,
    SKY,
    STYLE,
    WIDTHS,
    Width,
    inches,
    keep_panels,
    outside_legend,
    panels_in,
    require_columns,
    whole_numbers,
)
from tvlens.scores.catalogue import RANKED, SCORES
from tvlens.scores.ranking import top_heads

# The underscores leave comparing sizes to `head_maps`, whose message names both shapes.
ScoreMap = Float[np.ndarray, "_layer _head"] | Float[Tensor, "_layer _head"]

_COLOURS = (BLUE, RED, GREEN, ORANGE, PINK, SKY, GREY, "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def head_maps(
    aie: ScoreMap,
    contribution: ScoreMap,
    *,
    task: str,
    k: int = 10,
    unit: str = "probability",
) -> Figure:
    """Two maps over layers and heads side by side: causal effect and learned contribution.

    As `score_maps` of these two.

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
    return score_maps({"aie": aie, "contribution": contribution}, task=task, k=k, unit=unit)


@rc_context(STYLE)
def score_maps(
    scores: Mapping[str, ScoreMap],
    *,
    task: str,
    k: int = 10,
    unit: str = "probability",
    width: Width = "double",
) -> Figure:
    """A map over layers and heads for every score of the catalogue that is given.

    In every map a frame marks the k heads of highest first score (AIE) and a dot the k of highest
    own score, in the first map those of the second (signed: a head that works against the task
    ranks last), so agreement is a dot in a frame. Layers without heads, NaN in every map, are grey.

    Args:
        scores: two or more scores of each head, by their name in `tvlens.scores.catalogue`.
        task: what to call it in the title.
        k: how many heads of each to mark.
        unit: unit of the effects.
        width: how wide, "single" or "double" column.

    Raises:
        UnknownNameError: fewer than two of the names are scores of the catalogue, or there is no
            such width.
        ShapeError: the maps differ in shape, or have fewer than k heads.
        NumericalError: a score is not finite.
    """
    known = [score for score in SCORES if score.heads is not None]
    shown = [score for score in known if score.name in scores]
    if len(shown) < 2:
        raise UnknownNameError(
            f"maps of {sorted(scores)} asked for; expected two or more of "
            f"{', '.join(score.name for score in known)}"
        )
    maps = [torch.as_tensor(scores[score.name]).detach().cpu().double() for score in shown]
    for score, grid in zip(shown, maps, strict=True):
        if grid.shape != maps[0].shape:
            raise ShapeError(
                f"the {shown[0].label} map has shape {[*maps[0].shape]} (layer, head), the "
                f"{score.label} map {[*grid.shape]}; both must come from the same model"
            )
    best = [top_heads(grid, k) for grid in maps]
    n_layers, n_heads = maps[0].shape
    across, height = np.clip(0.26 * n_heads, 2.1, 3.2), np.clip(0.14 * n_layers, 1.6, 5.5)
    n_rows, n_columns = panels_in(width, across, len(maps))
    height = height if n_rows == 1 else min(height, 7.2 / n_rows)
    wide = min(inches(width), 0.5 + n_columns * across)
    figure = Figure(figsize=(wide, 0.45 + n_rows * (0.8 + height)), layout="constrained")
    figure.suptitle(task)
    grid_of_panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    panels = keep_panels(grid_of_panels, len(maps))
    dots = [best[1], *best[1:]]
    for axes, score, grid, marked in zip(panels, shown, maps, dots, strict=True):
        limit = float(grid.nan_to_num().abs().max()) or 1.0
        axes.set_facecolor(PALE)
        image = axes.imshow(
            grid.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, origin="lower", aspect="auto"
        )
        bar = figure.colorbar(image, ax=axes, location="bottom", aspect=28, pad=0.1 / height)
        in_unit = f"{score.measured} ({unit})" if score is RANKED[0] else score.measured
        bar.set_label(textwrap.fill(in_unit, 40 if n_columns < 3 else 30))
        bar.locator = MaxNLocator(5 if n_columns < 3 else 3, symmetric=True)
        for layer, head in best[0]:
            corner = head - 0.5, layer - 0.5
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec="black", lw=1.1))
        layers, heads = zip(*marked, strict=True)
        axes.plot(heads, layers, "o", ms=3.6, mfc="black", mec="white", mew=0.7)
        axes.spines[:].set_visible(True)
        axes.locator_params(nbins=10, integer=True, steps=[1, 2, 5, 10])
        axes.set(
            title=score.title,
            xlabel="head",
            xlim=(-0.5, n_heads - 0.5),
            ylim=(-0.5, n_layers - 0.5),
        )
    for axes in grid_of_panels[:, 0]:
        axes.set_ylabel("layer")
    shared = len(set(best[0]) & set(best[1]))
    first, second = (score.label for score in shown[:2])
    dotted = f"{second} ({shared} in both)"
    if len(shown) > 2:
        dotted = f"each map's own score\n(in the first map by {second})"
    labels = [f"top {k} by {first}", f"top {k} by {dotted}"]
    outside_legend(figure, [axes.patches[0], axes.lines[0]], labels)
    return figure


@rc_context(STYLE)
def overlap_curve(curve: DataFrame, *, width: Width = "single") -> Figure:
    """Overlap of the two top-k sets against k, with its chance level and 95% band.

    Args:
        curve: columns `k, overlap, chance, chance_low, chance_high`, as shares of k; optionally
            `ceiling` (the overlap that prompt noise allows) and `task` (one line each).
        width: how wide, "single" or "double" column.

    Raises:
        UnknownNameError: a column is missing, or there is no such width.
        ShapeError: tasks have different chance levels at the same k.
    """
    require_columns(curve, "overlap curve", "k", "overlap", "chance", "chance_low", "chance_high")
    parts = list(curve.groupby("task", sort=False)) if "task" in curve else [("AIE and LTV", curve)]
    several = len(parts) > 1
    figure = Figure(figsize=(inches(width), 2.0), layout="constrained")
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
    axes.set(xlabel="k, heads in each set", ylabel="overlap (share of k)")
    axes.set_ylim(0, 1.02)
    if curve["k"].nunique() > 1:  # a model of one head has a single k
        axes.set_xlim(curve["k"].min(), curve["k"].max())
    axes.xaxis.set_major_locator(whole_numbers())
    outside_legend(figure, *axes.get_legend_handles_labels())
    return figure


@rc_context(STYLE)
def layer_profiles(profiles: DataFrame, *, width: Width = "double") -> Figure:
    """Where in depth the score mass lies: share per layer, one panel per task.

    Args:
        profiles: columns `task, layer, score, share`; score is a name of the
            catalogue, such as "aie" or "contribution".
        width: how wide, "single" or "double" column.

    Raises:
        UnknownNameError: a column is missing, or there is no such width.
    """
    require_columns(profiles, "layer profiles", "task", "layer", "score", "share")
    tasks = list(dict.fromkeys(profiles["task"]))
    lines, columns = panels_in(width, 1.6, len(tasks))
    wide = min(inches(width), max(WIDTHS["single"], 1.75 * columns))
    figure = Figure(figsize=(wide, 0.35 + 1.35 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    panels = keep_panels(grid, len(tasks))
    for axes, task in zip(panels, tasks, strict=True):
        for score in RANKED:
            chosen = (profiles["task"] == task) & (profiles["score"] == score.name)
            part = profiles[chosen].sort_values("layer")
            xy, colour = (part["layer"], part["share"]), PALETTE[score.colour]
            axes.fill_between(*xy, step="mid", color=colour, alpha=0.15, lw=0)
            axes.step(*xy, where="mid", color=colour, ls=score.dash, lw=1, label=score.label)
        axes.set_title("\n".join(textwrap.wrap(task, 20)))
        axes.xaxis.set_major_locator(whole_numbers(5))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylim(bottom=0)
    figure.supxlabel("layer")
    figure.supylabel("share of positive score")
    handles, labels = panels[0].get_legend_handles_labels()
    outside_legend(figure, handles, labels, above=True)
    return figure
