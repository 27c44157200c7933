"""How far head sets agree: tables of measures, and overlap at every size of the sets."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from pandas import DataFrame

from tvlens.figures.report import markup, ranks
from tvlens.figures.report.contents import Block, Contents, Picture, RunTables
from tvlens.figures.report.pictures import CYCLE, Band, Line, lines
from tvlens.scores.catalogue import SCORES

MEASURES = ("overlap", "rank_biased_overlap", "spearman")
"""What is shown of every comparison; its table holds more."""

_COLUMNS = ("task", "comparison", "measure", "k", "value", "chance")
_CURVE = ("task", "k", "overlap", "chance", "chance_low", "chance_high")


def agreement_of(run: RunTables) -> tuple[str, DataFrame] | None:
    """The table of agreement that a run holds, and its name."""
    for name in ("headsets", "agreement"):
        table = run.table(name, *_COLUMNS)
        if table is not None:
            return name, table
    return None


def overlap(contents: Contents) -> list[Block]:
    """Curves of overlap, and the measures of every comparison."""
    blocks: list[Block] = []
    for run in contents.runs:
        curves, found = run.table("overlap_curves", *_CURVE), agreement_of(run)
        if curves is not None:
            blocks += ['<div class="maps">', *_pictures(run, curves), "</div>"]
        if found is not None:
            blocks.append(_table(run, *found))
    return blocks


def _pictures(run: RunTables, curves: DataFrame) -> list[Block]:
    blocks: list[Block] = []
    if "comparison" in curves:
        for task, part in curves.groupby("task", sort=False):
            first = str(part["comparison"].iloc[0]).split(" and ")[0]
            own = part[part["comparison"].str.startswith(f"{first} and ")]
            others = [name.removeprefix(f"{first} and ") for name in own["comparison"]]
            blocks.append(_picture(run, f"{task}, {first} and others", own.assign(line=others)))
        return blocks
    groups: dict[str, list[str]] = {}
    for task in dict.fromkeys(curves["task"]):
        name, way = ranks.asked_of(task)
        groups.setdefault(name if way else "all tasks", []).append(task)
    for name, tasks in groups.items():
        own = curves[curves["task"].isin(tasks)]
        line = [ranks.asked_of(task)[1] or task for task in own["task"]]
        blocks.append(_picture(run, f"{name}, AIE and LTV", own.assign(line=line)))
    return blocks


def _picture(run: RunTables, title: str, curves: DataFrame) -> Picture:
    chance = curves.drop_duplicates("k").sort_values("k")
    ks = chance["k"].tolist()
    band = Band("chance, 95%", ks, chance["chance_low"].tolist(), chance["chance_high"].tolist())
    shown = [
        Line("chance, mean", ks, chance["chance"].tolist(), colour="grey", dash="--",
             told=[f"chance\nk = {k}: {x:.3f}" for k, x in zip(ks, chance["chance"], strict=True)])
    ]  # fmt: skip
    if "ceiling" in curves and curves["ceiling"].notna().any():
        mean = curves.groupby("k")["ceiling"].mean()
        told = [f"halves of the prompts\nk = {k}: {x:.3f}" for k, x in mean.items()]
        shown.append(
            Line("ceiling (halves)", mean.index.tolist(), mean.tolist(), (), (), "black", ":", told)
        )
    looks = {str(score.heads): (score.colour, score.dash) for score in SCORES if score.heads}
    cycle = itertools.cycle(CYCLE)
    for name, part in curves.groupby("line", sort=False):
        colour, dash = looks.get(str(name), (next(cycle), "-"))
        part = part.sort_values("k")
        told = [
            f"{name}\nbest {row.k}: {row.overlap:.3f} shared, chance {row.chance:.3f}"
            for row in part.itertuples()
        ]
        xy = part["k"].tolist(), part["overlap"].tolist()
        shown.append(Line(str(name), *xy, (), (), colour, dash, told))
    return Picture(
        lines(shown, "heads in each set", "share that both sets hold", bands=[band]),
        f"Overlap of the best heads: {title}",
        "The share of the best k heads by one score that are among the best k by the other; the "
        "grey band is where 95% of random sets lie. Point at a curve for its numbers.",
        run.made("overlap_curves"),
    )


def _table(run: RunTables, name: str, table: DataFrame) -> str:
    rows = table[table["measure"].isin(MEASURES)]
    tasks = list(dict.fromkeys(rows["task"]))
    keys = list(dict.fromkeys(zip(rows["comparison"], rows["measure"], rows["k"], strict=True)))
    unique = {(c, m, None if pd.isna(k) else int(k)): None for c, m, k in keys}
    cells = {
        (row.task, row.comparison, row.measure, None if pd.isna(row.k) else int(row.k)): row
        for row in rows.itertuples()
    }
    body = [
        [
            markup.plain(comparison),
            markup.plain(measure.replace("_", " ") + ("" if k is None else f" at {k}")),
            *(_value(cells, (task, comparison, measure, k)) for task in tasks),
            markup.number(_chance(cells, tasks, comparison, measure, k)),
        ]
        for comparison, measure, k in unique
    ]
    caption = "Agreement of head sets; halves of the prompts are the ceiling"
    return markup.table(caption, ["comparison", "measure", *tasks, "chance"], body, run.made(name))


def _value(cells: Mapping[tuple[Any, ...], Any], key: tuple[object, ...]) -> markup.Cell:
    row = cells.get(key)
    ends = (getattr(row, name, None) for name in ("value", "low", "high"))
    return markup.number(*ends)


def _chance(
    cells: Mapping[tuple[Any, ...], Any], tasks: Sequence[str], *rest: object
) -> float | None:
    found = (cells.get((task, *rest)) for task in tasks)
    return next((getattr(row, "chance", None) for row in found if row is not None), None)
