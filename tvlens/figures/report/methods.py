"""What vectors do: tables of every method, of text and of regression, and error curves."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from pandas import DataFrame

from tvlens.figures.report import markup
from tvlens.figures.report.contents import Block, Contents, Picture, RunTables
from tvlens.figures.report.pictures import CYCLE, Line, lines
from tvlens.tasks.regression.oracles import ORACLES
from tvlens.vectors.catalogue import BASELINES, METHODS, Look, variants

LOOKS: dict[str, Look] = {
    **{name: BASELINES[name] for name in ("icl", "none")},
    **{method.name: method.look for method in METHODS},
}
"""Methods of text by name, in the order of tables."""

_MEASURES = (
    ("zero", "accuracy", "zero-shot accuracy"),
    ("shuffled", "accuracy", "accuracy, shuffled labels"),
    ("clean", "accuracy", "accuracy, clean prompts"),
    ("zero", "exact_match", "zero-shot, whole answer"),
    ("zero", "cross_entropy", "zero-shot cross-entropy"),
)
_TEXT = ("task", "method", "prompt", "metric", "value", "ci_low", "ci_high")
_POINTS = ("functions", "shift", "prompt", "points", "method", "metric", "value", "ci_low")


def text_of(run: RunTables) -> DataFrame | None:
    """The results of a run on text."""
    return run.table("results", *_TEXT)


def points_of(run: RunTables) -> DataFrame | None:
    """The results of a run on regression."""
    return run.table("results", *_POINTS, "ci_high")


def trained_points(run: RunTables, results: DataFrame, functions: object) -> int:
    """T_train of a class; the longest prompts where no table says it."""
    models = run.table("models", "functions", "train_points")
    known = {} if models is None else models.set_index("functions")["train_points"].to_dict()
    longest = results.loc[results["functions"] == functions, "points"].max()
    return int(known.get(functions, longest))


def label_of(name: object) -> str:
    """The words of a method, estimator or baseline."""
    known: dict[str, str] = {each: look.label for each, look in (LOOKS | BASELINES).items()}
    known |= {each: variant.label for each, variant in variants().items()}
    known |= {each: oracle.label for each, oracle in ORACLES.items()}
    known["bare_dummies"] = f"{BASELINES['bare'].label}, dummies"
    return known.get(str(name), str(name))


def methods(contents: Contents) -> list[Block]:
    """Every method of every task; of several tasks, their means first."""
    blocks: list[Block] = []
    for run in contents.runs:
        results, points = text_of(run), points_of(run)
        if results is not None:
            blocks += _text(run, results)
        if points is not None:
            blocks += _regression(run, points)
    return blocks


def _text(run: RunTables, results: DataFrame) -> list[Block]:
    made = run.made("results")
    tasks = list(dict.fromkeys(results["task"]))
    tables: list[Block] = []
    if len(tasks) > 1:
        keys = ["method", "prompt", "metric"]
        means = results.groupby(keys, sort=False)["value"].mean().reset_index()
        caption = f"Mean over {len(tasks)} tasks"
        tables.append(_of_task(caption, means.assign(ci_low=np.nan, ci_high=np.nan), made))
    for task in tasks:
        caption = f"{task}, with 95% intervals over test prompts"
        tables.append(_of_task(caption, results[results["task"] == task], made))
    return tables


def _of_task(caption: str, rows: DataFrame, made: str) -> str:
    cells = _cells(rows, ["method", "prompt", "metric"])
    there = [each for each in _MEASURES if any(key[1:] == each[:2] for key in cells)]
    names = sorted(dict.fromkeys(rows["method"]), key=_place(LOOKS))
    body = [
        [
            markup.plain(label_of(name)),
            *(
                markup.number(*cells.get((name, prompt, metric), (None,)))
                for prompt, metric, _ in there
            ),
        ]
        for name in names
    ]
    return markup.table(caption, ["method", *(words for _, _, words in there)], body, made)


def _regression(run: RunTables, results: DataFrame) -> list[Block]:
    blocks: list[Block] = []
    made = run.made("results")
    for functions, part in results.groupby("functions", sort=False):
        trained = trained_points(run, results, functions)
        for shift, rows in part.groupby("shift", sort=False):
            under = "" if shift == "none" else f", shift: {shift}"
            last = int(rows.loc[rows["prompt"] == "clean", "points"].max())
            asked = [
                ("clean", trained, "squared_error", f"error at {trained} points, T_train"),
                ("clean", last, "squared_error", f"error at {last} points"),
                ("clean", last, "gain", f"gain at {last} points"),
                ("zero", 1, "squared_error", "error, zero-shot"),
                ("shuffled", trained, "squared_error", "error, shuffled labels"),
            ]
            cells = _cells(rows, ["method", "prompt", "points", "metric"])
            there = [each for each in asked if any(key[1:] == each[:3] for key in cells)]
            body = [
                [
                    markup.plain(label_of(name)),
                    *(
                        markup.number(*cells.get((name, *each[:3]), (None,)), digits=3)
                        for each in there
                    ),
                ]
                for name in sorted(dict.fromkeys(rows["method"]), key=_place(_regression_order()))
            ]
            caption = (
                f"{functions}{under}: squared error over the variance of f(x), and gain (error of "
                "the bare model over error), with 95% intervals over test prompts"
            )
            block = markup.table(caption, ["method", *(each[3] for each in there)], body, made)
            folded = markup.folded(f"{functions} under the shift {shift}", block)
            blocks.append(block if shift == "none" else folded)
    return blocks


def error_curves(contents: Contents) -> list[Block]:
    """Squared error against points, of estimators, vectors of the class and of each prompt."""
    blocks: list[Block] = []
    for run in contents.runs:
        results = points_of(run)
        if results is None:
            continue
        chosen = (results["shift"] == "none") & (results["prompt"] == "clean")
        rows = results[chosen & (results["metric"] == "squared_error")]
        for functions, part in rows.groupby("functions", sort=False):
            trained = trained_points(run, results, functions)
            blocks += [markup.heading(functions), '<div class="maps">']
            blocks += [
                Picture(
                    lines(
                        _curves(part, looks),
                        "points in the prompt",
                        "squared error / variance of f(x)",
                        mark=trained,
                        logarithmic=True,
                    ),
                    f"{functions}: {title}",
                    "Means over clean test prompts with 95% intervals; the dotted line is the "
                    f"longest prompt of training, {trained} points. Point at a curve for its "
                    "numbers, click a name to hide it.",
                    run.made("results"),
                )
                for title, looks in _panels(list(part["method"].unique())).items()
            ]
            blocks.append("</div>")
    return blocks


def _panels(there: Sequence[str]) -> dict[str, dict[str, Look]]:
    known, bare = variants(), {"bare": BASELINES["bare"]}
    cycle = dict(zip(ORACLES, CYCLE * 4, strict=False))
    estimators = {name: Look(ORACLES[name].label, cycle[name], dash="--") for name in ORACLES}
    panels = {"model and estimators": {**bare, "truncation": BASELINES["truncation"], **estimators}}
    for whose, title in (("class", "vectors of the class"), ("prompt", "vectors of each prompt")):
        panels[title] = bare | {
            name: each.method.look
            for name, each in known.items()
            if each.whose == whose and not each.dummies
        }
    shown = {
        title: {name: look for name, look in looks.items() if name in set(there)}
        for title, looks in panels.items()
    }
    return {title: looks for title, looks in shown.items() if looks.keys() - {"bare"}}


def _curves(rows: DataFrame, looks: dict[str, Look]) -> list[Line]:
    found = []
    for name, look in looks.items():
        # An estimator that makes no error has no place on a logarithmic axis.
        part = rows[(rows["method"] == name) & (rows["value"] > 1e-6)].sort_values("points")
        if part.empty:
            continue
        told = [
            f"{look.label}\n{row.points} points: "
            + markup.with_ends(row.value, row.ci_low, row.ci_high, digits=4)
            for row in part.itertuples()
        ]
        x, y = part["points"].tolist(), part["value"].tolist()
        low, high = (part[end].clip(lower=1e-6).tolist() for end in ("ci_low", "ci_high"))
        found.append(Line(look.label, x, y, low, high, look.colour, look.dash, told))
    return found


def _regression_order() -> dict[str, Look]:
    looks = {"bare": BASELINES["bare"], "truncation": BASELINES["truncation"]}
    return looks | {name: each.method.look for name, each in variants().items()}


def _place(order: dict[str, Look]) -> Callable[[str], int]:
    """Where a method stands in a table."""
    names = [*order]
    return lambda name: names.index(name) if name in names else len(names)


def _cells(
    rows: DataFrame, keys: list[str]
) -> dict[tuple[object, ...], tuple[float, float, float]]:
    """Value and interval by these columns."""
    numbers = rows[["value", "ci_low", "ci_high"]].apply(pd.to_numeric, errors="coerce")
    named = rows[keys].itertuples(index=False, name=None)
    return dict(zip(named, numbers.itertuples(index=False, name=None), strict=True))
