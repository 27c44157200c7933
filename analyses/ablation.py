"""Which of two sets of heads a model needs: text tasks and function classes, head sets ablated.

    python -m analyses.ablation --preset smoke         # a few prompts, to see that all of it runs
    python -m analyses.ablation                        # preset small: some hours on two cores
    python -m analyses.ablation --out runs/ablation    # goes on where it was stopped

OUT/text and OUT/regression hold what `tvlens ablate` writes; OUT/both holds
- ablation.csv, ablation_areas.csv: every curve and the area under it, of both modalities,
- summary.{csv,md,tex}: by task and score, the mean of the measure over the shares, for the best
  heads, for those without another score's best, and for random ones of the same layers, beside the
  overlap of the score's best heads with those of the first score,
- depths.{csv,md,tex}: how far the scores of every two tasks, of both modalities, lie equally deep,
- task_agreement.csv: every two text tasks by each score; significance.csv: heads against chance,
- figures: accuracy of the text tasks and errors of the function classes against the share of heads
  ablated, with the band of random sets, and the same of exclusive sets.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product

import pandas as pd

from analyses import presets
from tvlens import figures
from tvlens.cli import options
from tvlens.console import say, with_interval
from tvlens.evaluation.replacement import SetTo
from tvlens.runs.run import Run
from tvlens.runs.tables import write_tables
from tvlens.scores.ablation import SHARES
from tvlens.scores.catalogue import SCORES
from tvlens.scores.matrices import depth_matrix
from tvlens.scores.score import Scores
from tvlens.studies import scoring
from tvlens.studies.ablation import Ablated, AblationSettings, ablate_all
from tvlens.studies.plan import Plan
from tvlens.studies.regression import RegressionSettings, regression_plans
from tvlens.studies.text import TextSettings, text_plans

TASKS = "present-past,singular-plural,country-capital,capitalize-first-letter"
FUNCTIONS = "linear,relu"
WANTED = ("aie", "ltv", "gates", "induction", "direct")
OF_POINTS = ("aie", "ltv")


@dataclass(frozen=True, kw_only=True)
class Size(presets.Size):
    """How much is run.

    Attributes:
        n_test: test prompts of each task.
        n_means: clean prompts that head means are taken over.
        n_mediation: prompts of each causal mediation.
        steps: training steps of LTVs at most, if not the usual.
        draws: random sets beside each set of best heads.
        shares: shares of heads.
        set_to: what heads are set to.
    """

    n_test: int
    n_means: int
    n_mediation: int
    steps: int | None
    draws: int
    shares: tuple[float, ...] = SHARES
    set_to: tuple[SetTo, ...] = ("mean", "zero", "resample")


PRESETS: dict[presets.Name, Size] = {
    "smoke": Size(
        tasks="present-past",
        functions="linear",
        n_test=4,
        n_means=16,
        n_mediation=4,
        steps=4,
        draws=2,
        shares=(0.0, 0.02, 0.1),
        set_to=("mean",),
    ),
    "small": Size(
        tasks=TASKS,
        functions=FUNCTIONS,
        n_test=32,
        n_means=60,
        n_mediation=15,
        steps=40,
        draws=6,
        set_to=("mean", "zero"),
    ),
    "paper": Size(
        tasks=presets.PAPER_TASKS,
        functions=",".join(presets.STANDARD),
        n_test=100,
        n_means=100,
        n_mediation=25,
        steps=None,
        draws=20,
        **presets.PAPER,
    ),
}


def main(
    preset: presets.PresetOption = "small",
    tasks: presets.TasksOption = None,
    functions: presets.FunctionsOption = None,
    out: presets.OutOption = None,
    data: options.DataOption = None,
    model: presets.ModelOption = None,
    shots: options.ShotsOption = 10,
    seed: options.SeedOption = 0,
) -> None:
    """Ablation of text tasks and of function classes, and a table of both."""
    size = presets.sized(PRESETS, preset, tasks=tasks, functions=functions, model=model)
    out = presets.folder(out, preset, "ablation")
    chosen = options.read_tasks(size.tasks, data, "error")
    models, digests = size.regression_models()
    lens = size.lens()
    ltv = options.fit_settings("default", size.steps, shots)
    numbers = {"n_means": size.n_means, "n_mediation": size.n_mediation, "ltv_seeds": 1}
    text = TextSettings(seed=seed, shots=shots, ltv=ltv, **numbers)
    points = RegressionSettings(seed=seed, ltv_seeds=1)
    if preset == "smoke":
        points = replace(points, **numbers, ltv=replace(points.ltv, steps=4))
    digests |= {name: task.digest for name, task in chosen.items()}
    there = {score.heads for score in SCORES}
    of_text = AblationSettings(
        text,
        tuple(name for name in WANTED if name in there),
        set_to=size.set_to,
        shares=size.shares,
        draws=size.draws,
        n_test=size.n_test,
    )
    # Prompts of points cost little: an error needs many.
    of_points = replace(of_text, scoring=points, scores=OF_POINTS, n_test=4 * size.n_test)
    studies: dict[str, tuple[Mapping[str, Plan], AblationSettings]] = {
        "text": (text_plans(lens, chosen, text), of_text),
        "regression": (regression_plans(models, points), of_points),
    }
    done = {}
    for name, (plans, settings) in studies.items():
        config = {"model": lens.name, "settings": asdict(settings), "tasks": list(plans)}
        with Run.open(out / name, name, config, data=digests, seeds={"seed": seed}) as run:
            done[name] = ablate_all(plans, run, settings, say=say)
    config = {"model": lens.name, "preset": preset, "tasks": list(chosen)}
    config["functions"] = size.functions
    with Run.open(out / "both", "ablation", config, data=digests, seeds={"seed": seed}) as run:
        write(run, done, {name: settings for name, (_, settings) in studies.items()})
        print((run.folder / "summary.md").read_text())
    say(f"Wrote {out / 'both' / 'ablation.csv'}")


def write(
    run: Run, done: Mapping[str, Mapping[str, Ablated]], settings: Mapping[str, AblationSettings]
) -> None:
    """The tables and figures of both modalities together."""
    seed = settings["text"].seed
    both = {name: tables(found, seed) for name, found in done.items()}
    areas = pd.concat([each[1] for each in both.values()], ignore_index=True)
    curves = pd.concat([each[0] for each in both.values()], ignore_index=True)
    run.write_table("ablation", curves)
    run.write_table("ablation_areas", areas)
    agreement = [
        scoring.agreement_of(each.scores, settings[name].scoring.compare_ks)
        for name, found in done.items()
        for each in found.values()
    ]
    table, shown = summary(areas, pd.concat(agreement, ignore_index=True))
    write_tables(run.folder, "summary", table, shown)
    scores = {
        f"{task} {name}": each.scores[name]
        for found in done.values()
        for task, each in found.items()
        for name in OF_POINTS
        if (each.scores[name].scores.nan_to_num() > 0).any()
    }
    deep = depths(scores, seed)
    write_tables(run.folder, "depths", deep, deep.round(2))
    text = {task: each.scores for task, each in done["text"].items()}
    if len(text) > 1:
        ks = settings["text"].scoring.compare_ks
        run.write_table("task_agreement", scoring.across_tasks(text, ks, seed=seed))
    significance = [
        scoring.significance_of(each.scores, seed=seed)
        for found in done.values()
        for each in found.values()
    ]
    run.write_table("significance", pd.concat(significance, ignore_index=True))
    measured = {"text": ["accuracy"], "regression": ["squared_error", "squared_error_past"]}
    for name, (table, _) in both.items():
        there = [each for each in measured[name] if each in set(table["metric"])]
        for set_to, rule, metric in product(settings[name].set_to, ("top", "exclusive"), there):
            drawn = figures.ablation_curves(table, rule=rule, set_to=set_to, metric=metric)
            run.write_figure(f"{name}-{rule}-{set_to}-{metric}", drawn)


def tables(found: Mapping[str, Ablated], seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Curves and areas of all tasks of one modality."""
    ablations = [one for each in found.values() for one in each.ablations]
    return (
        pd.concat([one.to_frame(seed=seed) for one in ablations], ignore_index=True),
        pd.concat([one.areas(seed=seed) for one in ablations], ignore_index=True),
    )


