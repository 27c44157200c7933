"""A model taken apart as far as replaying a single position needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Block:
    """One transformer block, taken apart as far as replaying a single position needs.

    Attributes:
        norm: what the attention reads of the residual stream.
        w_qkv: query, key and value projections side by side.
        b_qkv: their biases, or None.
        norm_query: normalisation of each head's query, or None.
        norm_key: normalisation of each head's key, or None.
        rotate: rotary embedding of `[..., head, d_head]` at given positions `[...]`, or None.
        w_o: output projection, heads stacked along the first axis.
        b_o: its bias, or None.
        scale: factor on the attention scores.
        finish: `(residual before the block, attention output) -> residual after the block`.
    """

    norm: Callable[[Tensor], Tensor]
    w_qkv: Float[Tensor, "d_model qkv"]
    b_qkv: Float[Tensor, " qkv"] | None
    norm_query: Callable[[Tensor], Tensor] | None
    norm_key: Callable[[Tensor], Tensor] | None
    rotate: Callable[[Tensor, Tensor], Tensor] | None
    w_o: Float[Tensor, "head_d_head d_model"]
    b_o: Float[Tensor, " d_model"] | None
    scale: float
    finish: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Anatomy:
    """All blocks of a model and the sizes of its attention."""

    blocks: tuple[Block, ...]
    n_head: int
    n_kv_head: int
    d_head: int


class UnknownArchitectureError(NotImplementedError):
    """Replay does not know a part of this model; whole forward passes are used instead."""


def refuse_unknown(parts: Mapping[str, bool]) -> None:
    """Refuse a model that has one of these parts.

    Args:
        parts: whether the model has the part, by the name that the message calls it.

    Raises:
        UnknownArchitectureError: it has one or more.
    """
    found = [name for name, present in parts.items() if present]
    if found:
        raise UnknownArchitectureError(f"replay does not know {', '.join(found)}")


def side_by_side(weights: Sequence[Tensor]) -> Float[Tensor, "d_model qkv"]:
    """Query, key and value projections of every head, each `[head d_model d_head]`, in one."""
    return torch.cat([w.detach().transpose(0, 1).flatten(1) for w in weights], dim=1).contiguous()


def turn(
    x: Float[Tensor, "*rows head d_head"],
    cos: Float[Tensor, "*#rows turned"],
    sin: Float[Tensor, "*#rows turned"],
    quarter: Callable[[Tensor], Tensor],
) -> Float[Tensor, "*rows head d_head"]:
    """Rotary embedding: the first components of every head are turned, the others kept.

    Args:
        x: queries or keys.
        cos: cosine of every component's angle at the row's position.
        sin: its sine.
        quarter: turns the pairs of components, as the model pairs them, by a right angle.
    """
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    return torch.cat([turned * cos + quarter(turned) * sin, kept], dim=-1)


def finish(
    norm: Callable[[Tensor], Tensor], mlp: Callable[[Tensor], Tensor], *, parallel: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """`Block.finish` of a block whose MLP reads the residual stream through `norm`.

    Args:
        norm: normalisation before the MLP.
        mlp: the MLP.
        parallel: whether the MLP reads what the attention reads, not what it leaves.
    """

    def beside(residual: Tensor, attn_out: Tensor) -> Tensor:
        return residual + attn_out + mlp(norm(residual))

    def behind(residual: Tensor, attn_out: Tensor) -> Tensor:
        middle = residual + attn_out
        return middle + mlp(norm(middle))

    return beside if parallel else behind


def finish_without_mlp(
    residual: Float[Tensor, "*rows d_model"], attn_out: Float[Tensor, "*rows d_model"]
) -> Float[Tensor, "*rows d_model"]:
    """`Block.finish` of a block of attention alone."""
    return residual + attn_out
