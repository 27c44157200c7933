"""Figures of activation patching: what a patch does at each layer, place of the prompt and head.

The table is `patching.csv`, one row for each task, site, layer, head, place and method. A place is
a position, a column of the prompt, or a role in it, such as "answer 3". What was not patched, and
layers without heads, are grey. All maps of a figure share one scale, so that colours can be
compared; draw a figure for each to see small effects beside large ones.
"""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import DataFrame

from tvlens.errors import ShapeError, UnknownNameError
from tvlens.figures.grids import (
    BEST,
    Measure,
    Top,
    checked,
    choose,
    colour_bar,
    draw,
    fold,
    frame,
    grids,
    in_words,
    label_columns,
    limit,
    list_of,
    measured,
    named,
    of_head,
    of_heads,
    pick,
)
from tvlens.figures.style import STYLE, keep_panels, require_columns

_VISIBLE = {" ": "·", "\n": "⏎", "\t": "⇥"}
_LONGEST_TOKEN = 14
_WIDEST = 6.4
_OVER = {"sum": "sum over places", "max": "greatest over places"}


@rc_context(STYLE)
def position_map(
    table: DataFrame,
    *,
    task: str,
    site: str | Sequence[str],
    tokens: Sequence[str] | None = None,
    value: Measure = "value",
    head: int | None = None,
    method: str = "exact",
    metric: str | None = None,
) -> Figure:
    """A map over layers and places of the prompt, one for each site.

    Places are the positions of the table, with the prompt's tokens where they are given, or its
    roles in the order of the prompt. Of tokens too many to be read, every second, third, … is
    written, the last one always.

    Args:
        table: the columns of `patching.csv`.
        task: which task to draw.
        site: which site, or several.
        tokens: the prompt's tokens, from position 0 to the last in the table.
        value: which column to draw.
        head: which head of sites that have heads.
        method: "exact" or "attribution".
        metric: which metric; may be left out where the table holds one.

    Raises:
        UnknownNameError: a column is missing, or the table holds no such task, site, head, method
            or metric.
        ShapeError: the table holds positions and roles, or a place twice, or the tokens do not fit
            its positions.
        NumericalError: a value is not finite, or there is none.
    """
    rows = choose(table, task, value, method, metric)
    sites = list_of(site)
    maps = grids(
        {name: of_head(pick(rows, "site", name), name, head) for name in sites}, "place", value
    )
    n_layers, n_places = maps[sites[0]].shape
    labels = _labels(list(maps[sites[0]].columns), tokens)
    lines, across = (len(sites), 1) if n_places > 30 else (1, len(sites))
    width = float(np.clip(0.16 * n_places, 1.5, max(1.5, 6.4 / across)))
    height = float(np.clip(0.085 * n_layers, 1.1, 3.0))
    size = 1.2 + across * (width + 0.1), 1.1 + lines * (height + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, across, sharex=True, sharey=True, squeeze=False)
    for axes, name in zip(panels.flat, sites, strict=True):
        image = draw(axes, maps[name], limit(maps.values()))
        axes.set_title(textwrap.fill(named(name, head), round(16 * width)))
    if labels is not None:
        for axes in panels[-1]:
            label_columns(axes, maps[sites[0]], labels, width)
    figure.suptitle(task)
    figure.supxlabel("position" if labels is None else "token" if tokens else "role in the prompt")
    for axes in panels[:, 0]:
        axes.set_ylabel("layer")
    scale, size = measured(rows, value), (across * width, lines * height)
    colour_bar(figure, image, list(panels.flat), scale, location="right", size=size)
    return figure