def depths(scores: Mapping[str, Scores], seed: int) -> pd.DataFrame:
    """Every two of both modalities once, by how deep their scores lie."""
    table = depth_matrix(scores, seed=seed).drop(columns="k")
    order = {name: i for i, name in enumerate(scores)}
    return table[table["first"].map(order) < table["second"].map(order)].reset_index(drop=True)


def summary(areas: pd.DataFrame, agreement: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Areas by task and score, beside the overlap with the first score: numbers, and as text.

    Args:
        areas: areas under all curves.
        agreement: agreement of every two scores of each task.
    """
    first = areas["score"].iloc[0]
    last = f"overlap with {first}"
    overlap = agreement[agreement["measure"] == "overlap"]
    overlap = overlap.loc[overlap.groupby(["task", "comparison"])["k"].idxmin()]
    shared = overlap.set_index(["task", "comparison"])["value"]
    main = areas[areas["metric"].isin(["accuracy", "squared_error", "squared_error_past"])]
    values, texts = [], []
    keys = ["task", "set_to", "metric"]
    for (task, set_to, metric), part in main.groupby(keys, sort=False):
        difference = areas[
            (areas["task"] == task)
            & (areas["set_to"] == set_to)
            & (areas["metric"] == f"{metric}_minus_random")
        ]
        for score in part.loc[part["rule"] == "top", "score"]:
            row: dict[str, object] = {"task": task, "set to": set_to, "measure": metric}
            row["score"] = score
            text = dict(row)
            asked = {
                "best heads": part[(part["rule"] == "top") & (part["score"] == score)],
                "random, same layers": part[(part["rule"] == "random") & (part["score"] == score)],
                "best - random": difference[difference["score"] == score],
            }
            others = part[part["score"].str.startswith(f"{score} without ")]
            asked |= {
                f"without best by {name.split(' without ')[1]}": rows
                for name, rows in others.groupby("score", sort=False)
            }
            for label, rows in asked.items():
                for found in rows.itertuples():
                    row[label] = found.value
                    text[label] = with_interval(found.value, found.ci_low, found.ci_high)
            row[last] = shared.get((task, f"{first} and {score}"))
            text[last] = "" if pd.isna(row[last]) else f"{row[last]:.2f}"
            values.append(row)
            texts.append(text)
    tables = pd.DataFrame(values), pd.DataFrame(texts).fillna("")
    numbers, shown = (table[[*table.columns.drop(last), last]] for table in tables)
    return numbers, shown


if __name__ == "__main__":
    presets.run(main)
