import math
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from scipy import stats

from tvlens import stats as metrics
from tvlens.errors import NumericalError, ShapeError, TvlensError
from tvlens.lens.readout import is_top1, kl_divergence, target_log_prob
from tvlens.stats import (
    Interval,
    bootstrap_mean,
    bootstrap_mean_axis,
    bootstrap_ratio_axis,
    share_interval,
)


def random_logits(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Logits


def test_target_log_prob_closed_form():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    expected = torch.tensor([math.log(0.75), math.log(0.5)])
    assert torch.allclose(target_log_prob(logits, torch.tensor([1, 0])), expected)


def test_target_log_prob_is_minus_torchs_cross_entropy_on_any_batch_shape():
    logits, target = random_logits(2, 3, 7), torch.arange(6).reshape(2, 3)
    expected = -torch.nn.functional.cross_entropy(
        logits.reshape(6, 7), target.ravel(), reduction="none"
    )
    assert torch.allclose(target_log_prob(logits, target).ravel(), expected)
    assert target_log_prob(logits[0, 0], target[0, 0]).shape == ()


def test_half_precision_logits_are_measured_in_float32():
    logits = (20 + random_logits(4, 50)).to(torch.bfloat16)
    target = torch.tensor([0, 1, 2, 3])
    result = target_log_prob(logits, target)
    assert result.dtype == torch.float32
    assert torch.equal(result, target_log_prob(logits.float(), target))
    assert kl_divergence(logits, logits.flip(-1)).dtype == torch.float32
    assert target_log_prob(logits.double(), target).dtype == torch.float64


def test_target_log_prob_carries_gradients():
    logits = random_logits(1, 5).requires_grad_()
    target_log_prob(logits, torch.tensor([2])).sum().backward()
    expected = torch.eye(5)[2] - logits.detach().softmax(-1)
    assert torch.allclose(logits.grad, expected, atol=1e-6)


def test_is_top1_gives_ties_to_the_lowest_token():
    logits = torch.tensor([[0.0, 2.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 0.0]])
    assert is_top1(logits, torch.tensor([1, 0, 1])).tolist() == [True, True, False]


def test_kl_divergence_closed_form_and_direction():
    even, skewed = torch.zeros(1, 2), torch.tensor([[0.0, math.log(3.0)]])
    assert kl_divergence(even, skewed).item() == pytest.approx(0.5 * math.log(4 / 3))
    assert kl_divergence(skewed, even).item() == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    )


def test_kl_divergence_equals_scipys_relative_entropy():
    a, b = random_logits(3, 4, 11, seed=1), random_logits(3, 4, 11, seed=2)
    expected = stats.entropy(a.double().softmax(-1), b.double().softmax(-1), axis=-1)
    assert np.allclose(kl_divergence(a, b), expected, atol=1e-6)


def test_kl_divergence_of_a_distribution_with_itself_is_zero_and_never_negative():
    logits = 30 * random_logits(64, 500)
    assert torch.equal(kl_divergence(logits, logits + 0), torch.zeros(64))
    assert (kl_divergence(logits, logits + 7) >= 0).all()
    assert kl_divergence(logits, logits + 7).max() < 1e-4


def test_kl_divergence_counts_nothing_where_the_reference_puts_nothing():
    masked = torch.tensor([[0.0, 0.0, -math.inf]])
    assert kl_divergence(masked, masked).item() == 0
    assert kl_divergence(masked, torch.zeros(1, 3)).item() == pytest.approx(math.log(1.5))
    assert kl_divergence(torch.zeros(1, 3), masked).item() == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_logits_are_refused_with_their_row(bad):
    logits, good = random_logits(4, 5), random_logits(4, 5)
    logits[2, 3] = bad
    target = torch.zeros(4, dtype=torch.long)
    words = "logits are NaN or infinite in 1 of 4 rows \\(first: row 2\\)"
    for call in (
        lambda: target_log_prob(logits, target),
        lambda: is_top1(logits, target),
        lambda: kl_divergence(good, logits),
        lambda: kl_divergence(logits, good),
    ):
        with pytest.raises(NumericalError, match=words):
            call()


@pytest.mark.parametrize("token", [-1, 5])
def test_targets_outside_the_vocabulary_are_refused(token):
    target = torch.tensor([0, token])
    for measure in (target_log_prob, is_top1):
        with pytest.raises(
            ShapeError, match=f"target token {token} is outside .*0 to 4.*tokenizer"
        ):
            measure(random_logits(2, 5), target)


# Intervals


def test_interval_maps_its_ends_through_monotone_functions():
    cross_entropy = Interval(1.0, 0.5, 2.0, 10)
    perplexity = cross_entropy.map(math.exp)
    assert perplexity == Interval(math.exp(1.0), math.exp(0.5), math.exp(2.0), 10)
    assert cross_entropy.map(lambda x: -x) == Interval(-1.0, -2.0, -0.5, 10)
    with pytest.raises(FrozenInstanceError):
        cross_entropy.value = 0.0


