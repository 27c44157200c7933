"""Options that several commands share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tvlens.lens.loading import BackendKind

ModelOption = Annotated[
    str, typer.Option("--model", help="Bundled name, local folder or Hugging Face name.")
]
TasksOption = Annotated[str, typer.Option("--tasks", help="Task names, separated by commas.")]
DataOption = Annotated[
    Path | None,
    typer.Option("--data", help="Folder of NAME.json task files, looked in before shipped tasks."),
]
DuplicatesOption = Annotated[
    Literal["error", "drop"],
    typer.Option("--duplicates", help="What to do with inputs that have different outputs."),
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Run folder; the same command into it resumes.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of every draw.")]
BackendOption = Annotated[
    BackendKind,
    typer.Option("--backend", help="TransformerBridge, or transformer-lens 3's HookedTransformer."),
]
ShotsOption = Annotated[
    int, typer.Option("--shots", min=1, help="Examples in a prompt; LTVs may train on fewer.")
]
PresetOption = Annotated[
    Literal["default", "paper"],
    typer.Option(
        "--preset", help="Training settings: ours, or those of the paper's released code."
    ),
]
StepsOption = Annotated[
    int | None, typer.Option("--steps", min=1, help="Training steps at most, if not the preset's.")
]
