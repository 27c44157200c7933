"""The `tvlens` command: one thin command per verb of the library."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import typer
from rich.console import Console
from rich.table import Table

from tvlens import study as studies
from tvlens import tasks as text_tasks
from tvlens.bench import bench
from tvlens.errors import TvlensError, UnknownNameError
from tvlens.evaluate import Method, evaluate
from tvlens.headsets import compare_head_sets, overlap_curve
from tvlens.lens import Lens
from tvlens.loading import BackendKind, load
from tvlens.methods.fit import FitSettings
from tvlens.methods.ltv import LearnableTaskVector
from tvlens.methods.vector import TaskVector
from tvlens.models.bundled import list_bundled
from tvlens.runs import Run
from tvlens.storage import encode_json, load_tensors, write
from tvlens.study import StudySettings
from tvlens.tasks import Task

app = typer.Typer(
    help="Which attention heads carry a task, and does a learned answer agree with a causal one?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
study_app = typer.Typer(help="The whole study of several tasks.", no_args_is_help=True)
app.add_typer(study_app, name="study")
console = Console()
errors = Console(stderr=True)

ModelOption = Annotated[
    str, typer.Option("--model", help="Bundled name, local folder or Hugging Face name.")
]
TasksOption = Annotated[str, typer.Option("--tasks", help="Task names, separated by commas.")]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of [{input, output}] files to look tasks up in first."),
]
DuplicatesOption = Annotated[
    Literal["error", "drop"],
    typer.Option("--duplicates", help="What to do with inputs that have different outputs."),
]
OutOption = Annotated[Path, typer.Option("--out", help="Run folder.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Seed of every draw.")]
BackendOption = Annotated[
    BackendKind, typer.Option("--backend", help="TransformerBridge or HookedTransformer.")
]
ShotsOption = Annotated[int, typer.Option("--shots", help="Examples in a prompt.")]
PresetOption = Annotated[
    Literal["default", "paper"],
    typer.Option("--preset", help="Training settings: ours, or those of the released code."),
]
StepsOption = Annotated[int | None, typer.Option("--steps", help="Largest number of steps.")]


def main() -> None:
    """Run the command line; mistakes a user can make end in one line, not in a traceback."""
    try:
        app()
    except TvlensError as error:
        errors.print(f"[red]error:[/red] {_escape(str(error))}", highlight=False)
        sys.exit(2)


@app.command()
def models() -> None:
    """The bundled models, and whether they are here."""
    _print(list_bundled())
    console.print("Any local folder or Hugging Face name of a causal language model works too.")


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
            "licence": task.licence,
        }
        for name, task in found.items()
    ]
    _print(pd.DataFrame(rows))


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
    chosen = _tasks(tasks, data, duplicates)
    settings = StudySettings(seed=seed, shots=shots)
    with _open(out, "mediate", model, backend, chosen, settings) as run:
        lens = _load(model, backend)
        frames = []
        for task in chosen.values():
            means = studies.head_means(lens, task, run, settings)
            effects = studies.mediate(lens, task, run, settings, means)
            frames.append(effects.to_frame(seed=seed))
            _print(frames[-1].nlargest(10, "aie").round(4), title=f"{task.name}: top 10 by AIE")
        path = run.write_table("heads", pd.concat(frames, ignore_index=True))
    console.print(f"Wrote {path}")


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
    chosen = _tasks(tasks, data, duplicates)
    settings = StudySettings(seed=seed, shots=shots, ltv=_fit_settings(preset, steps))
    with _open(out, "fit", model, backend, chosen, settings) as run:
        lens = _load(model, backend)
        frames, histories = [], []
        for task in chosen.values():
            means = studies.head_means(lens, task, run, settings)
            ltv = studies.fit(lens, task, run, settings, means, seed)
            folder = run.folder / "vectors"
            folder.mkdir(exist_ok=True)
            ltv.save(folder / f"{task.name}-ltv.safetensors")
            histories.append(ltv.history.assign(task=task.name))
            frames.append(studies.ltv_frame(ltv))
            _print(ltv.history.iloc[[0, -1]].round(4), title=f"{task.name}: start and end")
        run.write_table("heads", pd.concat(frames, ignore_index=True))
        run.write_table("history", pd.concat(histories, ignore_index=True))
    console.print(f"Wrote {out}")


@app.command(name="evaluate")
def evaluate_command(
    tasks: TasksOption,
    vector: Annotated[
        list[str], typer.Option("--vector", help="NAME=FILE of a saved vector; repeatable.")
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
    chosen = _tasks(tasks, data, duplicates)
    methods = dict(_named_vector(text) for text in vector)
    settings = StudySettings(seed=seed, shots=shots)
    with _open(out, "evaluate", model, backend, chosen, settings, vectors=sorted(vector)) as run:
        lens = _load(model, backend)
        frames = []
        for task in chosen.values():

            def compute(task: Task = task) -> dict[str, Any]:
                return {"results": evaluate(lens, task, methods, shots=shots, seed=seed)}

            frames.append(run.step(f"{task.name}/evaluation", compute)["results"])
            _print(_accuracy(frames[-1]), title=f"{task.name}: accuracy")
        path = run.write_table("results", pd.concat(frames, ignore_index=True))
    console.print(f"Wrote {path}")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="COLUMN@FILE, such as aie@RUN/heads.csv.")],
    second: Annotated[str, typer.Argument(help="COLUMN@FILE, such as contribution@RUN/heads.csv.")],
    out: OutOption,
) -> None:
    """Two head scores against each other, task by task; writes OUT/headsets.csv."""
    a, b = _scores(first), _scores(second)
    shared = [task for task in a if task in b]
    if not shared:
        raise UnknownNameError(
            f"no task is in both {first} ({', '.join(a)}) and {second} ({', '.join(b)}); "
            "compare tables of the same tasks"
        )
    with Run.open(out, "compare", {"first": first, "second": second}) as run:
        names = (first, second) if first != second else (first, f"{second} again")
        frames, curves = [], []
        for task in shared:
            ks = [k for k in (5, 10, 20) if k <= a[task].numel()]
            frames.append(compare_head_sets(a[task], b[task], ks=ks, names=names))
            frames[-1].insert(0, "task", task)
            curves.append(overlap_curve(a[task], b[task]).assign(task=task))
            _print(frames[-1].round(4), title=task)
        run.write_table("overlap_curves", pd.concat(curves, ignore_index=True))
        path = run.write_table("headsets", pd.concat(frames, ignore_index=True))
    console.print(f"Wrote {path}")


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
    ltv_seeds: Annotated[int, typer.Option(help="LTVs trained per task, for stability.")] = 3,
    n_test: Annotated[int | None, typer.Option(help="Test prompts; all pairs by default.")] = None,
) -> None:
    """Mediation, function vectors, LTV, evaluation and comparison of text tasks."""
    chosen = _tasks(tasks, data, duplicates)
    settings = StudySettings(
        seed=seed,
        shots=shots,
        ltv=_fit_settings(preset, steps),
        ltv_seeds=ltv_seeds,
        n_test=n_test,
    )
    with _open(out, "study text", model, backend, chosen, settings) as run:
        lens = _load(model, backend)
        found = studies.study_tasks(lens, chosen, run, settings, say=console.print)
    for name, result in found.items():
        _print(_accuracy(result.results), title=f"{name}: first-token accuracy")
        headsets = result.headsets
        overlap = headsets[headsets["measure"].isin(["overlap", "rank_biased_overlap", "spearman"])]
        columns = ["comparison", "measure", "k", "value", "chance"]
        _print(overlap[columns].round(3), title=f"{name}: head sets")
    console.print(f"Tables, vectors, figures and manifest are in {out}")


@app.command(name="bench")
def bench_command(
    out: OutOption = Path("runs/bench"),
    model: ModelOption = "smollm2-135m",
    task: Annotated[str, typer.Option("--task", help="Task whose prompts are used.")] = (
        "present-past"
    ),
    backend: BackendOption = "bridge",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Replay against loops of whole forward passes, timed side by side."""
    chosen = _tasks(task, None, "error")
    with _open(out, "bench", model, backend, chosen, StudySettings()) as run:
        lens = _load(model, backend)
        figures = bench(lens, chosen[task], say=console.print)
        run.write_table("bench", pd.DataFrame([figures]))
    if json_file is not None:
        write(json_file, encode_json("the benchmark", figures))
    rows = [{"figure": name, "value": f"{value:.4g}"} for name, value in figures.items()]
    _print(pd.DataFrame(rows), title=f"{lens!r}")


