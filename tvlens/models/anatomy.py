"""A model taken apart as far as replaying a single position needs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Block:
    """One transformer block, taken apart as far as replaying a single position needs.

    Attributes:
        norm: what the attention reads of the residual stream.
        w_qkv: query, key and value projections side by side.
        b_qkv: their biases, or None.
        norm_query: normalisation of queries `[..., head, d_head]`, or None.
        norm_key: normalisation of keys, or None.
        clip: queries, keys and values are clipped to [-clip, clip]; None leaves them.
        rotate: rotary embedding of `[..., head, d_head]` at given positions `[...]`, or None.
        w_o: output projection, heads stacked along the first axis.
        b_o: its bias, or None.
        scale: factor on the attention scores.
        cap: scores become cap tanh(scores / cap); None leaves them.
        slopes: added to the scores of every head, times the key's position (ALiBi); None adds none.
        sinks: a further score of every head that takes its share of the weights and has no value;
            None where there is none.
        window: a position attends to so many positions, its own included; None to all before it.
        scale_output: what the block does to the attention output before it adds it, which must
            scale it; None where it adds it as it is.
        mlp: what is added behind attention, of the residual stream that it reads; None where the
            block is attention alone.
        parallel: whether `mlp` reads the residual stream that attention reads, not what that
            leaves.
    """

    norm: Callable[[Tensor], Tensor]
    w_qkv: Float[Tensor, "d_model qkv"]
    b_qkv: Float[Tensor, " qkv"] | None
    w_o: Float[Tensor, "head_d_head d_model"]
    b_o: Float[Tensor, " d_model"] | None
    scale: float
    mlp: "BehindNorm | None" = None
    parallel: bool = False
    norm_query: Callable[[Tensor], Tensor] | None = None
    norm_key: Callable[[Tensor], Tensor] | None = None
    clip: float | None = None
    rotate: Callable[[Tensor, Tensor], Tensor] | None = None
    cap: float | None = None
    slopes: Float[Tensor, " head"] | None = None
    sinks: Float[Tensor, " head"] | None = None
    window: int | None = None
    scale_output: Callable[[Tensor], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where its tensors are; blocks of one model may be on several devices."""
        return self.w_qkv.device

    def finish(
        self, residual: Float[Tensor, "*rows d_model"], added: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """The residual stream after the block, of that before it and what attention adds."""
        middle = residual + added
        if self.mlp is None:
            return middle
        return middle + self.mlp(residual if self.parallel else middle)


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
    return torch.cat([turned * cos + quarter(turned) * sin, kept], dim=-1).to(x.dtype)


@dataclass(frozen=True)
class BehindNorm:
    """An MLP that reads the residual stream through a norm: what it adds, of what it reads.

    Attributes:
        norm: normalisation before the MLP.
        mlp: the MLP.
        scale: what the block does to the MLP's output before it adds it, or None.
    """

    norm: Callable[[Tensor], Tensor]
    mlp: Callable[[Tensor], Tensor]
    scale: Callable[[Tensor], Tensor] | None = None

    def __call__(self, residual: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        return self.of_normed(self.norm(residual))

    def of_normed(self, read: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
        """What is added, of what the norm gives."""
        # Mixtures of experts read batches of sequences, no more axes, and some give their choices
        # too; OPT's MLP puts all positions in a row.
        out = self.mlp(read.flatten(0, -3) if read.ndim > 3 else read)
        out = (out[0] if isinstance(out, tuple) else out).reshape(read.shape)
        return out if self.scale is None else self.scale(out)
