"""How much an analysis does: `--preset smoke`, `small` or `paper`, for all of them.

smoke is over in a minute or so and shows that all of it runs. small makes the numbers that README
quotes, on two CPU cores with SmolLM2-135M and the shipped regression models. paper is for a GPU:
GPT-J-6B (or `--model meta-llama/Llama-3.1-8B`) on the tasks of Todd et al., and regression models
of the sizes of Garg et al., which `tvlens regression train --preset standard` makes.

Every analysis says its presets in `PRESETS`, values of a `Size`. An option that is given goes
before what the preset says.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from tvlens.cli import options, studies
from tvlens.errors import TvlensError, UnknownNameError, first_line

if TYPE_CHECKING:
    from tvlens.lens.lens import Lens
    from tvlens.tasks.regression.task import FunctionTask

Name = Literal["smoke", "small", "paper"]

LARGE = {"EleutherAI/gpt-j-6b": 24, "meta-llama/Llama-3.1-8B": 16}
"""Language models of preset paper, and the GB of their files; the first is its own."""
PAPER_TASKS = "antonym,capitalize-word,country-capital,english-french-word,present-past"
PAPER_TASKS += ",singular-plural"
CLASSES = ("linear", "sparse-linear", "relu", "tree")
STANDARD = {f"runs/standard/{name}/model.safetensors": name for name in CLASSES}
"""Where preset paper looks for regression models, and the class that each has learned."""

PresetOption = Annotated[
    Name,
    typer.Option(
        "--preset",
        help="smoke: a minute, to see that it runs; small: README's numbers, on two CPU cores; "
        "paper: GPT-J-6B or Llama and regression models of the paper's sizes, on a GPU.",
    ),
]
OutOption = Annotated[
    Path | None,
    typer.Option(
        "--out",
        help="Run folder; the same command into it resumes.",
        show_default="runs/PRESET/NAME",
    ),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        help="Bundled name, local folder or Hugging Face name.",
        autocompletion=options.complete_models,
        show_default="by preset",
    ),
]
TasksOption = Annotated[
    str | None,
    typer.Option(
        "--tasks",
        help="Task names, separated by commas.",
        autocompletion=options.complete_tasks,
        show_default="by preset",
    ),
]
FunctionsOption = Annotated[
    str | None,
    typer.Option(
        "--functions",
        help="Function classes with a shipped model, or model.safetensors files of your own; "
        "separated by commas.",
        autocompletion=options.complete_classes,
        show_default="by preset",
    ),
]
CountOption = Annotated[int | None, typer.Option(min=1, show_default="by preset")]


@dataclass(frozen=True, kw_only=True)
class Size:
    """What an analysis is of.

    Attributes:
        model: language model.
        dtype: type of its weights; float32 if None.
        device: where models are put; the CPU if None.
        tasks: text tasks, separated by commas.
        functions: function classes or files of regression models, separated by commas.
    """

    model: str = "smollm2-135m"
    dtype: str | None = None
    device: str | None = None
    tasks: str = ""
    functions: str = ""

    def lens(self) -> "Lens":
        """The language model; says what it is."""
        return options.load_lens(self.model, "bridge", self.dtype, self.device)

    def regression_models(self) -> "tuple[dict[str, tuple[Lens, FunctionTask]], dict[str, str]]":
        """The regression models with their classes as tasks, by name, and their digests."""
        return studies.read_functions(self.functions, "bridge", self.device)


PAPER: dict[str, Any] = {"model": next(iter(LARGE)), "dtype": "bfloat16", "device": "auto"}
"""What preset paper says of every analysis of a language model."""

S = TypeVar("S", bound=Size)


def sized(presets: Mapping[Name, S], preset: Name, **given: Any) -> S:
    """What a preset says, but for the options that were given.

    Args:
        presets: the presets of an analysis.
        preset: which of them.
        **given: options by name; None for those that were not given.

    Raises:
        UnknownNameError: a model of preset paper is not at hand.
    """
    size = replace(presets[preset], **{k: v for k, v in given.items() if v is not None})
    _require_files(size.functions)
    _require_large(size.model)
    return size


def _require_files(functions: str) -> None:
    for file in functions.split(","):
        if file in STANDARD and not isfile(file):
            raise UnknownNameError(
                f"preset paper asks a regression model of the paper's sizes, and {file} is not "
                "there; train it on a GPU, `tvlens regression train --functions "
                f"{STANDARD[file]} --preset standard --out {Path(file).parent}`, name other "
                "models with --functions, or take --preset small"
            )


def _require_large(model: str) -> None:
    if model not in LARGE:
        return
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(model)
    except Exception as error:
        others = " and ".join(name for name in LARGE if name != model)
        raise UnknownNameError(
            f"preset paper asks {model!r} ({LARGE[model]} GB), which is not at hand: "
            f"{first_line(error)}; get it from Hugging Face where there is a network (Llama after "
            f"its licence is accepted), name a folder or another model, such as {others}, with "
            "--model, or take --preset small"
        ) from error


def folder(out: Path | None, preset: Name, name: str) -> Path:
    """The run folder of an analysis: the one that was asked for, or its own for the preset."""
    return Path("runs", preset, name) if out is None else out


def run(main: Callable[..., None]) -> None:
    """Calls an analysis with the words of the command line; a mistake ends in one line."""
    try:
        typer.run(main)
    except TvlensError as error:
        sys.exit(f"error: {error}")
