"""Vectors of every kind are read back by one call, and files of nothing are refused."""

import pytest
import torch

from tvlens.errors import RunError, UnknownNameError
from tvlens.runs.storage import save_tensors
from tvlens.vectors.catalogue import METHODS, load_vector, method, methods_named, variants
from tvlens.vectors.hendel import DonorState, StateVector
from tvlens.vectors.icv import InContextVector
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.mixing import HeadBlend
from tvlens.vectors.vector import HeadMixture, TaskVector

MIX = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0))
KINDS = [
    TaskVector(torch.ones(2, 4), (1,), "m", "made"),
    HeadMixture(MIX, (0, 1), "m", "made"),
    LearnableTaskVector(torch.ones(2, 3, 4), start="normal", model="m", task="t"),
    StateVector(torch.ones(2, 4), (1,), "m", "made"),
    InContextVector(torch.ones(2, 4), (0, 1), "m", "made"),
    InContextVector(torch.ones(2, 4), (0, 1), "m", "made", "all", everywhere=True),
    DonorState(torch.tensor([0.0, 1.0]), "m", "made"),
    HeadBlend(torch.ones(2, 3), torch.ones(2, 3, 5), "m", "made"),
    HeadBlend(torch.ones(2, 3), None, "m", "made"),
]


@pytest.mark.parametrize("vector", KINDS, ids=[type(v).__name__ for v in KINDS])
def test_every_kind_is_read_back_as_what_it_is(vector, tmp_path):
    vector.save(tmp_path / "v.safetensors")
    found = load_vector(tmp_path / "v.safetensors")
    assert type(found) is type(vector)
    (tensors, facts), (expected, said) = found.state(), vector.state()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[k], expected[k]) for k in tensors if k != "attribution")
    assert {k: tuple(x) if isinstance(x, list) else x for k, x in facts.items()} == said


def test_a_file_without_a_vector_is_refused(tmp_path):
    save_tensors(tmp_path / "v.safetensors", {"z": torch.zeros(2)}, {"model": "m"})
    with pytest.raises(RunError, match=r"holds no Vector: it lacks 'vectors or mix or .*', it"):
        load_vector(tmp_path / "v.safetensors")


def test_names_in_tables_say_what_they_stand_for():
    known = variants()
    assert known["ltv_prompt"].label == "LTV, per prompt"
    assert known["fv_layer_class_dummies"].dummies
    assert "fv_published_prompt" not in known
    assert method("ltv").family == "learned"
    with pytest.raises(UnknownNameError, match="unknown method 'svd'; expected one of fv_layer"):
        method("svd")


def test_arithmetic_of_task_vectors():
    v = TaskVector(torch.ones(3, 4), (1,), "m", "a")
    w = TaskVector(2 * torch.ones(3, 4), (2,), "m", "b")
    assert (-v).vectors[1, 0] == -1
    assert (v / 2).vectors[1, 0] == 0.5
    total = sum([v, w])
    assert total.vectors[:, 0].tolist() == [0, 1, 2]
    assert total.layers == (1, 2)


@pytest.mark.usefixtures("unchecked")
def test_what_replaces_streams_is_not_added_up():
    with pytest.raises(TypeError, match="unsupported operand"):
        TaskVector(torch.ones(3, 4), (1,), "m", "a") + StateVector(torch.ones(3, 4), (1,), "m", "b")


def test_methods_are_asked_for_by_name():
    assert methods_named("default") == (
        "fv_layer",
        "fv_per_layer",
        "fv_published",
        "average",
        "ltv",
        "ltv_lengths",
        "random",
        "permuted",
    )
    assert set(methods_named("all")) == {each.name for each in METHODS}
    assert methods_named("icv, hendel") == ("hendel", "icv")
    with pytest.raises(UnknownNameError, match="unknown method 'svd'; expected one of fv_layer"):
        methods_named("ltv,svd")
    with pytest.raises(UnknownNameError, match="no method is named"):
        methods_named(" ,")
