"""TransformerBridge (transformer-lens 3.9 and 4) behind the backend interface."""

from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import ModelError
from tvlens.models.anatomy import (
    Anatomy,
    Block,
    UnknownArchitectureError,
    finish,
    refuse_unknown,
    side_by_side,
    turn,
)
from tvlens.models.backend import Backend
from tvlens.models.encode import special_prefix


class BridgeBackend(Backend):
    """A TransformerBridge."""

    kind = "bridge"

    @cached_property
    def w_o(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self.model.W_O.detach()

    @cached_property
    def b_o(self) -> Float[Tensor, "layer d_model"]:
        zero = self.w_o.new_zeros(self.d_model)
        biases = [block.attn.b_O for block in self.model.blocks]
        return torch.stack([zero if bias is None else bias.detach() for bias in biases])

    def projected_hooks(self, layer: int) -> tuple[str, ...]:
        return (f"blocks.{layer}.attn.hook_out",)

    def unembed(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        return self.model.unembed(self.model.ln_final(residual))

    def anatomy(self) -> Anatomy:
        config = self.model.original_model.config
        refuse_unknown(_unknown(config, self.model))
        rotary = _rotary(self.model)
        n_kv_head = int(getattr(self.model.cfg, "n_key_value_heads", None) or self.n_head)
        return Anatomy(
            blocks=tuple(_block(self.model.cfg, block, rotary) for block in self.model.blocks),
            n_head=self.n_head,
            n_kv_head=n_kv_head,
            d_head=self.d_head,
        )


def bridge_from_huggingface(hf_model: Any, tokenizer: Any, dtype: torch.dtype) -> Any:
    """A TransformerBridge over a Hugging Face model; the weights are shared, not copied.

    Raises:
        ModelError: transformer-lens has no bridge for this architecture.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerFast

    # transformer-lens reads a tokenizer anew from where it came from, alters it, and looks for one
    # on a hub where there is none. A stand-in keeps it from all three.
    words = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    stand_in = PreTrainedTokenizerFast(tokenizer_object=words)
    # Models made from a config do not say in it what they are until they are saved.
    hf_model.config.architectures = hf_model.config.architectures or [type(hf_model).__name__]
    try:
        bridge = TransformerBridge.boot_transformers(
            type(hf_model).__name__,
            hf_model=hf_model,
            tokenizer=stand_in,
            dtype=dtype,
            device="cpu",
        )
    except (NotImplementedError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise ModelError(
            f"TransformerBridge cannot wrap a {type(hf_model).__name__}: {error}; "
            "see transformer-lens' list of supported architectures"
        ) from error
    bridge.tokenizer = None
    bridge.tokenizer = tokenizer
    bridge.cfg.tokenizer_prepends_bos = tokenizer is not None and bool(special_prefix(tokenizer))
    return bridge


def _unknown(config: Any, model: Any) -> dict[str, bool]:
    """Parts that replay does not know, by name, and whether the model has them."""
    window = getattr(config, "sliding_window", None)
    uses_window = window is not None and getattr(config, "use_sliding_window", True)
    layer_kinds = set(getattr(config, "layer_types", None) or ())
    layer_kinds |= set(getattr(config, "attention_layers", None) or ())
    layer_kinds -= {"full_attention", "global"}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return {
        "sliding_window": uses_window,
        f"layer types {sorted(layer_kinds)}": bool(layer_kinds),
        "attn_logit_softcapping": bool(getattr(config, "attn_logit_softcapping", None)),
        "final_logit_softcapping": bool(getattr(config, "final_logit_softcapping", None)),
        "attention_chunk_size": bool(getattr(config, "attention_chunk_size", None)),
        # Their angles depend on how long the whole sequence is.
        f"rope type {rope!r}": rope in ("dynamic", "longrope"),
        "alibi": bool(getattr(config, "alibi", False)),
        "clip_qkv": bool(getattr(config, "clip_qkv", None)),
        "scale_attn_by_inverse_layer_idx": bool(
            getattr(config, "scale_attn_by_inverse_layer_idx", False)
        ),
        "a missing ln1, attn or ln_final": not all(
            hasattr(block, "ln1") and hasattr(block, "attn") for block in model.blocks
        )
        or not hasattr(model, "ln_final"),
    }


class _SharedRotary:
    """Cosines and sines of a Hugging Face rotary module that all layers share."""

    def __init__(self, module: Any, example: Tensor) -> None:
        self.module, self.example = module, example
        self.cos = self.sin = example.new_zeros(0)

    def tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        needed = int(positions.max()) + 1
        if needed > self.cos.shape[0]:
            ids = torch.arange(max(needed, 2 * self.cos.shape[0]), device=self.example.device)
            with torch.no_grad():
                cos, sin = self.module(self.example, ids[None])
            self.cos, self.sin = cos[0], sin[0]
        return self.cos[positions], self.sin[positions]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return turn(x, *self.tables(positions), _quarter_of_halves)


def _quarter_of_halves(x: Tensor) -> Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat([-high, low], dim=-1)


def _quarter_of_neighbours(x: Tensor) -> Tensor:
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def _rotate_adjacent(table: Tensor, x: Tensor, positions: Tensor) -> Tensor:
    """GPT-J's rotary embedding: neighbouring components are paired."""
    sin, cos = table[positions].repeat_interleave(2, dim=-1).chunk(2, dim=-1)
    return turn(x, cos, sin, _quarter_of_neighbours).to(x.dtype)


def _rotary(model: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    if model.cfg.positional_embedding_type == "standard":
        return None
    kind = model.cfg.positional_embedding_type
    refuse_unknown({f"positional_embedding_type {kind}": kind != "rotary"})
    base = model.original_model.base_model
    if hasattr(base, "rotary_emb"):
        example = model.blocks[0].attn.W_Q.detach().new_zeros(1)
        return _SharedRotary(base.rotary_emb, example).rotate
    attention = model.blocks[0].attn.original_component
    if hasattr(attention, "embed_positions"):
        return partial(_rotate_adjacent, attention.embed_positions)
    raise UnknownArchitectureError("replay does not find the model's rotary embedding")


def _block(cfg: Any, block: Any, rotate: Callable[[Tensor, Tensor], Tensor] | None) -> Block:
    attn = block.attn
    biases = [attn.b_Q, attn.b_K, attn.b_V]
    b_qkv = None
    if biases[0] is not None:
        b_qkv = torch.cat([b.detach().flatten() for b in biases])
    w_o = attn.W_O.detach()
    scale = getattr(attn.original_component, "scaling", None)
    return Block(
        norm=block.ln1,
        w_qkv=side_by_side([attn.W_Q, attn.W_K, attn.W_V]),
        b_qkv=b_qkv,
        norm_query=_head_norm(attn, "q_norm"),
        norm_key=_head_norm(attn, "k_norm"),
        rotate=rotate,
        w_o=w_o.flatten(0, 1),
        b_o=None if attn.b_O is None else attn.b_O.detach(),
        scale=w_o.shape[1] ** -0.5 if scale is None else float(scale),
        finish=_finish(block, parallel=bool(cfg.parallel_attn_mlp)),
    )


def _head_norm(attn: Any, name: str) -> Callable[[Tensor], Tensor] | None:
    if name not in attn.submodules:
        return None
    per_head = getattr(attn, "_qk_norm_phase", None) == "post_reshape"
    refuse_unknown({f"{name} over all heads at once": not per_head})
    return getattr(attn, name)


def _finish(block: Any, *, parallel: bool) -> Callable[[Tensor, Tensor], Tensor]:
    # Some parallel blocks have one norm for both.
    norm = block.ln1 if parallel and not hasattr(block, "ln2") else block.ln2
    return finish(norm, block.mlp, parallel=parallel)
