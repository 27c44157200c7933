"""Vectors: Learnable Task Vectors are trained, and saved vectors evaluated."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvlens.cli.options import (
    BackendOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    DuplicatesOption,
    ModelOption,
    OutOption,
    PresetOption,
    RevisionOption,
    SeedOption,
    ShotsOption,
    StepsOption,
    TasksOption,
    TemplateOption,
    fit_settings,
    lay_out,
    load_lens,
    named_files,
    open_run,
    read_tasks,
)
from tvlens.console import say, show, with_interval
from tvlens.studies.askable import require_askable
from tvlens.tasks import Task

if TYPE_CHECKING:
    import pandas as pd


def fit(
    tasks: TasksOption,
    out: OutOption,
    model: ModelOption = "smollm2-135m",
    data: DataOption = None,
    duplicates: DuplicatesOption = "error",
    template: TemplateOption = None,
    backend: BackendOption = "bridge",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    shots: ShotsOption = 10,
    seed: SeedOption = 0,
    preset: PresetOption = "default",
    steps: StepsOption = None,
) -> None:
    """Train Learnable Task Vectors; writes OUT/vectors/TASK-ltv.safetensors and OUT/heads.csv."""
    chosen = read_tasks(tasks, data, duplicates, template)

    import pandas as pd

    from tvlens.scores.score import join_scores
    from tvlens.studies import stages
    from tvlens.studies.text import TextSettings, text_plans

    ltv_settings = fit_settings(preset, steps, shots)
    settings = TextSettings(seed=seed, shots=shots, ltv=ltv_settings)
    lens = load_lens(model, backend, dtype, device, revision)
    chosen = lay_out(chosen, template, lens)
    require_askable(lens, chosen, shots, ["train", "validation"], settings.n_means)
    with open_run(out, "fit", lens, chosen, settings) as run:
        frames, histories = [], []
        for plan in text_plans(lens, chosen, settings).values():
            task = plan.task
            means = stages.head_means(plan, run)
            ltv = stages.train_one(lens, task, run, means, settings.ltv, seed)
            ltv.save(run.folder / "vectors" / f"{task.name}-ltv.safetensors")
            histories.append(ltv.history.assign(task=task.name))
            frames.append(join_scores([ltv.head_scores("omega"), ltv.head_scores()]))
            ends = {0, int(ltv.history["validation_loss"].argmin()), len(ltv.history) - 1}
            title = f"{task.name}: start, lowest validation loss (which is kept) and end"
            show(ltv.history.iloc[sorted(ends)], title)
        run.write_table("heads", pd.concat(frames, ignore_index=True), whole=True)
        run.write_table("history", pd.concat(histories, ignore_index=True))
    say(f"Wrote {out}")


def evaluate(
    tasks: TasksOption,
    vector: Annotated[
        list[str], typer.Option("--vector", help="Saved vector as NAME=FILE; repeatable.")
    ],
    out: OutOption,
    model: ModelOption = "smollm2-135m",
    data: DataOption = None,
    duplicates: DuplicatesOption = "error",
    template: TemplateOption = None,
    backend: BackendOption = "bridge",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    shots: ShotsOption = 10,
    seed: SeedOption = 0,
) -> None:
    """Saved vectors against test prompts; writes OUT/results.csv."""
    chosen = read_tasks(tasks, data, duplicates, template)
    files = named_files(vector)

    import pandas as pd

    from tvlens.evaluation import methods as evaluation
    from tvlens.studies.text import TextSettings
    from tvlens.vectors.catalogue import load_vector

    methods = {name: load_vector(file) for name, file in files.items()}
    settings = TextSettings(seed=seed, shots=shots)
    lens = load_lens(model, backend, dtype, device, revision)
    chosen = lay_out(chosen, template, lens)
    require_askable(lens, chosen, shots, ["test"], None)
    with open_run(out, "evaluate", lens, chosen, settings, vectors=files) as run:
        frames = []
        for task in chosen.values():

            def compute(task: Task = task) -> dict[str, Any]:
                found = evaluation.evaluate(lens, task, methods, shots=shots, seed=seed)
                return {"results": found}

            frames.append(run.step(f"{task.name}/evaluation", compute)["results"])
            show_accuracy(frames[-1])
        path = run.write_table("results", pd.concat(frames, ignore_index=True), whole=True)
    say(f"Wrote {path}")


def show_accuracy(results: "pd.DataFrame") -> None:
    """Print how often one task's methods are right: a row for each, a column per kind of prompt.

    By exact match where first tokens do not tell answers apart, which is then the first metric.
    """
    from tvlens.tasks.base import KINDS

    metric = results["metric"].iloc[0]
    rows = results[results["metric"] == metric]
    text = [with_interval(row.value, row.ci_low, row.ci_high) for row in rows.itertuples()]
    table = rows.assign(text=text).pivot(index="method", columns="prompt", values="text")
    kinds = [kind for kind in KINDS if kind in table.columns]
    what = "exact match" if metric == "exact_match" else "first-token accuracy"
    title = f"{rows['task'].iloc[0]}: {what} [95% interval], n = {rows['n'].iloc[0]}"
    show(table.loc[rows["method"].unique(), kinds].reset_index(), title)
