"""Every vector that competes with the Learnable Task Vector, on text and on regression.

    python -m analyses.rivals --preset smoke
    python -m analyses.rivals                                      # an hour and a half on two cores
    python -m analyses.rivals --tasks antonym --data FOLDER --functions "" --out runs/antonym

Runs `tvlens study text --methods all` and `tvlens study regression --methods all` in OUT/text and
OUT/regression, or goes on where an earlier call stopped, then writes to OUT
- text.{csv,md,tex}: every method on zero-shot and shuffled prompts, means over tasks: first-token
  accuracy, exact match, cross-entropy, and how far the next-token distribution is from that of
  in-context learning (d_NTP) over the vocabulary and over label tokens; on how many tasks a method
  is more accurate than the LTV, or nearer to in-context learning, and on how many less, intervals
  apart,
- text_tasks.{md,tex}: the same by task, with intervals; text/text_tasks.csv has the distances of
  hidden states too, text/states.csv where these states lie, on two principal components,
- heads_needed.{csv,md,tex}: accuracy of sparse LTVs and of function vectors by number of heads;
  heads_left.{md,tex}: how many heads a penalty leaves an LTV, and its accuracy,
- regression.{csv,md,tex}: errors at T_train, 1.5 and 2.5 times as many points,
- figures of all of these.
"""

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from analyses import presets
from tvlens import figures
from tvlens.cli import options
from tvlens.console import progress_bar, say, with_interval
from tvlens.evaluation.likeness import likeness
from tvlens.evaluation.methods import evaluate
from tvlens.runs.run import Run
from tvlens.runs.tables import write_tables, write_texts
from tvlens.scores.mediation import IndirectEffects
from tvlens.studies.regression import RegressionSettings, regression_plans
from tvlens.studies.scoring import Found
from tvlens.studies.study import Study, study_all
from tvlens.studies.summary import REGRESSION_LABELS, TEXT_LABELS
from tvlens.studies.text import TextPlan, TextSettings, text_plans
from tvlens.tasks.base import PromptKind
from tvlens.vectors.catalogue import methods_named
from tvlens.vectors.choice import ranked
from tvlens.vectors.fv import function_vector
from tvlens.vectors.ltv.fit import fit_ltv
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.sample import read_fit_prompts
from tvlens.vectors.sparse import DEFAULT_SCHEDULE, sparse_path
from tvlens.vectors.vector import Vector

TASKS = "present-past,singular-plural,country-nationality,verb-gerund,capitalize-word"
TASKS += ",country-capital"
FUNCTIONS = "linear,sparse-linear,relu"
KS = (1, 3, 10, 30, 100)
L1 = (0.001, 0.01)
"""Penalties on Σ|omega| of the other way to few heads."""
KINDS: tuple[PromptKind, ...] = ("zero", "shuffled")
METRICS = {
    "accuracy": "accuracy",
    "exact_match": "exact match",
    "cross_entropy": "cross-entropy",
    "d_ntp": "d_NTP",
    "d_ntp_labels": "d_NTP, labels",
}
AGAINST_LTV = {
    "accuracy": ("above LTV", "below LTV"),
    "d_ntp": ("farther than LTV", "nearer than LTV"),
}
"""Columns that count tasks where a method's value is higher and lower than the LTV's."""


@dataclass(frozen=True, kw_only=True)
class Size(presets.Size):
    """How much is done.

    Attributes:
        text: settings of the text study that are not the usual ones.
        text_fit: the same of its trainings.
        points: the same of the regression study.
        points_fit: the same of its trainings.
        ks: numbers of heads of sparse LTVs and function vectors.
    """

    text: Mapping[str, Any] = field(default_factory=dict)
    text_fit: Mapping[str, Any] = field(default_factory=dict)
    points: Mapping[str, Any] = field(default_factory=dict)
    points_fit: Mapping[str, Any] = field(default_factory=dict)
    ks: tuple[int, ...] = KS

    def text_settings(self, shots: int, seed: int) -> TextSettings:
        """What the text study does."""
        ltv = replace(options.fit_settings("default", None, shots), **self.text_fit)
        every = methods_named("all")
        once = {"ltv_seeds": 1, "control_draws": 1, "methods": every}
        return TextSettings(seed=seed, shots=shots, ltv=ltv, **once, **self.text)

    def regression_settings(self, seed: int) -> RegressionSettings:
        """What the regression study does."""
        every = methods_named("all")
        once = {"ltv_seeds": 1, "control_draws": 1, "shifts": ("none",), "methods": every}
        settings = RegressionSettings(seed=seed, **once, **self.points)
        return replace(settings, ltv=replace(settings.ltv, **self.points_fit))


