from dataclasses import replace

import pytest
import torch

from helpers import zoo
from helpers.prompt_table import stacked
from tvlens.errors import ShapeError
from tvlens.lens.heads import HeadMeans, mean_head_outputs
from tvlens.scores.mediation import IndirectEffects
from tvlens.vectors.fv import (
    choose_function_vectors,
    function_mixture,
    function_vector,
    function_vector_per_layer,
    published_mixture,
)
from tvlens.vectors.ltv.ltv import LearnableTaskVector

HEADS = [(0, 1), (0, 3), (2, 2)]


@pytest.fixture
def means(lens, task):
    return mean_head_outputs(lens, task.prompts("train", shots=2, n=8), answered_only=False)


@pytest.fixture
def effects():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 3, 4, generator=generator)
    return IndirectEffects.of(
        values, torch.zeros(3), task="made-up", model="llama", unit="probability"
    )


def test_one_layer_holds_the_sum_of_all_heads(means):
    made = function_vector(means, HEADS, layer=1, scale=2.0)
    expected = torch.zeros(3, 32)
    expected[1] = 2 * (means.outputs[0, 1] + means.outputs[0, 3] + means.outputs[2, 2])
    assert torch.allclose(made.vectors, expected)
    assert (made.layers, made.model) == ((1,), "llama")
    assert made.origin == "function vector of 3 heads at layer 1 x 2"


def test_per_layer_each_head_is_added_where_it_is(means):
    made = function_vector_per_layer(means, HEADS, scale=0.5)
    expected = torch.zeros(3, 32)
    expected[0] = 0.5 * (means.outputs[0, 1] + means.outputs[0, 3])
    expected[2] = 0.5 * means.outputs[2, 2]
    assert torch.allclose(made.vectors, expected)
    assert made.layers == (0, 2)


def test_per_layer_is_a_task_vector_of_zeros_and_ones(lens, means):
    weights = torch.zeros(3, 4)
    for head in HEADS:
        weights[head] = 1
    ltv = LearnableTaskVector(means.outputs, start=weights, model="llama")
    fv = function_vector_per_layer(means, HEADS)
    assert torch.allclose(fv.vectors, ltv().detach())
    edit = stacked([fv, ltv.task_vector], lens)
    logits = lens.outputs(zoo.batch(), edit, lambda x, b: x)
    assert zoo.off(logits[:, 0], logits[:, 1]) < 1e-6


@pytest.mark.parametrize("make", [function_vector_per_layer, None])
def test_heads_out_of_range_are_refused(means, make):
    make = make or (lambda *args: function_vector(*args, layer=0))
    for head in ((3, 0), (0, 4), (-1, 0)):
        words = rf"head \({head[0]}, {head[1]}\) is out of range: model 'llama' has 3 layers \(0-2"
        with pytest.raises(ShapeError, match=words):
            make(means, [(0, 0), head])
    with pytest.raises(ShapeError, match="needs at least one head, got none; ask for k >= 1"):
        make(means, [])


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_out_of_range_is_refused(means, layer):
    words = rf"layer {layer} is out of range: model 'llama' has 3 layers \(0-2\)"
    with pytest.raises(ShapeError, match=words):
        function_vector(means, HEADS, layer=layer)


def test_a_recipe_made_of_means_is_the_function_vector(means):
    made = function_mixture(means, HEADS, layer=1, scale=2.0)
    expected = torch.zeros(3, 32)
    expected[1] = 2 * (means.outputs[0, 1] + means.outputs[0, 3] + means.outputs[2, 2])
    assert torch.allclose(made.of_means(means).vectors, expected)
    assert made.layers == (1,)
    assert int((made.mix != 0).sum()) == 3
    made = function_mixture(means, HEADS, layer=None, scale=0.5)
    expected = torch.zeros(3, 32)
    expected[0] = 0.5 * (means.outputs[0, 1] + means.outputs[0, 3])
    expected[2] = 0.5 * means.outputs[2, 2]
    assert torch.allclose(made.of_means(means).vectors, expected)
    assert (made.layers, made.model) == ((0, 2), "llama")


@pytest.mark.parametrize(
    ("n_layer", "n_head", "k", "layers"),
    # 35/96 of the heads, rounded; at half to two thirds of the depth.
    [
        (12, 8, 35, (6, 7, 8)),
        (6, 4, 9, (3, 4)),
        (3, 4, 4, (1, 2)),
        (24, 16, 140, (12, 14, 16)),
        (1, 1, 1, (0,)),
        (2, 2, 1, (1,)),
    ],
)
def test_the_published_recipe_is_scaled_to_the_model(n_layer, n_head, k, layers):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(n_layer, n_head, 5, generator=generator)
    values = torch.randn(2, n_layer, n_head, generator=generator)
    means = HeadMeans(outputs, outputs, (0,), 1, "m")
    effects = IndirectEffects.of(values, torch.zeros(2), task="t", model="m", unit="probability")
    made = published_mixture(means, effects)
    ranked = sorted(
        ((float(values[:, n, h].mean()), n, h) for n in range(n_layer) for h in range(n_head)),
        reverse=True,
    )
    total = sum(outputs[n, h] for _, n, h in ranked[:k])
    assert made.layers == layers
    found = made.of_means(means).vectors
    for layer in range(n_layer):
        expected = total / len(layers) if layer in layers else torch.zeros(5)
        assert torch.allclose(found[layer], expected, atol=1e-5)
    weights = made.mix[made.mix != 0].tolist()
    assert weights == pytest.approx([1 / len(layers)] * (k * len(layers)))


