"""Models with layers that have no heads, and with values that are wider than queries."""

import warnings
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch
from torch import Tensor

import tvlens
from helpers import zoo
from tvlens.errors import ShapeError
from tvlens.figures import score_maps
from tvlens.lens.edits import AddToResidual, ReplaceHeads
from tvlens.lens.heads import contributions
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.runs.run import Run
from tvlens.scores.agreement import compare_head_sets
from tvlens.scores.ranking import layer_profile, rank_heads
from tvlens.scores.score import Scores
from tvlens.studies.study import study_all
from tvlens.studies.text import TextSettings, text_plans
from tvlens.vectors.controls import permuted_controls, random_controls
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.settings import FitSettings

KINDS = pytest.mark.parametrize("name", [*zoo.HYBRID_CONFIGS, *zoo.LATENT_CONFIGS])
HYBRIDS = pytest.mark.parametrize("name", zoo.HYBRID_CONFIGS)
FIT = FitSettings(steps=3, shots=2, n_prompts=4, n_validation=4)


def loaded(name: str) -> Lens:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tvlens.load(zoo.huggingface(name), tokenizer=zoo.tokenizer(), name=name)


def layers_of(name: str) -> tuple[int, ...]:
    return (1,) if name in zoo.HYBRID_CONFIGS else tuple(range(zoo.N_LAYER))


def plain(name: str, row: list[int], layer: int, change: Any = None) -> tuple[Tensor, Tensor]:
    """What the output projection of a layer reads at the end, and the logits there.

    By a hook of torch on the original model; `change` alters what it reads.
    """
    model, kept = zoo.huggingface(name), {}

    def read(_: Any, inputs: tuple[Tensor, ...]) -> Any:
        z = inputs[0].clone()
        kept["z"] = z[0, -1].unflatten(-1, (zoo.N_HEAD, -1)).clone()
        if change is not None:
            z[0, -1] = change(kept["z"].clone()).flatten()
        return (z, *inputs[1:])

    attention = model.model.layers[layer].self_attn
    projection = attention.o_proj if hasattr(attention, "o_proj") else attention.out_proj
    projection.register_forward_pre_hook(read)
    with torch.no_grad():
        logits = model(torch.tensor([row]), use_cache=False).logits[0, -1]
    return kept["z"], logits


@KINDS
def test_heads_are_those_of_the_original_and_layers_without_are_zero(name):
    lens, layers = loaded(name), layers_of(name)
    assert (lens.backend.attention_layers, lens.engine.name) == (layers, "whole passes")
    reading = lens.engine.read(zoo.batch())
    for i, row in enumerate(zoo.ROWS):
        for layer in layers:
            z, _ = plain(name, row, layer)
            assert zoo.off(reading.z[i, layer], z) < zoo.TOLERANCE[torch.float32]
    without = [n for n in range(lens.n_layer) if n not in layers]
    assert not reading.z[:, without].any()
    assert not contributions(lens, reading)[:, without].any()
    assert not lens.w_o[without].any()


@KINDS
def test_replacing_a_head_does_what_it_does_to_the_original(name):
    lens, layer = loaded(name), layers_of(name)[-1]
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(lens.n_layer, lens.n_head, lens.backend.d_head, generator=generator)
    edit = ReplaceHeads.each_head(values, [layer])
    assert edit.n_variant == lens.n_head
    found = lens.outputs(zoo.batch(), edit, lambda x, _: x)
    for i, row in enumerate(zoo.ROWS):
        for head in range(lens.n_head):

            def put(z: Tensor, head: int = head) -> Tensor:
                z[head] = values[layer, head]
                return z

            _, logits = plain(name, row, layer, put)
            assert zoo.off(found[i, head], logits) < zoo.TOLERANCE[torch.float32]


@HYBRIDS
def test_vectors_are_added_behind_layers_without_heads_too(name):
    lens, model = loaded(name), zoo.huggingface(name)
    vector = torch.randn(lens.d_model, generator=torch.Generator().manual_seed(4))

    def add(_: Any, __: Any, output: Any) -> Any:
        first = (output[0] if isinstance(output, tuple) else output).clone()
        first[:, -1] += vector
        return (first, *output[1:]) if isinstance(output, tuple) else first

    model.model.layers[0].register_forward_hook(add)
    vectors = torch.zeros(1, 1, lens.n_layer, lens.d_model)
    vectors[0, 0, 0] = vector
    active = torch.tensor([[True, False, False]])
    found = lens.outputs(zoo.batch(), AddToResidual(vectors, active), lambda x, _: x)
    for i, row in enumerate(zoo.ROWS):
        with torch.no_grad():
            logits = model(torch.tensor([row]), use_cache=False).logits[0, -1]
        assert zoo.off(found[i, 0], logits) < zoo.TOLERANCE[torch.float32]


@pytest.fixture(scope="module")
def found():
    """A hybrid with means, indirect effects and a trained vector."""
    lens = loaded("lfm2")
    clean = zoo.TASK.prompts("train", shots=2, n=6)
    means = tvlens.mean_head_outputs(lens, clean, answered_only=False)
    effects = tvlens.indirect_effects(lens, clean, means)
    ltv = tvlens.fit_ltv(lens, zoo.TASK, means, settings=FIT)
    return lens, means, effects, ltv


