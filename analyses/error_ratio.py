"""What the gain of a Learnable Task Vector past the training length depends on.

    python -m analyses.error_ratio --preset smoke
    python -m analyses.error_ratio                                   # the shipped models
    python -m analyses.error_ratio linear RUN/model.safetensors      # and models of your own

For every model, with the position rows past T_train as they are (no prompt of the training reached
them) and re-used (the rows of the last trained point, again and again), at one and a half, twice
and two and a half times T_train: squared error bare, shown the last T_train points only, and with
LTVs trained on several lengths, of the class and of each prompt, and the gain of each.
Models of other training lengths and dimensions are made by, for example,
    tvlens regression train --functions linear --train-points 6 --out RUN
"""

from dataclasses import dataclass, replace
from typing import Annotated

import pandas as pd
import torch
import typer

from analyses import presets
from tvlens.cli import options
from tvlens.console import say, with_interval
from tvlens.evaluation.curves import BARE, error_table, method_errors, truncation_errors
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.lens import Lens
from tvlens.runs.run import Run
from tvlens.runs.tables import write_tables
from tvlens.studies.regression import RegressionSettings
from tvlens.tasks.regression.task import FunctionTask
from tvlens.vectors.ltv.fit import fit_ltv
from tvlens.vectors.ltv.sample import read_fit_prompts

REACHES = (1.5, 2.0, 2.5)
METHODS = ("truncation", "ltv_class", "ltv_prompt")


@dataclass(frozen=True, kw_only=True)
class Size(presets.Size):
    """How much is done.

    Attributes:
        steps: training steps of LTVs.
        n_test: test prompts.
    """

    steps: int = RegressionSettings().ltv.steps
    n_test: int = 1024


PRESETS: dict[presets.Name, Size] = {
    "smoke": Size(functions="linear", steps=5, n_test=32),
    "small": Size(functions=",".join(presets.CLASSES)),
    "paper": Size(functions=",".join(presets.STANDARD), device="auto"),
}


def main(
    functions: Annotated[
        list[str] | None,
        typer.Argument(
            help="Classes with a shipped model, or files.", show_default="those of the preset"
        ),
    ] = None,
    preset: presets.PresetOption = "small",
    out: presets.OutOption = None,
    seed: options.SeedOption = 0,
    steps: options.StepsOption = None,
    n_test: presets.CountOption = None,
) -> None:
    """Errors and gains of several models, with untrained and with re-used position rows."""
    named = ",".join(functions) if functions else None
    size = presets.sized(PRESETS, preset, functions=named, steps=steps, n_test=n_test)
    out = presets.folder(out, preset, "error_ratio")
    settings = RegressionSettings(seed=seed, n_test=size.n_test)
    settings = replace(settings, ltv=replace(settings.ltv, steps=size.steps))
    models, data = size.regression_models()
    config = {"functions": size.functions.split(","), "n_test": size.n_test, "steps": size.steps}
    with Run.open(out, "error ratio", config, data=data, seeds=[seed]) as run:
        frames = []
        for name, (lens, task) in models.items():
            for rows in ("untrained", "re-used"):
                say(f"{name}, position rows past T_train {rows}")
                if rows == "re-used":
                    reuse_rows(lens, task.require_train_points())
                made = run.step(
                    f"{name}/{rows}",
                    lambda lens=lens, task=task: {"errors": errors(lens, task, settings)},
                )["errors"]
                frames.append(made.assign(rows=rows, dims=task.functions.n_dims))
        table = pd.concat(frames, ignore_index=True)
        run.write_table("errors", table)
    print("\nSquared error over the variance of f(x) [95% interval], and gain = bare / method\n")
    print(write_tables(out, "summary", *summary(table)))


def reuse_rows(lens: Lens, train_points: int) -> None:
    """Every point past the last trained one gets that one's two position rows."""
    rows = lens.backend.trained.backbone.wpe.weight.data
    last = slice(2 * train_points - 2, 2 * train_points)
    later = torch.arange(2 * train_points, len(rows))
    rows[2 * train_points :] = rows[last][later % 2]


def errors(lens: Lens, task: FunctionTask, settings: RegressionSettings) -> pd.DataFrame:
    """Errors and gains of one model at every reach that it has positions for."""
    trained = task.require_train_points()
    most = lens.backend.n_ctx // 2
    points = tuple(dict.fromkeys(min(most, round(reach * trained)) for reach in REACHES))
    seed = settings.seed
    clean = task.prompts("train", shots=trained - 1, n=settings.n_means, seed=seed)
    means = mean_head_outputs(lens, clean)
    fit = replace(
        settings.ltv,
        kinds=("clean",),
        shots=tuple(p - 1 for p in points),
        n_prompts=settings.ltv.n_prompts // len(points),
        n_validation=(settings.ltv.n_validation or 256) // len(points),
        per_prompt=True,
    )
    read = read_fit_prompts(lens, task, fit, seed)
    methods = {
        f"ltv_{unit}": fit_ltv(
            lens, task, means, settings=replace(fit, per_prompt=own), seed=seed, read=read
        )
        for unit, own in (("class", False), ("prompt", True))
    }
    curves = task.curves("test", points=(trained, *points), n=settings.n_test, seed=seed)
    found = method_errors(lens, [curves], methods)
    found["truncation"] = truncation_errors(lens, curves, trained, found[BARE])
    table = error_table(
        found, functions=task.name, shift="none", prompt="clean", train_points=trained, seed=seed
    )
    return table.assign(reach=table["points"] / trained, train_points=trained)


def summary(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row per model, kind of rows and reach: numbers, and as text with intervals."""
    keys = ["functions", "dims", "train_points", "rows", "points"]
    numbers, texts = [], []
    for key, part in table.groupby(keys, sort=False):
        row: dict[str, object] = dict(zip(keys, key, strict=True))
        text = dict(row)
        cells = part.set_index(["method", "metric"])[["value", "ci_low", "ci_high"]]
        for method, metric in [(BARE, "squared_error"), *((m, "gain") for m in METHODS)]:
            name = "bare error" if method == BARE else f"gain, {method.replace('_', ' per ')}"
            row[name] = cells.loc[(method, metric), "value"]
            digits = 4 if method == BARE else 2
            text[name] = with_interval(*cells.loc[(method, metric)], digits=digits)
        numbers.append(row)
        texts.append(text)
    return pd.DataFrame(numbers), pd.DataFrame(texts)


if __name__ == "__main__":
    presets.run(main)
