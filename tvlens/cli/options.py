"""Options that several commands share, and what their words become."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from os.path import isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tvlens import tasks as text_tasks
from tvlens.console import say
from tvlens.errors import TaskError, UnknownNameError
from tvlens.tasks import Task
from tvlens.tasks.text.files import Duplicates, load_named, task_files

if TYPE_CHECKING:
    from tvlens.lens.lens import Lens
    from tvlens.runs.run import Run
    from tvlens.scores.score import Scores
    from tvlens.vectors.ltv.settings import FitSettings

BackendKind = Literal["bridge", "hooked"]
CHAT = "chat"
"""Name of the layout that a model's own tokenizer has for chats."""


def complete_models(incomplete: str) -> list[str]:
    """The text models that tvlens knows whose name begins so."""
    from tvlens.models.catalogue import BUNDLED

    return [name for name in BUNDLED if name.startswith(incomplete)]


def complete_shipped(incomplete: str) -> list[str]:
    """The shipped regression models whose name begins so."""
    from tvlens.models.catalogue import list_shipped

    return [name for name in list_shipped() if name.startswith(incomplete)]


def complete_classes(incomplete: str) -> list[str]:
    """The list of function classes so far, continued by each that has a shipped model."""
    from tvlens.models.catalogue import list_shipped

    return _continued(incomplete, [name.removesuffix("-small") for name in list_shipped()])


def complete_templates(incomplete: str) -> list[str]:
    """The layouts whose name begins so."""
    return [name for name in (*text_tasks.TEMPLATES, CHAT) if name.startswith(incomplete)]


def complete_tasks(ctx: Any, incomplete: str) -> list[str]:
    """The list of tasks so far, continued by each shipped one or one in the folder of --data."""
    data = ctx.params.get("data")
    own = [] if data is None else task_files(Path(data))
    return _continued(incomplete, [*own, *text_tasks.names()])


def _continued(incomplete: str, names: Sequence[str]) -> list[str]:
    """Every way to end the last name of a list separated by commas; none is named twice."""
    *before, last = incomplete.split(",")
    names = [name for name in dict.fromkeys(names) if name not in before]
    return [",".join([*before, name]) for name in names if name.startswith(last)]


