"""How fast replay is, measured on this machine."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

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
    """Replay against loops of whole forward passes, timed side by side; writes OUT/bench.csv."""
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
    show([{"figure": name, "value": value} for name, value in figures.items()], repr(lens))


def bench_regression(out: OutOption = Path("runs/bench-curves"), seed: SeedOption = 0) -> None:
    """Error curves by replay against a loop over the number of points; writes OUT/bench.csv."""
    import pandas as pd

    from tvlens.bench import CurveBenchSettings, bench_curves
    from tvlens.runs.run import Run

    settings = CurveBenchSettings(seed=seed)
    with Run.open(out, "regression bench", asdict(settings), seeds={"seed": seed}) as run:
        found = bench_curves(settings)
        run.write_table("bench", pd.DataFrame([found]))
    show([{"figure": name, "value": value} for name, value in found.items()], digits=4)
