import doctest
from itertools import permutations
from math import comb, isnan

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from tvlens.errors import NumericalError, ShapeError, TvlensError
from tvlens.scores import agreement, ranking
from tvlens.scores.agreement import (
    compare_head_sets,
    kendall,
    layer_profile_distance,
    overlap_at_k,
    overlap_curve,
    rank_biased_overlap,
    rank_biased_overlap_chance,
    spearman,
    split_half,
    stability,
)
from tvlens.scores.ranking import (
    HasHeadScores,
    concentration,
    layer_profile,
    rank_heads,
    top_heads,
)


def random_map(seed, layers=4, heads=3):
    return torch.randn(layers, heads, generator=torch.Generator().manual_seed(seed))


def descending(n):
    """One layer whose heads are ranked 0, 1, 2, ..."""
    return torch.arange(n, 0, -1, dtype=torch.float32).reshape(1, n)


class Scored:
    """Something that scores heads without being a tensor."""

    def __init__(self, scores):
        self._scores = scores

    @property
    def scores(self):
        return self._scores


def test_docstring_examples_hold():
    for module in (agreement, ranking):
        results = doctest.testmod(module)
        assert results.attempted >= 1
        assert results.failed == 0


# Rankings


def test_heads_rank_by_signed_score_with_ties_in_order_of_layer_then_head():
    scores = torch.tensor([[0.5, -9.0, 0.5], [2.0, 0.5, -1.0]])
    assert rank_heads(scores) == [(1, 0), (0, 0), (0, 2), (1, 1), (1, 2), (0, 1)]
    assert top_heads(scores, 2) == [(1, 0), (0, 0)]
    assert top_heads(scores, 6) == rank_heads(scores)
    many = (random_map(0, 30, 9) > 0).float()
    assert rank_heads(many) == sorted(rank_heads(many), key=lambda head: (-many[head], *head))


def test_bfloat16_scores_with_gradients_rank_as_they_are():
    scores = random_map(0).to(torch.bfloat16).requires_grad_()
    assert rank_heads(scores) == rank_heads(scores.detach().float())


@pytest.mark.parametrize("k", [0, -1, 7])
def test_k_out_of_range_is_refused_by_name_and_count(k):
    scores = random_map(0, 2, 3)
    words = (
        f"top {k} heads asked for, but there are 6 heads \\(2 layers of 3\\): choose k from 1 to"
    )
    for call in (
        lambda: top_heads(scores, k),
        lambda: overlap_at_k(scores, scores, k),
        lambda: overlap_curve(scores, scores, [1, k]),
        lambda: concentration(scores, [k]),
        lambda: stability(torch.stack([scores, scores]), k),
        lambda: split_half(torch.stack([scores, scores]), k),
        lambda: compare_head_sets(scores, scores, ks=(1, k)),
    ):
        with pytest.raises(ShapeError, match=words):
            call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_with_their_place(bad):
    scores = random_map(0)
    scores[2, 1] = bad
    for call in (rank_heads, layer_profile, concentration, lambda s: top_heads(s, 1)):
        with pytest.raises(NumericalError, match=rf"1 of 12 .*{bad} at layer 2, head 1"):
            call(scores)
    with pytest.raises(NumericalError, match="not finite"):
        compare_head_sets(random_map(1), scores)


def test_maps_of_different_models_are_refused_with_both_shapes():
    a, b = random_map(0, 4, 3), random_map(0, 3, 4)
    for call in (
        lambda: overlap_at_k(a, b, 2),
        lambda: rank_biased_overlap(a, b),
        lambda: spearman(a, b),
        lambda: layer_profile_distance(a, b),
        lambda: compare_head_sets(a, b, ks=(2,)),
    ):
        with pytest.raises(ShapeError, match=r"shape \[4, 3\] and \[3, 4\].* heads of one model"):
            call()


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), (0, 4)])
def test_scores_must_be_a_map_of_heads(shape):
    with pytest.raises(ShapeError, match=r"scores have shape .*\[layer, head\]"):
        rank_heads(Scored(torch.zeros(shape)))