def test_layers_without_heads_are_in_no_table_and_no_comparison(found):
    _, means, effects, ltv = found
    assert means.n_heads == effects.n_heads == zoo.N_HEAD
    assert effects.scores[[0, 2]].isnan().all()
    assert effects.scores[1].isfinite().all()
    table = effects.to_frame()
    assert list(zip(table["layer"], table["head"], strict=True)) == [(1, n) for n in range(4)]
    assert table[["aie_low", "aie_high"]].notna().all(axis=None)
    assert [layer for layer, _ in rank_heads(effects)] == [1] * 4
    assert effects.top(4) == rank_heads(effects)
    with pytest.raises(ShapeError, match=r"top 5 heads .* 4 heads \(1 layers of 4\)"):
        effects.top(5)
    again = Scores.from_frame(table, "aie", layers=[1])["kind-of-word"]
    assert again.top(4) == effects.top(4)
    with pytest.raises(ShapeError, match=r"have none \(first: layer 0, head 0\)"):
        Scores.from_frame(table, "aie")
    contribution = ltv.head_scores()
    alone = [Scores(x.scores[1:2], x.name, x.unit) for x in (effects, contribution)]
    compared = compare_head_sets(effects, contribution, ks=(2,))
    expected = compare_head_sets(*alone, ks=(2,))
    distance = compared["measure"] == "layer_profile_distance"
    assert compared[~distance].equals(expected[~distance])
    assert layer_profile(effects).isnan().tolist() == [True, False, True]
    other = Scores(torch.zeros(3, 4), "aie", "probability")
    with pytest.raises(ShapeError, match=r"without heads in layers \[0, 2\] and \[\] cannot"):
        compare_head_sets(effects, other, ks=(1,))


def test_vectors_of_a_hybrid_weigh_the_heads_that_are_there(found, tmp_path):
    _, means, effects, ltv = found
    assert ltv.mask.sum(dim=1).tolist() == [0, 4, 0]
    assert not ltv.weights[[0, 2]].any()
    assert ltv.head_scores("omega").scores.isnan().sum() == 8
    for draws in (random_controls(ltv), permuted_controls(ltv)):
        assert all(not draw.vectors[[0, 2]].any() for draw in draws)
        assert all(draw.vectors[1].any() for draw in draws)
    for draw in random_controls(ltv):
        weights = torch.linalg.lstsq(ltv.outputs[1].T, draw.vectors[1][:, None]).solution
        assert float(weights.norm()) == pytest.approx(float(ltv.weights.detach().norm()), rel=1e-3)
    ltv.save(tmp_path / "ltv.safetensors")
    again = LearnableTaskVector.load(tmp_path / "ltv.safetensors")
    assert again.layers == (1,)
    assert again.top(2) == ltv.top(2)
    means.save(tmp_path / "means.safetensors")
    assert tvlens.HeadMeans.load(tmp_path / "means.safetensors").layers == (1,)
    vector = tvlens.function_vector(means, effects.top(2), layer=0)
    assert torch.allclose(
        vector.vectors[0], means.outputs[1, [n for _, n in effects.top(2)]].sum(dim=0)
    )
    with pytest.raises(ShapeError, match="layer 2 of model 'lfm2' has no heads; expected one of l"):
        tvlens.function_vector(means, [(2, 0)], layer=0)


def test_edits_of_heads_that_are_not_there_are_refused(found):
    lens = found[0]
    mask = torch.zeros(1, 3, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    edit = ReplaceHeads(mask, torch.ones(1, 1, 3, 4, lens.backend.d_head))
    with pytest.raises(ShapeError, match="layer 0 of 'lfm2' has no 'z'; it is in layers 1 only"):
        lens.outputs(zoo.batch(), edit, lambda x, _: x)


def test_maps_leave_layers_without_heads_grey(found):
    _, _, effects, ltv = found
    maps = {"aie": effects.scores, "contribution": ltv.scores}
    figure = score_maps(maps, task="t", k=2)
    panel = figure.axes[0]
    assert panel.images[0].get_array().mask.any(axis=1).tolist() == [True, False, True]
    plt.close(figure)


def test_a_whole_study_of_a_hybrid(found, tmp_path, monkeypatch):
    lens = found[0]
    # Weights that mean nothing answer nothing.
    everything = lambda _, outputs, batch: torch.ones(outputs.shape[:2], dtype=torch.bool)  # noqa: E731
    monkeypatch.setattr(FirstToken, "answered", everything)
    settings = TextSettings(
        shots=2, n_means=8, n_mediation=4, n_test=4, ltv=FIT, ltv_seeds=2, ks=(2,), scales=(2.0,)
    )
    folder, name = tmp_path / "run", zoo.TASK.name
    with Run.open(folder, "study", {}) as run:
        study_all(text_plans(lens, {name: zoo.TASK}, settings), run)
    assert pd.read_csv(folder / "heads.csv")["layer"].tolist() == [1] * 4
    assert set(pd.read_csv(folder / "layer_profiles.csv")["layer"]) == {1}
    assert pd.read_csv(folder / "results.csv")["value"].notna().all()
    assert (folder / "figures" / f"heads-{name}.pdf").is_file()
