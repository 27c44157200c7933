"""Prompts of points: kinds, shifts, splits, seeds."""

import pytest
import torch

from tvlens.errors import TaskError, UnknownNameError
from tvlens.tasks.base import HasDonors, HasPlaces, PromptSet, PromptSource
from tvlens.tasks.regression.functions import Linear, NoisyLinear, SparseLinear
from tvlens.tasks.regression.inputs import SHIFTS
from tvlens.tasks.regression.task import FunctionTask

TASK = FunctionTask("linear", Linear(4))
TRAINED = FunctionTask("linear", Linear(4), train_points=6)


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


def test_donors_of_clean_prompts_are_their_own_first_points():
    for shots, points in ((2, 3), (5, 6), (9, 6)):
        prompts = TRAINED.prompts("train", shots=shots, n=3)
        donors = prompts.donors()
        assert isinstance(prompts, HasDonors)
        assert torch.equal(donors.xs, prompts.xs[:, :points])
        assert torch.equal(donors.ys, prompts.ys[:, :points])
        assert torch.equal(donors.target, prompts.ys[:, points - 1])
        assert (donors.kind, donors.points) == ("clean", (points,))


@pytest.mark.parametrize("kind", ["zero", "shuffled"])
@pytest.mark.parametrize("shift", ["none", "skewed", "doubled", "orthogonal-query"])
def test_donors_of_prompts_that_do_not_tell_show_other_points_of_the_same_functions(kind, shift):
    task = FunctionTask("linear", Linear(4), shift, train_points=6)
    clean = task.prompts("train", shots=8, n=5)
    prompts = task.prompts("train", shots=8, n=5, kind=kind)
    donors = prompts.donors()
    assert (len(donors), donors.points, donors.kind) == (5, (6,), "clean")
    assert torch.allclose(weights(donors), weights(clean), atol=1e-2)
    value = torch.einsum("bd,bd->b", weights(clean), donors.xs[:, -1])
    assert torch.allclose(value, donors.target, atol=1e-3)
    for other in (clean, prompts):
        assert not torch.isin(donors.xs, other.xs).any()
    again = task.prompts("train", shots=8, n=5, kind=kind).donors()
    assert torch.equal(again.xs, donors.xs)
    for changes in ({"seed": 1}, {"shots": 7}):
        asked = {"shots": 8, "n": 5, "kind": kind} | changes
        assert not torch.isin(task.prompts("train", **asked).donors().xs, donors.xs).any()


def test_zero_and_shuffled_prompts_of_a_query_have_the_same_donors():
    zero, shuffled = (
        TRAINED.prompts("test", shots=6, n=5, kind=kind).donors() for kind in ("zero", "shuffled")
    )
    assert torch.equal(zero.xs, shuffled.xs)
    assert torch.allclose(weights(zero), weights(shuffled))


def test_knowing_the_training_length_changes_no_prompt():
    for kind in ("clean", "zero", "shuffled"):
        known, unknown = (task.prompts("test", n=4, kind=kind) for task in (TRAINED, TASK))
        assert torch.equal(known.xs, unknown.xs)
        assert torch.equal(known.ys, unknown.ys)
        assert torch.equal(known.target, unknown.target)


def test_rows_of_a_curve_take_the_prompts_own_first_points():
    curves = TRAINED.curves("test", points=(1, 4, 6, 9), n=3)
    donors = curves.donors()
    assert donors.points == (1, 4, 6, 6)
    assert len(donors) == len(curves)
    assert donors.xs is curves.xs
    assert torch.equal(donors.target, curves.values[:, [0, 3, 5, 5]].flatten())
    for points, expected in ((4, 4), (9, 6)):
        assert torch.equal(curves.at(points).donors().xs, curves.xs[:, :expected])


@pytest.mark.parametrize("kind", ["clean", "zero", "shuffled"])
def test_without_a_training_length_there_are_no_donors(kind):
    words = (
        "task 'linear' does not say how many points the model was trained on, so its prompts have "
        r"no donors to take head outputs from; make it with FunctionTask\(..., train_points=N\)"
    )
    with pytest.raises(TaskError, match=words):
        TASK.prompts("test", n=2, kind=kind).donors()
    curves = TASK.curves("test", points=(2, 5), n=2)
    for prompts in (curves, curves.at(2)):
        with pytest.raises(TaskError, match=words):
            prompts.donors()


