"""`tvlens regression`: transformers that learn functions in context."""

from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from tvlens import figures
from tvlens.bench import CurveBenchSettings, bench_curves
from tvlens.cli.options import BackendOption, OutOption, SeedOption, StepsOption
from tvlens.console import progress_bar, say, show, with_interval
from tvlens.errors import UnknownNameError
from tvlens.lens.lens import Lens
from tvlens.lens.loading import BackendKind, load
from tvlens.models.catalogue import is_regression, list_shipped, load_shipped, read_regression
from tvlens.models.regression.training import PRESETS, Precision, model_card, preset, train
from tvlens.models.regression.transformer import save_regression
from tvlens.runs.run import Run
from tvlens.studies.functions import study_functions
from tvlens.studies.regression import RegressionSettings
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.inputs import SHIFTS
from tvlens.tasks.regression.task import FunctionTask

regression_app = typer.Typer(
    help="Transformers that learn functions in context.", no_args_is_help=True
)


@regression_app.command(name="train")
def train_command(
    functions: Annotated[
        str, typer.Option("--functions", help="Function class, such as linear; or CLASS,key=value.")
    ],
    out: OutOption,
    preset_name: Annotated[
        str, typer.Option("--preset", help=f"Sizes and schedule: {', '.join(PRESETS)}.")
    ] = "small",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps.")] = None,
    dims: Annotated[int | None, typer.Option(min=1, help="Dimensions of x.")] = None,
    train_points: Annotated[
        int | None, typer.Option(min=1, help="Points of the longest training prompts, T_train.")
    ] = None,
    n_points: Annotated[
        int | None, typer.Option(min=1, help="Points that the model has positions for.")
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="Shipped model or .safetensors file to go on from, of the same preset."),
    ] = None,
    precision: Annotated[
        Precision | None, typer.Option(help="Of the forward pass, if not the preset's.")
    ] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda; an accelerator where there is one.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Train a regression transformer; writes OUT/model.safetensors and OUT/history.csv."""
    name, options = _class_and_options(functions)
    settings = preset(preset_name, options=options)
    settings = _changed(
        settings,
        sizes=_changed(settings.sizes, n_dims=dims, n_points=n_points),
        steps=steps,
        train_points=train_points,
        precision=precision,
        compiled=compiled,
    )
    function_class(name, settings.sizes.n_dims, **options)
    first = None if start is None else read_regression(start)[0]
    if device is None:
        current = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if current is None else current.type
    config = {"functions": name, "settings": asdict(settings), "start": start, "device": device}
    with Run.open(out, "regression train", config, seeds={"seed": seed}) as run:
        checkpoint = run.folder / "checkpoints" / "training.safetensors"

        def compute() -> dict[str, Any]:
            with progress_bar(f"{name}, {preset_name}", settings.steps) as advance:
                trained = train(
                    name,
                    settings,
                    seed=seed,
                    start=first,
                    device=device,
                    checkpoint=checkpoint,
                    progress=advance,
                    say=say,
                )
            card = model_card(name, settings, seed, start, device, trained)
            path = run.folder / "model.safetensors"
            save_regression(trained.model, path, card, dtype=torch.float32)
            return {"history": trained.history}

        history = run.step("training", compute)["history"]
        checkpoint.unlink(missing_ok=True)
        run.write_table("history", history)
        losses = history.rename(columns={"loss": "train_loss", "error": "validation_loss"})
        run.write_figure(
            "training", figures.training_history(losses, unit="share of the variance of y")
        )
    show(history.iloc[sorted({0, len(history) - 1})], f"{name}: start and end")
    say(f"Wrote {out / 'model.safetensors'}")


@regression_app.command(name="bench")
def bench_command(out: OutOption = Path("runs/bench-curves"), seed: SeedOption = 0) -> None:
    """Error curves by replay against a loop over the number of points; writes OUT/bench.csv."""
    settings = CurveBenchSettings(seed=seed)
    with Run.open(out, "regression bench", asdict(settings), seeds={"seed": seed}) as run:
        found = bench_curves(settings)
        run.write_table("bench", pd.DataFrame([found]))
    show(pd.DataFrame(found.items(), columns=["figure", "value"]), digits=4)


@regression_app.command(name="models")
def models_command() -> None:
    """The regression models that tvlens ships, and how well they do."""
    rows = []
    for name in list_shipped():
        model, card = load_shipped(name)
        facts = {key: card[key] for key in ("functions", "train_points", "error", "least_squares")}
        heads = model.sizes.n_layer * model.sizes.n_head
        rows.append({"model": name, "n_dims": model.sizes.n_dims, "heads": heads, **facts})
    show(pd.DataFrame(rows), "error: squared, at train_points points, over the variance of y")


def _class_and_options(text: str) -> tuple[str, dict[str, int | float]]:
    """The name and options of a text like `sparse-linear,n_nonzero=2`."""
    name, *pairs = (part.strip() for part in text.split(","))
    options: dict[str, int | float] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        try:
            options[key] = float(value) if "." in value else int(value)
        except ValueError:
            separator = ""
        if not separator:
            raise UnknownNameError(
                f"--functions {text!r}: expected CLASS or CLASS,key=number, such as "
                "sparse-linear,n_nonzero=2; one class is trained at a time"
            )
    return name, options


def study_command(
    functions: Annotated[
        str,
        typer.Option(
            "--functions",
            help="Function classes with a shipped model, or model.safetensors files of your own; "
            "separated by commas.",
        ),
    ],
    out: OutOption,
    backend: BackendOption = "bridge",
    seed: SeedOption = 0,
    steps: StepsOption = None,
    n_test: Annotated[
        int, typer.Option(min=2, help="Test prompts of each kind and shift.")
    ] = RegressionSettings.n_test,
    shifts: Annotated[
        str, typer.Option(help="Shifts of the test prompts, separated by commas.")
    ] = ",".join(SHIFTS),
    ltv_seeds: Annotated[
        int, typer.Option(min=1, help="LTVs trained for the comparison of heads.")
    ] = RegressionSettings.ltv_seeds,
) -> None:
    """Mediation, function vectors, LTV, fidelity benchmark and comparison of function classes.

    Writes OUT/results.csv (errors of every method and estimator at every number of points),
    OUT/heads.csv, OUT/headsets.csv, OUT/vectors, OUT/figures and OUT/manifest.json.
    """
    settings = RegressionSettings(
        seed=seed,
        n_test=n_test,
        shifts=tuple(name.strip() for name in shifts.split(",") if name.strip()),
        ltv_seeds=ltv_seeds,
    )
    if steps is not None:
        settings = replace(settings, ltv=replace(settings.ltv, steps=steps))
    models, data = read_functions(functions, backend)
    tasks = [task for _, task in models.values()]
    for task, shift in product(tasks, settings.shifts):
        replace(task, shift=shift)  # refuses an unknown shift before the folder is claimed
    config = {"functions": list(models), "backend": backend, "settings": asdict(settings)}
    with Run.open(out, "study regression", config, data=data, seeds={"seed": seed}) as run:
        found = study_functions(models, run, settings, say=say)
    for name, study in found.items():
        _show_errors(name, study.results, models[name][1].require_train_points())
        overlap = study.headsets[study.headsets["measure"].isin(["overlap", "spearman"])]
        show(overlap[["task", "comparison", "measure", "k", "value", "chance"]], f"{name}: heads")
    say(f"Tables, vectors, figures and manifest are in {out}")


def read_functions(
    names: str, backend: BackendKind
) -> tuple[dict[str, tuple[Lens, FunctionTask]], dict[str, str]]:
    """The models of function classes by name, each with its class as a task, and their digests.

    Args:
        names: function classes that have a shipped model, shipped models or files, separated by
            commas.
        backend: how they are looked at.

    Raises:
        UnknownNameError: there is no such class, model or file, or none is named.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UnknownNameError("--functions names no class; expected names separated by commas")
    found: dict[str, tuple[Lens, FunctionTask]] = {}
    digests: dict[str, str] = {}
    for name in wanted:
        shipped = f"{name}-small"
        source = shipped if shipped in list_shipped() else name
        if not is_regression(source):
            classes = [model.removesuffix("-small") for model in list_shipped()]
            raise UnknownNameError(
                f"--functions {name!r}: no shipped model has learned this class; expected one of "
                f"{', '.join(classes)}, or a model.safetensors that `tvlens regression train` wrote"
            )
        model, card = read_regression(source)
        label = name.removesuffix(".safetensors").replace("/", "-").strip("-.")
        task = FunctionTask.of_card(label, card, model.sizes.n_dims)
        found[label] = load(source, backend=backend), task
        digests |= {label: task.digest, f"{label}, weights": model.digest}
    return found, digests


