"""How fast replay is, measured on this machine."""

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    from tvlens.timing import Figures


def bench_text(
    out: OutOption = Path("runs/bench"),
    model: ModelOption = "smollm2-135m",
    task: Annotated[
        str,
        typer.Option("--task", help="Task whose prompts are used.", autocompletion=complete_tasks),
    ] = "present-past",
    data: DataOption = None,
    backend: BackendOption = "bridge",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
) -> None:
    """Replay against loops of whole forward passes, timed in turn; writes OUT/bench.csv."""
    chosen = read_tasks(task, data, "error")
    if len(chosen) != 1:
        raise UnknownNameError(f"--task {task!r}: expected one task, got {len(chosen)}")
    (found,) = chosen.values()

    import pandas as pd

    from tvlens.bench import BenchSettings, bench
    from tvlens.runs.storage import encode_json, write

    lens = load_lens(model, backend, dtype, device, revision)
    settings = BenchSettings()
    with open_run(out, "bench", lens, chosen, settings) as run:
        figures = bench(lens, found, settings, say=say)
        run.write_table("bench", pd.DataFrame([figures]))
    if json_file is not None:
        write(json_file, encode_json("the benchmark", figures))
    _show_figures(figures, repr(lens))


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
