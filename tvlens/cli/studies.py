"""The whole studies, of text and of regression."""

from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from tvlens.cli.options import (
    BackendKind,
    BackendOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    DuplicatesOption,
    MethodsOption,
    ModelOption,
    OutOption,
    PresetOption,
    RevisionOption,
    SeedOption,
    ShotsOption,
    StepsOption,
    TasksOption,
    TemplateOption,
    complete_classes,
    fit_settings,
    lay_out,
    load_lens,
    open_run,
    read_tasks,
)
from tvlens.cli.vectors import show_accuracy
from tvlens.console import say, show, with_interval
from tvlens.errors import UnknownNameError
from tvlens.studies.askable import require_askable
from tvlens.tasks.base import Split

if TYPE_CHECKING:
    import pandas as pd

    from tvlens.lens.lens import Lens
    from tvlens.studies.report import Asked
    from tvlens.tasks.regression.task import FunctionTask


def study_text(
    tasks: TasksOption,
    out: OutOption,
    model: ModelOption = "smollm2-135m",
    data: DataOption = None,
    duplicates: DuplicatesOption = "error",
    template: TemplateOption = None,
    backend: BackendOption = "bridge",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
    shots: ShotsOption = 10,
    seed: SeedOption = 0,
    preset: PresetOption = "default",
    steps: StepsOption = None,
    ltv_seeds: Annotated[
        int,
        typer.Option(min=1, help="LTVs trained per task, for stability; the first is reported."),
    ] = 3,
    n_means: Annotated[
        int, typer.Option(min=1, help="Clean train prompts that head means are taken over.")
    ] = 100,
    n_validation: Annotated[
        int | None,
        typer.Option(min=1, help="Validation prompts of each kind; every validation pair if none."),
    ] = None,
    n_test: Annotated[
        int | None, typer.Option(min=1, help="Test prompts of each kind; every test pair if none.")
    ] = None,
    control_draws: Annotated[
        int, typer.Option(min=1, help="Random and permuted weights drawn, as controls.")
    ] = 3,
    methods: MethodsOption = "default",
) -> None:
    """Mediation, function vectors, LTV, evaluation and comparison of text tasks.

    Writes OUT/results.csv (methods on test prompts), OUT/heads.csv (AIE and LTV weight of every
    head), OUT/headsets.csv (their agreement), OUT/vectors, OUT/figures, OUT/manifest.json and
    OUT/report.html, which shows them.
    """
    chosen = read_tasks(tasks, data, duplicates, template)

    from tvlens.studies.report import Asked
    from tvlens.studies.study import study_all
    from tvlens.studies.text import TextSettings, text_plans
    from tvlens.vectors.catalogue import methods_named

    settings = TextSettings(
        seed=seed,
        shots=shots,
        ltv=fit_settings(preset, steps, shots, n_validation),
        ltv_seeds=ltv_seeds,
        n_means=n_means,
        n_test=n_test,
        control_draws=control_draws,
        methods=methods_named(methods),
    )
    lens = load_lens(model, backend, dtype, device, revision)
    chosen = lay_out(chosen, template, lens)
    require_askable(lens, chosen, shots, get_args(Split), settings.n_means)
    plans = text_plans(lens, chosen, settings)
    with open_run(out, "study text", lens, chosen, settings) as run:
        found = study_all(plans, run, say=say)
    for name, result in found.items():
        show_accuracy(result.results)
        headsets = result.headsets
        overlap = headsets[headsets["measure"].isin(["overlap", "rank_biased_overlap", "spearman"])]
        show(overlap[["comparison", "measure", "k", "value", "chance"]], f"{name}: head sets")
    say(f"Tables, vectors, figures and manifest are in {out}")
    _show_page(out, {name: Asked(lens, task, shots, seed) for name, task in chosen.items()})


