"""Norms with their scale held, against closed forms and the norms themselves."""

import pytest
import torch
from torch import nn

from helpers import zoo
from tvlens.errors import ModelError
from tvlens.lens.norms import frozen, offset

D, EPS = 24, 1e-2
DTYPES = [torch.float32, torch.float64]


def random(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class OnePlus(nn.Module):
    """RMSNorm whose weight is around zero, as Gemma's."""

    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * (1 + self.weight)


def norms(dtype):
    """Norms, and each one's A, b and whether it takes the mean off."""
    weight, bias = random(D, seed=1, dtype=dtype), random(D, seed=2, dtype=dtype)
    rms, layer = nn.RMSNorm(D, eps=EPS, dtype=dtype), nn.LayerNorm(D, eps=EPS, dtype=dtype)
    plain = nn.LayerNorm(D, eps=EPS, bias=False, dtype=dtype)
    for module in (rms, layer, plain):
        module.weight.data = weight.clone()
    layer.bias.data = bias.clone()
    bare = nn.LayerNorm(D, eps=EPS, elementwise_affine=False, dtype=dtype)
    one, zero = torch.ones(D, dtype=dtype), torch.zeros(D, dtype=dtype)
    return {
        "rms": (rms, weight, zero, False),
        "one plus": (OnePlus(weight), 1 + weight, zero, False),
        "layer": (layer, weight, bias, True),
        "no bias": (plain, weight, zero, True),
        "bare": (bare, one, zero, True),
    }


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", norms(torch.float32))
@pytest.mark.parametrize("size", [1e-2, 1.0, 300.0])
def test_maps_are_those_on_paper(name, dtype, size):
    """Also where x is so small that the norm's epsilon counts."""
    norm, weight, bias, centres = norms(dtype)[name]
    x, change = size * random(3, D, dtype=dtype) + 0.3 * size, random(3, 5, D, seed=3, dtype=dtype)
    change = change * torch.tensor([1e-4, 1.0, 10.0, 1e3, 0.0], dtype=dtype)[:, None]

    def centred(v):
        return v - v.mean(dim=-1, keepdim=True) if centres else v

    scale = (centred(x).square().mean(dim=-1) + EPS).rsqrt()[:, None, None]
    expected = scale * weight * centred(change)
    found = frozen(norm, x[:, None])(change)
    share = 1e-5 if dtype == torch.float32 else 1e-7
    error = (found - expected).norm(dim=-1)
    assert (error <= share * expected.norm(dim=-1)).all()
    assert found.dtype == dtype
    assert torch.allclose(offset(norm, x), bias, atol=1e-6)
    assert torch.allclose(frozen(norm, x)(x) + bias, norm(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("norm", [lambda x: x, lambda x: 0.5 * x + 2.0])
def test_no_norm_is_a_map_already(norm):
    x, change = random(3, D), random(3, D, seed=1)
    assert torch.allclose(frozen(norm, x)(change), norm(change) - norm(torch.zeros(D)), atol=1e-6)


@torch.no_grad()
def test_the_map_of_nothing_is_zero():
    """LayerNorm takes the mean off, which is all that there is of a constant vector."""
    norm = norms(torch.float32)["layer"][0]
    x = torch.stack([torch.full((D,), 3.0), torch.zeros(D), random(D)])
    found = frozen(norm, x)(random(3, D, seed=1))
    assert found[:2].abs().max() == 0
    assert found[2].abs().min() > 0


def test_other_norms_are_refused():
    with pytest.raises(ModelError, match=r"a norm gave .* of twice the vector .* the same"):
        frozen(lambda v: v.abs().sqrt(), random(2, D))


@torch.no_grad()
def test_final_norms_of_models_sum_over_parts(backend):
    x = random(2, backend.d_model, seed=5)
    parts = random(2, 6, backend.d_model, seed=6)
    parts = torch.cat([parts, (x - parts.sum(dim=1))[:, None]], dim=1)
    found = frozen(backend.final_norm, x[:, None])(parts).sum(dim=1)
    found = found + offset(backend.final_norm, x)
    assert zoo.off(found, backend.final_norm(x[:, None])[:, 0]) < zoo.TOLERANCE[torch.float32]


@torch.no_grad()
def test_norms_of_half_precision_too(half):
    x = random(2, half.d_model, seed=5, dtype=torch.bfloat16)
    found = frozen(half.final_norm, x)(x) + offset(half.final_norm, x)
    assert found.dtype == torch.float32
    assert zoo.off(found, half.final_norm(x[:, None])[:, 0]) < 0.02
