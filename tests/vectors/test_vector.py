from dataclasses import replace

import pytest
import torch

import tvlens
from helpers import tiny_regression as tiny
from helpers import zoo
from helpers.prompt_table import stacked
from tvlens.errors import NumericalError, RunError, ShapeError, TaskError
from tvlens.lens.edits import AddHeads, AddToResidual, NoEdit
from tvlens.lens.heads import donor_outputs
from tvlens.vectors.catalogue import load_vector
from tvlens.vectors.vector import (
    HeadMixture,
    TaskVector,
    edits_of,
    require_fit,
)


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
    edit = stacked([vector((0,)), TaskVector.none(lens), vector((1, 2), -1.0)], lens)
    assert edit.active.tolist() == [[True, False, False], [False] * 3, [False, True, True]]
    assert edit.first_layer.tolist() == [0, 3, 1]
    assert torch.equal(edit.vectors[0, 2], vector(sign=-1.0).vectors)


def test_no_vector_is_no_edit(lens):
    none = stacked([TaskVector.none(lens)], lens)
    reading = lens.engine.read(zoo.batch())
    assert torch.equal(lens.engine.run(reading, none), lens.engine.run(reading, NoEdit(3)))


def test_vectors_take_the_precision_of_the_model():
    half = zoo.backend("llama", "bridge", torch.bfloat16)
    edit = stacked([vector()], replace(zoo.lens(), backend=half))
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
    with pytest.raises(
        RunError, match=r"cannot read .*vector.safetensors: .*, or name another file"
    ):
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
        stacked([vector(), other], lens)
    with pytest.raises(ShapeError, match="'other' has 3 layers"):
        vector() + other
    require_fit(other, 3, 16, "any")


def test_a_mixture_in_place_adds_every_head_at_its_own_layer():
    weights = torch.tensor([[0.5, -1.0], [2.0, 0.0], [1.0, 3.0]])
    outputs = torch.arange(1.0, 25).view(3, 2, 4)
    made = HeadMixture.in_place(weights, "m", "made").of_outputs(outputs)
    assert made.vectors.tolist() == [
        [sum(float(weights[n, h] * outputs[n, h, d]) for h in range(2)) for d in range(4)]
        for n in range(3)
    ]
    assert (made.layers, made.model, made.origin) == ((0, 1, 2), "m", "made")


def mixture(seed=0, layers=(1,), n_head=2, n_layer=2):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n_layer, n_layer, n_head, generator=generator)
    return HeadMixture(mix, layers, "tiny", f"mixture {seed}")


def test_a_mixture_sums_heads_of_every_layer_where_it_says():
    outputs = torch.randn(2, 2, 4, generator=torch.Generator().manual_seed(1))
    made = mixture(layers=(0, 1))
    found = made.of_outputs(outputs)
    for to_layer in range(2):
        expected = sum(
            made.mix[to_layer, layer, head] * outputs[layer, head]
            for layer in range(2)
            for head in range(2)
        )
        assert torch.allclose(found.vectors[to_layer], expected)


def test_the_mixture_of_means_is_that_of_their_outputs():
    means = tvlens.mean_head_outputs(tiny.lens(), tiny.TASK.prompts("train", shots=5, n=4))
    found = mixture().of_means(means)
    assert torch.equal(found.vectors, mixture().of_outputs(means.outputs).vectors)
    assert found.layers == (1,)


def test_a_mixture_saved_and_read_back(tmp_path):
    made = mixture(layers=(0, 1))
    made.save(tmp_path / "m.safetensors")
    for found in (
        HeadMixture.load(tmp_path / "m.safetensors"),
        load_vector(tmp_path / "m.safetensors"),
    ):
        assert isinstance(found, HeadMixture)
        assert torch.equal(found.mix, made.mix)
        assert (found.layers, found.model, found.origin) == ((0, 1), "tiny", "mixture 0")


