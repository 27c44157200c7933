"""The `tvlens` command: one thin command per verb of the library."""

import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from tvlens import tasks as text_tasks
from tvlens.bench import BenchSettings, bench
from tvlens.cli.options import (
    BackendOption,
    DataOption,
    DuplicatesOption,
    ModelOption,
    OutOption,
    PresetOption,
    SeedOption,
    ShotsOption,
    StepsOption,
    TasksOption,
    named_files,
    read_scores,
    read_tasks,
    read_vector,
    score_file,
)
from tvlens.cli.regression import regression_app, study_command
from tvlens.console import complain, say, show
from tvlens.errors import TvlensError, UnknownNameError
from tvlens.evaluation.methods import KINDS, evaluate
from tvlens.lens.lens import Lens
from tvlens.lens.loading import BackendKind, load
from tvlens.models.catalogue import list_bundled
from tvlens.runs.run import Run
from tvlens.runs.storage import encode_json, file_sha256, write
from tvlens.scores.agreement import compare_head_sets, overlap_curve
from tvlens.studies import text as studies
from tvlens.studies.stages import fitting_ks, ltv_frame
from tvlens.studies.text import StudySettings
from tvlens.tasks import Task
from tvlens.vectors.ltv.settings import FitSettings

app = typer.Typer(
    help="Which attention heads carry a task, and does a learned answer agree with a causal one?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
study_app = typer.Typer(help="The whole study of several tasks.", no_args_is_help=True)
app.add_typer(study_app, name="study")
app.add_typer(regression_app, name="regression")
study_app.command(name="regression")(study_command)


def main() -> None:
    """Run the command line; mistakes a user can make end in one line, not in a traceback."""
    try:
        app()
    except TvlensError as error:
        complain(str(error))
        sys.exit(2)


@app.command()
def models() -> None:
    """The bundled models, and whether they are here."""
    bundled = list_bundled()
    show(bundled.drop(columns=["description", "folder"]))
    for model in bundled.itertuples():
        state = "is in" if model.present else "will be fetched into"
        say(f"{model.name}: {model.description}; {state} {model.folder}")
    say("Any local folder or Hugging Face name of a causal language model works too.")


@app.command()
def tasks(data: DataOption = None, duplicates: DuplicatesOption = "error") -> None:
    """The shipped tasks, or those of a folder."""
    if data is None:
        found = {name: text_tasks.load(name) for name in text_tasks.names()}
    else:
        found = text_tasks.load_folder(data, duplicates=duplicates)
    rows = [
        {
            "task": name,
            "pairs": len(task.pairs),
            "example": f"{task.pairs[0].input} → {task.pairs[0].output}",
            "description": task.description,
        }
        for name, task in found.items()
    ]
    show(pd.DataFrame(rows))
    if data is None:
        say("Sources and licences: tvlens.tasks.load(NAME).source and .licence, in Python.")


@app.command()
def mediate(
    tasks: TasksOption,
    out: OutOption,
    model: ModelOption = "smollm2-135m",
    data: DataOption = None,
    duplicates: DuplicatesOption = "error",
    backend: BackendOption = "bridge",
    shots: ShotsOption = 10,
    seed: SeedOption = 0,
) -> None:
    """Average indirect effect of every head; writes OUT/heads.csv."""
    chosen = read_tasks(tasks, data, duplicates)
    settings = StudySettings(seed=seed, shots=shots)
    lens = _load(model, backend)
    with _open(out, "mediate", model, lens, chosen, settings) as run:
        frames = []
        for task in chosen.values():
            means = studies.head_means(lens, task, run, settings)
            effects = studies.mediate(lens, task, run, settings, means)
            frames.append(effects.to_frame(seed=seed))
            top = frames[-1].drop(columns="task").nlargest(10, "aie")
            unit = f"{effects.score_name}, 95% interval over {len(effects.values)} prompts"
            show(top, f"{task.name}: heads of largest AIE ({unit})", digits=4)
        path = run.write_table("heads", pd.concat(frames, ignore_index=True))
    say(f"Wrote {path}")


@app.command()
def fit(
    tasks: TasksOption,
    out: OutOption,
    model: ModelOption = "smollm2-135m",
    data: DataOption = None,
    duplicates: DuplicatesOption = "error",
    backend: BackendOption = "bridge",
    shots: ShotsOption = 10,
    seed: SeedOption = 0,
    preset: PresetOption = "default",
    steps: StepsOption = None,
) -> None:
    """Train Learnable Task Vectors; writes OUT/vectors/TASK-ltv.safetensors and OUT/heads.csv."""
    chosen = read_tasks(tasks, data, duplicates)
    settings = StudySettings(seed=seed, shots=shots, ltv=_fit_settings(preset, steps, shots))
    lens = _load(model, backend)
    with _open(out, "fit", model, lens, chosen, settings) as run:
        frames, histories = [], []
        for task in chosen.values():
            means = studies.head_means(lens, task, run, settings)
            ltv = studies.fit(lens, task, run, settings, means, seed)
            ltv.save(run.folder / "vectors" / f"{task.name}-ltv.safetensors")
            histories.append(ltv.history.assign(task=task.name))
            frames.append(ltv_frame(ltv))
            ends = {0, int(ltv.history["validation_loss"].argmin()), len(ltv.history) - 1}
            title = f"{task.name}: start, lowest validation loss (which is kept) and end"
            show(ltv.history.iloc[sorted(ends)], title)
        run.write_table("heads", pd.concat(frames, ignore_index=True))
        run.write_table("history", pd.concat(histories, ignore_index=True))
    say(f"Wrote {out}")


@app.command(name="evaluate")
def evaluate_command(
    tasks: TasksOption,
    vector: Annotated[
        list[str], typer.Option("--vector", help="Saved vector as NAME=FILE; repeatable.")
    ],
    out: OutOption,
    model: ModelOption = "smollm2-135m",
    data: DataOption = None,
    duplicates: DuplicatesOption = "error",
    backend: BackendOption = "bridge",
    shots: ShotsOption = 10,
    seed: SeedOption = 0,
) -> None:
    """Saved vectors against test prompts; writes OUT/results.csv."""
    chosen = read_tasks(tasks, data, duplicates)
    files = named_files(vector)
    methods = {name: read_vector(file) for name, file in files.items()}
    settings = StudySettings(seed=seed, shots=shots)
    lens = _load(model, backend)
    with _open(out, "evaluate", model, lens, chosen, settings, vectors=files) as run:
        frames = []
        for task in chosen.values():

            def compute(task: Task = task) -> dict[str, Any]:
                return {"results": evaluate(lens, task, methods, shots=shots, seed=seed)}

            frames.append(run.step(f"{task.name}/evaluation", compute)["results"])
            _show_accuracy(frames[-1])
        path = run.write_table("results", pd.concat(frames, ignore_index=True))
    say(f"Wrote {path}")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="COLUMN@FILE, such as aie@RUN/heads.csv.")],
    second: Annotated[str, typer.Argument(help="COLUMN@FILE, such as contribution@RUN/heads.csv.")],
    out: OutOption,
) -> None:
    """Two head scores against each other, task by task; writes OUT/headsets.csv."""
    a, b = read_scores(first), read_scores(second)
    shared = [task for task in a if task in b]
    if not shared:
        raise UnknownNameError(
            f"no task is in both {first} ({', '.join(a)}) and {second} ({', '.join(b)}); "
            "compare tables of the same tasks"
        )
    columns = first.split("@")[0], second.split("@")[0]
    names = columns if columns[0] != columns[1] else ("first", "second")
    digests = {text: file_sha256(score_file(text)) for text in (first, second)}
    config = {"first": first, "second": second}
    with Run.open(out, "compare", config, data=digests) as run:
        frames, curves = [], []
        for task in shared:
            ks = fitting_ks(StudySettings().compare_ks, a[task].numel())
            table = compare_head_sets(a[task], b[task], ks=ks, names=names)
            show(table, task)
            frames.append(table.assign(task=task)[["task", *table.columns]])
            curves.append(overlap_curve(a[task], b[task]).assign(task=task))
        run.write_table("overlap_curves", pd.concat(curves, ignore_index=True))
        path = run.write_table("headsets", pd.concat(frames, ignore_index=True))
    say(f"Wrote {path}")


