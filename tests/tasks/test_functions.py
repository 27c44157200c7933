"""Function classes: values known on paper, scales, seeds."""

import math
import re

import numpy as np
import pytest
import torch

from tvlens.errors import ShapeError, UnknownNameError
from tvlens.tasks.regression.functions import (
    CLASSES,
    DecisionTree,
    Linear,
    NoisyLinear,
    ReluNetwork,
    SparseLinear,
    _Linear,
    _Quadratic,
    _ReluNetwork,
    _Tree,
    function_class,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_linear_is_a_dot_product_with_the_prompts_own_weights():
    functions = _Linear(torch.tensor([[1.0, 2.0], [0.0, -1.0]]))
    xs = torch.tensor([[[1.0, 1.0], [3.0, 0.5]], [[1.0, 1.0], [3.0, 0.5]]])
    assert functions(xs).tolist() == [[3.0, 4.0], [-1.0, -0.5]]


def test_sparse_linear_keeps_as_many_coordinates_as_asked_for():
    functions = SparseLinear(6, n_nonzero=2).draw(200, generator())
    nonzero = functions.weights != 0
    assert (nonzero.sum(dim=1) == 2).all()
    # Every coordinate is as likely as any other: 200 x 2/6 within five standard deviations.
    counts = nonzero.sum(dim=0).double()
    assert ((counts - 200 / 3).abs() < 5 * math.sqrt(200 * 2 / 9)).all()


def test_quadratic_squares_every_coordinate():
    functions = _Quadratic(torch.tensor([[1.0, 2.0]]))
    found = functions(torch.tensor([[[2.0, -1.0]]]))
    assert found.item() == pytest.approx(6 / math.sqrt(3))


def test_relu_network_on_paper():
    first = torch.tensor([[[1.0, -1.0], [0.0, 2.0]]])
    functions = _ReluNetwork(first, torch.tensor([[3.0, 10.0]]))
    # Hidden units read x·(1, 0) and x·(-1, 2); two of them, so the scale is 1.
    found = functions(torch.tensor([[[1.0, 0.0], [-1.0, 1.0], [1.0, 1.0]]]))
    assert found.tolist() == [[3.0, 30.0, 13.0]]


def test_tree_goes_right_where_its_coordinate_is_positive():
    # Node 0 asks coordinate 1; its children ask coordinate 0.
    functions = _Tree(torch.tensor([[1, 0, 0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    xs = torch.tensor([[[-1.0, -1.0], [1.0, -1.0], [-1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]])
    assert functions(xs).tolist() == [[1.0, 2.0, 3.0, 4.0, 1.0]]


def test_trees_have_as_many_leaves_as_their_depth_allows():
    functions = DecisionTree(3, depth=4).draw(5, generator())
    assert functions.coordinates.shape == (5, 15)
    assert functions.leaves.shape == (5, 16)
    assert functions.coordinates.min() >= 0
    assert functions.coordinates.max() <= 2


@pytest.mark.parametrize("name", CLASSES)
def test_the_variance_of_a_class_is_what_it_says(name):
    drawn = function_class(name, 4)
    xs = torch.randn(20_000, 1, 4, generator=generator(1))
    ys = drawn.draw(len(xs), generator(2))(xs)
    assert float(ys.mean()) == pytest.approx(0, abs=0.1)
    assert float(ys.square().mean()) == pytest.approx(drawn.variance, rel=0.1)


@pytest.mark.parametrize("name", CLASSES)
def test_a_batch_of_functions_is_so_many_functions(name):
    drawn = function_class(name, 3)
    xs = torch.randn(4, 5, 3, generator=generator(1))
    whole = drawn.draw(4, generator(2))(xs)
    again = drawn.draw(4, generator(2))(xs)
    assert torch.equal(whole, again)
    other = drawn.draw(4, generator(3))(xs)
    assert not torch.allclose(whole, other)
    # One prompt's points do not matter to another prompt.
    moved = xs.clone()
    moved[0] += 1
    assert torch.equal(drawn.draw(4, generator(2))(moved)[1:], whole[1:])


def test_only_noisy_classes_have_noise():
    assert function_class("noisy-linear", 3, noise_std=0.5).noise == 0.5
    assert {name for name in CLASSES if function_class(name, 3).noise} == {"noisy-linear"}
    assert NoisyLinear(3).draw(1, generator())(torch.zeros(1, 2, 3)).tolist() == [[0.0, 0.0]]


def test_options_reach_the_class():
    assert function_class("relu", 3, n_hidden=7) == ReluNetwork(3, 7)
    assert function_class("sparse-linear", 5, n_nonzero=2) == SparseLinear(5, 2)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("tree", "depth", "x"),
        ("tree", "depth", 0),
        ("sparse-linear", "n_nonzero", 0),
        ("relu", "n_hidden", 2.0),
        ("relu", "n_hidden", True),
        ("noisy-linear", "noise_std", -1),
        ("noisy-linear", "noise_std", math.nan),
    ],
)
def test_options_that_are_no_sizes_are_refused(name, option, value, unchecked):
    kind = "a number, at least 0" if name == "noisy-linear" else "a whole number, at least 1"
    with pytest.raises(ShapeError, match=re.escape(f"{option} is {value!r}; expected {kind}")):
        CLASSES[name](3, **{option: value})


def test_numbers_of_numpy_are_numbers(unchecked):
    assert Linear(np.int64(3)) == Linear(3)
    assert NoisyLinear(3, np.float32(0.5)).noise == 0.5


def test_what_cannot_be_is_refused():
    with pytest.raises(UnknownNameError, match="unknown function class 'cubic'; expected one of l"):
        function_class("cubic", 3)
    with pytest.raises(UnknownNameError, match="class 'relu' has no option 'depth'; it has n_hid"):
        function_class("relu", 3, depth=2)
    with pytest.raises(ShapeError, match="n_nonzero=3: expected between 1 and n_dims=2"):
        SparseLinear(2)
    with pytest.raises(ShapeError, match="Linear: n_dims is 0; expected a whole number, at"):
        function_class("linear", 0)
