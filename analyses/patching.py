"""Where in a prompt a task is read and where it is written: residual streams patched by role.

    python -m analyses.patching --preset smoke
    python -m analyses.patching                              # three text tasks, one of numbers
    python -m analyses.patching --tasks antonym --data FOLDER --n 8 --out runs/antonym

Clean residual streams are put into label-shuffled prompts behind every layer, role by role, those
of all demonstrations together (denoising), and the reverse (noising); the same for a regression
model. AIE and LTV heads are scored beside. Writes to the run folder
- patching.csv: every effect, as `tvlens patch` writes them, with a column `direction`,
- scores.csv: AIE and LTV of every head,
- moves.{csv,md,tex}: by task, in which layers the task's information reaches the query, and how
  much of the positive AIE and LTV scores lies there,
- figures: layer x role maps of every task.
"""

from dataclasses import asdict, dataclass, replace
from typing import Annotated

import pandas as pd
import typer

from analyses import presets
from tvlens import figures
from tvlens.cli import options
from tvlens.console import progress_bar, say, with_interval
from tvlens.lens.lens import Lens
from tvlens.lens.loading import load
from tvlens.models.catalogue import read_regression
from tvlens.runs.run import Run
from tvlens.runs.tables import write_tables
from tvlens.scores.catalogue import scores_named
from tvlens.scores.effects import PatchEffects
from tvlens.scores.patching import patch
from tvlens.scores.ranking import layer_profile
from tvlens.scores.score import Scores
from tvlens.stats import bootstrap_mean
from tvlens.studies import scoring
from tvlens.studies.patching import PatchSettings, patched, twins
from tvlens.studies.text import TextSettings, text_plans
from tvlens.tasks.base import PromptSet
from tvlens.tasks.regression.task import FunctionTask

TASKS = "present-past,singular-plural,country-nationality"
ROLES = ("inputs", "answers", "separators", "query", "answer prefix")
DIRECTIONS = ("denoising", "noising")
ARRIVES = (0.1, 0.9)
"""Shares of the gap between which the task's information is on its way to the query."""


@dataclass(frozen=True, kw_only=True)
class Size(presets.Size):
    """How much is done.

    Attributes:
        n: pairs of prompts of each text task.
        n_points: pairs of prompts of the regression model.
        steps: training steps of LTVs at most, if not the usual.
        n_means: clean prompts that head means are taken over.
        n_mediation: prompts of causal mediation.
    """

    functions: str = "linear-small"
    n: int = 6
    n_points: int = 64
    steps: int | None = None
    n_means: int = TextSettings.n_means
    n_mediation: int = TextSettings.n_mediation


PRESETS: dict[presets.Name, Size] = {
    "smoke": Size(tasks="present-past", n=1, n_points=8, steps=3, n_means=16, n_mediation=3),
    "small": Size(tasks=TASKS),
    "paper": Size(
        tasks=presets.PAPER_TASKS, functions=next(iter(presets.STANDARD)), n=25, **presets.PAPER
    ),
}


def main(
    preset: presets.PresetOption = "small",
    tasks: presets.TasksOption = None,
    out: presets.OutOption = None,
    data: options.DataOption = None,
    model: presets.ModelOption = None,
    regression: Annotated[
        str | None,
        typer.Option(
            help="A shipped regression model, or the file of another.", show_default="by preset"
        ),
    ] = None,
    n: presets.CountOption = None,
    n_points: presets.CountOption = None,
    shots: options.ShotsOption = 10,
    seed: options.SeedOption = 0,
    steps: options.StepsOption = None,
) -> None:
    """Patching by role on text tasks and one regression model, and where the best heads sit."""
    given = {"tasks": tasks, "model": model, "functions": regression, "n": n}
    size = presets.sized(PRESETS, preset, **given, n_points=n_points, steps=steps)
    out = presets.folder(out, preset, "patching")
    chosen = options.read_tasks(size.tasks, data, "error")
    trained, card = read_regression(size.functions)
    lens = size.lens()
    settings = PatchSettings(("resid_post",), list(ROLES), n=size.n, shots=shots, seed=seed)
    text = TextSettings(
        seed=seed,
        shots=shots,
        ltv=options.fit_settings("default", size.steps, shots),
        ltv_seeds=1,
        n_means=size.n_means,
        n_mediation=size.n_mediation,
    )
    points = load(trained, name=size.functions, device=size.device)
    functions = FunctionTask.of_card(size.functions, card, trained.sizes.n_dims)
    config = {"model": lens.name, "regression": points.name, "n_points": size.n_points}
    config |= {"patching": asdict(settings), "scores": asdict(text)}
    digests = {name: task.digest for name, task in chosen.items()}
    with Run.open(out, "patching by role", config, data=digests, seeds={"seed": seed}) as run:
        effects: list[PatchEffects] = []
        scores: list[dict[str, Scores]] = []
        for plan in text_plans(lens, chosen, text).values():
            found, _ = twins(lens, plan.task, settings)
            for noising in (False, True):
                way = replace(settings, noising=noising)
                named = replace(found, name=f"{plan.task.name}-{DIRECTIONS[noising]}")
                each = patched(lens, named, "resid_post", "exact", way, run)
                effects.append(replace(each, task=plan.task.name))
            scores.append(scoring.made(scoring.Found(plan, run), scores_named(["aie", "ltv"])))
        of_text = len(effects)
        effects += _of_points(points, functions, size.n_points, seed, run)
        table = pd.concat(
            [each.to_frame(seed=seed).assign(direction=each.direction) for each in effects]
        )
        run.write_table("patching", table)
        run.write_table("scores", pd.concat([scoring.table_of(each, seed=seed) for each in scores]))
        moves = moved(effects[:of_text:2], scores)
        print(write_tables(out, "moves", moves, moves))
        for name, part in (("text", effects[:of_text]), ("regression", effects[of_text:])):
            shown = table[table["task"].isin({each.task for each in part})]
            run.write_figure(
                f"roles-{name}", figures.role_maps(shown, site="resid_post", value="normalised")
            )
    say(f"Wrote {out / 'patching.csv'}")


