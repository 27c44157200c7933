"""Do vectors carry over: to other layouts, to other tasks, into running text?

    python -m analyses.transfer                                      # after analyses.rivals
    python -m analyses.transfer --study runs/study/text --methods ltv,fv_layer --out runs/transfer

Reads the vectors of zero-shot prompts in a text study's run folder, that of `analyses.rivals` of
the same preset if none is named (preset smoke reads two tasks of it). All were learned in the
study's own layout; they are asked zero-shot prompts of the test split. Writes to the run folder
- transfer.csv: method, learned_on, task, layout, accuracy and its interval, of every vector on
  every task in the study's layout, and of every task's own vector in every layout,
- formats.{csv,md,tex} and tasks.{csv,md,tex}: its two halves as tables,
- figures: who helps whom, and what is left in another layout.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from analyses import presets
from tvlens import figures
from tvlens.cli import options
from tvlens.console import progress_bar, say, with_interval
from tvlens.errors import RunError
from tvlens.evaluation.methods import evaluate
from tvlens.lens.lens import Lens
from tvlens.runs.tables import write_tables
from tvlens.studies.text import TextSettings
from tvlens.tasks import TEMPLATES, Task, Template
from tvlens.vectors.catalogue import load_vector, method

METHODS = "ltv,fv_layer,mixing"
LAYOUTS: dict[str, Template] = TEMPLATES | {
    "running text": Template(
        query_prefix='They wrote "',
        answer_prefix="I read",
        field_separator='", and ',
        pair_separator=". ",
    ),
}
"""The layouts of `tvlens.tasks`, and one that is a sentence."""
OWN = "question-answer"


@dataclass(frozen=True, kw_only=True)
class Size(presets.Size):
    """How much is done.

    Attributes:
        n_tasks: tasks that are read, in the order of their names; all if None.
    """

    n_tasks: int | None = None


PRESETS: dict[presets.Name, Size] = {
    "smoke": Size(n_tasks=2),
    "small": Size(),
    "paper": Size(**presets.PAPER),
}


def main(
    preset: presets.PresetOption = "small",
    study: Annotated[
        Path | None,
        typer.Option(
            "--study",
            help="Run folder of `tvlens study text`.",
            show_default="runs/PRESET/rivals/text",
        ),
    ] = None,
    methods: str = METHODS,
    out: presets.OutOption = None,
    data: options.DataOption = None,
    model: presets.ModelOption = None,
    seed: options.SeedOption = 0,
) -> None:
    """Vectors of one text study in other layouts and on other tasks."""
    if study is None:
        study = presets.folder(None, preset, "rivals") / "text"
        if not study.is_dir():
            raise RunError(
                f"there is no folder {study}; run `python -m analyses.rivals --preset {preset}` "
                "first, or name the run folder of a text study with --study"
            )
    size = presets.sized(PRESETS, preset, model=model)
    out = presets.folder(out, preset, "transfer")
    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        method(name)
    files = vector_files(study, names)
    found = sorted({task for task, _ in files})[: size.n_tasks]
    tasks = options.read_tasks(",".join(found), data, "error")
    lens = size.lens()
    settings = TextSettings(seed=seed)
    vectors = {f"{task} {name}": files[task, name] for task in found for name in names}
    frames = []
    with options.open_run(out, "transfer", lens, tasks, settings, vectors) as run:
        n_layouts = {name: LAYOUTS if name in tasks else {} for name in found}
        total = sum(len(each) for each in n_layouts.values())
        with progress_bar("transfer", total) as advance:
            for name, task in tasks.items():
                for layout in LAYOUTS:

                    def compute(task: Task = task, layout: str = layout) -> dict[str, Any]:
                        return {"table": asked(lens, task, layout, files, found, names, seed)}

                    frames.append(run.step(f"{name}/{layout.replace(' ', '-')}", compute)["table"])
                    advance(1)
        table = pd.concat(frames, ignore_index=True)
        run.write_table("transfer", table)
        own = table[(table["learned_on"] == table["task"]) | (table["method"] == "none")]
        print(write_tables(out, "formats", own, _wide(own, "layout")))
        across = table[table["layout"] == OWN]
        print(write_tables(out, "tasks", across, _wide(across, "task")))
        for name in names:
            part = across[across["method"] == name]
            run.write_figure(f"tasks-{name}", figures.transfer_grid(part, across="task"))
            part = own[own["method"] == name]
            run.write_figure(f"formats-{name}", figures.transfer_grid(part, across="layout"))
    say(f"Wrote {out / 'transfer.csv'}")


def vector_files(study: Path, names: list[str]) -> dict[tuple[str, str], Path]:
    """The vectors for zero-shot prompts in a run folder, by task and method.

    Raises:
        RunError: there is none.
    """
    found = {}
    for name in names:
        for path in sorted((study / "vectors").glob(f"*-{name}*.safetensors")):
            task, _, rest = path.stem.rpartition(f"-{name}")
            if rest in ("", "-zero"):
                found[task, name] = path
    if not found:
        raise RunError(
            f"{study} holds no vectors of {', '.join(names)} for zero-shot prompts; give the run "
            "folder of `tvlens study text --methods all`"
        )
    return found


def asked(
    lens: Lens,
    task: Task,
    layout: str,
    files: dict[tuple[str, str], Path],
    found: list[str],
    names: list[str],
    seed: int,
) -> pd.DataFrame:
    """Zero-shot accuracy on one task in one layout: of all vectors in their own, else its own's."""
    learned = found if layout == OWN else [task.name]
    vectors = {
        f"{name} {other}": load_vector(files[other, name])
        for name in names
        for other in learned
        if (other, name) in files
    }
    table = evaluate(
        lens,
        task.with_template(LAYOUTS[layout]),
        vectors,
        kinds=("zero",),
        seed=seed,
        exact_match=False,
    )
    table = table[table["metric"] == "accuracy"]
    words = table["method"].str.split(" ", n=1, expand=True).reindex(columns=[0, 1])
    columns = ["method", "learned_on", "task", "layout", "value", "ci_low", "ci_high", "n"]
    made = table.assign(method=words[0], learned_on=words[1].fillna(""), layout=layout)
    return made[columns]


def _wide(table: pd.DataFrame, across: str) -> pd.DataFrame:
    """A row for each method and where it was learned; a column for each task or layout."""
    text = [with_interval(row.value, row.ci_low, row.ci_high) for row in table.itertuples()]
    rows = ["method", "learned_on"] if across == "task" else ["method", "task"]
    wide = table.assign(text=text).pivot(index=rows, columns=across, values="text")
    return wide[list(dict.fromkeys(table[across]))].reset_index().rename_axis(columns=None)


if __name__ == "__main__":
    presets.run(main)