@study_app.command()
def text(
    tasks: TasksOption,
    out: OutOption,
    model: ModelOption = "smollm2-135m",
    data: DataOption = None,
    duplicates: DuplicatesOption = "error",
    backend: BackendOption = "bridge",
    shots: ShotsOption = 10,
    seed: SeedOption = 0,
    preset: PresetOption = "default",
    steps: StepsOption = None,
    ltv_seeds: Annotated[
        int,
        typer.Option(min=1, help="LTVs trained per task, for stability; the first is reported."),
    ] = 3,
    n_test: Annotated[
        int | None, typer.Option(min=1, help="Test prompts of each kind; every test pair if none.")
    ] = None,
    control_draws: Annotated[
        int, typer.Option(min=1, help="Random and permuted weights drawn, as controls.")
    ] = 3,
) -> None:
    """Mediation, function vectors, LTV, evaluation and comparison of text tasks.

    Writes OUT/results.csv (methods on test prompts), OUT/heads.csv (AIE and LTV weight of every
    head), OUT/headsets.csv (their agreement), OUT/vectors, OUT/figures and OUT/manifest.json.
    """
    chosen = read_tasks(tasks, data, duplicates)
    settings = StudySettings(
        seed=seed,
        shots=shots,
        ltv=_fit_settings(preset, steps, shots),
        ltv_seeds=ltv_seeds,
        n_test=n_test,
        control_draws=control_draws,
    )
    lens = _load(model, backend)
    with _open(out, "study text", model, lens, chosen, settings) as run:
        found = studies.study_tasks(lens, chosen, run, settings, say=say)
    for name, result in found.items():
        _show_accuracy(result.results)
        headsets = result.headsets
        overlap = headsets[headsets["measure"].isin(["overlap", "rank_biased_overlap", "spearman"])]
        show(overlap[["comparison", "measure", "k", "value", "chance"]], f"{name}: head sets")
    say(f"Tables, vectors, figures and manifest are in {out}")