def validation(task):
    return {k: task.prompts("validation", shots=2, kind=k) for k in ("zero", "shuffled")}


def test_the_sweep_holds_every_candidate_with_its_measures(lens, means, effects, task):
    prompts = validation(task)
    found = choose_function_vectors(lens, means, effects, prompts, ks=(1, 12), scales=(1.0, 3.0))
    sweep = found.sweep
    assert len(sweep) == 2 * (2 * 2 * (1 + 3))
    columns = ["site", "layer", "k", "scale", "prompt", "accuracy", "cross_entropy"]
    assert list(sweep.columns) == columns
    for row in sweep.sample(6, random_state=0).itertuples():
        heads = effects.top(row.k)
        if row.site == "per_layer":
            assert row.layer == -1
            vector = function_vector_per_layer(means, heads, scale=row.scale)
        else:
            vector = function_vector(means, heads, layer=row.layer, scale=row.scale)
        edit = stacked([vector], lens)
        expected = lens.outputs(prompts[row.prompt], edit, lens.readout.measure).mean(dim=(0, 1))
        assert (row.accuracy, row.cross_entropy) == pytest.approx(
            tuple(expected.tolist()), rel=1e-5
        )


def test_each_kind_gets_what_is_best_on_its_own_prompts(lens, means, effects, task):
    found = choose_function_vectors(
        lens, means, effects, validation(task), ks=(1, 3, 9), scales=(1.0, 8.0)
    )
    for site, chosen in (("one_layer", found.one_layer), ("per_layer", found.per_layer)):
        assert list(chosen) == ["zero", "shuffled"]
        for kind, vector in chosen.items():
            rows = found.sweep[(found.sweep["site"] == site) & (found.sweep["prompt"] == kind)]
            rows = rows[rows["accuracy"] == rows["accuracy"].max()]
            best = rows.loc[rows["cross_entropy"].idxmin()]
            assert vector.origin.endswith(f"x {best['scale']:g}")
            assert f"of {best['k']} heads" in vector.origin
            if site == "one_layer":
                assert vector.layers == (best["layer"],)


def test_accuracy_comes_before_cross_entropy(lens, means, effects, task):
    """The best by accuracy is the worst by cross-entropy here."""

    class Contrary(type(lens.readout)):
        def measure(self, outputs, batch):
            loss = self.loss(outputs, batch)
            return torch.stack([loss, loss], dim=-1)

    prompts = {"zero": task.prompts("validation", kind="zero")}
    found = choose_function_vectors(
        replace(lens, readout=Contrary()), means, effects, prompts, ks=(4,)
    )
    rows = found.sweep.query("site == 'one_layer'")
    best = rows.loc[rows["accuracy"].idxmax()]
    assert found.one_layer["zero"].layers == (best["layer"],)
    assert rows["accuracy"].std() > 0.01


def test_only_validation_prompts_are_read(lens, means, effects, task):
    seen = []

    class Reads(zoo.Watched):
        def read(self, batch):
            seen.extend(row[mask].tolist() for row, mask in zip(batch.inputs, batch.mask))  # noqa: B905
            return super().read(batch)

    prompts = validation(task)
    choose_function_vectors(
        replace(lens, engine=Reads(lens.engine)), means, effects, prompts, ks=(1,)
    )
    allowed = [zoo.tokenizer()(text).input_ids for kind in prompts.values() for text in kind.texts]
    assert seen
    assert all(row in allowed for row in seen)


def test_layers_can_be_limited_and_must_exist(lens, means, effects, task):
    prompts = {"zero": task.prompts("validation", kind="zero")}
    found = choose_function_vectors(lens, means, effects, prompts, layers=[1], ks=(1,))
    assert set(found.sweep["layer"]) == {1, -1}
    with pytest.raises(ShapeError, match="layer 3 is out of range: model 'llama' has 3 layers"):
        choose_function_vectors(lens, means, effects, prompts, layers=[3], ks=(1,))


def test_numbers_of_heads_must_fit(lens, means, effects, task):
    prompts = {"zero": task.prompts("validation", kind="zero")}
    found = choose_function_vectors(lens, means, effects, prompts, ks=(0, 2, 13), scales=(1.0,))
    assert set(found.sweep["k"]) == {2}
    words = r"no k of \(13, 40\) fits 'llama', which has 12 heads; give a k between 1 and that"
    with pytest.raises(ShapeError, match=words):
        choose_function_vectors(lens, means, effects, prompts, ks=(13, 40))