def _show_errors(functions: str, results: pd.DataFrame, train_points: int) -> None:
    """Errors in distribution: a row per method, a column per number of points worth looking at."""
    rows = results[
        (results["functions"] == functions)
        & (results["shift"] == "none")
        & (results["metric"] == "squared_error")
    ]
    clean = rows[rows["prompt"] == "clean"]
    last = int(clean["points"].max())
    asked = [("clean", p) for p in sorted({train_points, (train_points + last) // 2, last})]
    asked += [("zero", 1), ("shuffled", train_points)]
    columns: dict[str, Any] = {}
    for prompt, points in asked:
        part = rows[(rows["prompt"] == prompt) & (rows["points"] == points)]
        columns[f"{prompt}, {points}"] = part.set_index("method").apply(
            lambda row: with_interval(row["value"], row["ci_low"], row["ci_high"], digits=3),
            axis=1,
        )
    table = pd.DataFrame(columns).reindex(clean["method"].unique()).fillna("")
    title = f"{functions}: squared error over variance [95% interval], by prompt and points"
    show(table.rename_axis("method").reset_index(), title)


def _changed(value: Any, **changes: Any) -> Any:
    """The dataclass with what was asked for changed."""
    return replace(value, **{key: new for key, new in changes.items() if new is not None})
