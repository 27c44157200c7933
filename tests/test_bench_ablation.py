"""The benchmark of ablation holds two ways to the same numbers against each other."""

import json
import math

import pytest
import torch

from helpers import trained
from helpers.commands import ok
from tvlens.bench import AblationBenchSettings, bench_ablation
from tvlens.bench import ablation as module
from tvlens.timing import Timings

SMALL = AblationBenchSettings(n_sets=3, n_prompts=4, n_passes=7, n_clean=4, repeats=2)
PROMISED = {
    "ablation_speedup_vs_hooked_passes",
    "ablation_speedup_vs_last_logits_passes",
    "ablation_max_abs_diff",
    "peak_memory_gib",
}


@pytest.fixture
def lens():
    return trained.lens()


@pytest.fixture
def task():
    return trained.TASKS["seven-on"]


@pytest.mark.usefixtures("unchecked")
def test_both_ways_give_the_same_numbers(lens, task):
    said = []
    found = bench_ablation(lens, task, SMALL, say=said.append)
    assert set(found) >= PROMISED
    assert all(math.isfinite(value) for value in found.values())
    assert 0 < found["ablation_max_abs_diff"] < 1e-5
    assert (found["n_sets"], found["n_prompts"], found["n_hooked_passes"]) == (15, 4, 60)
    assert found["n_hooked_passes_sampled"] == 7
    assert any("7 of these 60 by hooked passes, scaled" in line for line in said)


@pytest.mark.usefixtures("unchecked")
def test_times_of_passes_are_scaled_to_all(lens, task, monkeypatch):
    seconds = {"ablation": [2.0], "passes": [7.0], "last_logits_passes": [3.5]}

    def timed(ways, *rest, **more):
        results = {name: way() for name, way in ways.items()}
        assert torch.allclose(results["passes"], results["last_logits_passes"], atol=1e-5)
        results["passes"] = results["passes"] + 0.25
        return Timings(seconds, results, None)

    monkeypatch.setattr(module, "time_in_turn", timed)
    found = bench_ablation(lens, task, SMALL)
    assert found["hooked_passes_seconds"] == pytest.approx(60.0)
    assert found["ablation_speedup_vs_hooked_passes"] == pytest.approx(30.0)
    assert found["ablation_speedup_vs_last_logits_passes"] == pytest.approx(15.0)
    assert found["ablation_max_abs_diff"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.usefixtures("wide", "unchecked")
def test_the_command_writes_what_it_measures(tmp_path, monkeypatch):
    trained.save_model(tmp_path / "model")
    trained.save_tasks(tmp_path / "data")
    monkeypatch.setattr("tvlens.bench.AblationBenchSettings", lambda: SMALL)
    words = ["bench", "ablation", "--model", tmp_path / "model", "--data", tmp_path / "data"]
    words += ["--task", "seven-on", "--out", tmp_path / "run", "--json", tmp_path / "found.json"]
    said = ok(*words)
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) >= PROMISED
    assert "ablation_speedup_vs_hooked_passes" in said
    assert (tmp_path / "run" / "bench.csv").exists()
