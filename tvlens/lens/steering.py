"""Edits that move what is there, where those of `tvlens.lens.edits` put something in or add it:
heads towards given values, residual streams to a given one or in a given direction.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.lens.edits import Activation, AddToResidual, ReplaceHeads
from tvlens.lens.sites import Site


@dataclass(frozen=True)
class BlendHeads(ReplaceHeads):
    """`hook_z` of every head is moved towards given values: z becomes (1 - w) z + w value.

    A gate G that multiplies z is a weight of 1 - G towards 0. Made by `blend_heads`.

    Attributes:
        weights: the share w of the value in every head.
    """

    weights: Float[Tensor, "variant layer head"]

    def change(self, site: Site, activation: Activation) -> Activation:
        n = activation.shape[1]
        weight = self.weights[None, :n, None, site.layer, :, None].to(activation.dtype)
        value = self.values[:, :n, None, site.layer].to(activation.dtype)
        return activation + weight * (value - activation)

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "BlendHeads":
        values = self.values if self.values.shape[1] == 1 else self.values[:, index]
        return replace(self, mask=self.mask[index], values=values, weights=self.weights[index])


def blend_heads(
    weights: Float[Tensor, "variant layer head"],
    values: Float[Tensor, "some_batch some_variant layer head d_head"],
) -> BlendHeads:
    """The edit that moves heads towards values; heads of weight 0 stay as they are.

    Args:
        weights: the share of the value in every head, differentiable.
        values: what heads are moved towards; first two axes may have size 1.

    Raises:
        ShapeError: weights and values are of different models.
    """
    return BlendHeads(weights.detach() != 0, values, weights)


@dataclass(frozen=True)
class ReplaceResidual(AddToResidual):
    """The output of each chosen block is replaced by a vector, where `AddToResidual` adds it."""

    def change(self, site: Site, activation: Activation) -> Activation:
        given, active = self.given(site, activation)
        return torch.where(active, given, activation)


@dataclass(frozen=True)
class TurnResidual(AddToResidual):
    """The output x of each chosen block is turned towards a vector v and keeps its norm.

    It becomes x + ‖x‖ v, scaled back to the norm of x: turned by the angle whose tangent is ‖v‖
    where v is orthogonal to x.
    """

    def change(self, site: Site, activation: Activation) -> Activation:
        given, active = self.given(site, activation)
        norm = activation.norm(dim=-1, keepdim=True)
        turned = activation + norm * given
        # A stream of zeros has no direction to keep the norm of.
        scale = norm / turned.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny)
        return torch.where(active, turned * scale, activation)
