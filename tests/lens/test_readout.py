import math

import pytest
import torch

from helpers import zoo
from tvlens.errors import NumericalError
from tvlens.lens.readout import FirstToken, Readout


def outputs_and_batch():
    """Two prompts with the answers 2 and 0, two variants each."""
    logits = torch.log(
        torch.tensor([[[0.1, 0.2, 0.7], [0.6, 0.3, 0.1]], [[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]]])
    )
    batch = zoo.Batch.pad([[1], [1]], [[[2, 1]], [[0]]])
    return logits + torch.tensor([3.0, -50.0])[:, None, None], batch


def test_loss_and_score_are_those_of_the_first_answer_token():
    outputs, batch = outputs_and_batch()
    expected = torch.tensor([[0.7, 0.1], [0.5, 0.2]])
    assert torch.allclose(FirstToken().score(outputs, batch), expected, atol=1e-6)
    assert torch.allclose(FirstToken().loss(outputs, batch), -expected.log(), atol=1e-5)


def test_measures_are_accuracy_and_cross_entropy():
    outputs, batch = outputs_and_batch()
    readout = FirstToken()
    assert [m.name for m in readout.measures] == ["accuracy", "cross_entropy"]
    assert [m.higher_is_better for m in readout.measures] == [True, False]
    found = readout.measure(outputs, batch)
    assert found[..., 0].tolist() == [[1, 0], [1, 0]]
    assert found[1, 1, 1].item() == pytest.approx(-math.log(0.2), rel=1e-5)
    assert readout.answered(outputs, batch).tolist() == [[True, False], [True, False]]
    assert isinstance(readout, Readout)


def test_outputs_that_are_not_finite_are_refused():
    outputs, batch = outputs_and_batch()
    outputs[0, 1, 2] = torch.nan
    with pytest.raises(NumericalError, match="logits are NaN or infinite in 1 of 4 rows"):
        FirstToken().measure(outputs, batch)


def several_answers():
    """The same outputs where the first prompt has the answers 1 and 2, the second 0 alone."""
    outputs, _ = outputs_and_batch()
    return outputs, zoo.Batch.pad([[1], [1]], [[[1, 2], [2]], [[0]]])


def test_of_several_right_answers_the_likeliest_counts():
    outputs, batch = several_answers()
    expected = torch.tensor([[0.7, 0.3], [0.5, 0.2]])
    assert torch.allclose(FirstToken().score(outputs, batch), expected, atol=1e-6)
    assert FirstToken().answered(outputs, batch).tolist() == [[True, False], [True, False]]
    assert batch.right.tolist() == [[1, 2], [0, 0]]
    assert batch.target.tolist() == [1, 0]


def test_the_gradient_is_that_of_the_likeliest_and_counts_it_once():
    outputs, batch = several_answers()
    found = outputs.clone().requires_grad_(True)
    FirstToken().loss(found, batch).sum().backward()
    likeliest = torch.tensor([[2, 1], [0, 0]])
    alone = outputs.clone().requires_grad_(True)
    torch.nn.functional.cross_entropy(
        alone.flatten(0, 1), likeliest.flatten(), reduction="sum"
    ).backward()
    assert torch.allclose(found.grad, alone.grad, atol=1e-6)
