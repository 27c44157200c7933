"""Scores of heads: causal mediation, and two scores against each other."""

from typing import Annotated

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
    TaskOption,
    TasksOption,
    TemplateOption,
    fit_settings,
    lay_out,
    listed,
    load_lens,
    open_run,
    read_scores,
    read_tasks,
    score_file,
)
from tvlens.console import say, show
from tvlens.errors import UnknownNameError
from tvlens.scores.catalogue import scores_named
from tvlens.studies.askable import require_askable


def mediate(
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
) -> None:
    """Average indirect effect of every head; writes OUT/heads.csv."""
    chosen = read_tasks(tasks, data, duplicates, template)

    import pandas as pd

    from tvlens.studies import stages
    from tvlens.studies.text import TextSettings, text_plans

    settings = TextSettings(seed=seed, shots=shots)
    lens = load_lens(model, backend, dtype, device, revision)
    chosen = lay_out(chosen, template, lens)
    require_askable(lens, chosen, shots, ["train"], settings.n_means)
    with open_run(out, "mediate", lens, chosen, settings) as run:
        frames = []
        for plan in text_plans(lens, chosen, settings).values():
            means = stages.head_means(plan, run)
            effects = stages.mediate(plan, run, means, plan.views[0])
            frames.append(effects.to_frame(seed=seed))
            top = frames[-1].drop(columns="task").nlargest(10, "aie")
            unit = f"{effects.unit}, 95% interval over {len(effects.values)} prompts"
            show(top, f"{plan.task.name}: heads of largest AIE ({unit})", digits=4)
        path = run.write_table("heads", pd.concat(frames, ignore_index=True), whole=True)
    say(f"Wrote {path}")


def score(
    out: OutOption,
    tasks: TaskOption,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="Scores, separated by commas: aie, ltv, attribution, direct, induction, answers; "
            "or all.",
        ),
    ] = "all",
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
    """Several scores of every head, and how far they agree; writes OUT/scores.csv.

    And OUT/agreement.csv and OUT/overlap_curves.csv, every two of them against each other,
    OUT/significance.csv, which heads are more than chance, and, of several tasks,
    OUT/task_agreement.csv, every two tasks against each other, and OUT/pooled.csv, all together.
    """
    chosen = read_tasks(tasks, data, duplicates, template)
    wanted = scores_named(listed("--by", by))

    import pandas as pd

    from tvlens import figures
    from tvlens.studies import scoring
    from tvlens.studies.text import TextSettings, text_plans

    settings = TextSettings(
        seed=seed, shots=shots, ltv=fit_settings(preset, steps, shots), ltv_seeds=1
    )
    lens = load_lens(model, backend, dtype, device, revision)
    chosen = lay_out(chosen, template, lens)
    require_askable(lens, chosen, shots, ["train", "validation"], settings.n_means)
    with open_run(out, f"score by {by}", lens, chosen, settings) as run:
        tables, agreements, curves = [], [], []
        by_task = {}
        for plan in text_plans(lens, chosen, settings).values():
            task = plan.task.name
            found = scoring.made(scoring.Found(plan, run), wanted)
            by_task[task] = found
            tables.append(scoring.table_of(found, seed=seed))
            agreements.append(scoring.agreement_of(found, settings.compare_ks))
            unit = lens.readout.score_name
            for name, each in found.items():
                best = ", ".join(
                    f"{layer}.{head}" for layer, head in each.top(min(10, each.n_heads))
                )
                say(f"{task}: best heads by {name} ({each.unit}): {best}")
            if len(found) > 1:
                show(
                    agreements[-1].loc[lambda table: table["measure"] == "spearman"][
                        ["comparison", "value", "low", "high", "p_value"]
                    ],
                    f"{task}: Spearman's rank correlation over all heads, 95% interval",
                )
                run.write_figure(f"scores-{task}", scoring.maps_of(found, unit=unit))
                curves.append(scoring.curves_of(found))
                run.write_figure(f"overlap-{task}", scoring.curves_figure(curves[-1], found))
        if curves:
            run.write_table("overlap_curves", pd.concat(curves, ignore_index=True))
        run.write_table("agreement", pd.concat(agreements, ignore_index=True))
        significance = [scoring.significance_of(each, seed=seed) for each in by_task.values()]
        run.write_table("significance", pd.concat(significance, ignore_index=True))
        if len(by_task) > 1:
            shared = scoring.across_tasks(by_task, settings.compare_ks, seed=seed)
            run.write_table("task_agreement", shared)
            if together := scoring.pooled_of(by_task):
                run.write_table("pooled", scoring.table_of(together, seed=seed))
            for name in shared["score"].unique():
                drawn = figures.agreement_matrix(shared[shared["score"] == name])
                run.write_figure(f"tasks-{name}", drawn)
        path = run.write_table("scores", pd.concat(tables, ignore_index=True))
    say(f"Wrote {path}")


def compare(
    first: Annotated[str, typer.Argument(help="COLUMN@FILE, such as aie@RUN/heads.csv.")],
    second: Annotated[str, typer.Argument(help="COLUMN@FILE, such as contribution@RUN/heads.csv.")],
    out: OutOption,
) -> None:
    """Two head scores against each other, task by task; writes OUT/headsets.csv."""
    import pandas as pd

    from tvlens.runs.run import Run
    from tvlens.runs.storage import file_sha256
    from tvlens.scores.agreement import compare_head_sets, overlap_curve
    from tvlens.studies.text import TextSettings
    from tvlens.vectors.materials import fitting_ks

    a, b = read_scores(first), read_scores(second)
    shared = [task for task in a if task in b]
    if not shared:
        raise UnknownNameError(
            f"no task is in both {first} ({', '.join(a)}) and {second} ({', '.join(b)}); "
            "compare tables of the same tasks"
        )
    columns = first.split("@")[0], second.split("@")[0]
    names = columns if columns[0] != columns[1] else ("first", "second")
    digests = {text: file_sha256(score_file(text)) for text in (first, second)}
    config = {"first": first, "second": second}
    with Run.open(out, "compare", config, data=digests) as run:
        frames, curves = [], []
        for task in shared:
            ks = fitting_ks(TextSettings().compare_ks, a[task].n_heads)
            table = compare_head_sets(a[task], b[task], ks=ks, names=names)
            show(table, task)
            frames.append(table.assign(task=task)[["task", *table.columns]])
            curves.append(overlap_curve(a[task], b[task]).assign(task=task))
        run.write_table("overlap_curves", pd.concat(curves, ignore_index=True))
        path = run.write_table("headsets", pd.concat(frames, ignore_index=True))
    say(f"Wrote {path}")
