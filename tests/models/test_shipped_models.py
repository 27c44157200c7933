"""The regression models inside the package: they are there, they are small, they have learned."""

from pathlib import Path

import pytest
import torch

import tvlens
from helpers import zoo
from helpers.commands import ok
from tvlens.errors import RunError, UnknownNameError
from tvlens.lens.readout import SquaredError
from tvlens.models.catalogue import (
    is_regression,
    known_models,
    list_shipped,
    load_shipped,
    read_regression,
)
from tvlens.models.regression.training import preset
from tvlens.models.regression.transformer import RegressionTransformer, save_regression
from tvlens.tasks.regression import oracles
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.task import FunctionTask

NAMES = list_shipped()
BELOW = {
    "linear": ["averaging", "nearest_neighbours"],
    "sparse-linear": ["averaging", "nearest_neighbours"],
    "relu": ["averaging", "nearest_neighbours"],
    "tree": ["averaging", "nearest_neighbours", "least_squares"],
}
AT_MOST = {"linear": 0.03, "sparse-linear": 0.05}


def drawn(model, card):
    return function_class(card["functions"], model.sizes.n_dims, **card["settings"]["options"])


def prompts(model, card, n=1000):
    shots = card["train_points"] - 1
    return FunctionTask("t", drawn(model, card)).prompts("test", shots=shots, n=n, seed=1)


def test_some_are_shipped():
    assert "linear-small" in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_card_says_how_it_was_made(name):
    model, card = load_shipped(name)
    assert {"functions", "inputs", "train_points", "settings", "seed", "seconds"} <= card.keys()
    assert {"machine", "torch", "start", "error", "least_squares", "n_test"} <= card.keys()
    assert card["variance"] == drawn(model, card).variance
    assert model.sizes.n_layer * model.sizes.n_head >= 24
    assert model.sizes.n_points >= 2.5 * card["train_points"]
    assert not model.training


@pytest.mark.parametrize("name", NAMES)
def test_the_error_is_what_the_card_says_on_prompts_of_another_seed(name):
    model, card = load_shipped(name)
    asked = prompts(model, card)
    with torch.no_grad():
        predicted = model(asked.xs, asked.ys)[:, -1]
    squares = (predicted - asked.target).square().double() / card["variance"]
    # Four standard errors of the difference of two means, the card's over 4,000 prompts.
    spread = 4 * float(squares.std()) * (1 / 1000 + 1 / card["n_test"]) ** 0.5
    assert float(squares.mean()) == pytest.approx(card["error"], abs=spread)


@pytest.mark.parametrize("name", NAMES)
def test_it_has_really_learned(name):
    model, card = load_shipped(name)
    assert card["error"] <= AT_MOST.get(card["functions"], 1.0)
    asked = prompts(model, card)
    with torch.no_grad():
        off = model(asked.xs, asked.ys)[:, -1] - asked.target
    error = float(off.square().mean())
    for estimator in BELOW[card["functions"]]:
        predict = getattr(oracles, estimator)()
        guess = predict(asked.xs[:, :-1], asked.ys[:, :-1], asked.xs[:, -1])
        assert error < 0.9 * float((guess - asked.target).square().mean()), estimator


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_lens_on_it_replays_the_trained_numbers(name, kind):
    lens = tvlens.load(name, backend=kind)
    model, card = load_shipped(name)
    assert lens.name == name
    assert lens.engine.name == "replay"
    assert isinstance(lens.readout, SquaredError)
    assert lens.readout.variance == card["variance"]
    asked = prompts(model, card, n=20)
    error = lens.outputs(asked, tvlens.NoEdit(lens.n_layer), lens.readout.measure)[:, 0, 0]
    with torch.no_grad():
        off = model(asked.xs, asked.ys)[:, -1] - asked.target
    assert zoo.off(error, off.square() / card["variance"]) < 1e-4


@pytest.mark.usefixtures("wide")
def test_the_command_lists_them():
    said = ok("regression", "models")
    for name in NAMES:
        assert name in said


def test_an_unknown_name_is_refused():
    with pytest.raises(
        UnknownNameError, match=r"no shipped regression model 'cubic-small'; expect"
    ):
        load_shipped("cubic-small")


def test_all_of_them_fit_the_package():
    folder = Path(tvlens.__file__).parent / "models" / "regression" / "weights"
    files = list(folder.iterdir())
    assert {file.stem for file in files} == set(NAMES)
    assert sum(file.stat().st_size for file in files) <= 25e6


@pytest.fixture
def file(tmp_path):
    """A model of somebody's own, with the variance of its class in the card."""
    made = RegressionTransformer(preset("tiny").sizes)
    zoo.randomise(made)
    path = tmp_path / "mine.safetensors"
    save_regression(made, path, {"variance": 2.5}, dtype=torch.float32)
    return path, made


def test_names_and_files_of_regression_models_are_told_from_others(file):
    path, _ = file
    for model in (NAMES[0], str(path), path, "nowhere.safetensors"):
        assert is_regression(model)
    for model in ("smollm2-135m", "linear", path.parent, torch.nn.Linear(1, 1)):
        assert not is_regression(model)


def test_a_regression_model_is_read_by_its_name_or_its_file(file):
    path, made = file
    found, card = read_regression(NAMES[0])
    expected, expected_card = load_shipped(NAMES[0])
    assert (found.digest, card) == (expected.digest, expected_card)
    for given in (path, str(path)):
        found, card = read_regression(given)
        assert (found.digest, card) == (made.digest, {"variance": 2.5})
    words = r"no regression model 'nowhere.safetensors': no shipped model has this name \(linear-sm"
    with pytest.raises(UnknownNameError, match=words):
        read_regression("nowhere.safetensors")
    path.write_bytes(b"no model")
    with pytest.raises(RunError, match=r"cannot read .*mine\.safetensors"):
        read_regression(path)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_lens_on_a_file_reads_errors_over_the_variance_of_its_card(file, kind):
    path, made = file
    lens = tvlens.load(path, backend=kind)
    assert lens.name == "mine"
    assert tvlens.load(str(path), backend=kind, name="other").name == "other"
    asked = FunctionTask("t", function_class("linear", 1)).prompts("test", shots=4, n=5)
    error = lens.outputs(asked, tvlens.NoEdit(lens.n_layer), lens.readout.measure)[:, 0, 0]
    with torch.no_grad():
        off = made.eval()(asked.xs, asked.ys)[:, -1] - asked.target
    assert zoo.off(error, off.square() / 2.5) < 1e-4


def test_every_model_with_a_name_says_where_it_comes_from():
    known = known_models()
    assert known["smollm2-135m"] == "downloaded"
    assert {name for name, origin in known.items() if origin == "included"} == set(list_shipped())
