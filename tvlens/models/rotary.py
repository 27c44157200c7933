"""The rotary embeddings of a TransformerBridge, layer by layer."""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tvlens.models.anatomy import UnknownArchitectureError, refuse_unknown, turn

Rotate = Callable[[Tensor, Tensor], Tensor]
# Models whose layers of full attention have no positions, where others have a window.
_FULL_WITHOUT = ("Cohere2Attention", "Exaone4Attention")


def rotaries(model: Any) -> Sequence[Rotate | None]:
    """What turns queries and keys of every layer; None where nothing does.

    Args:
        model: a TransformerBridge.

    Raises:
        UnknownArchitectureError: the model has positions of another kind, or none can be found.
    """
    kind = model.cfg.positional_embedding_type
    if kind in ("standard", "alibi"):
        return [None] * len(model.blocks)
    refuse_unknown({f"positional_embedding_type {kind}": kind != "rotary"})
    base = model.original_model.base_model
    originals = [block.attn.original_component for block in model.blocks]
    if not hasattr(base, "rotary_emb"):
        if hasattr(originals[0], "embed_positions"):
            return [partial(_rotate_adjacent, each.embed_positions) for each in originals]
        raise UnknownArchitectureError("replay does not find the model's rotary embedding")
    config = model.original_model.config
    kinds = getattr(config, "layer_types", None) or [None] * len(originals)
    by_kind = hasattr(base.rotary_emb, "layer_types")
    example = model.blocks[0].attn.W_Q.detach().new_zeros(1)
    tables = {
        kind: _Tables(
            partial(base.rotary_emb, layer_type=kind) if by_kind else base.rotary_emb, example
        )
        for kind in set(kinds)
    }
    turning = {
        kind: partial(_rotate, table, _turning(originals[0], table, int(model.cfg.d_head)))
        for kind, table in tables.items()
    }
    return [
        turning[kind] if _is_turned(original, kind) else None
        for kind, original in zip(kinds, originals, strict=True)
    ]


def _is_turned(original: Any, kind: str | None) -> bool:
    if type(original).__name__ in _FULL_WITHOUT and kind == "full_attention":
        return not any("sliding" in k for k in original.config.layer_types)
    return bool(getattr(original, "use_rope", True))


class _Tables:
    """Cosines and sines of a Hugging Face rotary module that layers share."""

    def __init__(self, module: Callable[..., tuple[Tensor, Tensor]], example: Tensor) -> None:
        self.module, self.example = module, example
        self.cos = self.sin = example.new_zeros(0)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        needed = int(positions.max()) + 1
        if needed > self.cos.shape[0]:
            ids = torch.arange(max(needed, 2 * self.cos.shape[0]), device=self.example.device)
            with torch.no_grad():
                cos, sin = self.module(self.example, ids[None])
            self.cos, self.sin = cos[0], sin[0]
        return self.cos[positions], self.sin[positions]


def _rotate(tables: _Tables, turning: Callable[..., Tensor], x: Tensor, at: Tensor) -> Tensor:
    cos, sin = (table.to(x.device) for table in tables.at(at.to(tables.example.device)))
    return turning(x, cos, sin)


def _turning(original: Any, tables: _Tables, d_head: int) -> Callable[..., Tensor]:
    """How the model pairs components: halves unless its own function says otherwise."""
    own = getattr(sys.modules[type(original).__module__], "apply_rotary_pos_emb", None)
    halves = partial(turn, quarter=_quarter_of_halves)
    if own is None:
        return halves

    def as_model(x: Tensor, cos: Tensor, sin: Tensor, *, width: int) -> Tensor:
        turned, _ = own(x[..., :width], x[..., :width], cos, sin, unsqueeze_dim=-2)
        return torch.cat([turned, x[..., width:]], dim=-1).to(x.dtype)

    example = tables.example
    cos, sin = tables.at(torch.arange(3, device=example.device))
    x = torch.randn(3, 2, d_head, generator=torch.Generator().manual_seed(0)).to(example)
    # Some tables hold every angle once, for both components that it turns.
    for width in (cos.shape[-1], 2 * cos.shape[-1]):
        turning = partial(as_model, width=width)
        try:
            found = turning(x, cos, sin)
        except (TypeError, RuntimeError, ValueError, IndexError):
            continue
        same = width == cos.shape[-1] and torch.equal(found, halves(x, cos, sin))
        return halves if same else turning
    return halves


def _quarter_of_halves(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)


def _quarter_of_neighbours(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def _rotate_adjacent(table: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    """GPT-J's rotary embedding: neighbouring components are paired."""
    sin, cos = table.to(x.device)[positions].repeat_interleave(2, dim=-1).chunk(2, dim=-1)
    return turn(x, cos, sin, _quarter_of_neighbours)