@app.command(name="bench")
def bench_command(
    out: OutOption = Path("runs/bench"),
    model: ModelOption = "smollm2-135m",
    task: Annotated[str, typer.Option("--task", help="Task whose prompts are used.")] = (
        "present-past"
    ),
    data: DataOption = None,
    backend: BackendOption = "bridge",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Replay against loops of whole forward passes, timed side by side; writes OUT/bench.csv."""
    chosen = read_tasks(task, data, "error")
    if len(chosen) != 1:
        raise UnknownNameError(f"--task {task!r}: expected one task, got {len(chosen)}")
    (found,) = chosen.values()
    lens = _load(model, backend)
    settings = BenchSettings()
    with _open(out, "bench", model, lens, chosen, settings) as run:
        figures = bench(lens, found, settings, say=say)
        run.write_table("bench", pd.DataFrame([figures]))
    if json_file is not None:
        write(json_file, encode_json("the benchmark", figures))
    show(pd.DataFrame(figures.items(), columns=["figure", "value"]), repr(lens))


def _load(model: str, backend: BackendKind) -> Lens:
    from transformers.utils import logging

    logging.disable_progress_bar()
    lens = load(model, backend=backend)
    say(repr(lens))
    return lens


def _open(
    out: Path,
    command: str,
    model: str,
    lens: Lens,
    chosen: dict[str, Task],
    settings: StudySettings | BenchSettings,
    vectors: dict[str, Path] | None = None,
) -> Run:
    """The run folder. Opened last, so that a name mistyped does not claim it for that name."""
    config: dict[str, Any] = {"model": model, "backend": lens.backend.kind}
    digests = {name: task.digest for name, task in chosen.items()}
    if vectors is not None:
        config["vectors"] = {name: str(file) for name, file in vectors.items()}
        digests |= {str(file): file_sha256(file) for file in vectors.values()}
    config["settings"] = asdict(settings)
    run = Run.open(out, command, config, data=digests, seeds={"seed": settings.seed})
    run.manifest["lens"] = repr(lens)
    return run


def _fit_settings(preset: str, steps: int | None, shots: int) -> FitSettings:
    settings = FitSettings.paper() if preset == "paper" else FitSettings()
    settings = replace(settings, shots=min(settings.shots, shots))
    return settings if steps is None else replace(settings, steps=steps)


def _show_accuracy(results: pd.DataFrame) -> None:
    """Accuracy of one task's methods: a row per method, a column per kind of prompt."""
    rows = results[results["metric"] == "accuracy"]
    text = rows.apply(lambda r: f"{r['value']:.2f} [{r['ci_low']:.2f}, {r['ci_high']:.2f}]", axis=1)
    table = rows.assign(text=text).pivot(index="method", columns="prompt", values="text")
    kinds = [kind for kind in KINDS if kind in table.columns]
    title = f"{rows['task'].iloc[0]}: first-token accuracy [95% interval], n = {rows['n'].iloc[0]}"
    show(table.loc[rows["method"].unique(), kinds].reset_index(), title)


if __name__ == "__main__":
    main()
