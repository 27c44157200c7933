"""With the step size of the released code, LTV weights stay at their random start.

    python -m analyses.weight_travel --preset smoke
    python -m analyses.weight_travel                  # 2,000 published steps, 3 seeds
    python -m analyses.weight_travel --steps 20 --seeds 1 --out runs/short

The published settings start at omega ~ N(0, 1) and train by Adam at 5e-5, so that in 2,000 steps a
weight travels about 0.1 at most. The default starts at zero with a step size of 0.1. For each of
the two and each seed this trains on present-past and asks the test pairs zero-shot with the weights
training began with (`start`) and with those it returned (`end`: lowest validation loss).

Accuracy and cross-entropy (nats) are of the first answer token.

Written to the run folder, which resumes: summary.{csv,md,tex}, one row per setting and seed;
results, weights and travel as tidy tables; figures/weight-travel.{pdf,png}.
"""

from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import pandas as pd
import typer

import tvlens
from analyses import presets
from tvlens import figures
from tvlens.cli.options import ShotsOption
from tvlens.console import with_interval
from tvlens.runs.run import Run
from tvlens.runs.tables import write_tables
from tvlens.studies import stages
from tvlens.studies.text import TextPlan, TextSettings

TRAININGS = {"paper": tvlens.FitSettings.paper(), "default": tvlens.FitSettings()}
"""The published settings, and ours."""


@dataclass(frozen=True, kw_only=True)
class Size(presets.Size):
    """How much is done.

    Attributes:
        seeds: trainings of each setting.
        steps: steps of a training at most; what the setting says if None.
        n_means: clean prompts that head means are taken over.
    """

    seeds: int = 3
    steps: int | None = None
    n_means: int = TextSettings.n_means


PRESETS: dict[presets.Name, Size] = {
    "smoke": Size(seeds=1, steps=5, n_means=16),
    "small": Size(),
    "paper": Size(**presets.PAPER),
}


def main(
    preset: presets.PresetOption = "small",
    out: presets.OutOption = None,
    model: presets.ModelOption = None,
    task: Annotated[str, typer.Option(help="Shipped task, or a JSON file.")] = "present-past",
    shots: ShotsOption = 10,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Trainings of each setting.", show_default="by preset"),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a training at most.")] = None,
) -> None:
    """How far training carries the weights, and what that changes, under both settings."""
    size = presets.sized(PRESETS, preset, model=model, seeds=seeds, steps=steps)
    out = presets.folder(out, preset, "weight_travel")
    chosen = tvlens.tasks.load_file(task) if task.endswith(".json") else tvlens.tasks.load(task)
    most = size.steps or max(fit.steps for fit in TRAININGS.values())
    fits = {name: replace(fit, steps=min(fit.steps, most)) for name, fit in TRAININGS.items()}
    settings = TextSettings(shots=shots, n_means=size.n_means)
    config = {"model": size.model, "shots": settings.shots, "n_means": settings.n_means} | {
        name: asdict(fit) for name, fit in fits.items()
    }
    data = {chosen.name: chosen.digest}
    with Run.open(out, "weight travel", config, data=data, seeds=list(range(size.seeds))) as run:
        lens = size.lens()
        means = stages.head_means(TextPlan(lens, chosen, settings), run)
        icl = run.step(
            "in-context",
            lambda: {"results": tvlens.evaluate(lens, chosen, {}, kinds=["clean"], shots=shots)},
        )["results"]
        found = []
        for name, fit in fits.items():
            for seed in range(size.seeds):
                tables = _train(lens, chosen, run, means, name, fit, seed)
                found.append({k: x.assign(preset=name, seed=seed) for k, x in tables.items()})
        tidy = {key: pd.concat([one[key] for one in found], ignore_index=True) for key in found[0]}
        for key, table in tidy.items():
            run.write_table(key, table)
        rows = [_summary(fits[one["weights"]["preset"].iloc[0]], one) for one in found]
        values, shown = (pd.DataFrame(table) for table in zip(*rows, strict=True))
        text = write_tables(run.folder, "summary", values, shown)
        run.write_figure("weight-travel", figures.weight_travel(tidy["travel"], tidy["weights"]))
    accuracy = icl.set_index("metric").loc["accuracy", "value"]
    print(f"{chosen.name}, zero-shot test prompts; in-context accuracy is {accuracy:.2f}\n\n{text}")


def _train(
    lens: tvlens.Lens,
    task: tvlens.tasks.Task,
    run: Run,
    means: tvlens.HeadMeans,
    name: str,
    settings: tvlens.FitSettings,
    seed: int,
) -> dict[str, pd.DataFrame]:
    """Weights, history and accuracy of one training, as a step that resumes within training."""
    checkpoint = run.folder / "checkpoints" / f"{name}-{seed}.safetensors"

    def compute() -> dict[str, Any]:
        with tvlens.progress_bar(f"{name}, seed {seed}", settings.steps) as advance:
            ltv = tvlens.fit_ltv(
                lens,
                task,
                means,
                settings=settings,
                seed=seed,
                checkpoint=checkpoint,
                progress=advance,
            )
        methods = {"start": ltv.with_weights(ltv.start, "weights before training"), "end": ltv}
        n_layer, n_head = ltv.start.shape
        index = pd.MultiIndex.from_product([range(n_layer), range(n_head)], names=["layer", "head"])
        weights = {"start": ltv.start, "end": ltv.weights.detach()}
        return {
            "weights": pd.DataFrame(
                {key: tensor.flatten().tolist() for key, tensor in weights.items()}, index
            ).reset_index(),
            "travel": ltv.history,
            "results": tvlens.evaluate(lens, task, methods, kinds=["zero"], exact_match=False),
        }

    tables = run.step(f"{name}/seed-{seed}", compute)
    checkpoint.unlink(missing_ok=True)
    return tables


def _summary(
    settings: tvlens.FitSettings, tables: dict[str, pd.DataFrame]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One training in a row: numbers, and as text."""
    weights, travel = tables["weights"], tables["travel"]
    start, end = weights["start"], weights["end"]
    steps = int(travel["step"].max())
    constant = start.nunique() == 1
    row: dict[str, Any] = {
        "preset": weights["preset"].iloc[0],
        "seed": int(weights["seed"].iloc[0]),
        "steps": steps,
        "best step": int(travel.loc[travel["validation_loss"].idxmin(), "step"]),
        "largest travel of a weight": float((end - start).abs().max()),
        "steps x step size": steps * settings.learning_rate,
        "norm of start": float((start**2).sum() ** 0.5),
        "distance": float(((end - start) ** 2).sum() ** 0.5),
        "correlation": float("nan") if constant else float(start.corr(end)),
    }
    shown = dict(row)
    results = tables["results"].set_index(["metric", "method"])
    for when, label in (("none", "no vector"), ("start", "start"), ("end", "end")):
        accuracy = results.loc[("accuracy", when), ["value", "ci_low", "ci_high"]]
        row[f"accuracy, {label}"] = accuracy["value"]
        shown[f"accuracy, {label}"] = with_interval(*accuracy)
    for when in ("start", "end"):
        nats = results.loc[("cross_entropy", when), "value"]
        row[f"nats, {when}"] = shown[f"nats, {when}"] = nats
    return row, shown


if __name__ == "__main__":
    presets.run(main)
