"""Vectors to and from dictionaries of layers and GGUF control vectors."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from helpers import tiny_regression, zoo
from tvlens.errors import NumericalError, RunError, ShapeError, VectorError
from tvlens.lens.edits import AddToResidual
from tvlens.vectors import load_gguf, of_layers, save_gguf, to_layers
from tvlens.vectors.hendel import DonorState, StateVector
from tvlens.vectors.icv import InContextVector
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.mixing import HeadBlend
from tvlens.vectors.vector import HeadMixture, TaskVector


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def vector(layers=(1, 2), **changes):
    made = TaskVector(numbers(zoo.N_LAYER, zoo.D_MODEL), layers, "llama", "made", "all")
    return replace(made, **changes)


def gguf_file(path: Path, architecture="controlvector", **tensors):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    for name, values in tensors.items():
        writer.add_tensor(name.replace("_", "."), np.asarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_layers_are_there_and_back(lens):
    layers = to_layers(vector((2, 0)))
    assert list(layers) == [0, 2]
    back = of_layers(layers, lens)
    assert back.layers == (0, 2)
    assert back.model == lens.name
    assert torch.equal(back.vectors[[0, 2]], vector().vectors[[0, 2]])
    assert not back.vectors[1].any()


def test_a_vector_behind_a_layer_acts_as_a_hook_on_that_block_does(lens):
    """The convention of steering-vectors, repeng and llama.cpp: behind block N, counted from 0."""
    prompts = zoo.TASK.prompts("train", shots=1, n=1)
    made = of_layers({1: vector().vectors[1]}, lens)
    batch = lens.encode(prompts)
    found = lens.outputs(prompts, made.edit(lens, prompts), lambda outputs, _: outputs)[0, 0]

    def add(activation, hook):
        activation[:, -1] += made.vectors[1]
        return activation

    hooks = [(lens.backend.residual_hook(1), add)]
    with torch.no_grad(), lens.backend.hooks(hooks):
        expected = lens.backend.forward(batch.inputs, batch.mask)[0, -1]
    assert zoo.off(found, expected) < 1e-4


def test_negative_layers_count_from_the_last_and_further_axes_are_left_out(lens):
    made = of_layers({-1: numbers(1, 1, zoo.D_MODEL).half()}, lens)
    assert made.layers == (zoo.N_LAYER - 1,)
    assert made.vectors.dtype == torch.float32


def test_an_ltv_of_means_is_what_it_adds():
    ltv = LearnableTaskVector(numbers(3, 4, 8), start="normal", task="t")
    layers = to_layers(ltv)
    assert list(layers) == [0, 1, 2]
    assert torch.allclose(layers[1], ltv()[1].detach())
    assert not layers[1].requires_grad


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (StateVector(numbers(3, 8), (1,), "m", "Hendel's"), "StateVector.*replaces"),
        (InContextVector(numbers(3, 8), (1,), "m", "icv"), "turns"),
        (HeadMixture(numbers(3, 3, 4), (1,), "m", "mixture"), "made anew for each prompt"),
        (HeadBlend(torch.rand(3, 4), None, "m", "blend"), "hook_z"),
        (DonorState(torch.eye(3)[0], "m", "donor"), "donor"),
        (LearnableTaskVector(numbers(3, 4, 8), norms=torch.ones(3, 4)), "made anew for each"),
    ],
)
def test_what_acts_in_another_way_is_refused_by_name(made, says, tmp_path):
    with pytest.raises(VectorError, match=rf"(?s){says}.*expected a TaskVector"):
        to_layers(made)
    with pytest.raises(VectorError, match="control vector can only say"):
        save_gguf(made, tmp_path / "v.gguf", everywhere=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("layers", "error", "says"),
    [
        ({}, VectorError, "hold no vector"),
        ({3: numbers(32)}, ShapeError, r"layer 3, and 'llama' has 3 layers \(0-2\)"),
        ({-4: numbers(32)}, ShapeError, "layer -4"),
        ({1: numbers(31)}, ShapeError, r"\(31,\).*d_model 32"),
        ({1: numbers(2, 32)}, ShapeError, r"\(2, 32\)"),
        ({2: numbers(32), -1: numbers(32)}, ShapeError, "layer 2 twice"),
        ({1: numbers(32) / 0}, NumericalError, "layer 1 holds NaN"),
    ],
)
def test_layers_that_do_not_fit_are_refused(layers, error, says):
    with pytest.raises(error, match=says):
        of_layers(layers, zoo.lens())


def test_a_control_vector_is_written_as_llama_cpp_reads_it(tmp_path):
    save_gguf(vector((1, 2)), tmp_path / "v.gguf", model_hint="llama")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    assert reader.get_field("general.architecture").contents() == "controlvector"
    assert reader.get_field("controlvector.model_hint").contents() == "llama"
    assert reader.get_field("controlvector.layer_count").contents() == 2
    assert [each.name for each in reader.tensors] == ["direction.1", "direction.2"]
    for each in reader.tensors:
        assert each.tensor_type == gguf.GGMLQuantizationType.F32
        assert np.array_equal(each.data, vector().vectors[int(each.name[-1])].numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["v.gguf"]


def test_a_control_vector_is_read_as_it_was_written(tmp_path, lens):
    save_gguf(vector((2,)), tmp_path / "v.gguf")
    back = load_gguf(tmp_path / "v.gguf", lens)
    assert back.layers == (2,)
    assert back.positions == "all"
    assert torch.equal(back.vectors[2], vector().vectors[2])
    assert back.acts is AddToResidual


def test_a_vector_at_the_query_says_that_every_token_is_meant(tmp_path):
    lens = tiny_regression.lens()
    made = TaskVector(numbers(lens.n_layer, lens.d_model), (1,), lens.name, "made")
    with pytest.raises(VectorError, match=r"'query' alone.*everywhere=True"):
        save_gguf(made, tmp_path / "v.gguf")
    save_gguf(made, tmp_path / "v.gguf", everywhere=True)
    assert load_gguf(tmp_path / "v.gguf", lens).layers == (1,)


def test_layer_0_is_refused_unless_nothing_is_added_there(tmp_path):
    with pytest.raises(VectorError, match=r"norm 5\.\d+ behind layer 0.*layers from 1 on"):
        save_gguf(vector((0, 1)), tmp_path / "v.gguf")
    nothing = vector((0, 1))
    nothing.vectors[0] = 0
    save_gguf(nothing, tmp_path / "v.gguf")
    assert load_gguf(tmp_path / "v.gguf", zoo.lens()).layers == (1,)
    with pytest.raises(VectorError, match="adds nothing at any layer"):
        save_gguf(vector(()), tmp_path / "w.gguf")


@pytest.mark.parametrize(
    ("architecture", "tensors", "error", "says"),
    [
        ("llama", {"direction_1": np.zeros(32, np.float32)}, RunError, "'llama', not 'contr"),
        ("controlvector", {"direction_0": np.zeros(32, np.float32)}, RunError, r"direction\.0"),
        ("controlvector", {"blk_1": np.zeros(32, np.float32)}, RunError, r"blk\.1"),
        ("controlvector", {"direction_7": np.zeros(32, np.float32)}, ShapeError, "layer 7"),
        ("controlvector", {"direction_1": np.zeros(30, np.float32)}, ShapeError, "d_model 32"),
        ("controlvector", {}, VectorError, "hold no vector"),
    ],
)
def test_other_gguf_files_are_refused(architecture, tensors, error, says, tmp_path):
    path = gguf_file(tmp_path / "v.gguf", architecture, **tensors)
    with pytest.raises(error, match=says):
        load_gguf(path, zoo.lens())


def test_half_precision_is_read(tmp_path):
    path = gguf_file(tmp_path / "v.gguf", direction_1=np.full(32, 0.5, np.float16))
    assert float(load_gguf(path, zoo.lens()).vectors[1].sum()) == 16.0


def test_a_file_that_is_no_gguf_is_refused_by_name(tmp_path):
    (tmp_path / "v.gguf").write_bytes(b"GGUF" + bytes(3))
    with pytest.raises(RunError, match=r"v\.gguf.*expected a GGUF file of a control vector"):
        load_gguf(tmp_path / "v.gguf", zoo.lens())
    with pytest.raises(RunError, match=r"none\.gguf"):
        load_gguf(tmp_path / "none.gguf", zoo.lens())
