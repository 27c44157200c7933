import json
import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import zoo
from tvlens import timing
from tvlens.bench import BenchSettings, bench, doubts
from tvlens.bench import replay as module
from tvlens.lens.edits import ReplaceHeads
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.hooks import WholePassEngine
from tvlens.scores.mediation import indirect_effects
from tvlens.timing import Timings, time_in_turn

PROMISED = {
    "aie_speedup_vs_transformer_lens",
    "aie_speedup_vs_last_logits_loop",
    "aie_max_abs_diff",
    "ltv_step_speedup_vs_published",
    "flops_fraction_of_matmul",
    "peak_memory_gib",
}
RATIOS = {name for name in PROMISED if "speedup" in name or "fraction" in name}
SMALL = BenchSettings(
    n_prompts=2, n_loop_heads=12, n_step_prompts=4, n_clean=4, n_loop_prompts=2, repeats=1
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a test moves it."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def given(monkeypatch: pytest.MonkeyPatch, other_load: float = 0.0, **seconds: list[float]) -> None:
    """Every way runs, and takes what is given, or a second in each round."""

    def time_them(ways, rounds, *, say):
        of = {name: seconds.get(name.replace(" ", "_"), [1.0] * rounds) for name in ways}
        return Timings(of, {name: way() for name, way in ways.items()}, other_load)

    monkeypatch.setattr(module, "time_in_turn", time_them)


def test_every_promised_figure_is_there_and_finite(lens, task):
    said: list[str] = []
    figures = bench(lens, task, SMALL, say=said.append)
    assert figures.keys() >= PROMISED
    assert all(math.isfinite(value) and value >= 0 for value in figures.values())
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert said == [
        "mean head outputs",
        "effects of all heads and one LTV step by replay, against loops (a) and (b) of 12 hooked "
        "passes, the published LTV step and matrix products, in turn",
        "warm-up",
        "round 1 of 1",
    ]


def test_the_lines_name_the_engine(lens, task):
    whole = replace(lens, engine=WholePassEngine(lens.backend))
    said: list[str] = []
    bench(whole, task, SMALL, say=said.append)
    assert said[1].startswith("effects of all heads and one LTV step by whole passes, against")


def test_everything_that_is_compared_takes_turns(lens, task, monkeypatch):
    """Each way is timed in every round, beside all others."""
    order: list[str] = []

    def noted(ways, rounds, *, say):
        def way(name):
            return lambda: (order.append(name), ways[name]())[1]

        return time_in_turn({name: way(name) for name in ways}, rounds, say=say)

    monkeypatch.setattr(module, "time_in_turn", noted)
    figures = bench(lens, task, replace(SMALL, repeats=3))
    assert order == order[:7] * 4
    assert set(order) == {"effects", "loop a", "loop b", "matmul", "step", "means", "training"}
    assert figures["rounds"] == 3


def test_ratios_are_of_the_seconds_beside_them(lens, task):
    figures = bench(lens, task, SMALL)
    replay = figures["aie_seconds_per_prompt"]
    assert figures["aie_speedup_vs_transformer_lens"] == pytest.approx(
        figures["loop_a_seconds_per_prompt"] / replay
    )
    assert figures["aie_speedup_vs_last_logits_loop"] == pytest.approx(
        figures["loop_b_seconds_per_prompt"] / replay
    )
    assert figures["ltv_step_speedup_vs_published"] == pytest.approx(
        figures["published_step_seconds"] / figures["ltv_step_seconds"]
    )
    assert figures["flops_fraction_of_matmul"] == pytest.approx(
        figures["achieved_gflops"] / figures["matmul_gflops"]
    )


def test_ratios_are_medians_of_the_rounds_and_have_their_range(lens, task, monkeypatch):
    """All 12 heads are looped over, two prompts replayed, and both clean ones stand for two."""
    given(
        monkeypatch,
        effects=[2.0, 4.0, 20.0],
        loop_a=[30.0, 20.0, 500.0],
        loop_b=[10.0, 20.0, 300.0],
        step=[1.0, 10.0, 2.0],
        means=[5.0, 50.0, 20.0],
        training=[7.0, 70.0, 20.0],
        matmul=[1.0, 1.0, 1.0],
    )
    figures = bench(lens, task, replace(SMALL, repeats=3, n_clean=2))
    expected = {
        "aie_speedup_vs_transformer_lens": (30.0, 10.0, 50.0),
        "aie_speedup_vs_last_logits_loop": (10.0, 10.0, 30.0),
        "ltv_step_speedup_vs_published": (12.0, 12.0, 20.0),
    }
    for name, values in expected.items():
        found = [figures[key] for key in (name, f"{name}_low", f"{name}_high")]
        assert found == pytest.approx(values), name
    fraction = figures["flops_fraction_of_matmul"]
    assert figures["flops_fraction_of_matmul_low"] == pytest.approx(fraction / 5)
    assert figures["flops_fraction_of_matmul_high"] == pytest.approx(fraction * 2)
    assert figures["aie_seconds_per_prompt"] == 2.0
    assert figures["published_step_seconds"] == 40.0
    assert {name.removesuffix("_low") for name in figures if name.endswith("_low")} == RATIOS
    assert {name.removesuffix("_high") for name in figures if name.endswith("_high")} == RATIOS


def test_a_machine_that_becomes_slow_halfway_leaves_the_ratios(lens, task, monkeypatch):
    slow = [1.0, 1.0, 10.0, 10.0]
    ways = ("effects", "loop_a", "loop_b", "matmul", "step", "means", "training")
    given(monkeypatch, **dict.fromkeys(ways, slow))
    halfway = bench(lens, task, replace(SMALL, repeats=4))
    given(monkeypatch)
    steady = bench(lens, task, replace(SMALL, repeats=4))
    for name in RATIOS:
        assert halfway[name] == halfway[f"{name}_low"] == halfway[f"{name}_high"]
        assert halfway[name] == pytest.approx(steady[name])
    assert doubts(halfway) == []


@pytest.mark.parametrize(("other_load", "idle"), [(0.02, True), (0.4, False)])
def test_a_busy_machine_is_told_from_an_idle_one(lens, task, monkeypatch, other_load, idle):
    given(monkeypatch, other_load=other_load)
    figures = bench(lens, task, SMALL)
    assert (figures["other_load"], figures["idle"]) == (other_load, idle)
    assert figures["threads"] == torch.get_num_threads()
    assert [line for line in doubts(figures) if "busy" in line] == (
        []
        if idle
        else [
            "the machine was busy: other processes used 40% of its cores during the timings, "
            "more than 10%"
        ]
    )


def test_more_than_a_matrix_product_is_called_impossible(lens, task, monkeypatch):
    given(monkeypatch, effects=[1e-6], matmul=[1e3])
    (line,) = doubts(bench(lens, task, SMALL))
    assert line.startswith("flops_fraction_of_matmul is above 1, which cannot be")


def test_replay_and_loop_agree_to_float_precision(lens, task):
    assert 0 < bench(lens, task, SMALL)["aie_max_abs_diff"] < 1e-6


@pytest.mark.parametrize("head", [(0, 0), (1, 2), (2, 3)])
def test_a_replay_that_is_wrong_at_one_head_shows(lens, task, monkeypatch, head):
    def wrong(*args):
        effects = indirect_effects(*args)
        effects.values[0][head] += 0.25
        return effects

    monkeypatch.setattr(module, "indirect_effects", wrong)
    found = bench(lens, task, SMALL)["aie_max_abs_diff"]
    assert found == pytest.approx(0.25, abs=1e-5)


def test_a_loop_that_patches_other_values_shows(lens, task, monkeypatch):
    class Other:
        @staticmethod
        def each_head(z, layers):
            return ReplaceHeads.each_head(z + 1, layers)

    monkeypatch.setattr(module, "ReplaceHeads", Other)
    assert bench(lens, task, SMALL)["aie_max_abs_diff"] > 1e-4


def test_loop_runs_one_pass_per_head_with_all_logits_or_the_last(lens, task, monkeypatch):
    prompts = task.prompts("train", n=2, seed=0, kind="shuffled")
    means = mean_head_outputs(lens, prompts, answered_only=False)
    batch = lens.encode(prompts)[:1]
    shapes: list[tuple[int, ...]] = []
    forward = lens.backend.model.forward

    def recording(*args, **options):
        logits = forward(*args, **options)
        shapes.append(tuple(logits.shape[:2]))
        return logits

    monkeypatch.setattr(lens.backend.model, "forward", recording)
    edit, chosen = ReplaceHeads.each_head(means.z), torch.tensor([0, 5, 11])
    loop = module._loop(lens, batch, edit, chosen, last_only=False)
    shapes.clear()
    every = loop.run()
    assert shapes == [(1, batch.inputs.shape[1])] * 3, "the pass without is not timed"
    assert loop.scale == 4.0
    loop = module._loop(lens, batch, edit, chosen, last_only=True)
    shapes.clear()
    last = loop.run()
    assert shapes == [(1, 1)] * 3
    assert zoo.off(last, every) < 1e-4
    expected = indirect_effects(lens, prompts, means).values[0].flatten()[chosen]
    assert zoo.off(every, expected) < 1e-4


def test_a_part_of_the_heads_is_scaled_up_to_all(lens, task, monkeypatch):
    given(monkeypatch, effects=[8.0], loop_a=[15.0], loop_b=[10.0])
    figures = bench(lens, task, replace(SMALL, n_loop_heads=5))
    assert figures["loop_a_seconds_per_prompt"] == pytest.approx(12 * 3.0)
    assert figures["loop_b_seconds_per_prompt"] == pytest.approx(12 * 2.0)
    assert figures["aie_seconds_per_prompt"] == 4.0, "8 s for two prompts"
    assert figures["aie_speedup_vs_transformer_lens"] == pytest.approx(9.0)


def test_the_published_step_runs_every_prompt_whole_and_by_itself(lens, task, clock, monkeypatch):
    """With one second per forward pass, means cost n_clean and training n_step_prompts."""
    forward = lens.backend.forward
    rows: list[int] = []

    def slow(inputs, mask):
        clock[0] += 1.0
        rows.append(len(inputs))
        return forward(inputs, mask)

    monkeypatch.setattr(lens.backend, "forward", slow)
    means = mean_head_outputs(
        lens, task.prompts("train", n=2, seed=0, kind="clean"), answered_only=False
    )
    settings = replace(SMALL, n_clean=30, n_step_prompts=8)
    with lens.frozen():
        ways = module._published_step(lens, task, means.outputs, settings)
        timings = time_in_turn({name: way.run for name, way in ways.items()}, 2)
    for name, seconds in (("means", 30.0), ("training", 8.0)):
        assert [ways[name].scale * each for each in timings.seconds[name]] == [seconds] * 2
    assert set(rows) == {1}


# How many experts of a mixture run depends on the tokens.
@pytest.mark.parametrize(
    ("name", "kind"), [case for case in zoo.CASES if case[0] not in ("olmoe", "gpt-oss")]
)
def test_counted_operations_are_those_that_torch_counts(name, kind, task):
    lens = zoo.lens(name, kind)
    prompts = task.prompts("train", n=3, seed=0, kind="shuffled")
    means = mean_head_outputs(lens, prompts, answered_only=False)
    # Attention in one kernel is not counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        indirect_effects(lens, prompts, means)
    counted = module._aie_flops(lens, lens.encode(prompts))
    assert counted == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_nothing_stays_behind_on_the_model(lens, task):
    flags = [parameter.requires_grad for parameter in lens.backend.parameters()]
    bench(lens, task, SMALL)
    assert [parameter.requires_grad for parameter in lens.backend.parameters()] == flags
    points = [p for p in lens.backend.model.modules() if hasattr(p, "fwd_hooks")]
    assert points
    assert not any(point.fwd_hooks or point.bwd_hooks for point in points)
