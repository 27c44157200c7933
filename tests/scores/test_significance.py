"""Which heads are more than chance, checked on cases that can be counted out."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from tvlens.errors import NumericalError, ShapeError, TvlensError
from tvlens.scores.score import Scores
from tvlens.scores.significance import permutation_test, pooled, signed_heads


def scores_of(values, name="aie", task="t"):
    return Scores.of_prompts(values, name=name, unit="probability", task=task, model="m")


def some(n=8, heads=(2, 3), seed=0):
    values = torch.randn(n, *heads, generator=torch.Generator().manual_seed(seed))
    values[:, 0, 1] += 2.0
    values[:, 1, 2] -= 2.0
    return values


def test_all_changes_of_signs_are_counted_where_they_are_few():
    values = torch.tensor([[1.0, 2.0], [2.0, -1.0], [3.0, 0.5]])[:, None]
    table = permutation_test(scores_of(values))
    expected = []
    for column in values[:, 0].T.double().numpy():
        sums = [abs(np.dot(signs, column)) for signs in product((1, -1), repeat=3)]
        expected.append(np.mean([each >= abs(column.sum()) - 1e-9 for each in sums]))
    assert expected == [0.25, 0.75]
    assert table["p_value"].tolist() == expected
    assert table["value"].tolist() == [2.0, 0.5]
    assert table[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1]]
    assert list(table.columns) == (
        ["task", "score", "layer", "head", "value", "p_value", "q_value", "sign"]
    )


def test_p_values_are_those_of_scipy():
    values = some()
    table = permutation_test(scores_of(values))
    for row in table.itertuples():
        own = values[:, row.layer, row.head].double().numpy()
        test = stats.permutation_test(
            (own,), np.mean, permutation_type="samples", n_resamples=np.inf
        )
        assert row.p_value == pytest.approx(test.pvalue)


def test_random_changes_of_signs_where_they_are_many():
    values = some(30)
    table = permutation_test(scores_of(values), resamples=4000, seed=1)
    again = permutation_test(scores_of(values), resamples=4000, seed=1)
    pd.testing.assert_frame_equal(table, again)
    assert not table.equals(permutation_test(scores_of(values), resamples=4000, seed=2))
    for row in table.itertuples():
        normal = stats.ttest_1samp(values[:, row.layer, row.head].numpy(), 0).pvalue
        assert row.p_value == pytest.approx(max(normal, 1 / 4001), abs=0.02)
    # The scores themselves count as one of the changes, so that no p-value is 0.
    assert table["p_value"].min() == 1 / 4001


def test_false_discoveries_are_controlled_over_the_heads():
    table = permutation_test(scores_of(some(12)))
    p = table["p_value"].to_numpy()
    order = np.argsort(p)
    by_hand = np.minimum.accumulate((p[order] * len(p) / np.arange(1, len(p) + 1))[::-1])[::-1]
    assert table["q_value"].to_numpy()[order] == pytest.approx(by_hand.clip(max=1))
    # Of heads that do nothing, few are called more than chance.
    null = permutation_test(scores_of(torch.randn(20, 10, 30, generator=torch.Generator())))
    assert (null["q_value"] <= 0.05).mean() < 0.02
    assert 0.02 < (null["p_value"] <= 0.05).mean() < 0.09


def test_heads_that_work_against_the_task_stand_apart():
    found = signed_heads(permutation_test(scores_of(some(12))))
    assert found.positive == ((0, 1),)
    assert found.negative == ((1, 2),)
    values = some(12)
    values[:, 1, 0] += 5
    assert signed_heads(permutation_test(scores_of(values))).positive == ((1, 0), (0, 1))


def test_layers_without_heads_have_no_rows():
    values = some(12, (3, 3))
    values[:, 2] = torch.nan
    assert permutation_test(scores_of(values))["layer"].unique().tolist() == [0, 1]


def test_tasks_are_pooled_in_units_of_their_own():
    one = torch.tensor([[1.0, 2.0, 3.0]])
    made = [Scores(one, "aie", "p", "a", "m"), Scores(100 * one.flip(1), "aie", "p", "b", "m")]
    made.append(Scores(one + 7, "aie", "p", "c", "m"))
    both = pooled(made)
    step = np.sqrt(1.5)
    assert both.scores[0].tolist() == pytest.approx([-step / 3, 0, step / 3])
    assert both.values[:, 0].tolist() == [
        pytest.approx(row) for row in ([-step, 0, step], [step, 0, -step], [-step, 0, step])
    ]
    assert (both.task, both.name, both.model) == ("pooled", "aie", "m")
    gap = torch.cat([one, torch.full((1, 3), torch.nan)])
    assert pooled([Scores(gap, "aie", "p")]).scores[1].isnan().all()


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (
            lambda: permutation_test(Scores(torch.ones(2, 2), "contribution", "norm")),
            ShapeError,
            "scores 'contribution' have values of 0 single prompts; a permutation test needs two",
        ),
        (
            lambda: permutation_test(scores_of(torch.full((3, 1, 2), torch.inf))),
            NumericalError,
            "scores 'aie' of task 't' have values that are not finite",
        ),
        (
            lambda: permutation_test(scores_of(some()), resamples=0),
            TvlensError,
            "resamples=0: expected 1 or more",
        ),
        (
            lambda: signed_heads(permutation_test(scores_of(some())), level=5.0),
            TvlensError,
            "level=5.0: expected a false-discovery rate between 0 and 1",
        ),
        (lambda: pooled([]), ShapeError, "no scores are given to pool; expected one of each task"),
        (
            lambda: pooled([Scores(torch.ones(2, 2), "aie", "p", "t")]),
            NumericalError,
            "'aie' of task 't' are the same for all heads, so they cannot be standardised",
        ),
        (
            lambda: pooled([scores_of(some()), scores_of(some(heads=(3, 3)))]),
            ShapeError,
            "expected scores of one model",
        ),
    ],
)
def test_what_is_refused(make, kind, said):
    with pytest.raises(kind, match=said):
        make()
