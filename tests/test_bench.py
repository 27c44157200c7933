import math
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import zoo
from tvlens import bench as module
from tvlens.bench import BenchSettings, bench
from tvlens.lens.edits import ReplaceHeads
from tvlens.lens.heads import mean_head_outputs
from tvlens.scores.mediation import indirect_effects

PROMISED = {
    "aie_speedup_vs_transformer_lens",
    "aie_speedup_vs_last_logits_loop",
    "aie_max_abs_diff",
    "ltv_step_speedup_vs_published",
    "flops_fraction_of_matmul",
    "peak_memory_gib",
}
SMALL = BenchSettings(
    n_prompts=2, n_loop_heads=12, n_step_prompts=4, n_clean=4, n_loop_prompts=2, repeats=1
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still unless a test moves it."""
    now = [0.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_every_promised_figure_is_there_and_finite(lens, task):
    said: list[str] = []
    figures = bench(lens, task, SMALL, say=said.append)
    assert figures.keys() >= PROMISED
    assert all(math.isfinite(value) and value >= 0 for value in figures.values())
    assert said[0] == "mean head outputs"
    assert "loop (a): 12 hooked passes, logits of all positions" in said
    assert said[-1] == "one LTV step as published"


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
    every, _ = module._loop(lens, batch, edit, chosen, last_only=False)
    assert shapes == [(1, batch.inputs.shape[1])] * 4, "one pass without and one per head"
    shapes.clear()
    last, _ = module._loop(lens, batch, edit, chosen, last_only=True)
    assert shapes == [(1, 1)] * 4
    assert zoo.off(last, every) < 1e-4
    expected = indirect_effects(lens, prompts, means).values[0].flatten()[chosen]
    assert zoo.off(every, expected) < 1e-4


def test_a_part_of_the_heads_is_scaled_up_to_all(lens, task, clock, monkeypatch):
    def loop(lens, batch, edit, heads, *, last_only):
        return torch.zeros(len(heads)), len(heads) * (2.0 if last_only else 3.0)

    def effects(*args):
        clock[0] += 8.0
        return indirect_effects(*args)

    monkeypatch.setattr(module, "_loop", loop)
    monkeypatch.setattr(module, "indirect_effects", effects)
    monkeypatch.setattr(module, "_matmul_flops", lambda *_: 1e9)
    monkeypatch.setattr(module, "_replayed_step", lambda *_: 1.0)
    monkeypatch.setattr(module, "_published_step", lambda *_: 50.0)
    figures = bench(lens, task, replace(SMALL, n_loop_heads=5))
    assert figures["loop_a_seconds_per_prompt"] == pytest.approx(12 * 3.0)
    assert figures["loop_b_seconds_per_prompt"] == pytest.approx(12 * 2.0)
    assert figures["aie_seconds_per_prompt"] == 4.0, "8 s for two prompts"
    assert figures["aie_speedup_vs_transformer_lens"] == pytest.approx(9.0)
    assert figures["ltv_step_speedup_vs_published"] == 50.0


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
    with lens.frozen():
        seconds = module._published_step(lens, task, means.outputs, replace(SMALL, n_clean=30))
    assert seconds == 30 + 4
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
