"""Oracles: known solutions, and a mean where nothing is known."""

import pytest
import torch

from tvlens.tasks.regression import oracles

EVERY = {
    "least squares": oracles.least_squares(),
    "ridge": oracles.ridge(0.1),
    "lasso": oracles.lasso(0.01),
    "nearest neighbours": oracles.nearest_neighbours(),
    "decision tree": oracles.decision_tree(),
    "boosting": oracles.boosting(5),
    "network": oracles.network(8, steps=5),
    "averaging": oracles.averaging(),
}


def linear_prompts(n=3, n_points=6, n_dims=2):
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(n, n_points, n_dims, generator=generator)
    weights = torch.randn(n, n_dims, generator=generator)
    ys = torch.einsum("bpd,bd->bp", xs, weights)
    return xs[:, :-1], ys[:, :-1], xs[:, -1], ys[:, -1], weights


def test_least_squares_recovers_linear_functions():
    xs, ys, query, answer, _ = linear_prompts()
    assert torch.allclose(EVERY["least squares"](xs, ys, query), answer, atol=1e-5)


def test_least_squares_of_few_examples_is_the_shortest_solution():
    xs, ys, query, _, _ = linear_prompts(n_points=2, n_dims=3)
    expected = torch.einsum("bd,bd->b", torch.linalg.pinv(xs)[..., 0] * ys, query)
    assert torch.allclose(EVERY["least squares"](xs, ys, query), expected, atol=1e-5)


def test_ridge_is_its_normal_equation():
    xs, ys, query, _, _ = linear_prompts()
    gram = xs.transpose(1, 2) @ xs + 0.1 * torch.eye(2)
    weights = torch.linalg.solve(gram, (xs.transpose(1, 2) @ ys[..., None])[..., 0])
    assert torch.allclose(EVERY["ridge"](xs, ys, query), (weights * query).sum(1), atol=1e-5)


def test_lasso_of_a_heavy_penalty_predicts_nothing():
    xs, ys, query, _, _ = linear_prompts()
    assert oracles.lasso(100.0)(xs, ys, query).tolist() == [0, 0, 0]


def test_the_nearest_example_is_found():
    xs, ys, _, _, _ = linear_prompts()
    assert torch.allclose(oracles.nearest_neighbours(1)(xs, ys, xs[:, 2]), ys[:, 2])
    assert torch.allclose(EVERY["nearest neighbours"](xs, ys, xs[:, 2]), ys[:, 2])


def test_a_deep_tree_repeats_its_examples():
    xs, ys, _, _, _ = linear_prompts()
    assert torch.allclose(oracles.decision_tree(None)(xs, ys, xs[:, 1]), ys[:, 1])


def test_averaging_is_one_step_of_gradient_descent():
    xs = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    ys = torch.tensor([[3.0, 5.0]])
    # w = ((3, 0) + (0, 10)) / 2
    assert EVERY["averaging"](xs, ys, torch.tensor([[1.0, 1.0]])).tolist() == [6.5]


def test_a_network_learns_what_it_is_shown():
    xs, ys, _, _, _ = linear_prompts(n=1)
    found = oracles.network(50, steps=500)(xs, ys, xs[:, 0])
    assert torch.allclose(found, ys[:, 0], atol=0.1)


@pytest.mark.parametrize("name", EVERY)
def test_prompts_are_fitted_one_by_one(name):
    xs, ys, query, _, _ = linear_prompts()
    whole = EVERY[name](xs, ys, query)
    alone = [EVERY[name](xs[i : i + 1], ys[i : i + 1], query[i : i + 1]) for i in range(3)]
    assert torch.allclose(whole, torch.cat(alone))


@pytest.mark.parametrize("name", EVERY)
def test_without_examples_the_mean_of_all_functions_is_predicted(name):
    found = EVERY[name](torch.zeros(2, 0, 3), torch.zeros(2, 0), torch.ones(2, 3))
    assert found.tolist() == [0, 0]


@pytest.mark.parametrize("name", EVERY)
def test_one_example_is_enough_to_predict(name):
    found = EVERY[name](torch.ones(2, 1, 3), torch.ones(2, 1), torch.ones(2, 3))
    assert torch.isfinite(found).all()


def test_the_oracle_that_is_best_on_the_prompts_is_chosen():
    def constant(value):
        return lambda xs, ys, query: torch.full((len(query),), value)

    xs, ys, query, answer, _ = linear_prompts()
    candidates = {
        "far": constant(9.0),
        "near": constant(float(answer.mean())),
        "low": constant(-7.0),
    }
    assert oracles.choose_oracle(candidates, xs, ys, query, answer) == "near"
    assert oracles.choose_oracle(candidates, xs, ys, query, torch.full((3,), 8.0)) == "far"
    # Not by the largest error of one prompt, but by the mean of squares.
    skewed = torch.tensor([0.0, 0.0, 4.0])
    pair = {"zero": constant(0.0), "four": constant(4.0)}
    assert oracles.choose_oracle(pair, xs, ys, query, skewed) == "zero"


def test_sparse_functions_are_best_fitted_with_a_penalty():
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(12, 9, 8, generator=generator)
    weights = torch.zeros(12, 8)
    weights[:, 0] = torch.randn(12, generator=generator).sign() * 2
    ys = torch.einsum("bpd,bd->bp", xs, weights)
    shown = xs[:, :6], ys[:, :6], xs[:, 8]
    candidates = {str(alpha): oracles.lasso(alpha) for alpha in (0.001, 0.1, 100.0)}
    found = oracles.choose_oracle(candidates, *shown, ys[:, 8])
    errors = {
        name: sum(
            float(predict(*(x[i : i + 1] for x in shown))[0] - ys[i, 8]) ** 2 for i in range(12)
        )
        for name, predict in candidates.items()
    }
    assert found == min(errors, key=errors.get)
    assert found != "100.0"
    assert max(errors.values()) == errors["100.0"]
