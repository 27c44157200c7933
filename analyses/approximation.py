"""Indirect effects to first order against exact ones, on five text tasks.

    python -m analyses.approximation --preset smoke
    python -m analyses.approximation                                 # five shipped tasks
    python -m analyses.approximation --tasks antonym --data FOLDER --out runs/antonym

Of all heads on the prompts of `tvlens mediate`: exact effects, those to first order, and exact ones
of the `screen` heads that are best to first order. Writes to the run folder
- approximation.{csv,md,tex}: by task, Spearman's correlation over all heads, how many of the ten
  best heads are found, which are missed, and whether the screened effects have the same ten best,
- scores.csv: both scores of every head.
"""

from dataclasses import asdict, dataclass

import pandas as pd

from analyses import presets
from tvlens.cli import options
from tvlens.console import progress_bar, say
from tvlens.runs.run import Run
from tvlens.runs.tables import write_tables
from tvlens.scores.agreement import spearman
from tvlens.scores.catalogue import scores_named
from tvlens.scores.mediation import IndirectEffects, indirect_effects
from tvlens.studies import scoring
from tvlens.studies.text import TextSettings, text_plans

TASKS = "present-past,singular-plural,country-nationality,verb-gerund,capitalize-word"
BEST = 10


@dataclass(frozen=True, kw_only=True)
class Size(presets.Size):
    """How much is done.

    Attributes:
        n_means: clean prompts that head means are taken over.
        n_mediation: prompts of the effects.
    """

    n_means: int = TextSettings.n_means
    n_mediation: int = TextSettings.n_mediation


PRESETS: dict[presets.Name, Size] = {
    "smoke": Size(tasks="present-past", n_means=16, n_mediation=3),
    "small": Size(tasks=TASKS),
    "paper": Size(tasks=presets.PAPER_TASKS, **presets.PAPER),
}


def main(
    preset: presets.PresetOption = "small",
    tasks: presets.TasksOption = None,
    out: presets.OutOption = None,
    data: options.DataOption = None,
    model: presets.ModelOption = None,
    screen: int = 20,
    shots: options.ShotsOption = 10,
    seed: options.SeedOption = 0,
) -> None:
    """Exact, approximate and screened indirect effects of several tasks, and a table of them."""
    size = presets.sized(PRESETS, preset, tasks=tasks, model=model)
    out = presets.folder(out, preset, "approximation")
    chosen = options.read_tasks(size.tasks, data, "error")
    lens = size.lens()
    settings = TextSettings(
        seed=seed, shots=shots, n_means=size.n_means, n_mediation=size.n_mediation
    )
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
    presets.run(main)
