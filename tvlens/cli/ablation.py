"""Ablation: what a model still does without the heads that scores call best."""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated

import typer

from tvlens.cli.options import (
    BackendOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    DuplicatesOption,
    ModelOption,
    OutOption,
    PresetOption,
    RevisionOption,
    SeedOption,
    ShotsOption,
    StepsOption,
    TemplateOption,
    complete_classes,
    complete_tasks,
    fit_settings,
    lay_out,
    listed,
    load_lens,
    open_run,
    read_tasks,
)
from tvlens.cli.studies import read_functions
from tvlens.console import say, show, with_interval
from tvlens.errors import UnknownNameError
from tvlens.scores.catalogue import scores_named
from tvlens.studies.askable import require_askable

if TYPE_CHECKING:
    import pandas as pd


def ablate(
    out: OutOption,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", help="Task names, separated by commas.", autocompletion=complete_tasks
        ),
    ] = None,
    functions: Annotated[
        str | None,
        typer.Option(
            "--functions",
            help="Function classes instead, with a shipped model, or model.safetensors files.",
            autocompletion=complete_classes,
        ),
    ] = None,
    scores: Annotated[
        str,
        typer.Option("--scores", help="Scores that choose the heads, separated by commas, or all."),
    ] = "aie,ltv,gates,induction,direct",
    rule: Annotated[
        str,
        typer.Option(
            "--rule",
            help="Which sets: top, the best heads, with random ones of the same layers; exclusive, "
            "the best of one score without those of another; keep, all but the best.",
        ),
    ] = "top,exclusive,keep",
    set_to: Annotated[
        str,
        typer.Option(
            "--set-to",
            help="What heads are set to: mean, over clean prompts; zero; other, their mean over "
            "the other tasks; resample, another prompt's.",
        ),
    ] = "mean",
    positions: Annotated[
        str, typer.Option("--positions", help="Where: query, or all; all takes much longer.")
    ] = "query",
    shares: Annotated[
        str | None,
        typer.Option(
            "--shares",
            help="Shares of heads, from 0 to 1, separated by commas.",
            show_default="0,.01,.02,.03,.05,.07,.1,.15,.2",
        ),
    ] = None,
    draws: Annotated[
        int, typer.Option("--draws", min=1, help="Random sets beside each set of best heads.")
    ] = 20,
    n_test: Annotated[
        int | None,
        typer.Option(
            "--n-test",
            min=2,
            help="Test prompts of each task.",
            show_default="every test pair; 256 of functions",
        ),
    ] = None,
    exact_match: Annotated[
        bool,
        typer.Option(
            "--exact-match",
            help="Also generate whole answers, ablated at the query, which takes longer.",
        ),
    ] = False,
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
) -> None:
    """What a model still does without its best heads; writes OUT/ablation.csv.

    And OUT/ablation_areas.csv, the area under each curve, OUT/scores.csv, OUT/agreement.csv and
    figures. Heads are scored on train prompts and ablated on test prompts. A share of 0 ablates
    nothing, but with the rule keep: there it ablates every head.
    """
    if (tasks is None) == (functions is None):
        raise UnknownNameError(
            "--tasks and --functions: expected one of the two, to say what is ablated"
        )
    if exact_match and functions is not None:
        raise UnknownNameError(
            "--exact-match compares generated text, and --functions are answered with numbers; "
            "leave it out"
        )
    wanted = tuple(str(score.heads) for score in scores_named(listed("--scores", scores)))
    given = None if shares is None else _numbers(shares)
    chosen = {} if tasks is None else read_tasks(tasks, data, duplicates, template)
    rules = tuple(listed("--rule", rule))

    from tvlens.evaluation.replacement import place_of, way_of
    from tvlens.runs.run import Run
    from tvlens.scores.ablation import SHARES
    from tvlens.studies.ablation import AblationSettings, ablate_all, require_ablatable
    from tvlens.studies.regression import RegressionSettings, regression_plans
    from tvlens.studies.text import TextSettings, text_plans

    ways = tuple(map(way_of, listed("--set-to", set_to)))
    places = tuple(map(place_of, listed("--positions", positions)))

    def settings_with(scoring: TextSettings | RegressionSettings) -> AblationSettings:
        return AblationSettings(
            scoring,
            wanted,
            rules,
            ways,
            places,
            SHARES if given is None else given,
            draws,
            n_test,
            exact_match,
        )

    if functions is not None:
        of_functions = RegressionSettings(seed=seed, ltv_seeds=1)
        if steps is not None:
            of_functions = replace(of_functions, ltv=replace(of_functions.ltv, steps=steps))
        settings = settings_with(of_functions)
        models, digests = read_functions(functions, backend)
        plans = regression_plans(models, of_functions)
        require_ablatable(plans, settings)
        config = {"functions": list(models), "backend": backend, "settings": asdict(settings)}
        with Run.open(out, "ablate", config, data=digests, seeds={"seed": seed}) as run:
            done = ablate_all(plans, run, settings, say=say)
    else:
        of_text = TextSettings(
            seed=seed, shots=shots, ltv=fit_settings(preset, steps, shots), ltv_seeds=1
        )
        settings = settings_with(of_text)
        lens = load_lens(model, backend, dtype, device, revision)
        chosen = lay_out(chosen, template, lens)
        texts = text_plans(lens, chosen, of_text)
        require_ablatable(texts, settings)
        require_askable(
            lens, chosen, shots, ["train", "validation", "test"], settings.scoring.n_means
        )
        with open_run(out, "ablate", lens, chosen, settings) as run:
            done = ablate_all(texts, run, settings, say=say)
    for name, each in done.items():
        for one in each.ablations:
            _show_areas(one.areas(seed=seed), name, one.measures[0])
    say(f"Wrote {out / 'ablation.csv'}")


def _numbers(text: str) -> tuple[float, ...]:
    """Shares, ascending.

    Raises:
        UnknownNameError: a word is no number.
    """
    words = listed("--shares", text)
    try:
        return tuple(sorted({float(word) for word in words}))
    except ValueError as error:
        raise UnknownNameError(
            f"--shares {text!r}: expected numbers from 0 to 1 separated by commas, such as 0,.02,.1"
        ) from error


def _show_areas(areas: "pd.DataFrame", task: str, metric: str) -> None:
    """Areas under the curves of one measure: a row a score, a column a rule."""
    rows = areas[areas["metric"].isin([metric, f"{metric}_minus_random"])]
    if len(single := rows[rows["rule"] != "exclusive"]):
        rows = single  # of every two scores, the file has them
    if rows.empty:
        return
    column = rows["rule"].where(rows["metric"] == metric, "top - random")
    text = [with_interval(row.value, row.ci_low, row.ci_high) for row in rows.itertuples()]
    table = rows.assign(column=column, text=text).pivot(
        index="score", columns="column", values="text"
    )
    first = rows.iloc[0]
    order = ("top", "random", "top - random", "exclusive", "keep")
    table = table.reindex(rows["score"].unique())[[c for c in order if c in table]].fillna("")
    show(
        table.rename_axis(columns=None).reset_index(),
        f"{task}: mean {metric.replace('_', ' ')} over the shares, heads set to {first['set_to']} "
        f"({first['positions']})",
    )