def test_mixtures_that_are_not_finite_or_do_not_fit_are_refused():
    broken = mixture().mix.clone()
    broken[0, 1, 1] = torch.nan
    with pytest.raises(NumericalError, match="weights of made hold NaN or infinite numbers"):
        HeadMixture(broken, (0,), "tiny", "made")
    words = (
        r"mixture 0 of 'tiny' weighs \(2, 3\) \(layer, head\), model 'tiny' has \(2, 2\); make it "
        "on the model it is used on"
    )
    with pytest.raises(ShapeError, match=words):
        mixture(n_head=3).of_outputs(torch.zeros(2, 2, 4))
    with pytest.raises(ShapeError, match=words):
        edits_of([mixture(n_head=3)], tiny.lens(), tiny.TASK.prompts("test", n=1))


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_shared_vectors_and_mixtures_act_together_as_alone(kind):
    lens = tiny.lens(kind)
    prompts = tiny.TASK.prompts("test", shots=8, n=3)
    values = torch.randn(2, 32, generator=torch.Generator().manual_seed(2))
    shared = TaskVector(values, (0,), "tiny", "random")
    vectors = [mixture(), shared, mixture(1, (0, 1)), TaskVector.none(lens)]
    edits = edits_of(vectors, lens, prompts)
    assert [(type(edit), places) for edit, places in edits] == [
        (AddHeads, [0, 2]),
        (AddToResidual, [1, 3]),
    ]
    found = torch.empty(3, 4)
    for edit, places in edits:
        found[:, places] = lens.outputs(prompts, edit, lambda outputs, _: outputs[..., 0])
    donors = prompts.donors()
    for place, vector in enumerate(vectors):
        if isinstance(vector, HeadMixture):
            expected = tiny.predictions(lens, prompts, donors, vector.mix, vector.layers)
        else:
            edit = stacked([vector], lens)
            expected = lens.outputs(prompts, edit, lambda outputs, _: outputs[..., 0])[:, 0]
        assert zoo.off(found[:, place], expected) < 1e-4


def test_vectors_act_at_the_places_that_prompts_have_for_them(task):
    lens, prompts = tiny.lens(), tiny.TASK.prompts("test", shots=8, n=2)
    vectors = [TaskVector.none(lens), mixture()]
    made = prompts.with_dummies((0.0, 0.5))
    assert made.places == (0, 10)
    assert [edit.also for edit, _ in edits_of(vectors, lens, made)] == [(0, 10), (0, 10)]
    assert all(edit.at_query_only for edit, _ in edits_of(vectors, lens, prompts))
    ((edit, _),) = edits_of([TaskVector.none(zoo.lens())], zoo.lens(), task.prompts("test", n=1))
    assert edit.at_query_only


def test_edits_are_only_of_what_there_is():
    lens, prompts = tiny.lens(), tiny.TASK.prompts("test", n=2)
    none = TaskVector.none(lens)
    assert [places for _, places in edits_of([none, none], lens, prompts)] == [[0, 1]]
    assert [places for _, places in edits_of([mixture()], lens, prompts)] == [[0]]
    assert edits_of([], lens, prompts) == []
    # Without mixtures no donors are needed.
    unknown = replace(tiny.TASK, train_points=None).prompts("test", n=2)
    assert len(edits_of([none], lens, unknown)) == 1
    with pytest.raises(TaskError, match="no donors to take head outputs from"):
        edits_of([none, mixture()], lens, unknown)


def test_stacked_mixtures_are_variants_in_order():
    lens = tiny.lens()
    prompts = tiny.TASK.prompts("test", shots=8, n=3)
    edit = HeadMixture.stack([mixture(), mixture(1, (0,))], lens, prompts)
    assert edit.active.tolist() == [[False, True], [True, False]]
    assert torch.equal(edit.mix[1], mixture(1).mix)
    assert torch.equal(edit.outputs, donor_outputs(lens, prompts).outputs)
