"""Scores of heads as tables hold them: every score of a task, and how heads rank by it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from pandas import DataFrame

from tvlens.figures.report.contents import Head, RunTables
from tvlens.figures.report.markup import short
from tvlens.scores.catalogue import SCORES, HeadScore

_WAY = re.compile(r"(.+)-(class|prompt)-(informative|uninformative)")

BEST = 10
"""Best heads by each score that are framed, named, and looked at."""


@dataclass(frozen=True)
class Ranked:
    """One score of all heads.

    Attributes:
        score: which one.
        table: value, low, high and rank (1 is the highest) by layer and head.
        made: the line under its picture.
    """

    score: HeadScore
    table: DataFrame
    made: str

    @property
    def n_heads(self) -> int:
        """How many heads have the score."""
        return int(self.table["value"].notna().sum())

    def top(self, k: int) -> list[Head]:
        """The best heads, best first."""
        best = self.table[self.table["rank"] <= k].sort_values("rank")
        return [(int(layer), int(head)) for layer, head in best.index]

    def said(self, head: Head) -> str:
        """The score of a head, with its interval and rank, in a line."""
        row = self.table.loc[head]
        if pd.isna(row["value"]):
            return f"{self.score.label}: none"
        shown = short(row["value"], 4)
        if not pd.isna(row["low"]):
            shown += f" [{short(row['low'], 4)}, {short(row['high'], 4)}]"
        return f"{self.score.label}: {shown}, rank {int(row['rank'])} of {self.n_heads}"


def by_task(runs: Sequence[RunTables]) -> dict[str, list[Ranked]]:
    """Every score of every task that the runs hold, in the order of the catalogue, each once."""
    found: dict[str, dict[str, Ranked]] = {}
    for run in runs:
        for task, score, rows, file in [*_of_heads(run), *_of_scores(run)]:
            found.setdefault(task, {}).setdefault(
                score.name, Ranked(score, _ranked(rows), run.made(file))
            )
    order = {score.name: i for i, score in enumerate(SCORES)}
    return {
        task: sorted(scores.values(), key=lambda each: order[each.score.name])
        for task, scores in found.items()
    }


def asked_of(task: str) -> tuple[str, str]:
    """The task that a name in tables of heads is of, and the way it is asked, if in several."""
    found = _WAY.fullmatch(task)
    return (found[1], f"{found[2]}, {found[3]}") if found else (task, "")


def drawn(scores: Sequence[Ranked]) -> list[Ranked]:
    """Those that heads are ranked by: they have maps."""
    return [each for each in scores if each.score.heads is not None]


def best_of(scores: Sequence[Ranked], k: int = BEST) -> list[Head]:
    """The best heads by each score, in the order of the model."""
    return sorted({head for each in drawn(scores) for head in each.top(k)})


_Rows = tuple[str, HeadScore, DataFrame, str]


def _of_heads(run: RunTables) -> list[_Rows]:
    """Scores of `heads.csv`, a column each."""
    table = run.table("heads", "task", "layer", "head")
    if table is None:
        return []
    found = []
    for score in SCORES:
        if score.name not in table:
            continue
        names = {score.name: "value", f"{score.name}_low": "low", f"{score.name}_high": "high"}
        rows = table.rename(columns=names)
        found += [(str(task), score, part, "heads") for task, part in _by(rows, "task")]
    return found


def _of_scores(run: RunTables) -> list[_Rows]:
    """Scores of `scores.csv`, a row each."""
    table = run.table("scores", "task", "score", "layer", "head", "value")
    if table is None:
        return []
    rows = table.rename(columns={"ci_low": "low", "ci_high": "high"})
    return [
        (str(task), score, part[part["score"] == score.heads], "scores")
        for task, part in _by(rows, "task")
        for score in SCORES
        if score.heads is not None and (part["score"] == score.heads).any()
    ]


def _by(rows: DataFrame, column: str) -> list[tuple[object, DataFrame]]:
    return list(rows.groupby(column, sort=False))


def _ranked(rows: DataFrame) -> DataFrame:
    table = rows.drop_duplicates(["layer", "head"]).set_index(["layer", "head"]).sort_index()
    table = table.reindex(columns=["value", "low", "high"]).apply(pd.to_numeric, errors="coerce")
    order = np.argsort(-table["value"].to_numpy(), kind="stable")
    ranks = np.empty(len(table))
    ranks[order] = np.arange(1, len(table) + 1)
    return table.assign(rank=np.where(table["value"].isna(), np.nan, ranks))
