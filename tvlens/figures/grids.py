"""Tables of effects to grids over layers, and grids to maps.

A grid has a row for each layer between the first and the last in the table, and a column for each
head or place of the prompt; it is NaN, and drawn grey, where nothing was measured.
"""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from pandas import DataFrame

from tvlens.errors import NumericalError, ShapeError, UnknownNameError
from tvlens.figures.style import PALE, require_columns

Measure = Literal["value", "normalised"]
"""Effects in the metric's own unit, or the share that is restored: 0 nothing, 1 all."""

Top = Literal["high", "low", "size"]
"""The best are the highest, the lowest (of a metric that a good patch lowers, such as a squared
error), or those furthest from 0.
"""

Key = TypeVar("Key", bound=Hashable)

_COLUMNS = ("task", "site", "layer", "head", "position", "role", "method", "metric")
_DEMONSTRATION = re.compile(r"(input|answer|x|y) (\d+)")
_FOLDED = {
    "input": "inputs (mean)",
    "answer": "answers (mean)",
    "x": "x (mean)",
    "y": "y (mean)",
}
_GROUPS = ("inputs", "xs", "answers", "ys")
_AFTER = ("separators", "query", "answer prefix")
_SMALLEST = 4.5
_SITES = {
    "resid_pre": "residual stream before the layer",
    "resid_mid": "residual stream after attention",
    "resid_post": "residual stream after the layer",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "z": "head outputs (z)",
    "pattern": "attention patterns",
}
BEST = {"high": "top {}", "low": "lowest {}", "size": "{} furthest from 0"}


def pick(rows: DataFrame, column: str, asked: Any, table: str = "patching") -> DataFrame:
    """The rows with this in the column; where nothing is asked for, all must have the same.

    Raises:
        UnknownNameError: no row has it, or nothing was asked for and there are several.
    """
    there = list(dict.fromkeys(rows[column].tolist()))
    if asked is None and len(there) == 1:
        return rows
    if asked not in there:
        what = f"rows of {len(there)} {column}s" if asked is None else f"no {column} {asked!r}"
        raise UnknownNameError(
            f"the {table} table holds {what}; there are {there}: give one of them as {column}"
        )
    return rows[rows[column] == asked]


def choose(table: DataFrame, task: str, value: str, method: str, metric: str | None) -> DataFrame:
    """The rows of one task, method and metric, their numbers as numbers, their place as `place`.

    Raises:
        UnknownNameError: a column is missing, or the table holds no such rows.
        ShapeError: some places are positions, others roles, or a place is there twice.
        NumericalError: a value is not finite.
    """
    if value not in ("value", "normalised"):
        raise UnknownNameError(
            f"a map of {value!r} was asked for; a patching table has 'value' and 'normalised'"
        )
    require_columns(table, "patching", *_COLUMNS, value)
    rows = pick(pick(pick(table, "task", task), "method", method), "metric", metric)
    position = pd.to_numeric(rows["position"], errors="coerce")
    single = position.notna()
    if single.all():
        place = position.astype(int)
    elif single.any():
        raise ShapeError(
            f"the patching table of {task!r} holds {single.sum()} rows of positions and "
            f"{(~single).sum()} of roles: draw a table of either"
        )
    else:
        place = rows["role"].astype(object).fillna("").replace("", "query")
    return checked(rows.assign(place=place), value, "site", "head", "place")


