"""Learned vectors against function vectors on regression, past the training length of the models.

    python -m analyses.regression_study --preset smoke
    python -m analyses.regression_study                              # the four shipped models
    python -m analyses.regression_study --functions linear,relu --out runs/regression

Runs `tvlens study regression`, or goes on where an earlier call stopped, then writes to the run
folder
- summary.{csv,md,tex}: squared error of the bare model and of every kind of vector at T_train and
  at the longest prompts, and the gain of each over the bare model,
- claims.{csv,md,tex}: which of the paper's claims hold, with the numbers they rest on.
"""

from dataclasses import dataclass

import pandas as pd

from analyses import presets
from tvlens.cli import options, studies
from tvlens.console import with_interval
from tvlens.evaluation.curves import BARE
from tvlens.runs.tables import write_tables
from tvlens.studies.regression import RegressionSettings
from tvlens.studies.summary import REGRESSION_LABELS
from tvlens.tasks.regression.inputs import SHIFTS
from tvlens.vectors.catalogue import variants

VARIANTS = {name: v for name, v in variants().items() if not v.dummies}


@dataclass(frozen=True, kw_only=True)
class Size(presets.Size):
    """How much is done.

    Attributes:
        steps: training steps of LTVs, if not the usual.
        n_test: test prompts of each kind and shift.
        shifts: how test prompts differ from those of training, separated by commas.
        ltv_seeds: LTVs trained for the comparison of heads.
    """

    steps: int | None = None
    n_test: int = RegressionSettings.n_test
    shifts: str = ",".join(SHIFTS)
    ltv_seeds: int = RegressionSettings.ltv_seeds


PRESETS: dict[presets.Name, Size] = {
    "smoke": Size(functions="linear", steps=3, n_test=16, shifts="none", ltv_seeds=1),
    "small": Size(functions=",".join(presets.CLASSES)),
    "paper": Size(functions=",".join(presets.STANDARD), device="auto"),
}


def main(
    preset: presets.PresetOption = "small",
    functions: presets.FunctionsOption = None,
    out: presets.OutOption = None,
    seed: options.SeedOption = 0,
    steps: options.StepsOption = None,
    n_test: presets.CountOption = None,
    shifts: str | None = None,
    ltv_seeds: presets.CountOption = None,
) -> None:
    """The regression study of several function classes and its summary over them."""
    given = {"functions": functions, "steps": steps, "n_test": n_test, "shifts": shifts}
    size = presets.sized(PRESETS, preset, **given, ltv_seeds=ltv_seeds)
    out = presets.folder(out, preset, "regression_study")
    studies.study_regression(
        size.functions,
        out,
        device=size.device,
        seed=seed,
        steps=size.steps,
        n_test=size.n_test,
        shifts=size.shifts,
        ltv_seeds=size.ltv_seeds,
    )
    results = pd.read_csv(out / "results.csv")
    trained = pd.read_csv(out / "models.csv").set_index("functions")["train_points"]
    print(
        "\nSquared error over the variance of f(x), and gain = bare error / error, clean prompts\n"
    )
    print((out / "summary.md").read_text(encoding="utf-8"))
    print("What the paper claims, on these models\n")
    print(write_tables(out, "claims", *[claims(results, trained)] * 2))


def claims(results: pd.DataFrame, train_points: "pd.Series[int]") -> pd.DataFrame:
    """Each claim of the paper by function class: the gains it rests on, and whether it holds.

    A gain is the bare model's error over the method's on the same prompts, so that of the bare
    model is 1. Past T it is that of the mean error over all numbers of points above T_train. Where
    the two intervals overlap the answer is in brackets.
    """
    clean = results[(results["shift"] == "none") & (results["prompt"] == "clean")]
    rows = []
    for functions, part in clean.groupby("functions", sort=False):
        trained, last = int(train_points[functions]), int(part["points"].max())
        past = _gains(part, last, "gain_past")
        at_train, longest = _gains(part, trained, "gain"), _gains(part, last, "gain")
        fvs = _of_family("function vector", past)
        controls = _of_family("control", past)
        best, mildest = past.loc[fvs, "value"].idxmax(), at_train.loc[fvs, "value"].idxmax()
        asked = []
        for unit in ("class", "prompt"):
            one, several = f"ltv_{unit}", f"ltv_lengths_{unit}"
            asked += [
                ("lower error at its training length", longest, one, BARE),
                ("lower mean error past T", past, several, BARE),
                ("beats every FV past T", past, several, best),
                ("at T loses less than any FV", at_train, several, mildest),
            ]
        asked.append(
            ("controls no better past T", past, BARE, past.loc[controls, "value"].idxmax())
        )
        for claim, gains, method, other in asked:
            own, against = gains.loc[method], gains.loc[other]
            holds = "yes" if own["value"] >= against["value"] else "no"
            apart = own["ci_low"] > against["ci_high"] or own["ci_high"] < against["ci_low"]
            rows.append(
                {
                    "functions": functions,
                    "claim": claim,
                    "method": REGRESSION_LABELS[method],
                    "gain": with_interval(*own),
                    "against": REGRESSION_LABELS[other],
                    "its gain": with_interval(*against),
                    "holds": holds if apart else f"({holds})",
                }
            )
    return pd.DataFrame(rows)


def _of_family(family: str, gains: pd.DataFrame) -> list[str]:
    """The methods of a family that have gains."""
    return [n for n, v in VARIANTS.items() if v.method.family == family and n in gains.index]


def _gains(part: pd.DataFrame, points: int, metric: str) -> pd.DataFrame:
    """Gain and its interval by method, 1 for the bare model."""
    rows = part[(part["points"] == points) & (part["metric"] == metric)].set_index("method")
    gains = rows[["value", "ci_low", "ci_high"]]
    return pd.concat([gains, pd.DataFrame(1.0, index=[BARE], columns=gains.columns)])


if __name__ == "__main__":
    presets.run(main)
