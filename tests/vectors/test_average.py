"""The layer average: all heads with weight one, and its place in every table and figure."""

import torch

from helpers import tiny_regression as tiny
from helpers import zoo
from tvlens.lens.heads import mean_head_outputs
from tvlens.vectors.average import average_mixture, layer_average
from tvlens.vectors.catalogue import METHODS, method, methods_for, variants
from tvlens.vectors.ltv.ltv import LearnableTaskVector


def test_it_is_the_sum_of_all_mean_outputs_of_each_layer(lens, task):
    means = mean_head_outputs(lens, task.prompts("train", shots=2, n=3), answered_only=False)
    found = layer_average(means)
    assert found.layers == tuple(range(lens.n_layer))
    assert zoo.off(found.vectors, means.outputs.sum(dim=1)) < 1e-6
    ones = torch.ones(lens.n_layer, lens.n_head)
    learnable = LearnableTaskVector(means.outputs, start=ones)
    assert zoo.off(found.vectors, learnable.task_vector.vectors) < 1e-6


def test_the_mixture_of_each_prompt_adds_what_its_donor_writes():
    lens = tiny.lens()
    prompts = tiny.TASK.prompts("test", shots=8, n=3)
    means = mean_head_outputs(lens, tiny.TASK.prompts("train", shots=5, n=4))
    mixture = average_mixture(means)
    edit = mixture.edit(lens, prompts)
    found = lens.outputs(prompts, edit, lambda outputs, _: outputs[..., 0])[:, 0]
    expected = tiny.predictions(lens, prompts, prompts.donors(), mixture.mix, mixture.layers)
    assert zoo.off(found, expected) < 1e-4


def test_one_line_of_the_catalogue_puts_it_everywhere():
    average = method("average")
    for modality in ("text", "regression"):
        for whose in average.whose:
            assert average in methods_for(modality, whose)
    assert {"average_class", "average_prompt"} <= set(variants())
    names = [each.name for each in METHODS]
    assert len(set(names)) == len(names)
    looks = [(m.look.colour, m.look.marker) for m in METHODS]
    assert len(set(looks)) == len(looks), "no two methods look alike"
