"""Norms with their scale held: the linear part of a layer norm or root-mean-square norm."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Norm = Callable[[Tensor], Tensor]
Stream = Float[Tensor, "*rows d_model"]

# So many times a vector of size one, eps is nothing beside it.
_LARGE = 1e4


def frozen(norm: Norm, x: Stream) -> Callable[[Stream], Stream]:
    """The norm as it is at `x`, its scale held: `frozen(norm, x)(d)` is what adding d would change.

    A norm is norm(x) = s(x) A x + b, where A centres or does not and weighs coordinates, and s(x)
    is one over the root mean square of what is centred. The map is d -> s(x) A d; it knows of the
    norm no more than what it gives, so that it holds for any of this form, and for none at all.

    Args:
        norm: the norm.
        x: where its scale is taken.

    Returns:
        The linear map, of tensors that broadcast with `x`.
    """
    zero = torch.zeros_like(x)
    offset = norm(zero)
    scale = _inverse_rms(norm, x, norm(x) - offset, offset)

    def linear(change: Stream) -> Stream:
        return _weighed(norm, change) * scale

    return linear


def _centres(norm: Norm, like: Tensor) -> bool:
    # A vector of ones is nothing at all once it is centred, and sums of ones are exact.
    ones = torch.ones_like(like)
    alternating = ones * (1 - 2 * (torch.arange(like.shape[-1], device=like.device) % 2))
    offset = norm(torch.zeros_like(like))
    moved, reference = (norm(v) - offset for v in (ones, alternating.to(like.dtype)))
    return bool(moved.abs().max() < 1e-3 * reference.abs().max())


def _is_linear(norm: Norm, like: Tensor) -> bool:
    """Whether what is twice as large comes out twice as large: no norm at all."""
    one = torch.zeros_like(like)
    one[..., 0] = _LARGE
    offset = norm(torch.zeros_like(like))
    return bool(torch.allclose(norm(2 * one) - offset, 2 * (norm(one) - offset), rtol=1e-3))


def _rms(norm: Norm, x: Tensor) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    if _centres(norm, x):
        exact = exact - exact.mean(dim=-1, keepdim=True)
    return exact.square().mean(dim=-1, keepdim=True).sqrt().to(x.dtype)


def _weighed(norm: Norm, x: Tensor) -> Tensor:
    """A x."""
    if _is_linear(norm, x):
        return norm(x) - norm(torch.zeros_like(x))
    size = _rms(norm, x)
    unit = x / size.clamp(min=torch.finfo(x.dtype).tiny)
    found = norm(_LARGE * unit) - norm(torch.zeros_like(x))
    return torch.where(size > 0, found * size, 0.0)


def _inverse_rms(norm: Norm, x: Tensor, moved: Tensor, offset: Tensor) -> Tensor:
    """s(x), of what the norm makes of x: one number for each row."""
    if _is_linear(norm, x):
        return torch.ones_like(x[..., :1])
    weighed = _weighed(norm, x)
    # Least squares over coordinates, all of which are the same multiple.
    down = weighed.square().sum(dim=-1, keepdim=True)
    return (moved * weighed).sum(dim=-1, keepdim=True) / down.where(down > 0, 1.0)