ModelOption = Annotated[
    str,
    typer.Option(
        "--model",
        help="Bundled name, local folder or Hugging Face name.",
        autocompletion=complete_models,
    ),
]
MethodsOption = Annotated[
    str,
    typer.Option(
        "--methods",
        help='Vectors to make: names separated by commas, "default", or "all" with every rival.',
    ),
]
TasksOption = Annotated[
    str,
    typer.Option("--tasks", help="Task names, separated by commas.", autocompletion=complete_tasks),
]
TaskOption = Annotated[
    str,
    typer.Option("--task", help="Task names, separated by commas.", autocompletion=complete_tasks),
]
DataOption = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder of task files (.json, .jsonl, .csv, .tsv), looked in before shipped tasks.",
    ),
]
DuplicatesOption = Annotated[
    Literal["error", "drop", "merge"],
    typer.Option(
        "--duplicates",
        help="What to do with inputs that have different outputs; merge takes all as right.",
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", help="Run folder; the same command into it resumes.")
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of every draw.")]
BackendOption = Annotated[
    BackendKind,
    typer.Option("--backend", help="TransformerBridge, or transformer-lens 3's HookedTransformer."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="Precision of the weights: float32 if none, bfloat16, float16, float64, or auto for "
        "that of the file.",
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", help="Where the model is put: cpu if none, cuda, cuda:1, mps, auto."),
]
RevisionOption = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of a Hugging Face model."),
]
TemplateOption = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="Text layout: question-answer (if none), input-output, arrow, chat for the model's "
        "own, or a JSON file of one.",
        autocompletion=complete_templates,
    ),
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


def listed(option: str, text: str) -> list[str]:
    """The words of an option that are separated by commas, each once.

    Raises:
        UnknownNameError: there are none.
    """
    words = list(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    if not words:
        raise UnknownNameError(f"{option} names nothing; expected names separated by commas")
    return words


def read_tasks(
    names: str, data: Path | None, duplicates: Duplicates, template: str | None = None
) -> dict[str, Task]:
    """The tasks by the names they were asked for by, whatever their files call them.

    Args:
        names: names separated by commas.
        data: folder of task files, looked in before the shipped tasks.
        duplicates: what to do where one input has different outputs.
        template: their layout, by name or file; that of chats is told by the model (`lay_out`).

    Raises:
        UnknownNameError: neither the folder nor the shipped tasks have such a name, or there is no
            such layout.
        TaskError: there is no such folder, or a file cannot be used.
    """
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if not wanted:
        raise UnknownNameError("--tasks names no task; expected names separated by commas")
    if data is not None and not isdir(data):
        raise TaskError(f"--data {data}: no such folder; expected one that holds task files")
    there = {} if data is None else task_files(data)
    found = {}
    for name in wanted:
        if data is not None and name in there:
            found[name] = load_named(data, name, duplicates=duplicates)
        elif data is not None and name not in text_tasks.names():
            near = difflib.get_close_matches(name, [*there, *text_tasks.names()], cutoff=0.5)
            near += [other for other in there if other.endswith(f"/{name}")]
            hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
            raise UnknownNameError(
                f"unknown task {name!r}: {hint}{data} holds {len(there)} tasks, which `tvlens "
                f"tasks --data {data}` lists, and no shipped task has this name"
            )
        else:
            found[name] = text_tasks.load(name)
    if template in (None, CHAT):
        return found
    layout = text_tasks.read_template(template)
    return {name: task.with_template(layout) for name, task in found.items()}


def lay_out(chosen: dict[str, Task], template: str | None, lens: "Lens") -> dict[str, Task]:
    """The tasks as they are asked: in the layout of the model's own chats where that is meant.

    Raises:
        TaskError: the model has none.
    """
    if template != CHAT:
        return chosen
    tokenizer, laid_out = lens.backend.tokenizer, {}
    for name, task in chosen.items():
        instruction = task.template.instruction or None
        layout = text_tasks.chat_template(tokenizer, instruction=instruction)
        laid_out[name] = task.with_template(layout)
    return laid_out


def named_files(texts: Sequence[str]) -> dict[str, Path]:
    """The files of arguments like NAME=FILE, by name.

    Raises:
        UnknownNameError: an argument is not like that, a file is not there, or a name comes twice.
    """
    files: dict[str, Path] = {}
    for text in texts:
        name, separator, file = text.partition("=")
        if not (name and separator and file):
            raise UnknownNameError(f"--vector {text!r}: expected NAME=FILE, such as ltv=FILE")
        if not isfile(file):
            raise UnknownNameError(f"--vector {text!r}: there is no file {file}")
        if name in files:
            raise UnknownNameError(f"--vector names {name!r} twice; give every vector its own name")
        files[name] = Path(file)
    return files


def score_file(text: str) -> Path:
    """The file of an argument like COLUMN@FILE.

    Raises:
        UnknownNameError: the argument is not like that, or the file is not there.
    """
    column, separator, file = text.partition("@")
    if not (column and separator and file):
        raise UnknownNameError(f"{text!r}: expected COLUMN@FILE, such as aie@RUN/heads.csv")
    if not isfile(file):
        raise UnknownNameError(f"{text!r}: there is no file {file}")
    return Path(file)


def read_scores(text: str) -> "dict[str, Scores]":
    """The scores of heads, by task, of an argument like COLUMN@FILE, such as heads.csv.

    Raises:
        UnknownNameError: the argument is not like that, or the table has no such scores.
        ShapeError: a head has several scores or none.
        RunError: the file cannot be read.
    """
    from tvlens.scores.score import Scores

    return Scores.from_csv(score_file(text), text.split("@")[0])


def load_lens(
    model: str,
    backend: BackendKind,
    dtype: str | None = None,
    device: str | None = None,
    revision: str | None = None,
) -> "Lens":
    """The lens on a model; says what it is."""
    from transformers.utils import logging

    from tvlens.lens.loading import load

    logging.disable_progress_bar()
    name = model if revision is None else f"{model}@{revision}"
    lens = load(model, backend=backend, dtype=dtype, device=device, revision=revision, name=name)
    say(repr(lens))
    return lens


def open_run(
    out: Path,
    command: str,
    lens: "Lens",
    chosen: Mapping[str, Task],
    settings: Any,
    vectors: Mapping[str, Path] | None = None,
    prompts: Path | None = None,
) -> "Run":
    """The run folder. Opened last, so that a name mistyped does not claim it for that name.

    Args:
        out: the folder.
        command: words of the command.
        lens: the lens on the model.
        chosen: the tasks by name.
        settings: a dataclass with a `seed`, all that decides what the run finds.
        vectors: files that are read, by name.
        prompts: a file of prompts that is read.
    """
    from tvlens.runs.run import Run
    from tvlens.runs.storage import file_sha256

    config: dict[str, Any] = {"model": lens.name, "backend": lens.backend.kind}
    config["dtype"] = str(lens.backend.dtype).removeprefix("torch.")
    digests = {name: task.digest for name, task in chosen.items()}
    digests["weights and tokenizer"] = lens.backend.digest
    if vectors is not None:
        config["vectors"] = {name: str(file) for name, file in vectors.items()}
        digests |= {str(file): file_sha256(file) for file in vectors.values()}
    if prompts is not None:
        config["prompts"] = str(prompts)
        digests[str(prompts)] = file_sha256(prompts)
    config["settings"] = asdict(settings)
    run = Run.open(out, command, config, data=digests, seeds={"seed": settings.seed})
    run.manifest["lens"] = repr(lens)
    return run


def fit_settings(
    preset: str, steps: int | None, shots: int, n_validation: int | None = None
) -> "FitSettings":
    """How LTVs are trained: by a preset, on no more examples than asked for."""
    from tvlens.vectors.ltv.settings import FitSettings

    settings = FitSettings.paper() if preset == "paper" else FitSettings()
    settings = replace(settings, shots=min(settings.shots, shots), n_validation=n_validation)
    return settings if steps is None else replace(settings, steps=steps)