PRESETS: dict[presets.Name, Size] = {
    "smoke": Size(
        tasks="present-past",
        functions="linear",
        text={"n_means": 16, "n_mediation": 3, "n_test": 4},
        text_fit={"steps": 3, "n_prompts": 16, "n_validation": 2},
        points={
            "n_means": 64,
            "n_mediation": 16,
            "n_test": 16,
            "n_oracle": 4,
            "n_slow": 2,
            "n_dummy": 4,
        },
        points_fit={"steps": 5, "n_prompts": 128, "n_validation": 64},
        ks=KS[:3],
    ),
    "small": Size(
        tasks=TASKS,
        functions=FUNCTIONS,
        text={"n_means": 60, "n_mediation": 20, "n_test": 40},
        text_fit={"steps": 40},
    ),
    "paper": Size(tasks=presets.PAPER_TASKS, functions=",".join(presets.STANDARD), **presets.PAPER),
}


def main(
    preset: presets.PresetOption = "small",
    tasks: presets.TasksOption = None,
    functions: presets.FunctionsOption = None,
    out: presets.OutOption = None,
    data: options.DataOption = None,
    model: presets.ModelOption = None,
    shots: options.ShotsOption = 10,
    seed: options.SeedOption = 0,
) -> None:
    """Every method on text tasks and on function classes, and tables of what beats what."""
    size = presets.sized(PRESETS, preset, tasks=tasks, functions=functions, model=model)
    out = presets.folder(out, preset, "rivals")
    models, digests = size.regression_models() if size.functions else ({}, {})
    if size.tasks:
        chosen = options.read_tasks(size.tasks, data, "error")
        settings = size.text_settings(shots, seed)
        lens = size.lens()
        plans = text_plans(lens, chosen, settings)
        with options.open_run(out / "text", "study text", lens, chosen, settings) as run:
            found = study_all(plans, run, say=say)
            text_tables(out, plans, found, run)
        with options.open_run(out / "text", "study text", lens, chosen, settings) as run:
            heads_needed(out, plans, run, size.ks)
    if models:
        points = size.regression_settings(seed)
        config = {"functions": list(models), "backend": "bridge", "settings": asdict(points)}
        folder, seeds = out / "regression", {"seed": seed}
        with Run.open(folder, "study regression", config, data=digests, seeds=seeds) as run:
            study_all(regression_plans(models, points), run, say=say)
        regression_table(out)


def text_tables(out: Path, plans: dict[str, TextPlan], found: dict[str, Study], run: Run) -> None:
    """Text methods by task and over tasks, with distances to in-context learning."""
    frames, states = [pd.concat([each.results for each in found.values()])], []
    for name, plan in plans.items():
        for kind in KINDS:

            def compute(
                plan: TextPlan = plan, kind: PromptKind = kind, study: Study = found[name]
            ) -> dict[str, Any]:
                s = plan.settings
                n = s.n_test or len(plan.task.split("test"))
                with progress_bar(f"{plan.task.name}: likeness, {kind}", 2 * n) as advance:
                    like = likeness(
                        plan.lens,
                        plan.task,
                        study.methods,
                        kind=kind,
                        shots=s.shots,
                        n=s.n_test,
                        seed=s.seed,
                        progress=advance,
                    )
                return {"table": like.to_frame(seed=s.seed), "states": like.projection()}

            kept = run.step(f"{name}/likeness-{kind}", compute)
            frames.append(kept["table"])
            states.append(kept["states"].assign(kind=kind))
    table = pd.concat(frames, ignore_index=True)
    run.write_table("text_tasks", table)
    run.write_table("states", pd.concat(states, ignore_index=True))
    print(write_tables(out, "text", *over_tasks(table)))
    write_texts(out, "text_tasks", by_task(table))
    for metric in ("accuracy", "exact_match", "d_ntp"):
        run.write_figure(f"rivals-{metric}", figures.method_means(table, metric=metric))
    for name in plans:
        shown = pd.concat(states, ignore_index=True)
        shown = shown[(shown["task"] == name) & (shown["kind"] == "zero")]
        run.write_figure(f"states-{name}", figures.state_map(shown))


