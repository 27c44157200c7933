"""How fast replay is, measured on this machine."""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, no_type_check

import typer

from tvlens.cli.options import (
    BackendOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    ModelOption,
    OutOption,
    RevisionOption,
    SeedOption,
    complete_tasks,
    load_lens,
    open_run,
    read_tasks,
)
from tvlens.console import say, show
from tvlens.errors import UnknownNameError

if TYPE_CHECKING:
    from tvlens.lens.lens import Lens
    from tvlens.tasks import Task
    from tvlens.timing import Figures


OneTaskOption = Annotated[
    str,
    typer.Option("--task", help="Task whose prompts are used.", autocompletion=complete_tasks),
]
JsonOption = Annotated[
    Path | None, typer.Option("--json", help="Also write the figures to this file.")
]


@no_type_check  # typer gives a context of a class that it keeps to itself
def bench_text(
    ctx: typer.Context,
    out: OutOption = Path("runs/bench"),
    model: ModelOption = "smollm2-135m",
    task: OneTaskOption = "present-past",
    data: DataOption = None,
    backend: BackendOption = "bridge",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    json_file: JsonOption = None,
) -> None:
    """Replay against loops of whole forward passes, timed in turn; writes OUT/bench.csv."""
    if ctx.invoked_subcommand is not None:
        return
    chosen = _one_task(task, data)

    from tvlens.bench import BenchSettings, bench

    lens = load_lens(model, backend, dtype, device, revision)
    _run("bench", bench, BenchSettings(), lens, chosen, out, json_file)


def bench_patching(
    out: OutOption = Path("runs/bench-patching"),
    model: ModelOption = "smollm2-135m",
    task: OneTaskOption = "present-past",
    data: DataOption = None,
    backend: BackendOption = "bridge",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    json_file: JsonOption = None,
) -> None:
    """Patching against transformer-lens' own functions, and exact against approximate effects.

    Writes OUT/bench.csv.
    """
    chosen = _one_task(task, data)

    from tvlens.bench import PatchBenchSettings
    from tvlens.bench import bench_patching as bench

    lens = load_lens(model, backend, dtype, device, revision)
    _run("bench patching", bench, PatchBenchSettings(), lens, chosen, out, json_file)


def bench_ablation(
    out: OutOption = Path("runs/bench-ablation"),
    model: ModelOption = "smollm2-135m",
    task: OneTaskOption = "present-past",
    data: DataOption = None,
    backend: BackendOption = "bridge",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    json_file: JsonOption = None,
) -> None:
    """Ablation of 100 sets of heads at the query against one hooked pass for each set and prompt.

    Writes OUT/bench.csv.
    """
    chosen = _one_task(task, data)

    from tvlens.bench import AblationBenchSettings
    from tvlens.bench import bench_ablation as bench

    lens = load_lens(model, backend, dtype, device, revision)
    _run("bench ablation", bench, AblationBenchSettings(), lens, chosen, out, json_file)


def bench_regression(out: OutOption = Path("runs/bench-curves"), seed: SeedOption = 0) -> None:
    """Error curves by replay against a loop over the number of points; writes OUT/bench.csv."""
    import pandas as pd

    from tvlens.bench import CurveBenchSettings, bench_curves
    from tvlens.runs.run import Run

    settings = CurveBenchSettings(seed=seed)
    with Run.open(out, "regression bench", asdict(settings), seeds={"seed": seed}) as run:
        found = bench_curves(settings, say=say)
        run.write_table("bench", pd.DataFrame([found]))
    _show_figures(found, digits=4)


def _one_task(task: str, data: Path | None) -> "dict[str, Task]":
    chosen = read_tasks(task, data, "error")
    if len(chosen) != 1:
        raise UnknownNameError(f"--task {task!r}: expected one task, got {len(chosen)}")
    return chosen


def _run(
    command: str,
    bench: "Callable[..., Figures]",
    settings: Any,
    lens: "Lens",
    chosen: "dict[str, Task]",
    out: Path,
    json_file: Path | None,
) -> None:
    """Measure, write and show."""
    import pandas as pd

    from tvlens.runs.storage import encode_json, write

    (task,) = chosen.values()
    with open_run(out, command, lens, chosen, settings) as run:
        figures = bench(lens, task, settings, say=say)
        run.write_table("bench", pd.DataFrame([figures]))
    if json_file is not None:
        write(json_file, encode_json("the benchmark", figures))
    _show_figures(figures, repr(lens))


def _show_figures(figures: "Figures", title: str | None = None, *, digits: int = 3) -> None:
    """One row a figure, beside it its range over the rounds, and why it is not to be quoted."""
    from tvlens.bench import doubts

    ends = {f"{name}_{end}" for name in figures for end in ("low", "high")}
    rows = [
        {
            "figure": name,
            "value": value,
            "low": figures.get(f"{name}_low", math.nan),
            "high": figures.get(f"{name}_high", math.nan),
        }
        for name, value in figures.items()
        if name not in ends
    ]
    show(rows, title, digits=digits)
    for doubt in doubts(figures):
        say(f"not to be quoted: {doubt}")