@pytest.mark.parametrize("confidence", [0.8, 0.95])
def test_bootstrap_equals_scipys_percentile_bootstrap(confidence):
    values = np.random.default_rng(5).exponential(size=40)
    result = bootstrap_mean(values, confidence=confidence, seed=3)
    reference = stats.bootstrap(
        (values,),
        np.mean,
        method="percentile",
        n_resamples=2000,
        confidence_level=confidence,
        rng=np.random.default_rng(3),
    ).confidence_interval
    assert (result.low, result.high) == pytest.approx((reference.low, reference.high))
    assert (result.value, result.n) == (np.mean(values), 40)


def test_bootstrap_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = bootstrap_mean(generator.normal(2.0, 1.0, 50), resamples=400, seed=trial)
        hits += interval.low <= 2.0 <= interval.high
    assert 0.90 <= hits / 200 <= 0.98


def test_bootstrap_of_one_value_or_equal_values_has_no_width():
    assert bootstrap_mean(np.array([0.1])) == Interval(0.1, 0.1, 0.1, 1)
    same = bootstrap_mean(torch.full((7,), 0.1, dtype=torch.float64))
    assert same.low == same.high == same.value == pytest.approx(0.1)
    assert bootstrap_mean(np.ones(3, dtype=bool)) == Interval(1.0, 1.0, 1.0, 3)


def test_bootstrap_takes_booleans_tensors_and_half_precision():
    correct = torch.tensor([True, False, True, True])
    assert bootstrap_mean(correct) == bootstrap_mean(np.array([1.0, 0.0, 1.0, 1.0]))
    assert bootstrap_mean(correct).value == 0.75
    assert bootstrap_mean(correct.to(torch.bfloat16).requires_grad_()).value == 0.75


def test_bootstrap_repeats_with_its_seed_whatever_its_blocks(monkeypatch):
    values = np.random.default_rng(0).normal(size=20)
    whole = bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) == whole
    assert bootstrap_mean(values, seed=2) != whole
    maps = np.random.default_rng(0).normal(size=(20, 3, 2))
    whole_maps = bootstrap_mean_axis(maps, seed=1)
    monkeypatch.setattr(metrics, "_MAX_ELEMENTS", 5001)
    assert bootstrap_mean(values, seed=1) == whole
    for one, other in zip(bootstrap_mean_axis(maps, seed=1), whole_maps, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-14)


def test_bootstrap_of_a_head_map_is_the_bootstrap_of_each_head():
    values = np.random.default_rng(0).normal(size=(25, 3, 2))
    mean, low, high = bootstrap_mean_axis(values, confidence=0.9, resamples=500, seed=4)
    for layer in range(3):
        for head in range(2):
            one = bootstrap_mean(values[:, layer, head], confidence=0.9, resamples=500, seed=4)
            found = [float(x[layer, head]) for x in (mean, low, high)]
            assert found == pytest.approx([one.value, one.low, one.high], abs=1e-12)


def test_bootstrap_of_a_head_map_keeps_precision_and_constant_heads():
    values = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))
    values[:, 1, 2] = 0.1
    mean, low, high = bootstrap_mean_axis(values)
    assert mean.dtype == low.dtype == high.dtype == torch.float32
    assert torch.allclose(mean, values.mean(0))
    assert low[1, 2] == high[1, 2] == mean[1, 2] == values[0, 1, 2]
    assert (low.flatten()[:5] < high.flatten()[:5]).all()
    assert bootstrap_mean_axis(values.double())[0].dtype == torch.float64
    assert bootstrap_mean_axis(values.to(torch.bfloat16))[0].dtype == torch.float32
    for part in bootstrap_mean_axis(values[:1]):
        assert torch.equal(part, values[0])


def test_bootstrap_refuses_no_values():
    with pytest.raises(ShapeError, match="needs at least one prompt; look for a filter"):
        bootstrap_mean(np.array([]))
    with pytest.raises(ShapeError, match=r"values of shape \[0, 2, 3\] hold nothing"):
        bootstrap_mean_axis(torch.zeros(0, 2, 3))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_bootstrap_refuses_values_that_are_not_finite(bad):
    with pytest.raises(NumericalError, match=f"1 of 3 values .*first: {bad} at prompt 1"):
        bootstrap_mean(np.array([0.0, bad, 1.0]))
    values = torch.zeros(4, 2, 2)
    values[3, 0, 1] = bad
    with pytest.raises(NumericalError, match=f"1 of 16 values .*first: {bad} at prompt 3"):
        bootstrap_mean_axis(values)


@pytest.mark.parametrize("options", [{"confidence": 1.0}, {"confidence": 0.0}, {"resamples": 0}])
def test_bootstrap_refuses_impossible_settings(options):
    with pytest.raises(TvlensError, match="confidence between 0 and 1 and at least 1 resample"):
        bootstrap_mean(np.ones(3), **options)
    with pytest.raises(TvlensError, match="confidence between 0 and 1 and at least 1 resample"):
        bootstrap_mean_axis(np.ones((3, 1, 1)), **options)


