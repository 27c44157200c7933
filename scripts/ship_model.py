"""Puts a trained regression model among those that tvlens ships.

    tvlens regression train --functions linear --preset small --precision bfloat16 --out runs/linear
    python scripts/ship_model.py runs/linear/model.safetensors linear-small

Weights are stored in half precision. The errors in the card are measured anew on what is stored,
on prompts that no training saw: the model's and those of classical estimators at `train_points`
points, squared, over the variance of the function's values.
"""

import sys
from pathlib import Path

import torch

from tvlens.models.regression.transformer import load_regression, save_regression
from tvlens.tasks.regression import oracles
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.task import FunctionTask

WEIGHTS = Path(__file__).parents[1] / "tvlens" / "models" / "regression" / "weights"
N_PROMPTS = 4000
ESTIMATORS = {
    "least_squares": oracles.least_squares(),
    "averaging": oracles.averaging(),
    "nearest_neighbours": oracles.nearest_neighbours(),
    "decision_tree": oracles.decision_tree(),
}


def main(source: str, name: str) -> None:
    """Stores the model of `source` as the shipped model `name` and prints its errors."""
    model, card = load_regression(source)
    path = WEIGHTS / f"{name}.safetensors"
    save_regression(model, path, card, dtype=torch.float16)
    stored, _ = load_regression(path)
    options = card["settings"]["options"]
    drawn = function_class(card["functions"], model.sizes.n_dims, **options)
    shots = card["train_points"] - 1
    prompts = FunctionTask(name, drawn).prompts("test", shots=shots, n=N_PROMPTS, seed=0)
    with torch.no_grad():
        found = {"error": stored(prompts.xs, prompts.ys)[:, -1]}
    for estimator, predict in ESTIMATORS.items():
        found[estimator] = predict(prompts.xs[:, :-1], prompts.ys[:, :-1], prompts.xs[:, -1])
    errors = {
        key: float((values - prompts.target).square().double().mean()) / drawn.variance
        for key, values in found.items()
    }
    card |= errors | {"n_test": N_PROMPTS, "stored_as": "float16"}
    save_regression(model, path, card, dtype=torch.float16)
    print(f"{path.name}, {path.stat().st_size:,} bytes")
    for key, error in errors.items():
        print(f"  {key}: {error:.4f}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
