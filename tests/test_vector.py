from dataclasses import replace

import pytest
import torch
import zoo

from tvlens.edits import NoEdit
from tvlens.errors import NumericalError, RunError, ShapeError
from tvlens.methods.vector import TaskVector, require_fit, stack_vectors


def vector(layers=(0, 2), sign=1.0, model="llama", **changes):
    values = sign * torch.arange(1.0, 97).view(3, 32)
    return replace(TaskVector(values, layers, model, "made"), **changes)


def dense(made):
    """What is added at every layer, zeros where nothing is."""
    found = torch.zeros_like(made.vectors)
    found[list(made.layers)] = made.vectors[list(made.layers)]
    return found


def test_algebra_is_that_of_what_is_added():
    a, b = vector((0, 2)), vector((1, 2), sign=-2.0)
    assert torch.equal(dense(a + b), dense(a) + dense(b))
    assert torch.equal(dense(a - b), dense(a) - dense(b))
    assert torch.equal(dense(3.0 * a), 3 * dense(a))
    assert torch.equal(dense(a * 0.5), 0.5 * dense(a))
    assert (a + b).layers == (0, 1, 2)
    assert not dense(a - a).any()
    assert (a + b).origin == "(made + made)"
    assert (2.0 * a).origin == "made x 2"


def test_stacked_vectors_are_variants_in_order(lens):
    edit = stack_vectors([vector((0,)), TaskVector.none(lens), vector((1, 2), -1.0)], lens)
    assert edit.active.tolist() == [[True, False, False], [False] * 3, [False, True, True]]
    assert edit.first_layer.tolist() == [0, 3, 1]
    assert torch.equal(edit.vectors[0, 2], vector(sign=-1.0).vectors)


def test_no_vector_is_no_edit(lens):
    none = stack_vectors([TaskVector.none(lens)], lens)
    reading = lens.engine.read(zoo.batch())
    assert torch.equal(lens.engine.run(reading, none), lens.engine.run(reading, NoEdit(3)))


def test_vectors_take_the_precision_of_the_model():
    half = zoo.backend("llama", "bridge", torch.bfloat16)
    edit = stack_vectors([vector()], replace(zoo.lens(), backend=half))
    assert edit.vectors.dtype == torch.bfloat16


def test_saved_and_read_back(tmp_path):
    made = vector()
    made.save(tmp_path / "vector.safetensors")
    found = TaskVector.load(tmp_path / "vector.safetensors")
    assert torch.equal(found.vectors, made.vectors)
    assert (found.layers, found.model, found.origin) == ((0, 2), "llama", "made")
    assert [path.name for path in tmp_path.iterdir()] == ["vector.safetensors"]


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "vector.safetensors"
    vector().save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RunError, match=r"cannot read .*vector.safetensors: .*; delete it and make"):
        TaskVector.load(path)
    with pytest.raises(RunError, match=r"cannot read .*nowhere"):
        TaskVector.load(tmp_path / "nowhere")


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        vector().save(tmp_path / "file" / "vector.safetensors")


@pytest.mark.parametrize("layer", [-1, 3])
def test_layers_out_of_range_are_refused(layer):
    words = rf"layer {layer} is out of range: the model has 3 layers \(0-2\)"
    with pytest.raises(ShapeError, match=words):
        vector((0, layer))


def test_numbers_that_are_not_finite_are_refused_where_they_are_added():
    values = vector().vectors.clone()
    values[1, 5] = torch.inf
    vector((0, 2), vectors=values)
    with pytest.raises(NumericalError, match=r"task vector \(made\) holds NaN or infinite numbers"):
        vector((0, 1), vectors=values)


def test_vectors_of_another_model_are_refused(lens):
    other = TaskVector(torch.zeros(3, 16), (0,), "other", "made")
    words = (
        "task vector of 'other' has 3 layers and d_model 16, model 'llama' has 3 and 32; make the "
        "vector on the model it is used on"
    )
    with pytest.raises(ShapeError, match=words):
        stack_vectors([vector(), other], lens)
    with pytest.raises(ShapeError, match="'other' has 3 layers"):
        vector() + other
    require_fit(other, 3, 16, "any")
