"""Displays of studies: what each method does on test prompts, and which heads carry the task."""

import pandas as pd

from tvlens import figures
from tvlens.notebook import pieces
from tvlens.notebook.displays import shows
from tvlens.scores.catalogue import RANKED
from tvlens.scores.score import Scores, layers_in
from tvlens.studies.study import Study
from tvlens.studies.summary import REGRESSION_LABELS, TEXT_LABELS

_KEYS = ["method", "prompt"]
_MEASURES = ("overlap", "rank_biased_overlap", "spearman")


@shows(Study)
def _study(study: Study) -> str:
    tasks = ", ".join(study.heads["task"].unique())
    parts = [_results(study.results)]
    for task, rows in study.heads.groupby("task", sort=False):
        parts += _maps(str(task), rows)
    agreement = study.headsets[study.headsets["measure"].isin(_MEASURES)]
    shown = ["task", "comparison", "measure", "k", "value", "chance"]
    parts += [pieces.sentence("How far head sets agree, beside chance:")]
    parts += [pieces.frame(agreement[shown])]
    note = "Its tables: results, heads, headsets, curve, sweep, rivals, history."
    return pieces.card(f"Study of {tasks}", *parts, pieces.sentence(note))


def _results(results: pd.DataFrame) -> str:
    """The first metric of every method, a column for each kind of prompts."""
    rows = results
    metric = str(rows["metric"].iloc[0]) if "accuracy" not in set(rows["metric"]) else "accuracy"
    rows = rows[rows["metric"] == metric]
    asked = rows["prompt"].astype(str)
    if "points" in rows:
        if "shift" in rows:
            rows = rows[rows["shift"] == rows["shift"].iloc[0]]
        last = rows.groupby("prompt")["points"].transform("max")
        rows = rows[rows["points"] == last]
        asked = rows["prompt"] + ", " + rows["points"].astype(str) + " points"
    cells = [
        pieces.with_ends(float(row.value), float(row.ci_low), float(row.ci_high))
        for row in rows.itertuples()
    ]
    wide = (
        rows.assign(asked=asked, cell=cells)
        .drop_duplicates(["method", "asked"])
        .pivot(index="method", columns="asked", values="cell")
        .reindex(index=rows["method"].unique(), columns=asked.unique())
    )
    labels = REGRESSION_LABELS if "points" in rows else TEXT_LABELS
    table = [[labels.get(row[0], row[0]), *row[1:]] for row in wide.itertuples(name=None)]
    said = f"{metric.replace('_', ' ')} on test prompts [95% interval], by kind of prompt:"
    return pieces.sentence(said.capitalize()) + pieces.table(["method", *wide.columns], table)


def _maps(task: str, rows: pd.DataFrame) -> list[str]:
    """A map of every score that heads are ranked by."""
    found = []
    for score in RANKED:
        if score.name not in rows:
            continue
        grid = Scores.from_frame(rows, score.name, layers=layers_in(rows))[task].scores
        k = max(1, min(10, grid.numel() // 4))
        drawn = figures.value_map(grid, title=f"{score.title}, {task}", label=score.measured, k=k)
        found.append(pieces.picture(drawn, f"{score.title} of every head by layer, {task}"))
    return found
