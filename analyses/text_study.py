"""Learned heads against function-vector heads on five text tasks, and the two tables of a paper.

    python -m analyses.text_study --preset smoke
    python -m analyses.text_study                                    # five shipped tasks
    python -m analyses.text_study --data FOLDER --tasks antonym,country-capital --out runs/public

Runs `tvlens study text`, or goes on where an earlier call stopped, and prints of its run folder
- summary.{csv,md,tex}: accuracy of every method on zero-shot and label-shuffled prompts,
- headset_summary.{csv,md,tex}: agreement of AIE and LTV heads, between its chance and its ceilings.
"""

from dataclasses import asdict, dataclass

from analyses import presets
from tvlens.cli import options, studies
from tvlens.studies.text import TextSettings

TASKS = "present-past,singular-plural,country-nationality,verb-gerund,capitalize-word"


@dataclass(frozen=True, kw_only=True)
class Size(presets.Size):
    """How much is done.

    Attributes:
        steps: training steps of LTVs at most, if not the usual.
        ltv_seeds: LTVs trained per task; the first is reported.
        n_means: clean prompts that head means are taken over.
        n_validation: validation prompts of each kind; every pair if None.
        n_test: test prompts of each kind; every pair if None.
        control_draws: random and permuted weights drawn.
    """

    steps: int | None = None
    ltv_seeds: int = TextSettings.ltv_seeds
    n_means: int = TextSettings.n_means
    n_validation: int | None = None
    n_test: int | None = None
    control_draws: int = TextSettings.control_draws


PRESETS: dict[presets.Name, Size] = {
    "smoke": Size(
        tasks="present-past",
        steps=3,
        ltv_seeds=1,
        n_means=16,
        n_validation=2,
        n_test=4,
        control_draws=1,
    ),
    "small": Size(tasks=TASKS, ltv_seeds=2),
    "paper": Size(tasks=presets.PAPER_TASKS, **presets.PAPER),
}


def main(
    preset: presets.PresetOption = "small",
    tasks: presets.TasksOption = None,
    out: presets.OutOption = None,
    data: options.DataOption = None,
    duplicates: options.DuplicatesOption = "error",
    model: presets.ModelOption = None,
    shots: options.ShotsOption = 10,
    seed: options.SeedOption = 0,
    steps: options.StepsOption = None,
    ltv_seeds: presets.CountOption = None,
    n_means: presets.CountOption = None,
    n_validation: presets.CountOption = None,
    n_test: presets.CountOption = None,
    control_draws: presets.CountOption = None,
) -> None:
    """The text study of several tasks and its summary over them."""
    size = presets.sized(
        PRESETS,
        preset,
        tasks=tasks,
        model=model,
        steps=steps,
        ltv_seeds=ltv_seeds,
        n_means=n_means,
        n_validation=n_validation,
        n_test=n_test,
        control_draws=control_draws,
    )
    out = presets.folder(out, preset, "text_study")
    asked = asdict(size)
    del asked["functions"]
    studies.study_text(**asked, out=out, data=data, duplicates=duplicates, shots=shots, seed=seed)
    print("\nFirst-token accuracy with 95% intervals over test prompts\n")
    print((out / "summary.md").read_text(encoding="utf-8"))
    print("Agreement of head sets\n")
    print((out / "headset_summary.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    presets.run(main)