def _load(model: str, backend: BackendKind) -> Lens:
    from transformers.utils import logging

    logging.disable_progress_bar()
    lens = load(model, backend=backend)
    console.print(repr(lens), highlight=False)
    return lens


def _tasks(names: str, data: Path | None, duplicates: Literal["error", "drop"]) -> dict[str, Task]:
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UnknownNameError("--tasks names no task; expected names separated by commas")
    found = {}
    for name in wanted:
        path = None if data is None else data / f"{name}.json"
        if path is not None and path.exists():
            found[name] = text_tasks.load_file(path, duplicates=duplicates)
        elif data is not None and name not in text_tasks.names():
            there = ", ".join(sorted(file.stem for file in data.glob("*.json"))) or "no such files"
            raise UnknownNameError(
                f"unknown task {name!r}: {data} holds {there}, and no shipped task has this name"
            )
        else:
            found[name] = text_tasks.load(name)
    return found


def _open(
    out: Path,
    command: str,
    model: str,
    backend: str,
    chosen: dict[str, Task],
    settings: StudySettings,
    **more: Any,
) -> Run:
    config = {"model": model, "backend": backend, "settings": settings.to_json(), **more}
    digests = {name: task.digest for name, task in chosen.items()}
    return Run.open(out, command, config, data=digests, seeds={"seed": settings.seed})