def test_the_last_points_of_curves_are_cut_out_row_by_row():
    curves = FunctionTask("noisy", NoisyLinear(4)).curves("test", points=(2, 5, 3, 8), n=3)
    last = curves.last(3)
    assert (len(last), last.points, last.kind) == (6, (3,), "clean")
    for prompt in range(3):
        for column, end in enumerate((5, 8)):
            row = 2 * prompt + column
            assert torch.equal(last.xs[row], curves.xs[prompt, end - 3 : end])
            assert torch.equal(last.ys[row], curves.ys[prompt, end - 3 : end])
            assert last.target[row] == curves.values[prompt, end - 1]
    words = (
        r"curves at \[2, 5, 3, 8\] points have nothing to cut to the last 8; ask for more points"
    )
    with pytest.raises(TaskError, match=words):
        curves.last(8)


def test_the_first_prompts_of_curves_are_those():
    curves = TRAINED.curves("test", points=(2, 5), n=4)
    few = curves.first(3)
    assert (len(few), few.points) == (6, (2, 5))
    assert torch.equal(few.target, curves.target[:6])
    assert torch.equal(few.xs, curves.xs[:3])
    assert torch.equal(few.at(5).ys, curves.at(5).ys[:3])
    assert few.donors().points == (2, 5)


def test_pairs_of_zeros_stand_where_they_are_asked_for():
    prompts = TRAINED.prompts("test", shots=10, n=3)
    made = prompts.with_dummies((0.0, 0.1, 0.3, 0.3, 1.0))
    # Before example 0, after 1, twice after 3, and after all 10, each counted behind the others.
    assert made.dummies == (0, 2, 5, 6, 14)
    assert made.places == (0, 4, 10, 12, 28)
    assert isinstance(made, HasPlaces)
    assert made.xs.shape == (3, 16, 4)
    assert not made.xs[:, made.dummies].any()
    assert not made.ys[:, made.dummies].any()
    real = [i for i in range(16) if i not in made.dummies]
    assert torch.equal(made.xs[:, real], prompts.xs)
    assert torch.equal(made.ys[:, real], prompts.ys)
    assert torch.equal(made.target, prompts.target)
    assert (made.shots, made.points) == (10, (11,))
    assert torch.equal(made.donors().xs, prompts.donors().xs)
    assert prompts.dummies == prompts.with_dummies(()).dummies == ()
    assert prompts.places == ()


def test_noisy_labels_hide_a_twentieth_of_the_variance_from_what_is_asked():
    task = FunctionTask("linear", Linear(4), "noisy-labels", train_points=6)
    plain, noisy = (made.prompts("train", shots=30, n=400) for made in (TASK, task))
    assert torch.equal(noisy.xs, plain.xs)
    assert torch.equal(noisy.target, plain.target)
    noise = noisy.ys - plain.ys
    assert float(noise.square().mean()) == pytest.approx(0.05 * 4, rel=0.05)
    assert float((noise * plain.ys).mean()) == pytest.approx(0, abs=0.03)
    curves = task.curves("test", points=(3,), n=400)
    off = curves.ys - curves.values
    assert float(off.square().mean()) == pytest.approx(0.2, rel=0.15)
    donors = task.prompts("train", shots=30, n=400, kind="zero").donors()
    values = torch.einsum("bpd,bd->bp", donors.xs, weights(plain))
    assert float((donors.ys - values).square().mean()) == pytest.approx(0.2, rel=0.1)
    assert torch.allclose(donors.target, values[:, -1], atol=1e-3)


def test_only_a_shift_of_the_query_alone_has_no_curves():
    without = [name for name in SHIFTS if not FunctionTask("x", Linear(2), name).has_curves]
    assert without == ["orthogonal-query"]


CARD = {"functions": "sparse-linear", "settings": {"options": {"n_nonzero": 2}}, "train_points": 9}


def test_a_card_says_what_a_model_was_trained_on():
    task = FunctionTask.of_card("mine", CARD | {"error": 0.1}, 5)
    assert task == FunctionTask("mine", SparseLinear(5, n_nonzero=2), train_points=9)
    assert task.require_train_points() == 9
    with pytest.raises(TaskError, match="task 'linear' does not say how many points"):
        TASK.require_train_points()


@pytest.mark.parametrize(
    ("changes", "lacks"),
    [
        ({"functions": None}, "functions"),
        ({"train_points": None}, "train_points"),
        ({"settings": None}, "settings"),
        ({"settings": {}}, "options"),
    ],
)
def test_a_card_without_them_is_refused(changes, lacks):
    card = {key: value for key, value in (CARD | changes).items() if value is not None}
    words = f"the model card of 'mine' lacks '{lacks}'; expected functions, train_points and"
    with pytest.raises(TaskError, match=words):
        FunctionTask.of_card("mine", card, 5)


def test_the_training_length_tells_tasks_apart():
    assert TRAINED.digest != TASK.digest
    assert TRAINED.digest == FunctionTask("other name", Linear(4), train_points=6).digest
