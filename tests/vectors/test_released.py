"""Released weights: what they weigh, and what is refused."""

import os

import pytest
import torch

from helpers import zoo
from tvlens.errors import NumericalError, RunError, ShapeError, UnknownNameError, VectorError
from tvlens.lens.heads import mean_head_outputs
from tvlens.vectors import load_released, load_vector


@pytest.fixture(scope="module")
def lens():
    return zoo.lens("gpt2")


@pytest.fixture
def means(lens, task):
    return mean_head_outputs(lens, task.prompts("train", shots=2, n=4), answered_only=False)


@pytest.fixture
def weights():
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(5))


@pytest.fixture
def file(tmp_path, weights):
    torch.save({"weights": weights}, tmp_path / "ltv_layer_5.pth")
    return tmp_path / "ltv_layer_5.pth"


def projected(lens, means, layer, heads):
    """What the model's own output projection makes of the mean activations of some heads."""
    z = torch.zeros(1, 1, lens.n_head, lens.backend.d_head)
    z[0, 0, heads] = means.z[layer, heads]
    projection = lens.backend.model.original_model.transformer.h[layer].attn.c_proj
    projection = getattr(projection, "original_component", projection)
    with torch.no_grad():
        return projection(z.flatten(2))[0, 0]


def test_head_weights_weigh_every_head_projected_alone_with_the_bias(lens, means, weights, file):
    made = load_released(file, lens, means, granularity="head", task="t")
    assert lens.backend.b_o.abs().max() > 0.01
    for layer in range(3):
        expected = sum(
            weights[layer, head] * projected(lens, means, layer, [head]) for head in range(4)
        )
        assert torch.allclose(made.task_vector.vectors[layer], expected, atol=1e-5)
    assert torch.equal(made.omega.detach(), weights)
    assert (made.granularity, made.task, made.model) == ("head", "t", lens.name)


def test_block_weights_weigh_slices_of_all_heads_projected_together(lens, means, weights, file):
    made = load_released(file, lens, means, granularity="block")
    for layer in range(3):
        together = projected(lens, means, layer, [0, 1, 2, 3]).reshape(4, -1)
        expected = (weights[layer][:, None] * together).flatten()
        assert torch.allclose(made.task_vector.vectors[layer], expected, atol=1e-5)


def test_it_is_saved_and_evaluated_as_any_other(lens, means, file, tmp_path):
    made = load_released(file, lens, means, granularity="block")
    made.save(tmp_path / "v.safetensors")
    read = load_vector(tmp_path / "v.safetensors")
    assert torch.equal(read.task_vector.vectors, made.task_vector.vectors)
    assert read.granularity == "block"


class Harmful:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_what_is_no_released_file_is_refused(lens, means, tmp_path):
    def load(state, granularity="head"):
        torch.save(state, tmp_path / "x.pth")
        return load_released(tmp_path / "x.pth", lens, means, granularity=granularity)

    for state in ({"omega": torch.zeros(3, 4)}, torch.zeros(3, 4), {}, {"weights": [1]}):
        with pytest.raises(VectorError, match=r"x\.pth holds no released weights; expected 'wei"):
            load(state)
    with pytest.raises(VectorError, match="real numbers"):
        load({"weights": torch.zeros(3, 4, dtype=torch.long)})
    with pytest.raises(ShapeError, match=r"weights of \(4, 3\) .* has \(3, 4\)"):
        load({"weights": torch.zeros(4, 3)})
    with pytest.raises(NumericalError, match="NaN or infinite weights"):
        load({"weights": torch.full((3, 4), torch.nan)})
    with pytest.raises(RunError, match=r"it holds more than weights; expected .* no code"):
        load({"weights": Harmful(tmp_path / "harm")})
    assert not (tmp_path / "harm").exists()
    with pytest.raises(RunError, match=r"cannot read .*none\.pth: .*No such file"):
        load_released(tmp_path / "none.pth", lens, means, granularity="head")


@pytest.mark.usefixtures("unchecked")
def test_the_granularity_must_be_said(lens, means, file):
    with pytest.raises(UnknownNameError, match="granularity 'slice': expected 'head' or 'block'"):
        load_released(file, lens, means, granularity="slice")
