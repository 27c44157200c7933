"""The fidelity benchmark against loops over prompts cut by hand."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats

from helpers import tiny_regression as tiny
from helpers import zoo
from tvlens.errors import TaskError
from tvlens.evaluation.curves import (
    BARE,
    DUMMY_PLACES,
    FIDELITY_COLUMNS,
    Errors,
    dummy_errors,
    error_table,
    method_errors,
    oracle_errors,
    prompt_sets,
    truncation_errors,
)
from tvlens.lens.readout import SquaredError
from tvlens.models.regression.transformer import interleave
from tvlens.tasks.regression import oracles
from tvlens.tasks.regression.functions import Linear
from tvlens.tasks.regression.prompts import PointCurves, PointPrompts
from tvlens.tasks.regression.task import FunctionTask
from tvlens.vectors.vector import TaskVector

TASK = tiny.TASK
VARIANCE = 4.0
POINTS = (1, 3, 6, 7, 11)


@pytest.fixture(scope="module", params=zoo.KINDS)
def lens(request):
    return replace(tiny.lens(request.param), readout=SquaredError(VARIANCE))


@pytest.fixture(scope="module")
def curves():
    return TASK.curves("test", points=POINTS, n=5)


@pytest.fixture(scope="module")
def vector():
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    return TaskVector(values, (0, 1), "tiny", "random")


def squares(predicted, target):
    return (predicted - target).square().double() / VARIANCE


@torch.no_grad()
def by_module(xs, ys, target):
    """Errors of the trained module itself at the last of these points."""
    return squares(tiny.trained()(xs, ys)[:, -1], target)


@torch.no_grad()
def by_hooks(lens, xs, ys, target, vector, places):
    """Errors at the last x with the vector added at these positions, by hooks of our own."""
    backend = lens.backend
    inputs = interleave(xs, ys)[:, :-1]

    def add(activation, hook, layer):
        changed = activation.clone()
        changed[:, places] += vector.vectors[layer]
        return changed

    hooks = [(backend.residual_hook(n), partial(add, layer=n)) for n in range(2)]
    with backend.hooks(hooks):
        outputs = backend.forward(inputs, torch.ones(inputs.shape[:2], dtype=torch.bool))
    return squares(outputs[:, -1, 0], target)


def test_errors_on_curves_are_those_of_a_loop_over_numbers_of_points(lens, curves, vector):
    found = method_errors(lens, [curves], {"added": vector})
    assert list(found) == [BARE, "added"]
    for column, points in enumerate(POINTS):
        xs, ys, target = curves.xs[:, :points], curves.ys[:, :points], curves.values[:, points - 1]
        expected = by_module(xs, ys, target)
        assert zoo.off(found[BARE].values[:, column], expected) < 1e-4
        expected = by_hooks(lens, xs, ys, target, vector, [2 * points - 2])
        assert zoo.off(found["added"].values[:, column], expected) < 1e-4
    assert found[BARE].points == found["added"].points == POINTS


def test_errors_on_single_sets_stand_beside_each_other(lens, vector):
    sets = [TASK.prompts("test", shots=shots, n=4, kind="shuffled") for shots in (3, 5)]
    found = method_errors(lens, sets, {"added": vector})
    assert list(found) == [BARE, "added"]
    assert found[BARE].points == (4, 6)
    for column, prompts in enumerate(sets):
        expected = by_module(prompts.xs, prompts.ys, prompts.target)
        assert zoo.off(found[BARE].values[:, column], expected) < 1e-4


def test_errors_are_joined_and_picked_by_their_number_of_points():
    left, right = Errors((4, 2), torch.tensor([[1.0, 2.0]])), Errors((9,), torch.tensor([[3.0]]))
    both = Errors.join([left, right])
    assert both.points == (4, 2, 9)
    assert both.values.tolist() == [[1.0, 2.0, 3.0]]
    assert both.at([9, 4]).points == (9, 4)
    assert both.at([9, 4]).values.tolist() == [[3.0, 1.0]]
    assert (both.mean().points, both.mean().values.tolist()) == ((9,), [[2.0]])


def sets_of(task, kind, points, n=3):
    return prompt_sets(task, "test", kind=kind, points=points, n=n, seed=2)


def test_clean_prompts_are_one_curve():
    (found,) = sets_of(TASK, "clean", (1, 2, 9))
    assert isinstance(found, PointCurves)
    assert found.points == (1, 2, 9)
    assert torch.equal(found.xs, TASK.curves("test", points=(1, 2, 9), n=3, seed=2).xs)


def test_zero_shot_prompts_are_the_queries_of_prompts_as_long_as_in_training():
    (found,) = sets_of(TASK, "zero", (1, 2, 9))
    clean = TASK.prompts("test", shots=tiny.TRAINED - 1, n=3, seed=2)
    assert (found.kind, found.points) == ("zero", (1,))
    assert torch.equal(found.xs, clean.xs[:, -1:])
    assert torch.equal(found.target, clean.target)
    (alone,) = sets_of(replace(TASK, train_points=None), "zero", (1, 2, 9))
    assert alone.points == (1,)


def test_shuffled_prompts_have_two_examples_or_more():
    found = sets_of(TASK, "shuffled", (1, 2, 3, 8))
    assert [(prompts.kind, prompts.points) for prompts in found] == [
        ("shuffled", (3,)),
        ("shuffled", (8,)),
    ]
    expected = TASK.prompts("test", shots=7, n=3, seed=2, kind="shuffled")
    assert torch.equal(found[1].ys, expected.ys)
    with pytest.raises(
        TaskError, match=r"no shuffled prompts of shift 'none' have \[1, 2\] points"
    ):
        sets_of(TASK, "shuffled", (1, 2))


def test_an_orthogonal_query_is_asked_at_up_to_as_many_points_as_dimensions():
    task = FunctionTask("linear", Linear(4), "orthogonal-query", train_points=6)
    found = sets_of(task, "clean", range(1, 10))
    assert [prompts.points for prompts in found] == [(2,), (3,), (4,)]
    for prompts in found:
        assert isinstance(prompts, PointPrompts)
        products = torch.einsum("bpd,bd->bp", prompts.xs[:, :-1], prompts.xs[:, -1])
        assert products.abs().max() < 1e-4
    words = (
        r"task 'linear': no clean prompts of shift 'orthogonal-query' have \[1, 5, 9\] points; "
        "expected at least 2 and at most 4"
    )
    with pytest.raises(TaskError, match=words):
        sets_of(task, "clean", (1, 5, 9))


@pytest.mark.parametrize("window", [3, 6])
def test_a_truncated_prompt_is_its_last_points(lens, curves, window):
    bare = method_errors(lens, [curves], {})[BARE]
    found = truncation_errors(lens, curves, window, bare)
    assert found.points == POINTS
    for column, points in enumerate(POINTS):
        span = slice(max(0, points - window), points)
        target = curves.values[:, points - 1]
        expected = by_module(curves.xs[:, span], curves.ys[:, span], target)
        assert zoo.off(found.values[:, column], expected) < 1e-4


def test_nothing_is_cut_from_short_prompts(lens, curves):
    bare = method_errors(lens, [curves], {})[BARE]
    assert truncation_errors(lens, curves, 11, bare) is bare


def with_pairs_of_zeros(x, places):
    """Rows of x with zeros put in before the examples at these places."""
    pieces, last = [], 0
    for place in places:
        pieces += [x[:, last:place], torch.zeros_like(x[:, :1])]
        last = place
    return torch.cat([*pieces, x[:, last:]], dim=1)


@pytest.mark.parametrize(
    ("points", "before"), [(11, (1, 2, 5, 8, 9)), (7, (1, 2, 3, 4, 5)), (3, (0, 0, 1, 2, 2))]
)
def test_dummies_are_pairs_of_zeros_at_which_the_vector_is_added_too(
    lens, curves, vector, points, before
):
    """`before` counts the examples that stand before each pair: shares, rounded to even."""
    assert DUMMY_PLACES == (0.1, 0.25, 0.5, 0.75, 0.9)
    chosen = replace(curves, points=(points,))
    found = dummy_errors(lens, chosen, {"added": vector})
    assert list(found) == ["bare_dummies", "added_dummies"]
    xs = with_pairs_of_zeros(curves.xs[:, :points], before)
    ys = with_pairs_of_zeros(curves.ys[:, :points], before)
    target = curves.values[:, points - 1]
    assert xs.shape[1] == points + 5
    expected = by_module(xs, ys, target)
    assert zoo.off(found["bare_dummies"].values[:, 0], expected) < 1e-4
    dummies = [place + earlier for earlier, place in enumerate(before)]
    places = [2 * dummy for dummy in dummies] + [2 * (points + 5) - 2]
    expected = by_hooks(lens, xs, ys, target, vector, places)
    assert zoo.off(found["added_dummies"].values[:, 0], expected) < 1e-4
    at_query_alone = by_hooks(lens, xs, ys, target, vector, places[-1:])
    assert zoo.off(found["added_dummies"].values[:, 0], at_query_alone) > 0.01
    assert found["bare_dummies"].points == found["added_dummies"].points == (points,)


def test_least_squares_knows_linear_functions_beyond_as_many_examples_as_dimensions():
    task = FunctionTask("linear", Linear(2), train_points=6)
    sets = sets_of(task, "clean", (1, 2, 3, 4, 9), n=8)
    found = oracle_errors(sets, oracles.least_squares(), variance=2.0, n=5)
    assert found.points == (1, 2, 3, 4, 9)
    assert found.values.shape == (5, 5)
    assert found.values[:, 2:].max() < 1e-8
    assert found.values[:, :2].min() > 1e-8
    # Without an example zero is predicted.
    expected = sets[0].values[:5, 0].square() / 2.0
    assert torch.allclose(found.values[:, 0], expected.double())


def test_an_estimator_is_shown_what_the_model_is_shown():
    def total(xs, ys, query):
        return ys.sum(dim=1) + 100 * query.sum(dim=1)

    for kind in ("clean", "shuffled"):
        sets = sets_of(TASK, kind, (3, 5), n=4)
        found = oracle_errors(sets, total, variance=VARIANCE, n=4)
        assert found.points == (3, 5)
        for column, points in enumerate((3, 5)):
            own = sets[0].at(points) if kind == "clean" else sets[column]
            expected = own.ys[:, : points - 1].sum(dim=1) + 100 * own.xs[:, points - 1, 0]
            assert torch.allclose(found.values[:, column], squares(expected, own.target))


def errors(points, n=12, seed=0):
    values = torch.rand(n, len(points), generator=torch.Generator().manual_seed(seed)) + 0.1
    return Errors(points, values.double())


def table_of(found, train_points=3):
    return error_table(
        found,
        functions="linear",
        shift="skewed",
        prompt="clean",
        train_points=train_points,
        seed=0,
    )


def values_of(table, method, metric):
    rows = table[(table["method"] == method) & (table["metric"] == metric)]
    return rows.set_index("points")


def test_the_table_holds_means_and_ratios_of_means():
    bare, other = errors((2, 4, 6)), errors((2, 4, 6), seed=1)
    table = table_of({BARE: bare, "other": other})
    assert list(table.columns) == FIDELITY_COLUMNS
    assert set(table[["functions", "shift", "prompt", "n"]].itertuples(index=False, name=None)) == {
        ("linear", "skewed", "clean", 12)
    }
    for name, found in ((BARE, bare), ("other", other)):
        rows = values_of(table, name, "squared_error")
        assert rows.index.tolist() == [2, 4, 6]
        assert rows["value"].to_numpy() == pytest.approx(found.values.mean(dim=0).numpy())
    gain = values_of(table, "other", "gain")
    expected = bare.values.mean(dim=0) / other.values.mean(dim=0)
    assert gain["value"].to_numpy() == pytest.approx(expected.numpy())
    assert values_of(table, BARE, "gain").empty
    assert values_of(table, BARE, "gain_past").empty
    interval = stats.bootstrap(
        (other.values[:, 1].numpy(),),
        np.mean,
        method="percentile",
        n_resamples=2000,
        rng=np.random.default_rng(0),
    ).confidence_interval
    row = values_of(table, "other", "squared_error").loc[4]
    assert (row["ci_low"], row["ci_high"]) == pytest.approx((interval.low, interval.high))


def test_halving_every_error_is_a_gain_of_two_for_certain():
    bare = errors((2, 4, 6))
    table = table_of({BARE: bare, "half": Errors(bare.points, bare.values / 2)})
    gains = table[table["metric"].str.startswith("gain")]
    assert gains["metric"].tolist() == ["gain"] * 3 + ["gain_past"]
    for column in ("value", "ci_low", "ci_high"):
        assert gains[column].tolist() == [2.0] * 4


def test_a_method_without_any_error_has_no_gain():
    bare = errors((2, 4, 6))
    exact = bare.values.clone()
    exact[:, 1] = 0
    table = table_of({BARE: bare, "exact": Errors(bare.points, exact)})
    assert values_of(table, "exact", "squared_error")["value"].loc[4] == 0
    assert values_of(table, "exact", "gain").index.tolist() == [2, 6]
    assert np.isfinite(table[["value", "ci_low", "ci_high"]].to_numpy()).all()


def test_gains_past_the_training_length_are_of_means_over_lengths():
    bare, other = errors((2, 4, 6)), errors((2, 4, 6), seed=1)
    table = table_of({BARE: bare, "other": other}, train_points=3)
    for name, found in ((BARE, bare), ("other", other)):
        rows = values_of(table, name, "squared_error_past")
        assert rows.index.tolist() == [6]
        assert rows["value"].to_numpy() == pytest.approx(float(found.values[:, 1:].mean()))
    (gain,) = values_of(table, "other", "gain_past")["value"]
    assert gain == pytest.approx(float(bare.values[:, 1:].mean() / other.values[:, 1:].mean()))
    # One number of points past the training length is no mean over several.
    alone = table_of({BARE: bare, "other": other}, train_points=5)
    assert set(alone["metric"]) == {"squared_error", "gain"}
    # Nor is a method compared at some of the numbers of points with the bare model at all of them.
    some = table_of({BARE: errors((2, 4, 5, 6)), "other": other.at([2, 4])})
    assert values_of(some, "other", "gain_past").empty
    assert values_of(some, "other", "gain").index.tolist() == [2, 4]


def test_estimators_of_fewer_prompts_are_compared_on_those():
    bare, few = errors((2, 4)), errors((2, 4), n=5, seed=1)
    table = table_of({BARE: bare, "few": few})
    gain = values_of(table, "few", "gain")
    expected = bare.values[:5].mean(dim=0) / few.values.mean(dim=0)
    assert gain["value"].to_numpy() == pytest.approx(expected.numpy())
    assert set(gain["n"]) == {5}


def test_there_is_no_gain_where_the_bare_model_was_not_asked():
    table = table_of({BARE: errors((2, 4)), "other": errors((2, 9), seed=1)})
    assert values_of(table, "other", "gain").empty
    assert values_of(table, "other", "squared_error").index.tolist() == [2, 9]
