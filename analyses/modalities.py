"""Text and regression side by side: how far the two head sets agree, and how they are spread.

    python -m analyses.modalities             # after the two studies of the same preset
    python -m analyses.modalities --text runs/text --regression runs/regression --out runs/both

Reads results.csv, heads.csv and headsets.csv of both run folders, those of
`analyses.text_study` and `analyses.regression_study` if none are named. Writes to OUT
- methods.{csv,md,tex}: what vectors do, in text by zero-shot accuracy, in regression by the gain
  over the bare model past its training length,
- modalities_summary.{csv,md,tex} and figures/modalities.{pdf,png}: the two head sets. Models differ
  in their number of heads, so sets hold the same share of them, an eighth, and agreement is
  corrected for chance: 0 is chance, 1 the same set.
"""

from pathlib import Path
from typing import Annotated

import pandas as pd
import torch
import typer
from jaxtyping import Float
from torch import Tensor

from analyses import presets
from tvlens import figures
from tvlens.console import with_interval
from tvlens.errors import RunError
from tvlens.runs.run import Run
from tvlens.runs.storage import file_sha256
from tvlens.runs.tables import write_tables
from tvlens.scores.agreement import overlap_at_k, spearman
from tvlens.scores.ranking import concentration, layer_profile
from tvlens.scores.score import Scores
from tvlens.vectors.catalogue import METHODS, variants

SHARE = 1 / 8


PRESETS: dict[presets.Name, presets.Size] = {
    "smoke": presets.Size(),
    "small": presets.Size(),
    "paper": presets.Size(),
}
"""All alike: runs that are finished are read."""


def main(
    preset: presets.PresetOption = "small",
    text: Annotated[
        Path | None,
        typer.Option(help="Run folder of a text study.", show_default="runs/PRESET/text_study"),
    ] = None,
    regression: Annotated[
        Path | None,
        typer.Option(
            help="Run folder of a regression study.", show_default="runs/PRESET/regression_study"
        ),
    ] = None,
    out: presets.OutOption = None,
) -> None:
    """One table and one figure over both modalities."""
    folders = {
        "text": presets.folder(text, preset, "text_study"),
        "regression": presets.folder(regression, preset, "regression_study"),
    }
    out = presets.folder(out, preset, "modalities")
    names = ("results.csv", "heads.csv", "headsets.csv")
    files = {name: [folder / file for file in names] for name, folder in folders.items()}
    for name, own in files.items():
        if missing := [str(file) for file in own if not file.is_file()]:
            raise RunError(
                f"{missing[0]} is not there; run `python -m analyses.{name}_study --preset "
                f"{preset}` or `tvlens study {name}` first, and name its folder with --{name} if "
                "it has another"
            )
    data = {str(file): file_sha256(file) for own in files.values() for file in own}
    with Run.open(out, "modalities", {"share": SHARE}, data=data) as run:
        table = pd.concat(
            [
                rows(pd.read_csv(folder / "heads.csv"), pd.read_csv(folder / "headsets.csv"), name)
                for name, folder in folders.items()
            ],
            ignore_index=True,
        )
        run.write_table("modalities", table)
        results = {name: pd.read_csv(folder / "results.csv") for name, folder in folders.items()}
        methods = pd.concat(
            [text_methods(results["text"]), regression_methods(results["regression"])],
            ignore_index=True,
        )
        print(
            "\nWhat vectors do: text, zero-shot accuracy; regression, bare error over error past "
            "T\n"
        )
        print(write_tables(out, "methods", methods, methods))
        means = table.drop(columns=["task", "heads"]).groupby("modality", sort=False).mean()
        print(f"\nHead sets of an eighth of all heads, agreement corrected for chance; {out}\n")
        both = pd.concat([table, means.reset_index().assign(task="mean")]).drop(columns="heads")
        print(write_tables(out, "modalities_summary", both, both.round(2)))
        run.write_figure("modalities", figures.modality_dots(table))