def _fit_settings(preset: str, steps: int | None) -> FitSettings:
    settings = FitSettings.paper() if preset == "paper" else FitSettings()
    return settings if steps is None else replace(settings, steps=steps)


def _named_vector(text: str) -> tuple[str, Method]:
    name, separator, file = text.partition("=")
    if not (name and separator and file):
        raise UnknownNameError(f"--vector {text!r}: expected NAME=FILE")
    tensors, _ = load_tensors(file)
    return name, LearnableTaskVector.load(file) if "omega" in tensors else TaskVector.load(file)


def _scores(text: str) -> dict[str, Any]:
    import torch

    column, separator, file = text.partition("@")
    if not (column and separator and file):
        raise UnknownNameError(f"{text!r}: expected COLUMN@FILE, such as aie@RUN/heads.csv")
    if not Path(file).is_file():
        raise UnknownNameError(f"{text!r}: there is no file {file}")
    table = pd.read_csv(file)
    missing = {"task", "layer", "head", column} - set(table.columns)
    if missing:
        raise UnknownNameError(
            f"{file} has no column {', '.join(sorted(missing))}; it has {', '.join(table.columns)}"
        )
    grids = {}
    for task, rows in table.groupby("task", sort=False):
        grid = rows.pivot(index="layer", columns="head", values=column)
        grids[str(task)] = torch.tensor(grid.to_numpy())
    return grids


def _accuracy(results: pd.DataFrame) -> pd.DataFrame:
    rows = results[results["metric"] == "accuracy"]
    text = rows.apply(lambda r: f"{r['value']:.2f} [{r['ci_low']:.2f}, {r['ci_high']:.2f}]", axis=1)
    table = rows.assign(text=text).pivot(index="method", columns="prompt", values="text")
    order = [name for name in rows["method"].unique() if name in table.index]
    return table.loc[order].fillna("").reset_index()


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _print(frame: pd.DataFrame, title: str | None = None) -> None:
    table = Table(title=title, title_justify="left")
    for column in frame.columns:
        numeric = pd.api.types.is_numeric_dtype(frame[column])
        table.add_column(str(column), justify="right" if numeric else "left")
    show: Callable[[Any], str] = lambda x: "" if pd.isna(x) else str(x)  # noqa: E731
    for row in frame.itertuples(index=False):
        table.add_row(*(_escape(show(x)) for x in row))
    console.print(table)


if __name__ == "__main__":
    main()