def pairs(n=60):
    generator = np.random.default_rng(2)
    above = generator.exponential(size=(n, 2, 3))
    return above, above * generator.uniform(0.2, 1.0, size=above.shape) + 0.1


def test_the_ratio_of_means_and_its_interval_are_scipys():
    above, below = pairs()
    value, low, high = bootstrap_ratio_axis(above, below, seed=3)
    assert value.numpy() == pytest.approx(above.mean(axis=0) / below.mean(axis=0))
    for row, column in ((0, 0), (1, 2)):
        numbers = above[:, row, column], below[:, row, column]
        reference = stats.bootstrap(
            numbers,
            lambda x, y, axis: x.mean(axis=axis) / y.mean(axis=axis),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=2000,
            rng=np.random.default_rng(3),
        ).confidence_interval
        found = float(low[row, column]), float(high[row, column])
        assert found == pytest.approx((reference.low, reference.high), rel=0.02)
        # The intervals of two means that are not resampled together are much wider.
        alone = [bootstrap_mean(x, seed=3) for x in numbers]
        apart = alone[0].high / alone[1].low - alone[0].low / alone[1].high
        assert found[1] - found[0] < 0.5 * apart


@pytest.mark.parametrize("factor", [2.0, 0.5, 4.0])
def test_columns_in_proportion_have_that_ratio_for_certain(factor):
    values = torch.rand(9, 4, generator=torch.Generator().manual_seed(0))
    for part in bootstrap_ratio_axis(factor * values, values):
        assert part.tolist() == [factor] * 4


def test_ratios_repeat_with_their_seed_whatever_their_blocks(monkeypatch):
    above, below = pairs(20)
    whole = bootstrap_ratio_axis(above, below, seed=1)
    assert not torch.equal(bootstrap_ratio_axis(above, below, seed=2)[1], whole[1])
    monkeypatch.setattr(metrics, "_MAX_ELEMENTS", 5001)
    for one, other in zip(bootstrap_ratio_axis(above, below, seed=1), whole, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


def test_a_wider_confidence_is_a_wider_interval_around_the_ratio():
    above, below = pairs()
    value, low, high = bootstrap_ratio_axis(above, below)
    _, inner_low, inner_high = bootstrap_ratio_axis(above, below, confidence=0.5)
    assert (low < inner_low).all()
    assert (inner_low < value).all()
    assert (value < inner_high).all()
    assert (inner_high < high).all()


def test_ratios_of_other_prompts_or_broken_numbers_are_refused(unchecked):
    with pytest.raises(ShapeError, match=r"got shapes \[4, 2\] and \[3, 2\]; measure both on one"):
        bootstrap_ratio_axis(np.ones((4, 2)), np.ones((3, 2)))
    with pytest.raises(ShapeError, match=r"values of shape \[0, 2\] hold nothing"):
        bootstrap_ratio_axis(np.ones((0, 2)), np.ones((0, 2)))
    broken = np.ones((4, 2))
    broken[2, 1] = math.nan
    for both in ((broken, np.ones((4, 2))), (np.ones((4, 2)), broken)):
        with pytest.raises(NumericalError, match=r"1 of 8 values .*first: nan at prompt 2"):
            bootstrap_ratio_axis(*both)


# Shares


@pytest.mark.parametrize("n", [1, 5, 26, 75])
def test_a_share_of_0_or_1_has_wilsons_interval(n):
    z = 1.959963984540054
    none, all_ = share_interval(torch.zeros(n)), share_interval(torch.ones(n, dtype=torch.bool))
    assert (none.value, none.low, none.n) == (0.0, 0.0, n)
    assert none.high == pytest.approx(z**2 / (n + z**2))
    assert (all_.value, all_.high, all_.n) == (1.0, 1.0, n)
    assert all_.low == pytest.approx(n / (n + z**2))


def test_other_shares_have_the_interval_of_the_bootstrap():
    values = np.array([0, 1, 1, 0.5, 0, 1])
    assert share_interval(values, seed=3) == bootstrap_mean(values, seed=3)
    tiny = np.array([0.0] * 20 + [1.0])
    assert share_interval(tiny) == bootstrap_mean(tiny)


@pytest.mark.parametrize("values", [[0.0, 1.5], [-0.1, 0.0], [2.0, 2.0]])
def test_what_is_no_share_is_refused(values):
    with pytest.raises(NumericalError, match="expected numbers from 0 to 1"):
        share_interval(torch.tensor(values))


def test_wilsons_interval_holds_the_true_share_as_often_as_it_says_at_the_ends():
    """Of intervals around a share that was seen as 0 in n draws, at most 5% miss a share beyond."""
    n, high = 20, share_interval(torch.zeros(20)).high
    assert (1 - high) ** n < 0.05
