"""Where a prompt's information is: maps of layers and positions, or of layers and heads."""

from html import escape
from typing import Any

import pandas as pd
from pandas import DataFrame

from tvlens.figures import grids
from tvlens.figures.report import markup, pictures
from tvlens.figures.report.contents import Block, Contents, Picture, RunTables

_COLUMNS = ("task", "site", "layer", "head", "position", "role", "method", "metric", "value")


def effects_of(run: RunTables) -> DataFrame | None:
    """The table of patching that a run holds."""
    return run.table("patching", *_COLUMNS, "ci_low", "ci_high", "normalised")


def patching(contents: Contents) -> list[Block]:
    """A map for each task, site, method and direction."""
    blocks: list[Block] = []
    for run in contents.runs:
        table = effects_of(run)
        if table is None:
            continue
        if "direction" not in table:
            table = table.assign(direction="")
        for task, rows in table.groupby("task", sort=False):
            blocks += [markup.heading(task), '<div class="maps">']
            keys = ["site", "method", "direction"]
            for key, part in rows.groupby(keys, sort=False):
                blocks += _map(run, str(task), key, part)
            blocks.append("</div>")
    return blocks


def _map(run: RunTables, task: str, key: tuple[str, ...], part: DataFrame) -> list[Block]:
    site, method, direction = key
    place = _places(part)
    part = part.assign(place=place)
    headed = part["head"].notna().any() and part["head"].nunique() > 1
    over = ""
    if headed and part["place"].nunique() > 1:
        part = part.loc[part.groupby(["layer", "head"])["value"].idxmax()]
        over = " The place of the greatest effect counts."
    value = "normalised" if part["normalised"].notna().any() else "value"
    words = "share of the gap restored" if value == "normalised" else "effect"
    columns: list[str] = []
    if headed:
        across = part["head"].astype(int).tolist()
    else:
        order = _in_order(part["place"])
        across = [order.index(each) for each in part["place"]]
        columns = _names(order, run.tokens.get(f"{task}/{site}", ()))
    metric = str(part["metric"].iloc[0]).replace("_", " ")
    data = {
        "layer": part["layer"].astype(int).tolist(),
        "head" if headed else "place": across,
        "value": pd.to_numeric(part[value]).tolist(),
        "told": [_told(row, metric, across[i], columns) for i, row in enumerate(part.itertuples())],
    }
    if pd.isna(data["value"]).all():
        return []
    extra = 8 * max(map(len, columns), default=0)
    drawn = pictures.tile_map(
        pictures.source_of(data),
        "value",
        "head" if headed else "place",
        "layer",
        height=90 + extra + max(110, 9 * (max(data["layer"]) + 1)),
        columns=columns,
    )
    how = ", ".join(
        filter(None, [grids.named(site), direction, "" if method == "exact" else method])
    )
    caption = f"{words.capitalize()} ({metric}), by layer.{over} Point at a tile for its numbers."
    return [Picture(drawn, f"{task}: {how}", caption, run.made("patching"))]


def _places(part: DataFrame) -> list[Any]:
    """Positions as numbers, or roles where no position is counted."""
    position = pd.to_numeric(part["position"], errors="coerce")
    if position.notna().all():
        return [int(each) for each in position]
    return [str(role) if isinstance(role, str) and role else "query" for role in part["role"]]


def _in_order(places: "pd.Series[Any]") -> list[Any]:
    found = list(dict.fromkeys(places))
    return sorted(found) if isinstance(found[0], int) else grids.in_order(found)


def _names(places: list[Any], tokens: tuple[str, ...]) -> list[str]:
    """Places in words: the token that stands there, where it is known."""
    if tokens and places == list(range(len(tokens))):
        return [f"{token.strip() or '␣'} {place}" for place, token in enumerate(tokens)]
    return [str(place) for place in places]


def _told(row: Any, metric: str, across: int, columns: list[str]) -> str:
    where = f"head {across}" if not columns else columns[across]
    effect = markup.with_ends(row.value, row.ci_low, row.ci_high, digits=4)
    lines = [f"layer {row.layer}, {where}", f"effect on {metric}: {effect}"]
    if not columns:
        lines[0] += f", {row.place}" if isinstance(row.place, str) else f", position {row.place}"
    if not pd.isna(row.normalised):
        lines.append(f"share restored: {row.normalised:.3f}")
    first, *others = map(escape, lines)
    return "<br>".join([f"<strong>{first}</strong>", *others])