def test_objects_with_scores_serve_as_well_as_tensors():
    a, b = random_map(0), random_map(1)
    assert isinstance(Scored(a), HasHeadScores)
    assert not isinstance(a, HasHeadScores)
    assert top_heads(Scored(a), 3) == top_heads(a, 3)
    mixed = compare_head_sets(Scored(a), b, ks=(2, 3))
    assert mixed.equals(compare_head_sets(a, b, ks=(2, 3)))


# Overlap of the top k


def test_overlap_closed_form():
    a, b = descending(10), descending(10)
    b[0, [1, 7]] = b[0, [7, 1]]  # ranks 1 and 7 swapped: the top 4 share 3
    result = overlap_at_k(a, b, 4)
    assert (result.k, result.shared, result.overlap) == (4, 3, 0.75)
    assert result.jaccard == pytest.approx(3 / 5)
    assert result.chance_overlap == pytest.approx(4 / 10)
    assert result.p_value == pytest.approx((comb(4, 3) * 6 + 1) / comb(10, 4))


def test_jaccard_chance_is_the_mean_over_all_pairs_of_sets():
    a = descending(5)
    values = []
    for order in permutations(range(5)):
        b = torch.tensor([order], dtype=torch.float32)
        values.append(overlap_at_k(a, b, 2).jaccard)
    assert overlap_at_k(a, a, 2).chance_jaccard == pytest.approx(np.mean(values))


@pytest.mark.parametrize("k", [1, 5, 12])
def test_p_value_is_scipys_hypergeometric_test(k):
    a, b = random_map(2), random_map(3)
    result = overlap_at_k(a, b, k)
    shared = len(set(top_heads(a, k)) & set(top_heads(b, k)))
    assert result.shared == shared
    reference = stats.fisher_exact(
        [[shared, k - shared], [k - shared, 12 - 2 * k + shared]], alternative="greater"
    )
    assert result.p_value == pytest.approx(reference.pvalue)


def test_overlap_chance_levels_match_random_maps():
    generator = torch.Generator().manual_seed(0)
    a, k, draws = random_map(0, 5, 4), 6, 800
    results = [overlap_at_k(a, torch.rand(5, 4, generator=generator), k) for _ in range(draws)]
    assert np.mean([r.overlap for r in results]) == pytest.approx(0.3, abs=0.02)
    assert np.mean([r.jaccard for r in results]) == pytest.approx(
        results[0].chance_jaccard, abs=0.02
    )
    # A valid p-value is below its level no more often than the level says.
    assert np.mean([r.p_value <= 0.15 for r in results]) <= 0.17


def test_overlap_curve_agrees_with_single_points_and_holds_its_chance_range():
    a, b = random_map(2), random_map(3)
    curve = overlap_curve(a, b)
    columns = "k shared overlap jaccard chance chance_low chance_high p_value"
    assert list(curve.columns) == columns.split()
    assert list(curve.k) == list(range(1, 13))
    for row in curve.itertuples():
        point = overlap_at_k(a, b, row.k)
        expected = (point.shared, point.overlap, point.jaccard, point.p_value)
        assert (row.shared, row.overlap, row.jaccard, row.p_value) == expected
    assert (curve.chance_low <= curve.chance).all()
    assert (curve.chance <= curve.chance_high).all()
    last = curve.iloc[-1]
    assert (last.overlap, last.chance, last.chance_low, last.p_value) == (1, 1, 1, 1)
    covered = stats.hypergeom.cdf(curve.chance_high * curve.k, 12, curve.k, curve.k)
    covered -= stats.hypergeom.cdf(curve.chance_low * curve.k - 1, 12, curve.k, curve.k)
    assert (covered >= 0.95 - 1e-12).all()
    assert list(overlap_curve(a, b, range(2, 5)).k) == [2, 3, 4]


# Ties