def over_tasks(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for each method and kind of prompts: means over tasks, and how it fares against LTV."""
    rows = []
    for kind in KINDS:
        part = table[(table["prompt"] == kind) | (table["method"] == "icl")]
        for method, label in TEXT_LABELS.items():
            own = part[part["method"] == method]
            if not len(own):
                continue
            row: dict[str, Any] = {"prompts": kind, "method": label}
            for metric, name in METRICS.items():
                values = own.loc[own["metric"] == metric, "value"]
                row[name] = float(values.mean()) if len(values) else float("nan")
            for metric, names in AGAINST_LTV.items():
                row |= against(part, method, "ltv", metric, names)
            rows.append(row)
    numbers = pd.DataFrame(rows)
    shown = numbers.map(lambda x: ("" if pd.isna(x) else f"{x:.2f}") if isinstance(x, float) else x)
    return numbers, shown


def by_task(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each task, kind of prompts and method: every metric with its interval, as text."""
    rows = table[table["metric"].isin(METRICS)]
    text = [with_interval(row.value, row.ci_low, row.ci_high) for row in rows.itertuples()]
    keys = ["task", "prompt", "method"]
    wide = rows.assign(text=text).pivot(index=keys, columns="metric", values="text")
    order = itertools.product(dict.fromkeys(rows["task"]), ("clean", *KINDS), TEXT_LABELS)
    shown = wide.loc[[key for key in order if key in wide.index], list(METRICS)].reset_index()
    shown["method"] = shown["method"].map(TEXT_LABELS)
    return shown.fillna("").rename(columns={"prompt": "prompts", **METRICS})


def against(
    part: pd.DataFrame, method: str, other: str, metric: str, names: tuple[str, str]
) -> dict[str, str]:
    """On how many tasks a method's value is higher and lower than another's, intervals apart."""
    rows = part[part["metric"] == metric]
    own, rival = (rows[rows["method"] == name].set_index("task") for name in (method, other))
    if method == other or not len(own) or not len(rival):
        return dict.fromkeys(names, "")
    rival = rival.loc[own.index]
    apart = own["ci_low"] > rival["ci_high"], own["ci_high"] < rival["ci_low"]
    return {
        name: f"{int(tasks.sum())} of {len(own)}" for name, tasks in zip(names, apart, strict=True)
    }


def heads_needed(out: Path, plans: dict[str, TextPlan], run: Run, ks: tuple[int, ...]) -> None:
    """Zero-shot accuracy of a sparse LTV and of the best function vector of as many heads."""
    frames = []
    for name, plan in plans.items():
        kept = Found(plan, run)
        ltv, effects = kept.ltv, kept.effects

        def compute(
            kept: Found = kept,
            ltv: LearnableTaskVector = ltv,
            effects: IndirectEffects = effects,
        ) -> dict[str, Any]:
            return {"table": _by_heads(kept, ltv, effects, ks)}

        frames.append(run.step(f"{name}/heads-needed", compute)["table"])
    table = pd.concat(frames, ignore_index=True)
    run.write_table("heads_needed", table)
    rows = table[(table["prompt"] == "zero") & (table["metric"] == "accuracy")].copy()
    rows["text"] = [with_interval(r.value, r.ci_low, r.ci_high) for r in rows.itertuples()]
    penalised = rows["method"] == "L1"
    shown = rows[~penalised].pivot(index=["task", "method"], columns="k", values="text")
    shown = shown.reset_index().fillna("").rename_axis(columns=None)
    print(write_tables(out, "heads_needed", table, shown))
    left = rows.loc[penalised, ["task", "k", "text"]]
    print(write_texts(out, "heads_left", left.set_axis(["task", "heads left", "accuracy"], axis=1)))
    run.write_figure("heads-needed", figures.heads_needed(table))


def _by_heads(
    kept: Found, ltv: LearnableTaskVector, effects: IndirectEffects, ks: tuple[int, ...]
) -> pd.DataFrame:
    plan, means = kept.plan, kept.means
    assert isinstance(plan, TextPlan)
    s, lens, task = plan.settings, plan.lens, plan.task
    fitting = [k for k in ks if k < means.n_heads]
    read = read_fit_prompts(lens, task, s.ltv, s.seed)
    with progress_bar(f"{task.name}: sparse path", s.ltv.steps) as advance:
        schedule = replace(DEFAULT_SCHEDULE, steps=s.ltv.steps)
        path = sparse_path(
            lens, ltv, read, ks=fitting, schedule=schedule, seed=s.seed, progress=advance
        )
    vectors: dict[str, Vector] = {
        f"LTV {k}": vector for k, (_, vector) in zip(fitting, path, strict=True)
    }
    vectors[f"LTV {means.n_heads}"] = ltv
    with progress_bar(f"{task.name}: L1 path", len(L1)) as advance:
        for penalty in L1:
            settings = replace(s.ltv, l1=penalty)
            sparse = fit_ltv(lens, task, means, settings=settings, seed=s.seed, read=read)
            vectors[f"L1 {int((sparse.weights != 0).sum())}"] = sparse
            advance(1)
    validation = {"zero": plan.validation()["zero"]}
    for k in fitting:
        tried = [
            (
                {"layer": layer, "scale": scale},
                function_vector(means, effects.top(k), layer=layer, scale=scale),
            )
            for layer in range(lens.n_layer)
            for scale in s.scales
        ]
        order, _ = ranked(lens, tried, validation)
        vectors[f"FV {k}"] = tried[order["zero"][0]][1]
    table = evaluate(
        lens,
        task,
        vectors,
        kinds=("zero",),
        shots=s.shots,
        n=s.n_test,
        seed=s.seed,
        exact_match=False,
    )
    table = table[table["method"] != "none"]
    names = table["method"].str.split(" ", expand=True)
    return table.assign(method=names[0], k=names[1].astype(int))


def regression_table(out: Path) -> None:
    """Errors of every method at T_train, 1.5 and 2.5 times as many points."""
    results = pd.read_csv(out / "regression" / "results.csv")
    trained = pd.read_csv(out / "regression" / "models.csv").set_index("functions")["train_points"]
    clean = results[(results["prompt"] == "clean") & (results["metric"] == "squared_error")]
    numbers, texts = [], []
    for functions, part in clean.groupby("functions", sort=False):
        longest = int(part["points"].max())
        asked = {
            f"{times:g} T": min(longest, round(times * trained[functions]))
            for times in (1, 1.5, 2.5)
        }
        cells = part.set_index(["method", "points"])[["value", "ci_low", "ci_high"]]
        for method, label in REGRESSION_LABELS.items():
            if (method, longest) not in cells.index:
                continue
            row: dict[str, Any] = {"functions": functions, "method": label}
            text = dict(row)
            for name, points in asked.items():
                value, low, high = cells.loc[(method, points)]
                row[name], text[name] = value, with_interval(value, low, high, digits=3)
                if method != "ltv_class":
                    rival = cells.loc[("ltv_class", points)]
                    text[name] += " +" if high < rival["ci_low"] else ""
            numbers.append(row)
            texts.append(text)
    print("+: below the LTV of the class, intervals apart\n")
    print(write_tables(out, "regression", pd.DataFrame(numbers), pd.DataFrame(texts)))


if __name__ == "__main__":
    presets.run(main)
