"""Classical estimators to hold regression transformers against, from scikit-learn.

An `Oracle` sees what the model sees of each prompt: the examples before the query, and the query.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Oracle: TypeAlias = Callable[
    [
        Float[Tensor, "batch example n_dims"],
        Float[Tensor, "batch example"],
        Float[Tensor, "batch n_dims"],
    ],
    Float[Tensor, " batch"],
]
"""`(examples' x, examples' y, query's x) -> prediction of the query's y`, prompt by prompt."""


def least_squares() -> Oracle:
    """Least squares without intercept; of the many solutions of few examples, the shortest."""
    from sklearn.linear_model import LinearRegression

    return _fitted(lambda n: LinearRegression(fit_intercept=False))


def ridge(alpha: float) -> Oracle:
    """Least squares with the penalty `alpha ‖w‖²`: the posterior mean for noise variance alpha."""
    from sklearn.linear_model import Ridge

    return _fitted(lambda n: Ridge(alpha=alpha, fit_intercept=False))


def lasso(alpha: float) -> Oracle:
    """Least squares with the penalty `alpha Σ|w|` on the mean squared error."""
    from sklearn.linear_model import Lasso

    return _fitted(lambda n: Lasso(alpha=alpha, fit_intercept=False, max_iter=10_000))


def nearest_neighbours(k: int = 3) -> Oracle:
    """Mean y of the k nearest examples, or of all there are, weighted by inverse distance."""
    from sklearn.neighbors import KNeighborsRegressor

    return _fitted(lambda n: KNeighborsRegressor(min(k, n), weights="distance"))


def decision_tree(depth: int | None = 4) -> Oracle:
    """One regression tree of at most this depth."""
    from sklearn.tree import DecisionTreeRegressor

    return _fitted(lambda n: DecisionTreeRegressor(max_depth=depth, random_state=0))


def boosting(n_trees: int = 50) -> Oracle:
    """Gradient-boosted trees."""
    from sklearn.ensemble import GradientBoostingRegressor

    return _fitted(lambda n: GradientBoostingRegressor(n_estimators=n_trees, random_state=0))


def network(n_hidden: int = 100, steps: int = 200) -> Oracle:
    """A two-layer ReLU network trained by Adam on the examples of each prompt."""
    from sklearn.neural_network import MLPRegressor

    return _fitted(
        lambda n: MLPRegressor(
            hidden_layer_sizes=(n_hidden,),
            learning_rate_init=5e-3,
            max_iter=steps,
            random_state=0,
        )
    )


def averaging() -> Oracle:
    """`w = mean of xᵢ yᵢ`: one step of gradient descent from zero (Garg et al. 2022, section 3)."""

    def predict(xs: Tensor, ys: Tensor, query: Tensor) -> Tensor:
        if not xs.shape[1]:
            return query.new_zeros(len(query))
        weights = torch.einsum("bpd,bp->bd", xs, ys) / xs.shape[1]
        return torch.einsum("bd,bd->b", weights, query)

    return predict


def choose_oracle(
    candidates: Mapping[str, Oracle],
    xs: Float[Tensor, "batch example n_dims"],
    ys: Float[Tensor, "batch example"],
    query: Float[Tensor, "batch n_dims"],
    target: Float[Tensor, " batch"],
) -> str:
    """The name of the candidate of lowest squared error on these prompts, those of validation."""
    errors = {
        name: float((predict(xs, ys, query) - target).square().double().mean())
        for name, predict in candidates.items()
    }
    return min(errors, key=errors.__getitem__)


def choose_lasso(
    xs: Float[Tensor, "batch example n_dims"],
    ys: Float[Tensor, "batch example"],
    query: Float[Tensor, "batch n_dims"],
    target: Float[Tensor, " batch"],
) -> Oracle:
    """Lasso with the penalty, of `LASSO_ALPHAS`, that is best on these prompts of validation."""
    candidates = {str(alpha): lasso(alpha) for alpha in LASSO_ALPHAS}
    return candidates[choose_oracle(candidates, xs, ys, query, target)]


def _fitted(make: Callable[[int], Any]) -> Oracle:
    """The oracle that fits an estimator, made for so many examples, to every prompt."""

    def predict(xs: Tensor, ys: Tensor, query: Tensor) -> Tensor:
        from sklearn.exceptions import ConvergenceWarning

        n = xs.shape[1]
        if not n:
            # Nothing is known of the function, whose mean is zero.
            return query.new_zeros(len(query))
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            prompts = (x.double().cpu().numpy() for x in (xs, ys, query[:, None]))
            for points, values, asked in zip(*prompts, strict=True):
                found.append(float(make(n).fit(points, values).predict(asked)[0]))
        return torch.tensor(found, dtype=query.dtype, device=query.device)

    return predict


LASSO_ALPHAS = (0.001, 0.01, 0.1, 1.0)


@dataclass(frozen=True)
class Estimator:
    """An oracle by name.

    Attributes:
        label: its words in legends.
        make: makes it.
        cost: "closed" where all prompts are computed at once, "fast" where one estimator is fitted
            to each, "slow" where that takes long.
    """

    label: str
    make: Callable[[], Oracle]
    cost: Literal["closed", "fast", "slow"] = "fast"


ORACLES: dict[str, Estimator] = {
    "least_squares": Estimator("least squares", least_squares),
    "ridge": Estimator("ridge", lambda: ridge(1.0)),
    "lasso": Estimator("lasso", lambda: lasso(LASSO_ALPHAS[1])),
    "nearest_neighbours": Estimator("3-NN", nearest_neighbours),
    "averaging": Estimator("averaging", averaging, "closed"),
    "tree": Estimator("tree", decision_tree),
    "boosting": Estimator("boosted trees", boosting, "slow"),
    "network": Estimator("MLP", network, "slow"),
}
"""Every estimator that regression models are held against, in the order of tables and legends."""
