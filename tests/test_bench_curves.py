"""The benchmark of error curves measures two ways to the same numbers."""

import math
from dataclasses import replace

import pytest

from tvlens.bench import CurveBenchSettings, bench_curves, doubts
from tvlens.bench import curves as module
from tvlens.timing import Timings

SETTINGS = CurveBenchSettings(preset="tiny", n_points=8, n_prompts=2, n_vectors=2, repeats=1)


def test_both_ways_give_the_same_curves_in_some_time():
    found = bench_curves(SETTINGS)
    assert (found["n_points"], found["n_prompts"], found["n_vectors"]) == (8, 2, 2)
    for name in ("bare", "vectors"):
        loop, replay = (found[f"{way}_{name}_seconds"] for way in ("loop", "replay"))
        assert 0 < loop < math.inf
        assert 0 < replay < math.inf
        assert found[f"ratio_{name}"] == pytest.approx(loop / replay)
        assert 0 <= found[f"largest_difference_{name}"] < 1e-5


def test_a_way_that_goes_wrong_shows_in_the_difference(monkeypatch):
    right = module._replayed_curves

    def wrong(lens, curves, edit):
        curve = right(lens, curves, edit).clone()
        curve[1, 3] += 0.5
        return curve

    monkeypatch.setattr(module, "_replayed_curves", wrong)
    found = bench_curves(SETTINGS)
    for name in ("bare", "vectors"):
        assert found[f"largest_difference_{name}"] == pytest.approx(0.5, abs=1e-4)


def test_the_loop_and_replay_are_asked_the_same(monkeypatch):
    """Every number of points of every prompt under every vector, and each as often as asked."""
    shapes = []

    def noted(way):
        def draw(lens, curves, edit):
            found = way(lens, curves, edit)
            shapes.append((way.__name__, tuple(found.shape)))
            return found

        return draw

    for name in ("_loop_over_points", "_replayed_curves"):
        monkeypatch.setattr(module, name, noted(getattr(module, name)))
    bench_curves(CurveBenchSettings(preset="tiny", n_points=5, n_prompts=3, n_vectors=2, repeats=2))
    bare = [("_loop_over_points", (3, 5, 1)), ("_replayed_curves", (3, 5, 1))]
    vectors = [("_loop_over_points", (3, 5, 2)), ("_replayed_curves", (3, 5, 2))]
    assert shapes == (bare + vectors) * 3, "a warm-up and two rounds, in turn"


@pytest.mark.parametrize("other_load", [0.0, 0.5])
def test_ratios_are_medians_with_ranges_and_a_busy_machine_is_said(monkeypatch, other_load):
    seconds = {
        "loop_bare": [6.0, 60.0, 8.0],
        "replay_bare": [2.0, 20.0, 2.0],
        "loop_vectors": [9.0, 8.0, 7.0],
        "replay_vectors": [1.0, 1.0, 1.0],
    }

    def time_them(ways, rounds, *, say):
        assert (list(ways), rounds) == (list(seconds), 3)
        return Timings(seconds, {name: way() for name, way in ways.items()}, other_load)

    monkeypatch.setattr(module, "time_in_turn", time_them)
    found = bench_curves(replace(SETTINGS, repeats=3))
    for name, values in (("ratio_bare", (3.0, 3.0, 4.0)), ("ratio_vectors", (8.0, 7.0, 9.0))):
        assert tuple(found[key] for key in (name, f"{name}_low", f"{name}_high")) == values
    assert (found["loop_bare_seconds"], found["replay_bare_seconds"]) == (8.0, 2.0)
    assert all(math.isfinite(value) for value in found.values())
    assert (found["rounds"], found["idle"]) == (3, other_load == 0.0)
    assert len(doubts(found)) == (other_load > 0)