def test_ties_count_as_the_mean_over_all_ways_of_breaking_them():
    tied, other = torch.tensor([[3.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), random_map(7, 2, 3)
    broken = []
    for ones in permutations([1.0, 1.1, 1.2]):
        for zeros in permutations([0.0, 0.1]):
            broken.append(torch.tensor([[3.0, ones[0], ones[1]], [ones[2], *zeros]]))
    for k in range(1, 7):
        shared = np.mean([overlap_at_k(x, other, k).shared for x in broken])
        assert overlap_at_k(tied, other, k).shared == pytest.approx(shared)
    expected = np.mean([rank_biased_overlap(x, other) for x in broken])
    assert rank_biased_overlap(tied, other) == pytest.approx(expected)
    assert overlap_at_k(tied, other, 3).shared % 1 != 0


def test_a_map_that_says_nothing_agrees_exactly_as_much_as_chance():
    flat, other = torch.zeros(4, 3), random_map(0)
    for b in (other, flat):
        curve = overlap_curve(flat, b)
        assert np.allclose(curve.overlap, curve.chance)
        assert rank_biased_overlap(flat, b) == pytest.approx(rank_biased_overlap_chance(12))


def test_heads_that_two_sparse_maps_leave_at_zero_feign_no_agreement():
    a, b = torch.zeros(4, 5), torch.zeros(4, 5)
    a[0, :2], b[3, :2] = 1.0, 1.0
    result = overlap_at_k(a, b, 4)
    # Of a's top 4, two are any of 18 zeros: each of b's two heads is there with 2/18, and so on.
    assert result.shared == pytest.approx(2 * 2 * 2 / 18 + 16 * (2 / 18) ** 2)
    assert result.p_value == pytest.approx(stats.hypergeom.sf(0, 20, 4, 4))


# Rank-biased overlap


def reference_rbo(a, b, p):
    """RBO_EXT of two full rankings, summed over explicit sets (Webber et al. 2010, equation 30)."""
    first, second = rank_heads(a), rank_heads(b)
    n = len(first)
    total = 0.0
    for depth in range(1, n + 1):
        shared = len(set(first[:depth]) & set(second[:depth]))
        total += (1 - p) / p * shared / depth * p**depth
    return total + p**n


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.98])
def test_rank_biased_overlap_equals_a_sum_over_sets(p):
    for seed in range(5):
        a, b = random_map(seed), random_map(seed + 100)
        assert rank_biased_overlap(a, b, p) == pytest.approx(reference_rbo(a, b, p), abs=1e-12)


def test_rank_biased_overlap_of_equal_reversed_and_swapped_rankings():
    a = descending(4)
    assert rank_biased_overlap(a, a, 0.7) == 1.0
    assert rank_biased_overlap(random_map(0, 30, 9), random_map(0, 30, 9)) == 1.0
    # Reversed, 4 heads: overlaps 0, 0, 2/3, 1.
    assert rank_biased_overlap(a, a.flip(-1), 0.5) == pytest.approx(0.125 * 2 / 3 + 0.125)
    # Disjoint down to depth 3 of 6, where full rankings must begin to meet: 0, 0, 0, 2/4, 4/5, 1.
    a = descending(6)
    disjoint = a[:, [3, 4, 5, 0, 1, 2]]
    expected = 0.5**4 * 2 / 4 + 0.5**5 * 4 / 5 + 0.5**5
    assert rank_biased_overlap(a, disjoint, 0.5) == pytest.approx(expected)
    assert rank_biased_overlap(descending(1), descending(1)) == 1.0


def test_rank_biased_overlap_chance_closed_form_and_random_rankings():
    for n, p in ((1, 0.9), (12, 0.9), (12, 0.3), (270, 0.98)):
        closed = (1 - p**n) / (n * (1 - p))
        assert rank_biased_overlap_chance(n, p) == pytest.approx(closed)
    generator = torch.Generator().manual_seed(0)
    a = random_map(0)
    values = [rank_biased_overlap(a, torch.rand(4, 3, generator=generator)) for _ in range(1500)]
    assert np.mean(values) == pytest.approx(rank_biased_overlap_chance(12), abs=0.015)


@pytest.mark.parametrize("p", [0.0, 1.0, 1.5])
def test_rank_biased_overlap_refuses_other_persistence(p):
    with pytest.raises(TvlensError, match=f"between 0 and 1, got {p}"):
        rank_biased_overlap(random_map(0), random_map(1), p)
    with pytest.raises(TvlensError, match="between 0 and 1"):
        rank_biased_overlap_chance(12, p)