def checked(rows: DataFrame, value: str, group: str, *columns: str) -> DataFrame:
    """The rows with layers, heads and values as numbers, NaN where they are empty.

    Only layers without heads have no value, and places where clean and corrupted do not differ no
    normalised one.

    Raises:
        ShapeError: a group holds a layer twice with the same in these columns.
        NumericalError: a value is not finite.
    """
    numbers = rows[["head", value]].apply(pd.to_numeric, errors="coerce").astype(float)
    rows = rows.assign(**numbers, layer=rows["layer"].astype(int))
    twice = rows[rows.duplicated([group, "layer", *columns])]
    if len(twice):
        where = ", ".join(f"{name} {twice[name].iloc[0]}" for name in (group, "layer", *columns))
        raise ShapeError(
            f"the table holds {len(twice)} of {len(rows)} effects twice (first: {where}): keep the "
            "rows of one patch only, such as of one direction"
        )
    broken = ~np.isfinite(rows[value])
    empty = rows[value].isna()
    whole = empty.groupby([rows[group], rows["layer"]]).transform("all")
    broken &= ~(whole if value == "value" else empty)
    if broken.any():
        first = rows[broken].iloc[0]
        where = ", ".join(f"{name} {first[name]}" for name in (group, "layer", *columns))
        raise NumericalError(
            f"{broken.sum()} of {len(rows)} effects are not finite (first: {first[value]} at "
            f"{where}): only finite numbers can be drawn"
        )
    return rows


def of_heads(rows: DataFrame, site: str) -> DataFrame:
    """The rows of heads of a site.

    Raises:
        UnknownNameError: the site has none.
    """
    rows = rows[rows["head"].notna()]
    if rows.empty:
        raise UnknownNameError(
            f"the patching table holds no heads of site {site!r}; sites that have heads are q, k, "
            "v, z and pattern: choose one of them, or draw position_map"
        )
    return rows.assign(head=rows["head"].astype(int))


def of_head(rows: DataFrame, site: str, head: int | None) -> DataFrame:
    """The rows of one head, or of a site without heads.

    Raises:
        UnknownNameError: there is no such head, or none was named of a site with several.
    """
    if head is None and rows["head"].isna().all():
        return rows
    return pick(of_heads(rows, site), "head", head)


def fold(rows: DataFrame, value: str) -> DataFrame:
    """The mean over demonstrations: one role for all inputs, one for all answers."""
    roles = rows["place"].map(
        lambda role: _FOLDED[found[1]] if (found := _DEMONSTRATION.fullmatch(role)) else role
    )
    return rows.assign(place=roles).groupby(["layer", "place"], as_index=False)[value].mean()


def in_order(roles: Iterable[str]) -> list[str]:
    """Roles in the order of the prompt; those that no prompt of tvlens has stand last."""
    parts, of_all = ("input", "x", "answer", "y"), (*_FOLDED.values(), *_GROUPS)

    def rank(role: str) -> tuple[int, int, int]:
        if found := _DEMONSTRATION.fullmatch(role):
            return 1, int(found[2]), parts.index(found[1])
        if role in of_all:
            return 1, 0, of_all.index(role)
        if role in _AFTER:
            return 2, _AFTER.index(role), 0
        return (0 if role == "start" else 3), 0, 0

    return sorted(dict.fromkeys(roles), key=rank)


def grids(parts: Mapping[Key, DataFrame], across: str, value: str) -> dict[Key, DataFrame]:
    """A grid of each table's values, layers down and `across` to the right.

    All grids have the same layers, and those of places the same places.

    Raises:
        NumericalError: there is no value.
    """
    if all(rows[value].isna().all() for rows in parts.values()):
        raise NumericalError(
            f"nothing is left to draw: column {value!r} of the patching table is empty"
            + (", so clean and corrupted do not differ: draw 'value'" if value != "value" else "")
        )
    together = pd.concat(parts.values())
    layers = range(together["layer"].min(), together["layer"].max() + 1)

    def columns(rows: DataFrame) -> Sequence[Any]:
        if across == "head":
            return range(rows["head"].max() + 1)
        if isinstance(together["place"].iloc[0], str):
            return in_order(together["place"])
        return range(together["place"].min(), together["place"].max() + 1)

    return {
        key: rows.pivot(index="layer", columns=across, values=value)
        .astype(float)
        .reindex(index=layers, columns=columns(rows))
        for key, rows in parts.items()
    }


def limit(maps: Iterable[DataFrame]) -> float:
    """The largest size of any number in the grids; 1 where all are 0."""
    return max(float(np.nanmax(np.abs(grid.to_numpy()), initial=0)) for grid in maps) or 1.0