def study_regression(
    functions: Annotated[
        str,
        typer.Option(
            "--functions",
            help="Function classes with a shipped model, or model.safetensors files of your own; "
            "separated by commas.",
            autocompletion=complete_classes,
        ),
    ],
    out: OutOption,
    backend: BackendOption = "bridge",
    device: DeviceOption = None,
    seed: SeedOption = 0,
    steps: StepsOption = None,
    n_test: Annotated[
        int | None,
        typer.Option(min=2, help="Test prompts of each kind and shift.", show_default="512"),
    ] = None,
    shifts: Annotated[
        str | None,
        typer.Option(
            help="Shifts of the test prompts, separated by commas.",
            show_default="none,skewed,doubled,noisy-labels,orthogonal-query",
        ),
    ] = None,
    ltv_seeds: Annotated[
        int | None,
        typer.Option(min=1, help="LTVs trained for the comparison of heads.", show_default="2"),
    ] = None,
    methods: MethodsOption = "default",
) -> None:
    """Mediation, function vectors, LTV, fidelity benchmark and comparison of function classes.

    Writes OUT/results.csv (errors of every method and estimator at every number of points),
    OUT/heads.csv, OUT/headsets.csv, OUT/vectors, OUT/figures, OUT/manifest.json and
    OUT/report.html, which shows them.
    """
    from tvlens.runs.run import Run
    from tvlens.studies.regression import RegressionSettings, regression_plans
    from tvlens.studies.report import Asked
    from tvlens.studies.study import study_all
    from tvlens.vectors.catalogue import methods_named

    asked: dict[str, Any] = {"seed": seed, "n_test": n_test, "ltv_seeds": ltv_seeds}
    asked["methods"] = methods_named(methods)
    if shifts is not None:
        asked["shifts"] = tuple(name.strip() for name in shifts.split(",") if name.strip())
    settings = RegressionSettings(**{key: x for key, x in asked.items() if x is not None})
    if steps is not None:
        settings = replace(settings, ltv=replace(settings.ltv, steps=steps))
    models, data = read_functions(functions, backend, device)
    plans = regression_plans(models, settings)
    for plan, shift in product(plans.values(), settings.shifts):
        replace(plan.task, shift=shift)  # refuses an unknown shift before the folder is claimed
    config = {"functions": list(models), "backend": backend, "settings": asdict(settings)}
    with Run.open(out, "study regression", config, data=data, seeds={"seed": seed}) as run:
        found = study_all(plans, run, say=say)
    for name, study in found.items():
        _show_errors(name, study.results, plans[name].trained)
        overlap = study.headsets[study.headsets["measure"].isin(["overlap", "spearman"])]
        show(overlap[["task", "comparison", "measure", "k", "value", "chance"]], f"{name}: heads")
    say(f"Tables, vectors, figures and manifest are in {out}")
    _show_page(
        out,
        {name: Asked(p.lens, p.task, p.trained - 1, seed) for name, p in plans.items()},
    )


def read_functions(
    names: str, backend: BackendKind, device: str | None = None
) -> "tuple[dict[str, tuple[Lens, FunctionTask]], dict[str, str]]":
    """The models of function classes by name, each with its class as a task, and their digests.

    Args:
        names: function classes that have a shipped model, shipped models or files, separated by
            commas.
        backend: how they are looked at.
        device: where they are put; the CPU if None.

    Raises:
        UnknownNameError: there is no such class, model, file or device, or none is named.
    """
    from tvlens.lens.loading import load
    from tvlens.models.catalogue import is_regression, list_shipped, read_regression
    from tvlens.tasks.regression.task import FunctionTask

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
        found[label] = load(source, backend=backend, device=device), task
        digests |= {label: task.digest, f"{label}, weights": model.digest}
    return found, digests


def _show_page(out: Path, asked: "dict[str, Asked]") -> None:
    """The page of a study that has ended, in its own folder."""
    from tvlens.studies.report import PAGE, find_runs, write_report

    say(f"Open {write_report(find_runs([out]), out / PAGE, asked)} in a browser")


def _show_errors(functions: str, results: "pd.DataFrame", train_points: int) -> None:
    """Errors in distribution: a row per method, a column per number of points worth looking at."""
    import pandas as pd

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
