"""What there is to look at and to ask, and the training of regression models."""

from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

import typer

from tvlens import tasks
from tvlens.cli.options import (
    DataOption,
    DuplicatesOption,
    OutOption,
    SeedOption,
    complete_shipped,
)
from tvlens.console import complain, progress_bar, say, show
from tvlens.errors import TaskError, UnknownNameError
from tvlens.tasks.text.files import read_folder

Precision = Literal["float32", "bfloat16", "float16"]


def list_models(
    families: Annotated[
        bool, typer.Option("--families", help="Families of models: what runs them, and why.")
    ] = False,
) -> None:
    """The models that tvlens knows: text models that it fetches, and whether they are here."""
    if families:
        _list_families()
        return

    from tvlens.models.catalogue import known_models, list_bundled

    bundled = list_bundled()
    said_below = ("description", "folder")
    show([{key: x for key, x in row.items() if key not in said_below} for row in bundled])
    for row in bundled:
        state = "is in" if row["present"] else "will be fetched into"
        say(f"{row['name']}: {row['description']}; {state} {row['folder']}")
    included = [name for name, origin in known_models().items() if origin == "included"]
    say(f"Included, for regression: {', '.join(included)} (tvlens regression models).")
    say("Any local folder or Hugging Face name of a causal language model works too.")


def _list_families() -> None:
    from tvlens.models.families import FAMILIES

    titles = {
        "replay": "By replay",
        "whole passes": "By whole forward passes, exact and far slower",
        "refused": "Refused",
    }
    for engine, title in titles.items():
        say(f"{title}:")
        for family in FAMILIES:
            if family.engine == engine:
                why = f" ({family.why})" if family.why else ""
                say(f"  {', '.join(family.models)}{why}")
    say("tvlens.load looks at the model that is given, and what it finds holds.")


def list_tasks(data: DataOption = None, duplicates: DuplicatesOption = "error") -> None:
    """The shipped tasks, or those of a folder."""
    left_out: list[TaskError] = []
    if data is None:
        found = {name: tasks.load(name) for name in tasks.names()}
    else:
        found, left_out = read_folder(data, duplicates=duplicates)
    show(
        [
            {
                "task": name,
                "pairs": len(task.pairs),
                "example": f"{task.pairs[0].input} → {task.pairs[0].output}",
                "description": task.description,
            }
            for name, task in found.items()
        ]
    )
    for error in left_out:
        complain(f"left out: {error}", "warning")
    if data is None:
        say("Sources and licences: tvlens.tasks.load(NAME).source and .licence, in Python.")


def list_regression_models() -> None:
    """The regression models that tvlens ships, and how well they do."""
    from tvlens.models.catalogue import list_shipped, load_shipped

    rows = []
    for name in list_shipped():
        model, card = load_shipped(name)
        facts = {key: card[key] for key in ("functions", "train_points", "error", "least_squares")}
        heads = model.sizes.n_layer * model.sizes.n_head
        rows.append({"model": name, "n_dims": model.sizes.n_dims, "heads": heads, **facts})
    show(rows, "error: squared, at train_points points, over the variance of y")


def train_regression(
    functions: Annotated[
        str, typer.Option("--functions", help="Function class, such as linear; or CLASS,key=value.")
    ],
    out: OutOption,
    preset_name: Annotated[
        str, typer.Option("--preset", help="Sizes and schedule: tiny, small, standard.")
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
        typer.Option(
            help="Shipped model or .safetensors file to go on from, of the same preset.",
            autocompletion=complete_shipped,
        ),
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
    """Train a regression transformer; writes OUT/model.safetensors and OUT/history.csv.

    The same command writes the same bytes, but for times: those are in OUT/times.csv and the
    manifest.
    """
    import torch

    from tvlens import figures
    from tvlens.models.catalogue import read_regression
    from tvlens.models.regression.training import model_card, preset, train
    from tvlens.models.regression.transformer import filled, save_regression
    from tvlens.models.source import which_device
    from tvlens.runs.run import Run
    from tvlens.tasks.regression.functions import function_class

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
    which_device(device)
    config = {"functions": name, "settings": asdict(settings), "start": start, "device": device}
    data = {} if first is None else {f"{start}, weights": first.digest}
    with Run.open(out, "regression train", config, data=data, seeds={"seed": seed}) as run:
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
            found = {"history": trained.history, "times": trained.times, "card": card}
            return found | {"weights": trained.model.state_dict()}

        found = run.step("training", compute)
        checkpoint.unlink(missing_ok=True)
        path = run.folder / "model.safetensors"
        model = filled(settings.sizes, found["weights"], path)
        save_regression(model, path, found["card"], dtype=torch.float32)
        history = found["history"]
        run.write_table("history", history)
        run.write_table("times", found["times"])
        losses = history.rename(columns={"loss": "train_loss", "error": "validation_loss"})
        run.write_figure(
            "training", figures.training_history(losses, unit="share of the variance of y")
        )
    show(history.iloc[sorted({0, len(history) - 1})], f"{name}: start and end")
    say(f"Wrote {out / 'model.safetensors'}")


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


def _changed(value: Any, **changes: Any) -> Any:
    """The dataclass with what was asked for changed."""
    return replace(value, **{key: new for key, new in changes.items() if new is not None})
