"""The tables of a paper, made of a study's own: what vectors do, and how far head sets agree."""

from collections.abc import Callable, Mapping

import pandas as pd

from tvlens.console import with_interval
from tvlens.vectors.catalogue import BASELINES, methods_for, variants

PROMPTS = {"zero": "zero-shot", "shuffled": "shuffled labels"}
MEASURES = ["overlap", "rank_biased_overlap", "spearman"]
TEXT_LABELS = {
    "icl": BASELINES["icl"].label,
    **{method.name: method.look.label for method in methods_for("text", "class")},
    "none": BASELINES["none"].label,
}
REGRESSION_LABELS = {
    **{name: BASELINES[name].label for name in ("bare", "truncation")},
    **{name: variant.label for name, variant in variants().items() if not variant.dummies},
}

Summary = tuple[pd.DataFrame, pd.DataFrame]
"""A table in numbers, and the same as text with intervals."""


def text_methods(results: pd.DataFrame) -> Summary:
    """Accuracy by task and kind of prompt (rows) and method (columns).

    Args:
        results: `results.csv` of a text study.
    """
    rows = results[results["metric"] == "accuracy"].copy()
    rows["text"] = [with_interval(row.value, row.ci_low, row.ci_high) for row in rows.itertuples()]
    values, shown = (_by_method(rows, column) for column in ("value", "text"))
    numbers = values.columns.drop(["task", "prompt"])
    means = values.groupby("prompt", sort=False)[list(numbers)].mean().reset_index()
    means.insert(0, "task", "mean over tasks")
    values = pd.concat([values, means], ignore_index=True)
    return values, pd.concat([shown, means.map(_decimals(2))], ignore_index=True)


def regression_methods(results: pd.DataFrame, train_points: Mapping[str, int]) -> Summary:
    """Errors on clean prompts, and gains over the bare model, by class and method (rows).

    Args:
        results: `results.csv` of a regression study.
        train_points: T_train of every class.
    """
    clean = results[(results["shift"] == "none") & (results["prompt"] == "clean")]
    numbers, texts = [], []
    for functions, part in clean.groupby("functions", sort=False):
        last = int(part["points"].max())
        cells = part.set_index(["method", "points", "metric"])[["value", "ci_low", "ci_high"]]
        there = set(part["method"])
        for method, label in REGRESSION_LABELS.items():
            if method not in there:
                continue
            row: dict[str, object] = {"functions": functions, "method": label}
            text = dict(row)
            for where, points in (("T_train", train_points[str(functions)]), ("longest", last)):
                for metric, name, digits in (("squared_error", "error", 4), ("gain", "gain", 2)):
                    key = (method, points, metric)
                    if key in cells.index:
                        value, low, high = cells.loc[key]
                        row[f"{name}, {where}"] = value
                        text[f"{name}, {where}"] = with_interval(value, low, high, digits=digits)
            numbers.append(row)
            texts.append(text)
    return pd.DataFrame(numbers), pd.DataFrame(texts).fillna("")


def head_sets(headsets: pd.DataFrame) -> Summary:
    """Agreement by comparison and measure (rows) and task (columns), with mean and chance.

    Args:
        headsets: `headsets.csv` of a study.
    """
    rows = headsets[headsets["measure"].isin(MEASURES)].sort_values(["comparison", "measure", "k"])
    at = rows["k"].map(lambda k: "" if pd.isna(k) else f" at {k:.0f}")
    rows["measure"] = rows["measure"].str.replace("_", " ") + at
    tasks = list(headsets["task"].unique())
    keys = ["comparison", "measure"]
    wide = rows.pivot(index=keys, columns="task", values="value")[tasks]
    wide["mean"] = wide.mean(axis=1)
    wide["chance"] = rows.groupby(keys)["chance"].first()
    order = pd.MultiIndex.from_frame(rows[keys].drop_duplicates())
    table = wide.loc[order].reset_index().rename_axis(columns=None)
    return table, table.map(_decimals(3))


def _by_method(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    wide = rows.pivot(index=["task", "prompt"], columns="method", values=column)
    icl = wide["icl"].xs("clean", level="prompt")
    tasks = list(rows["task"].unique())
    wide = wide.reindex(pd.MultiIndex.from_product([tasks, PROMPTS], names=["task", "prompt"]))
    wide = wide.assign(icl=icl.reindex(wide.index.get_level_values("task")).to_numpy())
    there = [name for name in TEXT_LABELS if name in wide]
    table = wide[there].rename(columns=TEXT_LABELS, index=PROMPTS)
    return table.reset_index().rename_axis(columns=None)


def _decimals(places: int) -> Callable[[object], object]:
    return lambda cell: f"{cell:.{places}f}" if isinstance(cell, float) else cell
