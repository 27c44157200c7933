"""Prompts of points: kinds, shifts, splits, seeds."""

import pytest
import torch

from tvlens.errors import TaskError, UnknownNameError
from tvlens.tasks.function_task import FunctionTask
from tvlens.tasks.functions import Linear, NoisyLinear
from tvlens.tasks.inputs import SHIFTS
from tvlens.tasks.prompts import PromptSet, PromptSource

TASK = FunctionTask("linear", Linear(4))


def weights(prompts):
    """The linear functions behind clean prompts that show more points than dimensions."""
    return torch.linalg.lstsq(prompts.xs[:, :-1], prompts.ys[:, :-1, None]).solution[..., 0]


def test_prompts_are_what_lenses_ask():
    assert isinstance(TASK, PromptSource)
    assert isinstance(TASK.prompts("test", n=2), PromptSet)


def test_clean_prompts_show_one_linear_function_each():
    prompts = TASK.prompts("train", shots=6, n=5)
    assert prompts.xs.shape == (5, 7, 4)
    assert (len(prompts), prompts.shots, prompts.kind) == (5, 6, "clean")
    found = torch.einsum("bd,bd->b", weights(prompts), prompts.xs[:, -1])
    assert torch.allclose(found, prompts.target, atol=1e-4)
    assert torch.equal(prompts.ys[:, -1], prompts.target)


def test_kinds_ask_the_same_queries_of_the_same_functions():
    clean, zero, shuffled = (
        TASK.prompts("test", shots=6, n=5, kind=kind) for kind in ("clean", "zero", "shuffled")
    )
    assert torch.equal(zero.xs, clean.xs[:, -1:])
    assert zero.shots == 0
    assert torch.equal(shuffled.xs, clean.xs)
    for other in (zero, shuffled):
        assert torch.equal(other.target, clean.target)
    assert torch.equal(shuffled.ys.sort(dim=1).values, clean.ys.sort(dim=1).values)
    assert (shuffled.ys[:, :-1] != clean.ys[:, :-1]).all()


def test_splits_and_seeds_share_nothing():
    sets = [TASK.prompts(split, n=3) for split in ("train", "validation", "test")]
    sets.append(TASK.prompts("train", n=3, seed=1))
    for i, first in enumerate(sets):
        for second in sets[i + 1 :]:
            assert not torch.isin(first.xs, second.xs).any()
    assert torch.equal(TASK.prompts("train", n=3).xs, sets[0].xs)
    assert [len(TASK.prompts(split)) for split in ("train", "validation", "test")] == [
        1024,
        256,
        256,
    ]


def test_noise_is_on_what_is_shown_and_not_on_what_is_asked():
    noisy = FunctionTask("noisy", NoisyLinear(2, noise_std=0.5)).prompts("train", shots=8, n=400)
    clean = torch.einsum("bd,bd->b", weights(noisy), noisy.xs[:, -1])
    residual = noisy.ys[:, :-1] - torch.einsum("bpd,bd->bp", noisy.xs[:, :-1], weights(noisy))
    # 8 points less 2 fitted weights leave 6 degrees of freedom.
    assert float((residual.square().sum(1) / 6).mean().sqrt()) == pytest.approx(0.5, rel=0.05)
    assert float((clean - noisy.target).abs().mean()) > 0.05
    assert float((noisy.ys[:, -1] - noisy.target).std()) == pytest.approx(0.5, rel=0.1)


def test_skewed_inputs_keep_their_length_and_lose_their_roundness():
    xs = FunctionTask("linear", Linear(4), "skewed").prompts("train", shots=400, n=40).xs
    covariance = xs.transpose(1, 2) @ xs / xs.shape[1]
    eigenvalues = torch.linalg.eigvalsh(covariance).mean(dim=0).flip(0)
    expected = 4 / torch.tensor([1, 2, 3, 4]) / (1 + 1 / 2 + 1 / 3 + 1 / 4)
    assert torch.allclose(eigenvalues, expected, rtol=0.06)


