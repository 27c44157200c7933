"""A page that shows what runs have found."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tvlens.cli.options import (
    BackendKind,
    DataOption,
    DeviceOption,
    DtypeOption,
    DuplicatesOption,
    RevisionOption,
    TemplateOption,
    complete_models,
    lay_out,
    load_lens,
    read_tasks,
)
from tvlens.console import complain, say
from tvlens.errors import TvlensError, first_line

if TYPE_CHECKING:
    from tvlens.runs.finished import FoundRun
    from tvlens.studies.report import Asked


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders of one model.", show_default=False)
    ],
    out: Annotated[Path, typer.Option("--out", help="The page, one file of HTML.")] = Path(
        "report.html"
    ),
    attention: Annotated[
        bool,
        typer.Option(
            "--attention/--no-attention",
            help="Show what the best heads attend to, which needs the model.",
        ),
    ] = True,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help="The model of the runs, if not where it was.",
            autocompletion=complete_models,
        ),
    ] = None,
    data: DataOption = None,
    duplicates: DuplicatesOption = "error",
    template: TemplateOption = None,
    backend: Annotated[
        BackendKind | None,
        typer.Option("--backend", help="TransformerBridge or HookedTransformer, if not as it was."),
    ] = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
) -> None:
    """A page of runs, which opens without a network: what was asked and found, and every picture.

    Writes OUT: tables of methods, maps of heads and what the best attend to, curves of overlap,
    ablation and error, maps of patching, and the manifests, as far as the runs hold them.
    """
    from tvlens.runs.finished import read_manifest

    for folder in runs:
        read_manifest(folder)

    from tvlens.studies import report as pages

    found = pages.find_runs(runs)
    pages.require_writable(out)
    asked: dict[str, Asked] = {}
    unseen: dict[str, str] = {}
    if attention:
        options: dict[str, Any] = {"dtype": dtype, "device": device, "revision": revision}
        for run in found:
            if isinstance(run.manifest["config"].get("functions"), list):
                _ask_functions(run, backend, asked, unseen)
            elif model or "model" in run.manifest["config"]:
                _ask_text(run, model, backend, options, (data, duplicates, template), asked, unseen)
    for run in found:
        if not run.finished:
            lacks = ", ".join(f"{name}.csv" for name in run.missing) or "no table"
            complain(f"run '{run.folder}' is not finished: it lacks {lacks}", "warning")
    for name, reason in unseen.items():
        complain(f"{name}: {reason}", "warning")
    path = pages.write_report(found, out, asked, unseen)
    say(f"Wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def _ask_text(
    run: "FoundRun",
    model: str | None,
    backend: BackendKind | None,
    options: dict[str, Any],
    files: tuple[Any, Any, Any],
    asked: "dict[str, Asked]",
    unseen: dict[str, str],
) -> None:
    """The tasks of a run of text that are not asked yet, and why others cannot be."""
    from tvlens.studies.report import Asked

    config, digests = run.manifest["config"], run.manifest["data"]
    wanted = [name for name in _scored(run) if name in digests and name not in asked]
    chosen: dict[str, Any] = {}
    data, duplicates, template = files
    for name in wanted:
        try:
            chosen |= read_tasks(name, data, duplicates, template)
        except TvlensError as error:
            unseen[name] = f"What heads attend to is left out: {first_line(error)}."
    if not chosen:
        return
    lens = next((each.lens for each in asked.values()), None)
    if lens is None:
        kind: BackendKind = backend or config.get("backend", "bridge")
        dtype = options["dtype"] or config.get("dtype")
        lens = load_lens(model or config["model"], kind, **(options | {"dtype": dtype}))
    seed = _number(run.manifest["seeds"], "seed", 0)
    shots = _number(config.get("settings"), "shots", 10)
    for name, task in lay_out(chosen, template, lens).items():
        if task.digest == digests[name]:
            asked[name] = Asked(lens, task, shots, seed)
        else:
            unseen[name] = (
                f"What heads attend to is left out: the run asked another {name}, or in another "
                "layout; give it with --data and --template."
            )


def _ask_functions(
    run: "FoundRun",
    backend: BackendKind | None,
    asked: "dict[str, Asked]",
    unseen: dict[str, str],
) -> None:
    """The classes of functions of a run that are not asked yet, and why others cannot be."""
    from tvlens.cli.studies import read_functions
    from tvlens.studies.report import Asked

    config = run.manifest["config"]
    for name in config["functions"]:
        if name in asked:
            continue
        try:
            models, digests = read_functions(name, backend or config.get("backend", "bridge"))
            (lens, task), weights = models[name], f"{name}, weights"
            if digests[weights] != run.manifest["data"].get(weights):
                raise TvlensError("the run is of a model with other weights")
            shots = task.require_train_points() - 1
            asked[name] = Asked(lens, task, shots, _number(run.manifest["seeds"], "seed", 0))
        except TvlensError as error:
            unseen[name] = f"What heads attend to is left out: {first_line(error)}."


def _scored(run: "FoundRun") -> list[str]:
    """The tasks that a run has scores of heads of."""
    tables = (run.tables[name] for name in ("heads", "scores") if name in run.tables)
    return list(dict.fromkeys(task for table in tables for task in table.get("task", [])))


def _number(facts: Any, key: str, default: int) -> int:
    value = facts.get(key) if isinstance(facts, dict) else None
    return value if isinstance(value, int) else default
