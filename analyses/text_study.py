"""Learned heads against function-vector heads on five text tasks, and the two tables of a paper.

    python analyses/text_study.py                                   # five shipped tasks
    python analyses/text_study.py --data FOLDER --tasks antonym,country-capital --out runs/public

Runs `tvlens study text`, or goes on where an earlier call stopped, then writes to the run folder
- summary.{csv,md,tex}: accuracy of every method on zero-shot and label-shuffled prompts,
- headset_summary.{csv,md,tex}: agreement of AIE and LTV heads, between its chance and its ceilings.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import typer

from tvlens.cli import options, studies
from tvlens.console import with_interval
from tvlens.errors import TvlensError
from tvlens.runs.tables import write_tables
from tvlens.vectors.catalogue import BASELINES, methods_for

TASKS = "present-past,singular-plural,country-nationality,verb-gerund,capitalize-word"
LABELS = {
    "icl": BASELINES["icl"].label,
    **{method.name: method.look.label for method in methods_for("text", "class")},
    "none": BASELINES["none"].label,
}
PROMPTS = {"zero": "zero-shot", "shuffled": "shuffled labels"}
MEASURES = ["overlap", "rank_biased_overlap", "spearman"]


def main(
    tasks: options.TasksOption = TASKS,
    out: options.OutOption = Path("runs/text"),
    data: options.DataOption = None,
    duplicates: options.DuplicatesOption = "error",
    model: options.ModelOption = "smollm2-135m",
    shots: options.ShotsOption = 10,
    seed: options.SeedOption = 0,
    steps: options.StepsOption = None,
    ltv_seeds: int = 3,
    n_test: int | None = None,
    control_draws: int = 3,
) -> None:
    """The text study of several tasks and its summary over them."""
    studies.study_text(
        tasks,
        out,
        model=model,
        data=data,
        duplicates=duplicates,
        shots=shots,
        seed=seed,
        steps=steps,
        ltv_seeds=ltv_seeds,
        n_test=n_test,
        control_draws=control_draws,
    )
    methods = method_summary(pd.read_csv(out / "results.csv"))
    print("\nFirst-token accuracy with 95% intervals over test prompts\n")
    print(write_tables(out, "summary", *methods))
    print("Agreement of head sets\n")
    headsets = headset_summary(pd.read_csv(out / "headsets.csv"))
    print(write_tables(out, "headset_summary", headsets, headsets.map(_decimals(3))))


def method_summary(results: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy by task and kind of prompt (rows) and method (columns): numbers, and as text."""
    rows = results[results["metric"] == "accuracy"].copy()
    rows["text"] = [with_interval(row.value, row.ci_low, row.ci_high) for row in rows.itertuples()]
    values, shown = (_by_method(rows, column) for column in ("value", "text"))
    numbers = values.columns.drop(["task", "prompt"])
    means = values.groupby("prompt", sort=False)[list(numbers)].mean().reset_index()
    means.insert(0, "task", "mean over tasks")
    values = pd.concat([values, means], ignore_index=True)
    return values, pd.concat([shown, means.map(_decimals(2))], ignore_index=True)


def headset_summary(headsets: pd.DataFrame) -> pd.DataFrame:
    """Agreement by comparison and measure (rows) and task (columns), with mean and chance."""
    rows = headsets[headsets["measure"].isin(MEASURES)].sort_values(["comparison", "measure", "k"])
    at = rows["k"].map(lambda k: "" if pd.isna(k) else f" at {k:.0f}")
    rows["measure"] = rows["measure"].str.replace("_", " ") + at
    tasks = list(headsets["task"].unique())
    keys = ["comparison", "measure"]
    wide = rows.pivot(index=keys, columns="task", values="value")[tasks]
    wide["mean"] = wide.mean(axis=1)
    wide["chance"] = rows.groupby(keys)["chance"].first()
    order = pd.MultiIndex.from_frame(rows[keys].drop_duplicates())
    return wide.loc[order].reset_index().rename_axis(columns=None)


def _by_method(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    wide = rows.pivot(index=["task", "prompt"], columns="method", values=column)
    icl = wide["icl"].xs("clean", level="prompt")
    tasks = list(rows["task"].unique())
    wide = wide.reindex(pd.MultiIndex.from_product([tasks, PROMPTS], names=["task", "prompt"]))
    wide = wide.assign(icl=icl.reindex(wide.index.get_level_values("task")).to_numpy())
    there = [name for name in LABELS if name in wide]
    table = wide[there].rename(columns=LABELS, index=PROMPTS)
    return table.reset_index().rename_axis(columns=None)


def _decimals(places: int) -> Callable[[object], object]:
    return lambda cell: f"{cell:.{places}f}" if isinstance(cell, float) else cell


if __name__ == "__main__":
    try:
        typer.run(main)
    except TvlensError as error:
        sys.exit(f"error: {error}")