def text_methods(results: pd.DataFrame) -> pd.DataFrame:
    """First-token accuracy on zero-shot prompts by task, beside that of ICL on clean ones."""
    found = results[results["metric"] == "accuracy"]
    zero = found[found["prompt"] == "zero"]
    clean = found[(found["prompt"] == "clean") & (found["method"] == "icl")]
    names = {"nothing": "none", "LTV": "ltv", "control": "random", "examples": "icl"}
    return _methods("text", "task", "accuracy", pd.concat([zero, clean]), names)


def regression_methods(results: pd.DataFrame) -> pd.DataFrame:
    """Gain past T_train by function class, beside that of the last T_train points alone."""
    found = results[
        (results["metric"] == "gain_past")
        & (results["shift"] == "none")
        & (results["prompt"] == "clean")
    ]
    one = {"value": 1.0, "ci_low": 1.0, "ci_high": 1.0}
    bare = found.drop_duplicates("functions").assign(method="bare", **one)
    names = {"nothing": "bare", "LTV": "ltv_lengths_class", "control": "random_class"}
    names["examples"] = "truncation"
    return _methods("regression", "functions", "gain", pd.concat([bare, found]), names)


def _methods(
    modality: str, task: str, metric: str, results: pd.DataFrame, names: dict[str, str]
) -> pd.DataFrame:
    """A row per task; of the function vectors it gives the one that is best on these prompts."""
    of_family = {method.name for method in METHODS if method.family == "function vector"}
    of_family |= {
        name
        for name, variant in variants().items()
        if variant.method.family == "function vector" and not variant.dummies
    }
    rows = []
    for name, part in results.groupby(task, sort=False):
        own = part.set_index("method")[["value", "ci_low", "ci_high"]]
        fvs = [m for m in own.index if m in of_family]
        row: dict[str, object] = {"modality": modality, "task": name, "metric": metric}
        methods = {**names, "strongest FV": own.loc[fvs, "value"].idxmax()}
        for label in ("nothing", "strongest FV", "LTV", "control", "examples"):
            row[label] = with_interval(*own.loc[methods[label]])
        rows.append(row)
    return pd.DataFrame(rows)


def rows(heads: pd.DataFrame, headsets: pd.DataFrame, modality: str) -> pd.DataFrame:
    """One row per task: agreement, stability, concentration and depth of both scores."""
    found = []
    maps = {name: Scores.from_frame(heads, name) for name in ("aie", "contribution")}
    for task in heads["task"].unique():
        aie, ltv = maps["aie"][task].scores, maps["contribution"][task].scores
        n_heads = aie.numel()
        k = max(1, round(SHARE * n_heads))
        overlap = overlap_at_k(aie, ltv, k)
        own = headsets[(headsets["task"] == task) & (headsets["measure"] == "spearman")]
        stable = own.set_index("comparison")["value"]
        row: dict[str, object] = {"modality": modality, "task": task, "heads": n_heads}
        row["overlap above chance"] = (overlap.overlap - overlap.chance_overlap) / (
            1 - overlap.chance_overlap
        )
        row["spearman"] = spearman(aie, ltv).value
        row["spearman of AIE halves"] = stable.get("aie halves", float("nan"))
        row["spearman of LTV seeds"] = stable.get("ltv seeds", float("nan"))
        for name, scores in (("AIE", aie), ("LTV", ltv)):
            row[f"effective share, {name}"] = effective_share(scores)
            row[f"depth, {name}"] = depth(scores)
        found.append(row)
    return pd.DataFrame(found)


def effective_share(scores: Float[Tensor, "layer head"]) -> float:
    """Effective number of heads that hold the positive score, as a share of all heads."""
    table = concentration(scores, [1]).set_index("measure")["value"]
    return float(table["effective_heads"]) / scores.numel()


def depth(scores: Float[Tensor, "layer head"]) -> float:
    """Mean relative depth of the positive score: 0 is the first layer, 1 the last."""
    profile = layer_profile(scores)
    if len(profile) == 1 or not profile.any():
        return float("nan")
    return float(profile @ torch.linspace(0, 1, len(profile)))


if __name__ == "__main__":
    presets.run(main)
