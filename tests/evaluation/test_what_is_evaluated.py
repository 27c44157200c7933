"""Whatever is given as a method works, or is refused by name; no number comes from nowhere."""

import pytest
import torch

from helpers import zoo
from tvlens.errors import ShapeError, UnknownNameError, VectorError
from tvlens.evaluation.methods import evaluate
from tvlens.lens.heads import mean_head_outputs
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.vector import TaskVector


@pytest.fixture(scope="module")
def lens():
    return zoo.lens()


@pytest.fixture(scope="module")
def ltvs(lens):
    prompts = zoo.TASK.prompts("train", shots=2, n=3)
    means = mean_head_outputs(lens, prompts, answered_only=False)
    return [
        LearnableTaskVector(means.outputs, start="normal", seed=seed, model="llama", task="t")
        for seed in range(2)
    ]


def values(lens, method, kinds=("zero",)):
    table = evaluate(lens, zoo.TASK, {"mine": method}, kinds=kinds, n=3, exact_match=False)
    return table.loc[table["method"] == "mine", "value"].tolist()


def test_trained_vectors_lists_of_them_and_their_files_are_methods(lens, ltvs, tmp_path):
    one = values(lens, ltvs[0])
    assert values(lens, ltvs[0].task_vector) == pytest.approx(one)
    ltvs[0].save(tmp_path / "ltv.safetensors")
    assert values(lens, tmp_path / "ltv.safetensors") == pytest.approx(one)
    assert values(lens, str(tmp_path / "ltv.safetensors")) == pytest.approx(one)
    both = values(lens, ltvs)
    expected = [(a + b) / 2 for a, b in zip(one, values(lens, ltvs[1]), strict=True)]
    # Perplexity is of the mean cross-entropy.
    assert both[:2] == pytest.approx(expected[:2])
    assert values(lens, {"zero": ltvs}) == pytest.approx(both)


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_vector_is_refused_by_name(lens, ltvs):
    for wrong, words in (
        (torch.zeros(3, 4), "method 'mine' is a Tensor, no vector; give a TaskVector"),
        (torch.zeros(3).numpy(), "method 'mine' is a ndarray, no vector"),
        ([], "method 'mine' is an empty list"),
        ([None, ltvs[0]], "method 'mine': number 0 of its 2 draws is a NoneType, no vector"),
        ({"zero": torch.zeros(3)}, "method 'mine' is a Tensor, no vector"),
    ):
        with pytest.raises(VectorError, match=words):
            values(lens, wrong)
    with pytest.raises(ShapeError, match=r"has shape \(4,\) and type .* \(layer, d_model\)"):
        TaskVector(torch.zeros(4), (1,), "m", "mine")


@pytest.mark.usefixtures("unchecked")
def test_misspelt_kinds_are_refused(lens, ltvs):
    words = "method 'mine' is given for unknown kind 'zero-shot' of prompts; expected 'zero', 'sh"
    with pytest.raises(UnknownNameError, match=words):
        values(lens, {"zero-shot": ltvs[0]})
    with pytest.raises(UnknownNameError, match="is given for 'clean' of prompts, but 'zero' are"):
        values(lens, {"clean": ltvs[0]})
    with pytest.raises(UnknownNameError, match="unknown kind 'zero-shot' of prompts; expected"):
        values(lens, ltvs[0], kinds=("zero-shot",))


def test_a_method_has_rows_for_the_kinds_it_is_given_for_and_no_others(lens, ltvs):
    methods = {"zero alone": {"zero": ltvs[0]}, "each": {"zero": ltvs[0], "clean": ltvs[1]}}
    table = evaluate(lens, zoo.TASK, methods, kinds=("zero", "clean"), n=3, exact_match=False)
    rows = set(table[["method", "prompt"]].itertuples(index=False, name=None))
    assert rows == {
        ("none", "zero"),
        ("icl", "clean"),
        ("zero alone", "zero"),
        ("each", "zero"),
        ("each", "clean"),
    }
    of_each = table[table["method"] == "each"].set_index(["prompt", "metric"])["value"]
    assert of_each["clean"].tolist() == pytest.approx(values(lens, ltvs[1], kinds=("clean",)))
    assert of_each["zero"].tolist() == pytest.approx(values(lens, ltvs[0]))
