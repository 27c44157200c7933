"""Values with names on their axes, for xarray."""

import builtins

import numpy as np
import pytest
import torch

from tvlens.evaluation.ablation import Ablation
from tvlens.lens.heads import HeadMeans
from tvlens.runs.labelled import labelled
from tvlens.scores.ablation import HeadSet
from tvlens.scores.mediation import IndirectEffects
from tvlens.scores.score import Scores

xarray = pytest.importorskip("xarray")


def numbers(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_scores_without_prompts_are_of_layer_and_head():
    array = Scores(numbers(2, 4), "omega", "weight", "t", "m").to_xarray()
    assert array.dims == ("layer", "head")
    assert array.name == "omega"
    assert array.attrs == {"unit": "weight", "task": "t", "model": "m"}
    assert list(array.coords["head"].values) == [0, 1, 2, 3]


def test_scores_of_prompts_have_their_mean_in_scores():
    aie = IndirectEffects.of(numbers(3, 2, 4), numbers(3), task="t", model="m", unit="probability")
    array = aie.to_xarray()
    assert array.dims == ("prompt", "layer", "head")
    assert np.allclose(array.mean("prompt"), aie.scores.numpy(), atol=1e-6)
    best = array.mean("prompt").argmax(...)
    assert (int(best["layer"]), int(best["head"])) == aie.top(1)[0]


def test_head_means_are_a_data_set():
    means = HeadMeans(numbers(2, 4, 6), numbers(2, 4, 8), (0, 2), 3, "m")
    data = means.to_xarray()
    assert dict(data.sizes) == {"layer": 2, "head": 4, "d_head": 6, "d_model": 8}
    assert np.array_equal(data["outputs"].sel(layer=1, head=3), means.outputs[1, 3].numpy())
    assert data.attrs == {"model": "m", "at": "query", "n": 2, "offered": 3}


def test_ablations_say_which_set_is_which():
    sets = (
        HeadSet("aie", ((0, 1),), "top", 0.125),
        HeadSet("aie", ((1, 1),), "random", 0.125, 3),
        HeadSet("mine", ((0, 0), (1, 2))),
    )
    found = Ablation(sets, numbers(5, 3, 2), numbers(5, 2), ("accuracy", "loss"), "mean", "query")
    data = found.to_xarray()
    assert data["values"].dims == ("prompt", "set", "measure")
    assert list(data["score"].values) == ["aie", "aie", "mine"]
    assert list(data["k"].values) == [1, 1, 2]
    assert np.isnan(data["draw"].values).tolist() == [True, False, True]
    top = data["values"].sel(measure="loss").isel(set=0) - data["unablated"].sel(measure="loss")
    assert np.allclose(top, (found.values[:, 0, 1] - found.unablated[:, 1]).numpy())


def test_half_precisions_and_gradients_are_no_obstacle():
    made = torch.nn.Parameter(torch.ones(2, 1, dtype=torch.bfloat16))
    array = labelled(made, ("layer", "head"), "x")
    assert array.dtype == np.float32


def test_without_xarray_it_says_what_to_do(monkeypatch):
    there = builtins.__import__

    def refuse(name, *args, **options):
        if name == "xarray":
            raise ImportError("no module named xarray")
        return there(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ImportError, match="pip install xarray, or use to_frame"):
        Scores(numbers(2, 4), "omega", "weight").to_xarray()
