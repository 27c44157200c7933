"""Norms with their scale held: what parts of a residual stream come to behind them.

A norm gives s(x) A x + b, where the scale s(x) alone is not linear in x. Held as it is on one x,
parts that sum to x sum, behind it, to what the norm gives of x, less b. A, b and s are read off the
norm itself, whatever it is called: b is what it gives of nothing, and A what it gives of vectors so
large that its epsilon is nothing beside them.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import ModelError

Norm = Callable[[Tensor], Tensor]

# Far above the epsilon of any norm, and the whole vector still within half precision.
_LARGE = 256.0
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3}


def offset(norm: Norm, like: Float[Tensor, "*rows d_model"]) -> Float[Tensor, " d_model"]:
    """What a norm gives of nothing: its bias.

    Args:
        norm: the norm.
        like: residual streams, whose width, type and device the answer has.
    """
    return norm(_row(like, torch.zeros(like.shape[-1]))).to(like)[0, 0]


def frozen(
    norm: Norm, x: Float[Tensor, "*rows d_model"]
) -> Callable[[Float[Tensor, "*more d_model"]], Float[Tensor, "*more d_model"]]:
    """The linear map that a norm is while its scale stays what it is on `x`.

    That is Δ -> s(x) A Δ, where the norm gives s(x) A x + b; `frozen(norm, x)(x)` is what it gives
    of x, less `offset`. RMSNorm and LayerNorm of any weight and bias are such norms, and so is one
    that is not there. The direct logit attribution of Elhage et al. (2021, "A Mathematical
    Framework for Transformer Circuits") freezes the final norm alike. Where x, less its mean if the
    norm takes that off, is zero, so is the map.

    Args:
        norm: the norm, of vectors along the last of three axes.
        x: residual streams.

    Returns:
        A function of changes Δ whose leading axes are those of `x`, or broadcast with them.

    Raises:
        ModelError: the norm is none of this kind.
    """
    bias, exact = offset(norm, x), torch.promote_types(x.dtype, torch.float32)
    probe = _LARGE * torch.linspace(-1.0, 2.0, x.shape[-1])
    once, twice = (norm(_row(x, size * probe)).to(x).to(exact) - bias for size in (1, 2))
    tolerance = _TOLERANCE.get(x.dtype, 0.05) * max(float(once.abs().max()), 1e-30)

    def linear(change: Tensor) -> Tensor:
        return _of_rows(norm, change.to(x)).to(exact) - bias

    if (twice - 2 * once).abs().max() <= 2 * tolerance:
        return linear
    if (twice - once).abs().max() > tolerance:
        raise ModelError(
            f"a norm gave {float(once.norm()):.4g} of a vector and {float(twice.norm()):.4g} of "
            "twice the vector (lengths, bias aside); expected the same, as of RMSNorm and "
            "LayerNorm, or twice as much: parts of a residual stream have no share in other norms"
        )
    flat = norm(_row(x, torch.full((x.shape[-1],), _LARGE))).to(x).to(exact) - bias
    centred = bool(flat.abs().max() <= tolerance)

    def scaleless(change: Tensor) -> Tensor:
        change = change.to(exact)
        if centred:
            change = change - change.mean(dim=-1, keepdim=True)
        size = change.square().mean(dim=-1, keepdim=True).sqrt()
        unit = (_LARGE * change / size).where(size > 0, 0.0)
        return size * linear(unit)

    whole = scaleless(x)
    power = whole.square().sum(dim=-1, keepdim=True)
    scale = ((linear(x) * whole).sum(dim=-1, keepdim=True) / power).where(power > 0, 0.0)
    return lambda change: scale * scaleless(change)


def _row(like: Tensor, values: Tensor) -> Float[Tensor, "1 1 d_model"]:
    return values.to(like)[None, None]


def _of_rows(norm: Norm, x: Tensor) -> Tensor:
    """The norm of vectors in any shape, given to it as a batch of sequences."""
    return norm(x.reshape(1, -1, x.shape[-1])).to(x).reshape(x.shape)
