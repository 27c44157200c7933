"""HookedTransformer (transformer-lens 3.9) behind the backend interface."""

import copy
import tempfile
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import ModelError
from tvlens.models.anatomy import (
    Anatomy,
    BehindNorm,
    Block,
    refuse_unknown,
    side_by_side,
    turn,
)
from tvlens.models.backend import Backend
from tvlens.models.encode import special_prefix


class HookedBackend(Backend):
    """A HookedTransformer."""

    kind = "hooked"

    @property
    def attention_layers(self) -> tuple[int, ...]:
        return tuple(range(self.n_layer))

    @cached_property
    def w_o(self) -> Float[Tensor, "layer head d_head d_model"]:
        return self.model.W_O.detach()

    @cached_property
    def b_o(self) -> Float[Tensor, "layer d_model"]:
        return self.model.b_O.detach()

    def projected_hooks(self, layer: int) -> tuple[str, ...]:
        norm = _norm_behind_attention(self.model.cfg)
        # A norm keeps what it divides by, and the quotient.
        parts = ("normalized", "scale") if norm else ()
        return tuple(f"blocks.{layer}.{norm}.hook_{part}" for part in parts)

    def final_norm(
        self, residual: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        has_norm = self.model.cfg.normalization_type is not None
        return self.model.ln_final(residual) if has_norm else residual

    def logits_of(self, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        return self.model.unembed(normed)

    @property
    def logit_cap(self) -> float | None:
        cap = self.model.cfg.output_logits_soft_cap
        return cap if cap > 0 else None

    def anatomy(self) -> Anatomy:
        cfg = self.model.cfg
        refuse_unknown(_unknown(cfg))
        return Anatomy(
            blocks=tuple(_block(cfg, block) for block in self.model.blocks),
            n_head=cfg.n_heads,
            n_kv_head=self.n_kv_head,
            d_head=cfg.d_head,
        )


def _norm_behind_attention(cfg: Any) -> str | None:
    """The norm through which a block puts what attention writes, or None."""
    from transformer_lens.utilities.architectures import POST_NORM_ARCHITECTURES

    if cfg.use_normalization_before_and_after:
        return "ln1_post"
    return "ln1" if cfg.original_architecture in POST_NORM_ARCHITECTURES else None


def hooked_transformer_class() -> Any:
    """The class HookedTransformer.

    Raises:
        ModelError: transformer-lens is 4 or newer.
    """
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        raise ModelError(
            "backend 'hooked' needs HookedTransformer, which transformer-lens 4 removed; "
            "install 'transformer-lens>=3.9,<4' or use backend='bridge'"
        ) from None
    return HookedTransformer


def load_unprocessed(model: Any, state: dict[str, Any]) -> None:
    """Give a HookedTransformer its weights as they are, so that heads write what they write."""
    model.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
    )


def hooked_from_huggingface(hf_model: Any, tokenizer: Any, dtype: torch.dtype) -> Any:
    """A HookedTransformer with the weights of a Hugging Face model, none of them folded or centred.

    HookedTransformer's own `from_pretrained` takes listed names only; this takes any architecture
    that transformer-lens can convert.

    Raises:
        ModelError: transformer-lens is 4 or newer, or cannot convert this architecture.
    """
    hooked_transformer = hooked_transformer_class()
    from transformer_lens import loading_from_pretrained as loading

    architecture = type(hf_model).__name__
    try:
        # The converter reads the architecture from a folder's config.json.
        with tempfile.TemporaryDirectory(prefix="tvlens-") as folder:
            config = _complete(hf_model.config, architecture)
            config.save_pretrained(folder)
            cfg = loading.get_pretrained_model_config(folder, dtype=dtype, device="cpu")
            _correct(cfg, config)
            state = loading.get_pretrained_state_dict(folder, cfg, hf_model, dtype=dtype)
        # It would read a tokenizer anew from where it came from, and alter it.
        cfg.tokenizer_name = None
        model = hooked_transformer(cfg, move_to_device=False)
        model.tokenizer = tokenizer
        cfg.tokenizer_prepends_bos = tokenizer is not None and bool(special_prefix(tokenizer))
        load_unprocessed(model, state)
    except (NotImplementedError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"HookedTransformer cannot take over a {architecture}: {error}; "
            "use backend='bridge', which knows more architectures"
        ) from error
    return model


def _complete(config: Any, architecture: str) -> Any:
    """A copy of a Hugging Face config with the fields that transformer-lens 3.9 reads from it."""
    config = copy.deepcopy(config)
    config.architectures = [architecture]
    if not hasattr(config, "n_ctx"):
        config.n_ctx = config.max_position_embeddings
    return config


def _correct(cfg: Any, config: Any) -> None:
    """Honour an explicit head_dim and a partial rotary factor, which the converter overlooks."""
    head_dim = getattr(config, "head_dim", None)
    if head_dim and head_dim != cfg.d_head:
        if cfg.rotary_dim == cfg.d_head:
            cfg.rotary_dim = head_dim
        cfg.d_head = head_dim
        cfg.attn_scale = head_dim**0.5
    rope = getattr(config, "rope_parameters", None) or {}
    if cfg.rotary_dim and "partial_rotary_factor" in rope:
        cfg.rotary_dim = int(cfg.d_head * rope["partial_rotary_factor"])


def _unknown(cfg: Any) -> dict[str, bool]:
    """Parts that replay does not know, by name, and whether the model has them."""
    return {
        "positional_embedding_type": cfg.positional_embedding_type not in ("standard", "rotary"),
        "attention_dir": cfg.attention_dir != "causal",
        "use_local_attn": bool(cfg.use_local_attn),
        "attn_scores_soft_cap": cfg.attn_scores_soft_cap > 0,
        "output_logits_soft_cap": cfg.output_logits_soft_cap > 0,
        "use_normalization_before_and_after": cfg.use_normalization_before_and_after,
        "use_attention_sinks": getattr(cfg, "use_attention_sinks", False),
        "use_logn_attn": getattr(cfg, "use_logn_attn", False),
        "use_dynamic_ntk_rope": getattr(cfg, "use_dynamic_ntk_rope", False),
        "clip_qkv": getattr(cfg, "clip_qkv", None) is not None,
    }


def _block(cfg: Any, block: Any) -> Block:
    attn = block.attn
    grouped = hasattr(attn, "_W_K")
    weights = [attn.W_Q, attn._W_K if grouped else attn.W_K, attn._W_V if grouped else attn.W_V]
    biases = [attn.b_Q, attn._b_K if grouped else attn.b_K, attn._b_V if grouped else attn.b_V]
    has_norm = bool(cfg.use_qk_norm)
    return Block(
        norm=block.ln1,
        w_qkv=side_by_side(weights),
        b_qkv=torch.cat([b.detach().flatten() for b in biases]),
        norm_query=partial(_norm_heads, attn.q_norm) if has_norm else None,
        norm_key=partial(_norm_heads, attn.k_norm) if has_norm else None,
        rotate=partial(_rotate, attn) if cfg.positional_embedding_type == "rotary" else None,
        w_o=attn.W_O.detach().flatten(0, 1),
        b_o=attn.b_O.detach(),
        scale=1.0 / float(attn.attn_scale),
        mlp=None if cfg.attn_only else BehindNorm(block.ln2, block.apply_mlp),
        parallel=bool(cfg.parallel_attn_mlp),
    )


def _norm_heads(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return norm(x.reshape(1, -1, x.shape[-1])).reshape(x.shape)


def _rotate(attn: Any, x: Tensor, positions: Tensor) -> Tensor:
    needed = int(positions.max()) + 1
    if needed > attn.rotary_cos.shape[0]:
        # The table grows only inside apply_rotary, and there is no public call for it.
        attn.apply_rotary(x.new_zeros(1, needed, 1, attn.cfg.d_head))
    return turn(x, attn.rotary_cos[positions], attn.rotary_sin[positions], attn.rotate_every_two)
