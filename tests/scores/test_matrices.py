"""Every two scores beside chance and ceiling."""

import numpy as np
import pytest
import torch

from tvlens.errors import NumericalError, ShapeError
from tvlens.scores.agreement import overlap_at_k, spearman, split_half
from tvlens.scores.matrices import agreement_matrix, depth_matrix, depth_overlap
from tvlens.scores.score import Scores


def noisy(seed, true=None, n=20, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(4, 5, generator=generator) if true is None else true
    values = true + noise * torch.randn(n, *true.shape, generator=generator)
    return Scores.of_prompts(values, name="aie", unit="p", task=f"task {seed}", model="m")


def test_every_two_tasks_beside_chance_and_ceiling():
    scores = {"a": noisy(0), "b": noisy(1), "c": Scores(torch.rand(4, 5), "ltv", "norm")}
    table = agreement_matrix(scores, (3, 5), splits=10, seed=4)
    assert len(table) == 6 * 3
    assert list(table.columns) == (
        ["first", "second", "measure", "k", "value", "chance", "p_value", "ceiling"]
    )
    cells = table.set_index(["first", "second", "measure"])
    overlap = cells.loc[("a", "b", "overlap")].set_index("k")
    for k in (3, 5):
        expected = overlap_at_k(scores["a"], scores["b"], k)
        row = overlap.loc[k]
        assert (row["value"], row["chance"], row["p_value"]) == pytest.approx(
            (expected.overlap, k / 20, expected.p_value)
        )
    rho = cells.loc[("b", "a", "spearman")]
    assert rho["value"] == pytest.approx(spearman(scores["a"], scores["b"]).value)
    halves = [
        split_half(scores[name].values, [3, 5], splits=10, seed=4).set_index(["measure", "k"])
        for name in "ab"
    ]
    own = [each.loc[("overlap", 5), "value"] for each in halves]
    assert overlap.loc[5, "ceiling"] == pytest.approx(np.sqrt(own[0] * own[1]))
    assert table.loc[table["first"] == "c", "ceiling"].isna().all()


def test_scores_that_are_alike_reach_their_ceiling():
    true = torch.randn(4, 5, generator=torch.Generator().manual_seed(9))
    alike = {"a": noisy(0, true, n=200), "b": noisy(1, true, n=200)}
    row = agreement_matrix(alike, (5,), splits=20).query("measure == 'spearman'").iloc[0]
    assert row["value"] == pytest.approx(row["ceiling"], abs=0.05)


def test_depths_of_models_of_different_sizes():
    two = torch.tensor([[1.0, 0.0], [1.0, -5.0]])
    four = torch.tensor([[2.0], [2.0], [0.0], [-1.0]])
    # Half of the mass of the one lies in the first half of its layers, all of the other's.
    assert depth_overlap(two, four) == pytest.approx(0.5)
    assert depth_overlap(four, two) == pytest.approx(0.5)
    assert depth_overlap(two, two) == pytest.approx(1.0)
    three = torch.tensor([[0.0], [0.0], [1.0]])
    # A third of the depth, of density 1 against 3 in common.
    assert depth_overlap(two, three) == pytest.approx(1 / 3)
    assert depth_overlap(four, three) == 0
    without = torch.tensor([[torch.nan, torch.nan], [1.0, 1.0]])
    assert depth_overlap(two, without) == pytest.approx(0.5)


def test_depths_beside_chance_and_ceiling():
    # All of the score in the first layer, in two models.
    true = torch.zeros(4, 5)
    true[0] = 1.0
    wide = torch.zeros(8, 3)
    wide[:2] = 1.0
    scores = {"text": noisy(0, true, noise=0.01), "points": noisy(1, wide, noise=0.01)}
    scores["one"] = Scores(true, "ltv", "norm", model="m")
    table = depth_matrix(scores, draws=200, splits=5)
    row = table.query("first == 'text' and second == 'points'").iloc[0]
    assert row["value"] == pytest.approx(1, abs=0.05)
    assert row["ceiling"] == pytest.approx(1, abs=0.05)
    # Of heads in random order, five of which hold all, the first layer holds a quarter.
    assert 0.3 < row["chance"] < 0.7
    assert row["p_value"] == pytest.approx(1 / 201)
    assert np.isnan(table.query("first == 'one' and second == 'text'").iloc[0]["ceiling"])
    assert table["k"].isna().all()


def test_what_is_refused():
    small = Scores(torch.rand(2, 2), "aie", "p", model="m")
    with pytest.raises(ShapeError, match="expected scores of one model"):
        agreement_matrix({"a": noisy(0), "b": small}, (2,))
    with pytest.raises(NumericalError, match="no head scores above 0"):
        depth_overlap(-torch.ones(2, 2), torch.ones(2, 2))
