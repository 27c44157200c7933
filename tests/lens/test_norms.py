"""A norm with its scale held is the linear map of its formula."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers import zoo
from tvlens.lens.norms import frozen

WIDTH = 48


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(name):
    norm = {
        "layer norm": lambda: nn.LayerNorm(WIDTH, eps=1e-5),
        "layer norm without weights": lambda: nn.LayerNorm(WIDTH, elementwise_affine=False),
        "rms": lambda: LlamaRMSNorm(WIDTH, eps=1e-6),
        "one plus weight": lambda: Gemma2RMSNorm(WIDTH, eps=1e-6),
        "none": lambda: nn.Identity(),
    }[name]()
    for i, parameter in enumerate(norm.parameters()):
        parameter.requires_grad_(False).copy_(random(*parameter.shape, seed=i + 1))
    return norm


def by_formula(name, norm, x, change):
    weight = getattr(norm, "weight", None)
    weight = torch.ones(WIDTH, dtype=x.dtype) if weight is None else weight
    if name == "none":
        return change
    eps = 1e-5 if "layer" in name else 1e-6
    if "layer" in name:
        x, change = (v - v.mean(dim=-1, keepdim=True) for v in (x, change))
    if name == "one plus weight":
        weight = 1 + weight
    return change / (x.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight


NAMES = ["layer norm", "layer norm without weights", "rms", "one plus weight", "none"]


@pytest.mark.parametrize("size", [1.0, 1e-4, 100.0])
@pytest.mark.parametrize("scale", [3.0, 1e-3])
@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_formula_with_the_scale_of_x(name, scale, size):
    norm = made(name)
    x, change = scale * (random(2, 5, WIDTH, seed=3) + 0.5), size * random(2, 5, WIDTH, seed=4)
    found, expected = frozen(norm, x)(change), by_formula(name, norm, x, change)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_it_is_linear_and_gives_the_norm_itself_at_x(name):
    norm, x = made(name), random(4, WIDTH, seed=3) * 2 + 1
    linear = frozen(norm, x)
    a, b = random(4, WIDTH, seed=5), random(4, WIDTH, seed=6)
    assert torch.allclose(linear(a + 2 * b), linear(a) + 2 * linear(b), atol=1e-5)
    assert torch.allclose(linear(x) + norm(torch.zeros_like(x)), norm(x), atol=1e-5)
    assert torch.equal(linear(torch.zeros_like(x)), torch.zeros_like(x))


def test_one_scale_serves_many_changes():
    norm, x = made("layer norm"), random(3, 1, WIDTH, seed=3)
    changes = random(3, 7, WIDTH, seed=4)
    found = frozen(norm, x)(changes)
    for i in range(7):
        assert torch.allclose(found[:, i], frozen(norm, x[:, 0])(changes[:, i]), atol=1e-6)


@pytest.mark.parametrize("at", ["first", "last"])
def test_norms_of_models_at_small_changes(backend, at):
    """Of what a small change does, all but the part along the norm's own output is the scale's."""
    norm = backend.anatomy().blocks[0].norm if at == "first" else backend.final_norm
    x = random(1, 1, zoo.D_MODEL, seed=3)
    change = random(1, 1, zoo.D_MODEL, seed=4)
    with torch.no_grad():
        linear = frozen(norm, x)
        total = linear(x) + norm(torch.zeros_like(x))
        assert torch.allclose(total, norm(x), atol=1e-4)
        # An exact norm of x + d is the held one's sum, rescaled.
        moved = linear(x + change)
        exact = norm(x + change) - norm(torch.zeros_like(x))
        ratio = (moved * exact).sum() / exact.square().sum()
        assert torch.allclose(moved, ratio * exact, atol=1e-4)