def draw(axes: Axes, grid: DataFrame, scale: float) -> AxesImage:
    """A grid as a map, red above 0 and blue below, with its first layer at the bottom."""
    first = _first(grid)
    sides = first - 0.5, first + len(grid.columns) - 0.5
    ends = grid.index[0] - 0.5, grid.index[-1] + 0.5
    axes.set_facecolor(PALE)
    axes.spines[:].set_visible(True)
    for axis in (axes.xaxis, axes.yaxis):
        # One layer or head needs one tick.
        axis.set_major_locator(MaxNLocator(10, integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    return axes.imshow(
        grid.to_numpy(),
        cmap="RdBu_r",
        vmin=-scale,
        vmax=scale,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        extent=(*sides, *ends),
    )


def _first(grid: DataFrame) -> int:
    """Where the first column stands: at its number, roles from 0."""
    return 0 if isinstance(grid.columns[0], str) else int(grid.columns[0])


def frame(axes: Axes, grid: DataFrame, k: int, top: Top) -> None:
    """Frames the k best cells of a map, or all where they are fewer."""
    for place in best(grid.to_numpy().ravel(), k, top):
        row, column = divmod(int(place), grid.shape[1])
        corner = grid.columns[column] - 0.5, grid.index[row] - 0.5
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, ec="black", lw=1.1))


def best(values: np.ndarray, k: int, top: Top) -> np.ndarray:
    """Where the k best of some numbers stand, the best first; NaN is never among them.

    Raises:
        ShapeError: k is negative.
    """
    if k < 0:
        raise ShapeError(f"the top {k} were asked for; expected 0 (none) or more")
    ranked = {"high": values, "low": -values, "size": np.abs(values)}[top]
    order = np.argsort(-ranked, kind="stable")  # NaN comes last
    return order[: min(k, int(np.isfinite(values).sum()))]


def label_columns(axes: Axes, grid: DataFrame, labels: Sequence[str], width: float) -> None:
    """Writes labels below the columns of a map `width` inches wide, from the last to the left.

    Where they are too many to be read, only every second, third, … is written.
    """
    pitch = 72 * width / len(labels)
    step = int(np.ceil(_SMALLEST / pitch))
    places = range((len(labels) - 1) % step, len(labels), step)
    axes.set_xticks(
        [_first(grid) + place for place in places],
        [labels[place] for place in places],
        rotation=90,
        fontsize=float(np.clip(0.95 * pitch * step, _SMALLEST, 7)),
        parse_math=False,
    )
    axes.tick_params(axis="x", length=2, pad=1.5)


def colour_bar(
    figure: Figure,
    image: AxesImage,
    panels: Sequence[Axes],
    label: str,
    *,
    location: Literal["right", "bottom"],
    size: tuple[float, float],
) -> None:
    """The scale of all panels, which are `size` inches wide and high, as thick in any figure."""
    across, along = size if location == "right" else size[::-1]
    length = min(along, 3.2)
    bar = figure.colorbar(
        image,
        ax=panels,
        location=location,
        shrink=length / along,
        aspect=length / 0.1,
        fraction=0.1 / across,
        pad=0.02,
    )
    bar.set_label(label)
    bar.locator = MaxNLocator(5, symmetric=True)


def list_of(names: str | Sequence[str]) -> list[str]:
    """One name or several, each once.

    Raises:
        UnknownNameError: there are none.
    """
    names = [names] if isinstance(names, str) else list(dict.fromkeys(names))
    if not names:
        raise UnknownNameError("nothing is left to draw: the list of names is empty; give one")
    return names


def named(site: str, head: int | None = None) -> str:
    """A site, and which of its heads, in words."""
    return _SITES.get(site, site) + ("" if head is None else f", head {head}")


def in_words(place: int | str) -> str:
    """A position or a role in words."""
    return place if isinstance(place, str) else f"position {place}"


def measured(rows: DataFrame, value: str) -> str:
    """What a column of these rows measures, in words."""
    metric = str(rows["metric"].iloc[0]).replace("_", " ")
    return f"effect on {metric}" if value == "value" else f"share of {metric} restored"