# Correlations and invariances


def test_rank_correlations_of_small_rankings():
    a = descending(4)
    assert spearman(a, a).value == pytest.approx(1)
    assert spearman(a, -a).value == pytest.approx(-1)
    assert kendall(a, -a).value == pytest.approx(-1)
    swapped = a[:, [1, 0, 2, 3]]  # one neighbouring pair out of order
    assert spearman(a, swapped).value == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert kendall(a, swapped).value == pytest.approx(1 - 2 / 6)
    x, y = random_map(0), random_map(1)
    assert spearman(x, y).p_value == pytest.approx(
        stats.spearmanr(x.ravel(), y.ravel()).pvalue, rel=1e-6
    )
    assert kendall(x, y).p_value == pytest.approx(
        stats.kendalltau(x.ravel(), y.ravel()).pvalue, rel=1e-6
    )


def test_correlation_with_a_constant_map_is_nan_without_a_warning():
    for test in (spearman, kendall):
        assert all(isnan(x) for x in test(torch.zeros(4, 3), random_map(0)))
        assert all(isnan(x) for x in test(torch.ones(1, 1), torch.ones(1, 1)))


RANK_MEASURES = [
    lambda a, b: overlap_at_k(a, b, 4).overlap,
    lambda a, b: overlap_at_k(a, b, 4).jaccard,
    lambda a, b: overlap_at_k(a, b, 4).p_value,
    rank_biased_overlap,
    lambda a, b: spearman(a, b).value,
    lambda a, b: kendall(a, b).value,
]


@pytest.mark.parametrize("measure", RANK_MEASURES)
def test_rank_measures_are_symmetric_and_blind_to_increasing_transforms(measure):
    a, b = random_map(4).double(), random_map(5).double()
    value = measure(a, b)
    assert measure(b, a) == pytest.approx(value, abs=1e-12)
    assert measure(a.exp(), 3 * b - 7) == pytest.approx(value, abs=1e-12)
    assert measure(a, a) != pytest.approx(value)


def test_a_sign_turned_is_a_different_head_set():
    a = random_map(0)
    assert overlap_at_k(a, -a, 3).shared == 0
    assert overlap_at_k(a.abs(), (-a).abs(), 3).shared == 3


# Layers and concentration


def test_layer_profile_shares_out_the_positive_mass():
    scores = torch.tensor([[1.0, 2.0], [-5.0, 1.0], [0.0, -1.0]])
    assert torch.equal(layer_profile(scores), torch.tensor([0.75, 0.25, 0.0]))
    assert torch.equal(layer_profile(-scores.abs()), torch.zeros(3))


def test_layer_profile_distance_is_total_variation():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[2.0, 4.0], [0.0, 2.0]])
    assert layer_profile_distance(a, b) == pytest.approx(0.25)
    assert layer_profile_distance(b, a) == pytest.approx(0.25)
    assert layer_profile_distance(a, a) == 0
    assert layer_profile_distance(5 * a, a) == 0
    apart = torch.tensor([[1.0], [0.0]])
    assert layer_profile_distance(apart, apart.flip(0)) == 1
    assert isnan(layer_profile_distance(a, -a))


def measured(scores, ks=(1, 5, 10)):
    """Concentration as a dictionary: `gini`, `effective_heads`, `top_share@1`, ..."""
    rows = concentration(scores, ks).itertuples()
    return {r.measure if pd.isna(r.k) else f"{r.measure}@{r.k}": r.value for r in rows}


def test_concentration_closed_forms():
    one = torch.full((3, 4), -2.0)
    one[1, 2] = 0.3
    values = measured(one)
    assert values["gini"] == pytest.approx(1 - 1 / 12)
    assert values["effective_heads"] == pytest.approx(1)
    assert values["top_share@1"] == values["top_share@10"] == 1

    values = measured(torch.full((3, 4), 1e-200, dtype=torch.float64))
    assert values["gini"] == pytest.approx(0, abs=1e-12)
    assert values["effective_heads"] == pytest.approx(12)
    assert values["top_share@5"] == pytest.approx(5 / 12)

    values = measured(torch.tensor([[1.0, 3.0, -4.0, 0.0]]), (1, 2))
    assert values["gini"] == pytest.approx((1 * 1 + 3 * 3) / (4 * 4))
    assert values["effective_heads"] == pytest.approx(16 / 10)
    assert values["top_share@1"] == pytest.approx(0.75)


