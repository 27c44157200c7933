"""A model taken apart as far as replaying a single position needs."""

from collections.abc import Callable
from dataclasses import dataclass

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