def test_doubled_inputs_are_twice_those_of_training():
    doubled = FunctionTask("linear", Linear(4), "doubled").prompts("train", n=3)
    assert torch.equal(doubled.xs, 2 * TASK.prompts("train", n=3).xs)


def test_an_orthogonal_query_shares_no_direction_with_the_examples():
    task = FunctionTask("linear", Linear(4), "orthogonal-query")
    found, plain = task.prompts("train", shots=3, n=5), TASK.prompts("train", shots=3, n=5)
    assert torch.equal(found.xs[:, :-1], plain.xs[:, :-1])
    products = torch.einsum("bpd,bd->bp", found.xs[:, :-1], found.xs[:, -1])
    assert products.abs().max() < 1e-4
    assert torch.allclose(found.xs[:, -1].norm(dim=1), plain.xs[:, -1].norm(dim=1), rtol=1e-4)
    # Nothing is orthogonal to as many examples as there are dimensions.
    assert torch.equal(
        task.prompts("train", shots=4, n=5).xs, TASK.prompts("train", shots=4, n=5).xs
    )


def test_curves_ask_prompts_at_several_numbers_of_points():
    curves = TASK.curves("test", points=(1, 3, 8), n=2)
    assert isinstance(curves, PromptSet)
    assert (len(curves), curves.shots) == (6, 7)
    assert curves.query.tolist() == [0, 4, 14, 0, 4, 14]
    assert torch.equal(curves.target, curves.values[:, [0, 2, 7]].flatten())
    short = curves.at(3)
    assert torch.equal(short.xs, curves.xs[:, :3])
    assert torch.equal(short.target, curves.values[:, 2])
    with pytest.raises(TaskError, match=r"curves at \[0, 3\] points asked for; expected one or"):
        TASK.curves("test", points=(0, 3))
    with pytest.raises(TaskError, match=r"curves at \[\] points asked for"):
        TASK.curves("test", points=())
    with pytest.raises(TaskError, match="the query of shift 'orthogonal-query' depends on the num"):
        FunctionTask("x", Linear(4), "orthogonal-query").curves("test", points=(2,))


@pytest.mark.parametrize("shift", [name for name in SHIFTS if name != "noisy-labels"])
def test_targets_are_of_the_shifted_query(shift):
    prompts = FunctionTask("linear", Linear(2), shift).prompts("train", shots=6, n=5)
    found = torch.einsum("bd,bd->b", weights(prompts), prompts.xs[:, -1])
    assert torch.allclose(found, prompts.target, atol=1e-3)


def test_digests_tell_tasks_apart():
    others = [FunctionTask("linear", Linear(3)), FunctionTask("linear", Linear(4), "skewed")]
    others.append(FunctionTask("linear", NoisyLinear(4)))
    assert len({task.digest for task in [TASK, *others]}) == 4
    assert FunctionTask("other name", Linear(4)).digest == TASK.digest


def test_what_cannot_be_asked_is_refused(unchecked):
    with pytest.raises(
        UnknownNameError, match="unknown shift 'bent' of task 'x'; expected one of n"
    ):
        FunctionTask("x", Linear(2), "bent")
    with pytest.raises(TaskError, match="unknown split 'dev'; expected one of 'train'"):
        TASK.prompts("dev")
    with pytest.raises(TaskError, match="unknown kind 'mixed'; expected one of 'zero'"):
        TASK.prompts("test", kind="mixed")
    with pytest.raises(TaskError, match="unknown split 'dev'; expected one of 'train'"):
        TASK.curves("dev", points=(2,))
    with pytest.raises(TaskError, match=r"0 curves at \[2\] points asked for; expected one or"):
        TASK.curves("test", points=(2,), n=0)
    with pytest.raises(TaskError, match="0 prompts of kind 'clean' with 10 shots asked for"):
        TASK.prompts("test", n=0)
    with pytest.raises(TaskError, match="with 1 shots asked for; expected at least 1 prompt and 2"):
        TASK.prompts("test", shots=1, kind="shuffled")
