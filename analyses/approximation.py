"""Indirect effects to first order against exact ones, on five text tasks.

    python analyses/approximation.py                                    # five shipped tasks
    python analyses/approximation.py --tasks antonym --data FOLDER --out runs/approximation

Of all heads on the prompts of `tvlens mediate`: exact effects, those to first order, and exact ones
of the `screen` heads that are best to first order. Writes to the run folder
- approximation.{csv,md,tex}: by task, Spearman's correlation over all heads, how many of the ten
  best heads are found, which are missed, and whether the screened effects have the same ten best,
- scores.csv: both scores of every head.
"""

import sys
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import typer

from tvlens.cli import options
from tvlens.console import progress_bar, say
from tvlens.errors import TvlensError
from tvlens.runs.run import Run
from tvlens.runs.tables import write_tables
from tvlens.scores.agreement import spearman
from tvlens.scores.catalogue import scores_named
from tvlens.scores.mediation import IndirectEffects, indirect_effects
from tvlens.studies import scoring
from tvlens.studies.text import TextSettings, text_plans

TASKS = "present-past,singular-plural,country-nationality,verb-gerund,capitalize-word"
BEST = 10


def main(
    tasks: options.TasksOption = TASKS,
    out: options.OutOption = Path("runs/approximation"),
    data: options.DataOption = None,
    model: options.ModelOption = "smollm2-135m",
    screen: int = 20,
    shots: options.ShotsOption = 10,
    seed: options.SeedOption = 0,
) -> None:
    """Exact, approximate and screened indirect effects of several tasks, and a table of them."""
    chosen = options.read_tasks(tasks, data, "error")
    lens = options.load_lens(model, "bridge")
    settings = TextSettings(seed=seed, shots=shots)
    config = {"model": lens.name, "screen": screen, "settings": asdict(settings)}
    digests = {name: task.digest for name, task in chosen.items()}
    with Run.open(out, "approximation", config, data=digests, seeds={"seed": seed}) as run:
        rows, tables = [], []
        for plan in text_plans(lens, chosen, settings).values():
            found = scoring.Found(plan, run)
            scores = scoring.made(found, scores_named(["aie", "attribution"]))
            tables.append(scoring.table_of(scores, seed=seed))
            best = min(BEST, scores["aie"].n_heads)
            exact, rough = scores["aie"].top(best), scores["attribution"].top(best)
            screened = _screened(found, screen).top(best)
            missed = [f"{layer}.{head}" for layer, head in exact if (layer, head) not in rough]
            rows.append(
                {
                    "task": plan.task.name,
                    "prompts": len(scores["aie"].values),
                    "Spearman": f"{spearman(scores['aie'], scores['attribution']).value:.2f}",
                    f"top {BEST} found": str(best - len(missed)),
                    "missed": ", ".join(missed),
                    f"screened top {BEST} is the exact one": "yes" if screened == exact else "no",
                }
            )
        run.write_table("scores", pd.concat(tables, ignore_index=True))
        table = pd.DataFrame(rows)
        print(write_tables(out, "approximation", table, table))
    say(f"Wrote {out / 'approximation.csv'}")


def _screened(found: scoring.Found, screen: int) -> IndirectEffects:
    plan = found.plan
    prompts = plan.mediation(plan.views[0], found.means)

    def compute() -> IndirectEffects:
        with progress_bar(f"{plan.task.name}: screened effects", len(prompts)) as advance:
            return indirect_effects(
                plan.lens, prompts, found.means, screen=screen, progress=advance
            )

    return found.run.kept(f"{plan.task.name}/screened", IndirectEffects, compute)


if __name__ == "__main__":
    try:
        typer.run(main)
    except TvlensError as error:
        sys.exit(f"error: {error}")
