import math
from dataclasses import replace

import pytest
import torch

from helpers import zoo
from tvlens.errors import NumericalError, ShapeError
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.hooks import WholePassEngine
from tvlens.scores.mediation import IndirectEffects, indirect_effects, mediation_prompts
from tvlens.stats import bootstrap_mean


@pytest.fixture
def means(lens, task):
    return mean_head_outputs(lens, task.prompts("train", shots=2, n=8), answered_only=False)


@pytest.fixture
def shuffled(task):
    return task.prompts("train", shots=2, n=3, seed=1, kind="shuffled")


def test_effects_are_those_of_a_loop_of_hooked_passes(lens, means, shuffled):
    """The slow way, written without any of tvlens' engines: one pass per head and prompt."""
    effects = indirect_effects(lens, shuffled, means)
    model = lens.backend.model
    for i in range(3):
        batch = lens.encode(shuffled[[i]])
        target = int(batch.target[0])

        def probability(hooks, batch=batch, target=target):
            with torch.no_grad(), model.hooks(fwd_hooks=hooks):
                return float(model(batch.inputs)[0, -1].softmax(dim=-1)[target])

        baseline = probability([])
        assert effects.baseline[i].item() == pytest.approx(baseline, abs=1e-6)
        for layer in range(3):
            for head in range(4):

                def patch(z, hook, layer=layer, head=head):
                    z = z.clone()
                    z[:, -1, head] = means.z[layer, head]
                    return z

                effect = probability([(f"blocks.{layer}.attn.hook_z", patch)]) - baseline
                found = effects.values[i, layer, head].item()
                assert found == pytest.approx(effect, abs=1e-6)
    assert effects.values.abs().max() > 0.01


def test_both_engines_give_the_same_effects(lens, means, shuffled):
    slow = replace(lens, engine=WholePassEngine(lens.backend), max_rows=5)
    expected = indirect_effects(slow, shuffled, means).values
    assert torch.allclose(indirect_effects(lens, shuffled, means).values, expected, atol=1e-6)


def test_a_clean_head_put_into_its_own_prompt_has_no_effect(lens, task):
    prompt = task.prompts("train", shots=2, n=1)
    means = mean_head_outputs(lens, prompt, answered_only=False)
    assert indirect_effects(lens, prompt, means).values.abs().max() < 1e-6


def test_scores_are_means_over_prompts_and_rank_heads(lens, means, shuffled):
    effects = indirect_effects(lens, shuffled, means)
    assert zoo.off(effects.scores, effects.values.mean(dim=0)) < 1e-5
    best = effects.top(3)
    order = effects.scores.flatten().argsort(descending=True)
    assert best == [divmod(int(i), 4) for i in order[:3]]
    assert (effects.task, effects.model) == ("kind-of-word", "llama")
    assert effects.unit == "probability"


def test_progress_counts_prompts(lens, means, shuffled):
    done = []
    small = replace(lens, max_tokens=60)
    indirect_effects(small, shuffled, means, progress=done.append)
    assert sum(done) == 3
    assert len(done) > 1


def made(values):
    return IndirectEffects.of(
        values, torch.zeros(len(values)), task="made-up", model="tiny", unit="probability"
    )


def test_the_table_has_a_row_per_head_with_its_interval():
    values = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[1.0, 1.0], [4.0, -3.0]]])
    frame = made(values).to_frame(seed=3)
    assert list(frame.columns) == ["task", "layer", "head", "aie", "aie_low", "aie_high"]
    assert frame["task"].unique().tolist() == ["made-up"]
    assert frame[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert frame["aie"].tolist() == [0.5, 1.0, 3.0, 0.0]
    for row in frame.itertuples():
        interval = bootstrap_mean(values[:, row.layer, row.head], seed=3)
        assert (row.aie_low, row.aie_high) == pytest.approx((interval.low, interval.high))
    assert frame["aie_low"].tolist() == [0.0, 1.0, 2.0, -3.0]


def test_more_heads_than_there_are_cannot_be_asked_for():
    effects = made(torch.zeros(2, 3, 4))
    assert len(effects.top(12)) == 12
    for k in (0, 13):
        with pytest.raises(ShapeError, match=f"top {k} heads asked for, but there are 12 heads"):
            effects.top(k)


def test_means_of_another_model_are_refused(lens, means, shuffled):
    parts = {"z": means.z[:2], "outputs": means.outputs[:2]}
    other = replace(means, **parts, model="other", layers=None)
    words = (
        r"means of 'other' have sizes \(2, 4, 6, 32\) \(layer, head, d_head, d_model\), model "
        r"'llama' has \(3, 4, 6, 32\); compute them with this lens"
    )
    with pytest.raises(ShapeError, match=words):
        indirect_effects(lens, shuffled, other)


def test_means_that_are_not_numbers_are_refused(means):
    z = means.z.clone()
    z[1, 2, 0] = torch.nan
    with pytest.raises(NumericalError, match="means of 'llama': z are no real, finite numbers"):
        replace(means, z=z)


def test_mediation_asks_shuffled_prompts_about_what_was_answered(task, means):
    clean = task.prompts("train", shots=2, n=8)
    some = replace(means, kept=(1, 6))
    found = mediation_prompts(task, clean, some, n=5, seed=3)
    assert (len(found), found.kind, found.shots, found.split) == (5, "shuffled", 2, "train")
    assert {prompt.query for prompt in found} == {clean[1].query, clean[6].query}
    assert found == mediation_prompts(task, clean, some, n=5, seed=3)
    assert found != mediation_prompts(task, clean, some, n=5, seed=4)
    assert len(mediation_prompts(task, clean, means)) == 25


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
def test_effects_on_a_model_that_is_known_on_paper():
    """Head (1, 0) alone carries the answer: 1 of 15 tokens is " k", which it writes 30-fold."""
    lens = zoo.linear_lens()
    clean = zoo.prompts(*[zoo.one_shot("k", query) for query in "bcd"])
    corrupted = zoo.prompts(*[zoo.one_shot("l", query, kind="shuffled") for query in "ef"])
    means = mean_head_outputs(lens, clean)
    assert means.count == 3
    assert means.z[1, 0].tolist() == pytest.approx([1 / 15, 0])
    assert means.z[0, 1].tolist() == pytest.approx([2 / 15, 0])
    assert means.outputs[1, 0, zoo.WORDS.index(" k")].item() == pytest.approx(2.0)
    effects = indirect_effects(lens, corrupted, means)
    # Logits at the query: 1 at its own token ":", 5 * 2/15 at "<pad>", 0 at 52 others; the patch
    # lifts the answer, one of them, to 2.
    others = math.exp(1) + math.exp(2 / 3) + 51
    without, patched = 1 / (others + 1), math.exp(2) / (others + math.exp(2))
    assert effects.baseline.tolist() == pytest.approx([without] * 2)
    expected = torch.zeros(2, 2)
    expected[1, 0] = patched - without
    assert torch.allclose(effects.scores, expected, atol=1e-7)
    assert effects.top(1) == [(1, 0)]