@rc_context(STYLE)
def role_maps(
    table: DataFrame,
    *,
    site: str,
    noising: DataFrame | None = None,
    folded: bool = True,
    value: Measure = "value",
    head: int | None = None,
    method: str = "exact",
    metric: str | None = None,
) -> Figure:
    """A small map over layers and roles for each task, and each direction of patching.

    Args:
        table: the columns of `patching.csv`, with roles as places; optionally `direction`
            ("denoising", "noising"), a row of maps each.
        site: which site to draw.
        noising: a second table, of noising, where the first is of denoising.
        folded: whether to draw the mean over demonstrations, or every one of them.
        value: which column to draw.
        head: which head of a site that has heads.
        method: "exact" or "attribution".
        metric: which metric; may be left out where the table holds one.

    Raises:
        UnknownNameError: a column is missing, or the table holds no such site, head, method or
            metric.
        ShapeError: the table holds positions, or a place twice.
        NumericalError: a value is not finite, or there is none.
    """
    if noising is not None:
        require_columns(noising, "noising", *(name for name in table if name != "direction"))
        both = table.assign(direction="denoising"), noising.assign(direction="noising")
        table = pd.concat(both, ignore_index=True)
    require_columns(table, "patching", "task")
    ways = table["direction"] if "direction" in table else pd.Series("", index=table.index)
    parts = {}
    for (way, task), rows in table.groupby([ways, "task"], sort=False):
        rows = pick(choose(rows, task, value, method, metric), "site", site)
        part = of_head(rows, site, head)
        if not isinstance(part["place"].iloc[0], str):
            raise ShapeError(
                f"the patching table of {task!r} holds positions, which mean another thing in "
                "every task: give a table of roles, or draw position_map of each task"
            )
        parts[way, task] = fold(part, value) if folded else part
    if not parts:
        raise UnknownNameError("the patching table holds no rows: give one with at least one task")
    maps = grids(parts, "place", value)
    tasks, directions = (
        list(dict.fromkeys(names)) for names in zip(*[k[::-1] for k in maps], strict=True)
    )
    roles = list(next(iter(maps.values())).columns)
    width = float(np.clip(0.09 * len(roles), 0.9, 2.2))
    across = min(len(tasks), int(6.6 / width))
    height = float(np.clip(0.05 * len(next(iter(maps.values()))), 1.2, 1.8))
    lines = -(-len(tasks) // across) * len(directions)
    size = max(2.6, 1.1 + across * (width + 0.1)), 1.2 + lines * (height + 0.2)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(lines, across, sharex=True, sharey=True, squeeze=False)
    for (way, task), grid in maps.items():
        block, column = divmod(tasks.index(task), across)
        line = block * len(directions) + directions.index(way)
        axes = panels[line, column]
        image = draw(axes, grid, limit(maps.values()))
        label_columns(axes, grid, roles, width)
        axes.tick_params(labelbottom=way == directions[-1])
        if way == directions[0]:
            axes.set_title(textwrap.fill(str(task), round(14 * width)))
        if column == 0:
            axes.set_ylabel(f"{way}\nlayer".lstrip())
    for axes in panels.flat:
        if not axes.images:
            axes.set_axis_off()
    figure.suptitle(named(site, head))
    figure.supxlabel("role in the prompt")
    scale, size = measured(part, value), (across * width, lines * height)
    colour_bar(figure, image, list(panels.flat), scale, location="right", size=size)
    return figure


@rc_context(STYLE)
def head_map(
    table: DataFrame,
    *,
    task: str,
    site: str | Sequence[str],
    place: int | str | None = None,
    over: Literal["sum", "max"] | None = None,
    k: int = 10,
    top: Top = "high",
    value: Measure = "value",
    method: str = "exact",
    metric: str | None = None,
) -> Figure:
    """A map over layers and heads, one for each site: at one place, or over all places.

    In each map a frame marks the k best heads.

    Args:
        table: the columns of `patching.csv`.
        task: which task to draw.
        site: which site that has heads, or several.
        place: a position or a role; may be left out where the table holds one.
        over: instead of one place, the sum over places, or the greatest value at any.
        k: how many heads to frame; all where there are fewer.
        top: which heads are the best.
        value: which column to draw.
        method: "exact" or "attribution".
        metric: which metric; may be left out where the table holds one.

    Raises:
        UnknownNameError: a column is missing; the table holds no such task, site, place, method or
            metric; the site has no heads.
        ShapeError: the table holds positions and roles, or a place twice.
        NumericalError: a value is not finite, or there is none.
    """
    rows = choose(table, task, value, method, metric)
    parts: dict[tuple[str, Any], DataFrame] = {}
    for name in list_of(site):
        part = of_heads(pick(rows, "site", name), name)
        part = part if over else pick(part, "place", place)
        parts |= {(name, where): there for where, there in part.groupby("place")}
    maps = grids(parts, "head", value)
    where = _OVER[over] if over else in_words(next(iter(maps))[1])
    by_site = {
        name: _over([grid for key, grid in maps.items() if key[0] == name], over)
        for name, _ in maps
    }
    titled = {named(name): grid for name, grid in by_site.items()}
    return _head_maps(titled, f"{task}, {where}", measured(rows, value), k, top)


@rc_context(STYLE)
def head_paths(
    table: DataFrame,
    *,
    task: str | None = None,
    receivers: Sequence[str] | None = None,
    unit: str = "logit difference",
    k: int = 10,
    top: Top = "high",
) -> Figure:
    """A map over layers and heads that send, one for each receiver: effects of direct paths.

    In each map a frame marks the k best heads. Heads that cannot reach the receiver are grey.

    Args:
        table: columns `receiver, layer, head, value`; optionally `task`.
        task: which task to draw; may be left out where the table holds one, or none.
        receivers: which receivers, in this order; all where left out.
        unit: unit of the effects.
        k: how many heads to frame; all where there are fewer.
        top: which heads are the best.

    Raises:
        UnknownNameError: a column is missing, or the table holds no such task or receiver.
        ShapeError: the table holds a receiver, layer and head twice.
        NumericalError: a value is not finite, or there is none.
    """
    require_columns(table, "paths", "receiver", "layer", "head", "value")
    if task is not None or "task" in table:
        require_columns(table, "paths", "task")
        table = pick(table, "task", task, "paths")
    names = list_of(list(table["receiver"]) if receivers is None else receivers)
    rows = checked(table, "value", "receiver", "head")
    rows = rows.assign(head=rows["head"].astype(int))
    parts = {name: pick(rows, "receiver", name, "paths") for name in names}
    title = "" if "task" not in rows else rows["task"].iloc[0]
    return _head_maps(grids(parts, "head", "value"), title, f"direct effect ({unit})", k, top)


def _head_maps(maps: Mapping[str, DataFrame], title: str, measure: str, k: int, top: Top) -> Figure:
    """Maps over layers and heads with the k best framed in each, and one scale below them."""
    sizes = [float(np.clip(0.26 * grid.shape[1], 0.8, 3.2)) for grid in maps.values()]
    n_layers = len(next(iter(maps.values())))
    lines = int(np.ceil(0.7 * sum(sizes) / _WIDEST))
    across = -(-len(maps) // lines)
    ratios = sizes if lines == 1 else [max(sizes)] * across
    width = float(np.clip(sum(ratios), 2.1, _WIDEST))
    height = float(np.clip(0.14 * n_layers, 1.3, 5.5 if lines == 1 else 2.4))
    size = 0.6 + width + 0.1 * across, 1.4 + lines * (height + 0.3)
    figure = Figure(figsize=size, layout="constrained")
    cells = figure.subplots(lines, across, sharey=True, squeeze=False, width_ratios=ratios)
    panels = keep_panels(cells, len(maps))
    for place, (axes, (name, grid)) in enumerate(zip(panels, maps.items(), strict=True)):
        image = draw(axes, grid, limit(maps.values()))
        frame(axes, grid, k, top)
        letters = round(14 * width * ratios[place % across] / sum(ratios))
        axes.set_title(textwrap.fill(str(name), letters))
        axes.set(xlabel="head" if place + across >= len(maps) else "")
        axes.set(ylabel="" if place % across else "layer")
    figure.suptitle(title)
    size = width, lines * height
    colour_bar(figure, image, list(panels), measure, location="bottom", size=size)
    frames = [axes.patches[0] for axes in panels if axes.patches]
    if frames:
        most = max(len(axes.patches) for axes in panels)
        label = BEST[top].format(most) + (" of each map" if len(maps) > 1 else "")
        figure.legend(frames[:1], [label], loc="outside lower center")
    return figure


def _over(maps: Sequence[DataFrame], over: str | None) -> DataFrame:
    """The sum or the greatest of grids, NaN where all of them are; of one grid itself."""
    layers = pd.concat(maps).groupby(level=0)
    return layers.max() if over == "max" else layers.sum(min_count=1)


def _labels(places: list[Any], tokens: Sequence[str] | None) -> list[str] | None:
    """What is written below each place; None where that is its number."""
    if tokens is None:
        return places if isinstance(places[0], str) else None
    if isinstance(places[0], str):
        raise ShapeError(
            f"tokens were given, but the patching table holds roles ({places[0]!r}, …): leave "
            "tokens out, or give a table of positions"
        )
    if len(tokens) != places[-1] + 1:
        raise ShapeError(
            f"{len(tokens)} tokens were given, but the positions of the patching table end at "
            f"{places[-1]}: expected the {places[-1] + 1} tokens up to there"
        )
    return [_visible(tokens[place]) for place in places]


def _visible(token: str) -> str:
    """A token with its white space as signs, cut where it is long."""
    signs = (
        _VISIBLE.get(c, c if c.isprintable() else c.encode("unicode_escape").decode())
        for c in token
    )
    text = "".join(signs)
    return text if len(text) <= _LONGEST_TOKEN else text[: _LONGEST_TOKEN - 1] + "…"