def _of_points(lens: Lens, task: FunctionTask, n: int, seed: int, run: Run) -> list[PatchEffects]:
    """The same of a regression model, at as many points as it was trained on."""
    shots = task.require_train_points() - 1
    clean, shuffled = (
        task.prompts("train", shots=shots, n=n, seed=seed, kind=kind)
        for kind in ("clean", "shuffled")
    )
    found = []
    for direction, source, target in zip(
        DIRECTIONS, (clean, shuffled), (shuffled, clean), strict=True
    ):

        def compute(
            source: PromptSet = source, target: PromptSet = target, direction: str = direction
        ) -> PatchEffects:
            with progress_bar(f"{task.name}: {direction}", n) as advance:
                return patch(
                    lens,
                    source,
                    target,
                    site="resid_post",
                    positions=["xs", "ys", "query"],
                    direction="noising" if direction == "noising" else "denoising",
                    progress=advance,
                )

        found.append(run.kept(f"{task.name}/{direction}", PatchEffects, compute))
    return found


def moved(effects: list[PatchEffects], scores: list[dict[str, Scores]]) -> pd.DataFrame:
    """By task: layers in which the task reaches the query, and what of the scores lies in them.

    Denoising effects at the role that ends with the query say after which layer a share of what
    clean and corrupted prompts differ by is there. The layers between two shares of it
    (`ARRIVES`) are compared with where the positive scores of heads lie: their share there beside
    that of the layers.
    """
    rows = []
    for each, of_task in zip(effects, scores, strict=True):
        arrived = each.at("answer prefix").normalised[:, 0, 0]
        first, last = (int((arrived >= share).int().argmax()) for share in ARRIVES)
        others = [place for place in each.places if place != "answer prefix"]
        before = most_before(each, others)
        row = {
            "task": each.task,
            "metric, clean": f"{float(each.source.mean()):.2f}",
            "metric, shuffled": mean_before(each),
            "arrives in layers": f"{first} to {last}",
            "share of layers": f"{(last - first + 1) / len(arrived):.2f}",
            "most before": before,
        }
        for name, score in of_task.items():
            share = float(layer_profile(score.scores)[first : last + 1].sum())
            inside = sum(first <= layer <= last for layer, _ in score.top(min(10, score.n_heads)))
            row[f"{name}: share of score there"] = f"{share:.2f}"
            row[f"{name}: of top 10 there"] = str(inside)
        rows.append(row)
    return pd.DataFrame(rows)


def mean_before(effects: PatchEffects) -> str:
    """The mean metric of the target prompts with its interval over them."""
    found = bootstrap_mean(effects.before)
    return with_interval(found.value, found.low, found.high)


def most_before(effects: PatchEffects, places: list[str]) -> str:
    """The place before the query, and the layer, from which most of the gap is restored."""
    shares = effects.normalised[:, 0]
    best = max(
        ((float(shares[:, effects.places.index(place)].max()), place) for place in places),
    )
    layer = int(shares[:, effects.places.index(best[1])].argmax())
    return f"{best[1]}, layer {layer} ({best[0]:.2f})"


if __name__ == "__main__":
    presets.run(main)
