"""What analyses conclude from tables and scores, by hand."""

import importlib
from pathlib import Path

import pandas as pd
import pytest
import torch

from tvlens.errors import RunError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def analysis(monkeypatch):
    """Gives the module of an analysis."""
    monkeypatch.syspath_prepend(str(ROOT))
    return lambda name: importlib.import_module(f"analyses.{name}")


def test_claims_follow_from_the_gains(analysis):
    script = analysis("regression_study")
    gains = {"bare": None, "fv_layer_class": 1.1, "ltv_class": 2.0, "ltv_prompt": 0.5}
    gains |= {"ltv_lengths_class": 1.5, "ltv_lengths_prompt": 1.05, "random_class": 0.9}
    rows = [
        {
            "functions": "linear",
            "shift": "none",
            "prompt": "clean",
            "points": points,
            "method": method,
            "metric": metric,
            "value": gain,
            "ci_low": gain - 0.1,
            "ci_high": gain + 0.1,
            "n": 8,
        }
        for method, gain in gains.items()
        if gain is not None
        for points, metric in ((12, "gain"), (31, "gain"), (31, "gain_past"))
    ]
    claims = script.claims(pd.DataFrame(rows), pd.Series({"linear": 12}))
    assert list(claims["holds"]) == [
        *("yes", "yes", "yes", "yes"),
        *("no", "(yes)", "(no)", "(no)"),
        "(yes)",
    ]
    assert claims["gain"][0] == "2.00 [1.90, 2.10]"


def test_modalities_needs_both_runs(analysis, tmp_path):
    script = analysis("modalities")
    with pytest.raises(
        RunError,
        match=r"a.results\.csv is not there; run `python -m analyses\.text_study --preset small`",
    ):
        script.main(text=tmp_path / "a", regression=tmp_path / "b", out=tmp_path / "c")


def test_effective_share_and_depth_by_hand(analysis):
    script = analysis("modalities")
    scores = torch.tensor([[1.0, 1.0], [0.0, -3.0], [2.0, 0.0]])
    # (1 + 1 + 2)² / (1 + 1 + 4) = 8 / 3 of six heads; half of the mass in the last of three layers.
    assert script.effective_share(scores) == pytest.approx(8 / 3 / 6)
    assert script.depth(scores) == pytest.approx(0.5)