def test_gini_is_half_the_relative_mean_difference_and_ignores_scale():
    scores = random_map(3).double()
    x = scores.clamp(min=0).ravel()
    reference = (x[:, None] - x).abs().mean() / (2 * x.mean())
    assert measured(scores)["gini"] == pytest.approx(float(reference))
    assert measured(1e-9 * scores)["gini"] == pytest.approx(float(reference))


def test_concentration_without_positive_scores_is_nan():
    assert concentration(torch.zeros(3, 4)).value.isna().all()
    assert concentration(-torch.ones(3, 4)).value.isna().all()


# Stability


def test_stability_of_equal_and_of_unrelated_maps():
    a = random_map(0, 6, 5)
    same = stability(torch.stack([a, a, a]), 5).set_index("measure")
    assert list(same.columns) == ["k", "value", "low", "high", "chance", "n"]
    assert np.allclose(same[["value", "low", "high"]], 1)
    assert (same.n == 3).all()
    samples = torch.stack([random_map(seed, 6, 5) for seed in range(16)])
    mixed = stability(samples, 5).set_index("measure")
    assert (mixed.n == 120).all()
    assert np.allclose(mixed.value, mixed.chance, atol=0.08)


def test_stability_is_the_mean_and_range_over_pairs():
    samples = torch.stack([random_map(seed) for seed in range(3)])
    pairs = [(samples[i], samples[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
    table = stability(samples, 4, p=0.8).set_index("measure")
    for measure, values in {
        "overlap": [overlap_at_k(a, b, 4).overlap for a, b in pairs],
        "rank_biased_overlap": [rank_biased_overlap(a, b, 0.8) for a, b in pairs],
        "spearman": [spearman(a, b).value for a, b in pairs],
    }.items():
        row = table.loc[measure]
        expected = (np.mean(values), min(values), max(values))
        assert (row.value, row.low, row.high) == pytest.approx(expected)


def test_several_sizes_at_once_are_each_by_itself():
    samples = torch.stack([random_map(seed) for seed in range(3)])
    values = torch.stack([random_map(seed) for seed in range(6)])
    for together, alone in (
        (stability(samples, (2, 5)), [stability(samples, k) for k in (2, 5)]),
        (split_half(values, (2, 5), splits=9), [split_half(values, k, splits=9) for k in (2, 5)]),
    ):
        assert together["measure"].tolist() == ["overlap", *alone[0]["measure"]]
        assert together.iloc[[0, 2, 3]].reset_index(drop=True).equals(alone[0])
        assert together.iloc[1:].reset_index(drop=True).equals(alone[1])


def test_stability_needs_two_maps():
    with pytest.raises(ShapeError, match="give 2 or more maps, not 1"):
        stability(random_map(0)[None], 3)


def test_split_half_is_perfect_without_noise_and_chance_without_signal():
    signal = random_map(0, 6, 5).double()
    noise = torch.randn(40, 6, 5, generator=torch.Generator().manual_seed(1))
    clean = split_half(signal.expand(9, 6, 5), 5, splits=7).set_index("measure")
    assert np.allclose(clean[["value", "low", "high"]], 1)
    assert (clean.n == 7).all()
    random = split_half(noise, 5).set_index("measure")
    assert np.allclose(random.value, random.chance, atol=0.15)
    # The correlation of 30 unrelated heads has variance 1 / 29. Splits of the same prompts show
    # half of it: halves are (sum ± difference) / 2, and only the difference changes.
    width = random.high["spearman"] - random.low["spearman"]
    assert width == pytest.approx(3.92 * (1 / 58) ** 0.5, abs=0.15)
    between = split_half(signal + 2 * noise, 5).set_index("measure")
    assert (between.value > random.value + 0.2).all()
    assert (between.value < 0.95).all()
    assert (between.low <= between.value).all()
    assert (between.value <= between.high).all()


def test_split_half_reads_disjoint_halves():
    # Two prompts, one score map each: every split compares the two.
    a, b = random_map(0), random_map(1)
    table = split_half(torch.stack([a, b]), 4, splits=5).set_index("measure")
    assert table.loc["spearman"].value == pytest.approx(spearman(a, b).value)
    assert table.loc["overlap"].low == table.loc["overlap"].high == overlap_at_k(a, b, 4).overlap


def test_split_half_repeats_with_its_seed():
    values = torch.randn(11, 4, 3, generator=torch.Generator().manual_seed(0))
    assert split_half(values, 3, seed=5).equals(split_half(values, 3, seed=5))
    assert not split_half(values, 3, seed=5).equals(split_half(values, 3, seed=6))


def test_split_half_refuses_what_it_cannot_split():
    with pytest.raises(ShapeError, match="2 or more prompts and 1 or more splits, not 1 and 100"):
        split_half(torch.zeros(1, 4, 3), 3)
    with pytest.raises(ShapeError, match="not 4 and 0"):
        split_half(torch.zeros(4, 4, 3), 3, splits=0)
    values = torch.zeros(4, 4, 3)
    values[1, 0, 0] = float("nan")
    with pytest.raises(NumericalError, match="layer 0, head 0"):
        split_half(values, 3)


# The comparison table


def test_compare_head_sets_holds_every_measure_once_and_agrees_with_each():
    a, b = random_map(0, 6, 5), random_map(1, 6, 5)
    table = compare_head_sets(a, b, names=("ltv", "aie"))
    assert list(table.columns) == ["measure", "k", "value", "chance", "p_value"]
    whole = "rank_biased_overlap spearman kendall layer_profile_distance"
    whole += " gini_ltv gini_aie effective_heads_ltv effective_heads_aie"
    each_k = "overlap jaccard top_share_ltv top_share_aie"
    rows = {r.measure if pd.isna(r.k) else (r.measure, r.k): r for r in table.itertuples()}
    assert len(rows) == len(table)
    assert set(rows) == {*whole.split(), *((m, k) for m in each_k.split() for k in (5, 10, 20))}

    point = overlap_at_k(a, b, 10)
    expected = {
        ("overlap", 10): (point.overlap, point.chance_overlap, point.p_value),
        ("jaccard", 10): (point.jaccard, point.chance_jaccard, point.p_value),
        "rank_biased_overlap": (rank_biased_overlap(a, b), rank_biased_overlap_chance(30), None),
        "spearman": (spearman(a, b).value, 0, spearman(a, b).p_value),
        "kendall": (kendall(a, b).value, 0, kendall(a, b).p_value),
        "layer_profile_distance": (layer_profile_distance(a, b), None, None),
        "gini_aie": (measured(b)["gini"], None, None),
        "effective_heads_ltv": (measured(a)["effective_heads"], None, None),
        ("top_share_ltv", 10): (measured(a)["top_share@10"], None, None),
    }
    for key, values in expected.items():
        row = rows[key]
        found = [None if isnan(x) else x for x in (row.value, row.chance, row.p_value)]
        assert found == list(values), key


def test_a_map_compared_with_itself_agrees_fully():
    a = random_map(0, 6, 5)
    table = compare_head_sets(a, a).groupby("measure").value.min()
    for measure in ("overlap", "jaccard", "rank_biased_overlap", "spearman", "kendall"):
        assert table[measure] == pytest.approx(1)
    assert table["layer_profile_distance"] == 0


def test_a_constant_map_compares_without_a_warning():
    table = compare_head_sets(torch.zeros(6, 5), random_map(0, 6, 5)).set_index("measure")
    assert np.allclose(table.loc["overlap"].value, table.loc["overlap"].chance)
    assert table.loc[["spearman", "kendall", "gini_a", "layer_profile_distance"]].value.isna().all()


def test_both_maps_need_their_own_name():
    with pytest.raises(TvlensError, match="both maps are named 'ltv': give two different names"):
        compare_head_sets(random_map(0), random_map(1), names=("ltv", "ltv"))
