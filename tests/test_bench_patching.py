"""The benchmark of patching holds two ways to the same numbers against each other."""

import json
import math
from dataclasses import replace

import pytest

from helpers import trained
from helpers.commands import ok
from tvlens.bench import PatchBenchSettings, bench_patching
from tvlens.bench import patching as module
from tvlens.timing import Timings

SMALL = PatchBenchSettings(
    n_positions=3, n_head_positions=2, n_loop_places=5, n_prompts=4, screen=3, repeats=2
)
PROMISED = {
    "patch_resid_speedup_vs_transformer_lens",
    "patch_heads_speedup_vs_transformer_lens",
    "patch_max_abs_diff",
    "attribution_speedup_vs_exact_aie",
    "attribution_spearman",
    "attribution_recall_at_10",
    "screened_aie_speedup",
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
    found = bench_patching(lens, task, SMALL, say=said.append)
    assert set(found) >= PROMISED
    assert all(math.isfinite(value) for value in found.values())
    assert 0 < found["patch_max_abs_diff"] < 1e-5
    n = found["n_tokens"] * lens.n_layer
    assert (found["patch_resid_places"], found["patch_heads_places"]) == (n, 4 * n)
    assert found["patch_resid_places_sampled"] == 3 * lens.n_layer
    assert found["patch_heads_places_sampled"] == 2 * lens.n_layer * lens.n_head
    assert found["patch_heads_places_sampled_by_transformer_lens"] == 5
    assert any("of each by transformer-lens, scaled" in line for line in said)


@pytest.mark.usefixtures("unchecked")
def test_a_way_that_gives_other_numbers_shows(lens, task, monkeypatch):
    run = module._Places.run
    monkeypatch.setattr(module._Places, "run", lambda places: run(places) + 0.25)
    assert bench_patching(lens, task, SMALL)["patch_max_abs_diff"] == pytest.approx(0.25, abs=1e-4)


@pytest.mark.usefixtures("unchecked")
def test_times_are_scaled_to_all_places(lens, task, monkeypatch):
    """Reading counts once, and every way as many times as it left places out."""

    seconds = {way: [1.0] for way in ("heads", "loop_heads", "exact", "attribution", "read")}
    seconds |= {"aie": [4.0], "screened": [2.0]}
    seconds |= {"read_pair": [3.0], "resid": [2.0], "loop_resid": [10.0]}

    def timed(ways, *rest, **more):
        return Timings(seconds, {name: way() for name, way in ways.items()}, None)

    monkeypatch.setattr(module, "time_in_turn", timed)
    found = bench_patching(lens, task, replace(SMALL, repeats=1))
    n = found["n_tokens"] * lens.n_layer
    ours, theirs = 3.0 + 2.0 * n / 6, 10.0 * n / 5
    assert found["patch_resid_all_places_seconds"] == pytest.approx(ours)
    assert found["patch_resid_speedup_vs_transformer_lens"] == pytest.approx(theirs / ours)
    assert found["attribution_speedup_with_reading"] == pytest.approx(2.0)
    assert found["screened_aie_speedup"] == pytest.approx(2.0)


@pytest.mark.usefixtures("wide", "unchecked")
def test_the_command_writes_what_it_measures(tmp_path, monkeypatch):
    trained.save_model(tmp_path / "model")
    trained.save_tasks(tmp_path / "data")
    monkeypatch.setattr("tvlens.bench.PatchBenchSettings", lambda: SMALL)
    words = ["bench", "patching", "--model", tmp_path / "model", "--data", tmp_path / "data"]
    words += ["--task", "seven-on", "--out", tmp_path / "run", "--json", tmp_path / "found.json"]
    said = ok(*words)
    found = json.loads((tmp_path / "found.json").read_text())
    assert set(found) >= PROMISED
    assert "patch_heads_speedup_vs_transformer_lens" in said
    assert (tmp_path / "run" / "bench.csv").exists()
