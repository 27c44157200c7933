"""Learned heads against function-vector heads on five text tasks, and the two tables of a paper.

    python analyses/text_study.py                                   # five shipped tasks
    python analyses/text_study.py --data FOLDER --tasks antonym,country-capital --out runs/public

Runs `tvlens study text`, or goes on where an earlier call stopped, and prints of its run folder
- summary.{csv,md,tex}: accuracy of every method on zero-shot and label-shuffled prompts,
- headset_summary.{csv,md,tex}: agreement of AIE and LTV heads, between its chance and its ceilings.
"""

import sys
from pathlib import Path

import typer

from tvlens.cli import options, studies
from tvlens.errors import TvlensError
from tvlens.studies.text import TextSettings

TASKS = "present-past,singular-plural,country-nationality,verb-gerund,capitalize-word"


def main(
    tasks: options.TasksOption = TASKS,
    out: options.OutOption = Path("runs/text"),
    data: options.DataOption = None,
    duplicates: options.DuplicatesOption = "error",
    model: options.ModelOption = "smollm2-135m",
    shots: options.ShotsOption = 10,
    seed: options.SeedOption = 0,
    steps: options.StepsOption = None,
    ltv_seeds: int = TextSettings.ltv_seeds,
    n_means: int = TextSettings.n_means,
    n_validation: int | None = None,
    n_test: int | None = None,
    control_draws: int = TextSettings.control_draws,
) -> None:
    """The text study of several tasks and its summary over them."""
    studies.study_text(
        tasks,
        out,
        model=model,
        data=data,
        duplicates=duplicates,
        shots=shots,
        seed=seed,
        steps=steps,
        ltv_seeds=ltv_seeds,
        n_means=n_means,
        n_validation=n_validation,
        n_test=n_test,
        control_draws=control_draws,
    )
    print("\nFirst-token accuracy with 95% intervals over test prompts\n")
    print((out / "summary.md").read_text(encoding="utf-8"))
    print("Agreement of head sets\n")
    print((out / "headset_summary.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    try:
        typer.run(main)
    except TvlensError as error:
        sys.exit(f"error: {error}")
