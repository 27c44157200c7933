"""`tvlens regression`: transformers that learn functions in context."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import typer

from tvlens import figures
from tvlens.console import say, show
from tvlens.errors import UnknownNameError
from tvlens.models.regression import RegressionTransformer, load_regression, save_regression
from tvlens.models.shipped import list_shipped, load_shipped
from tvlens.options import OutOption, SeedOption
from tvlens.progress import progress_bar
from tvlens.runs import Run
from tvlens.tasks.functions import function_class
from tvlens.training import PRESETS, Precision, model_card, preset, train

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
    changes: dict[str, Any] = {"steps": steps, "precision": precision, "compiled": compiled}
    settings = preset(
        preset_name, options=options, **{k: v for k, v in changes.items() if v is not None}
    )
    function_class(name, settings.sizes.n_dims, **options)
    first = None if start is None else _read(start)
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


def _read(start: str) -> RegressionTransformer:
    if start in list_shipped():
        return load_shipped(start)[0]
    if not Path(start).is_file():
        raise UnknownNameError(
            f"--start {start!r}: no such file, and no shipped model ({', '.join(list_shipped())})"
        )
    return load_regression(start)[0]
