"""TransformerBridge (transformer-lens 3.9 and 4) behind the backend interface."""

import inspect
import sys
from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.errors import ModelError
from tvlens.models.anatomy import (
    Anatomy,
    BehindNorm,
    Block,
    UnknownArchitectureError,
    refuse_unknown,
    side_by_side,
)
from tvlens.models.backend import Backend
from tvlens.models.encode import special_prefix
from tvlens.models.rotary import rotaries

# Attention whose scores are the products themselves.
_UNSCALED = ("GPTNeoSelfAttention",)


class BridgeBackend(Backend):
    """A TransformerBridge."""

    kind = "bridge"

    @property
    def config(self) -> Any:
        """That of the original model."""
        return getattr(self.model.original_model, "config", self.model.cfg)

    @property
    def d_head(self) -> int:
        """Width of a head's values, which need not be that of its queries."""
        return self.w_o.shape[2]

    @cached_property
    def attention_layers(self) -> tuple[int, ...]:
        blocks = enumerate(self.model.blocks)
        return tuple(n for n, block in blocks if "attn" in block.submodules)

    @cached_property
    def w_o(self) -> Float[Tensor, "layer head d_head d_model"]:
        blocks = self.model.blocks
        found = {n: self._output_projection(blocks[n].attn) for n in self.attention_layers}
        return self._by_layer(found)

    def _output_projection(self, attn: Any) -> Float[Tensor, "head d_head d_model"]:
        if getattr(self.config, "kv_lora_rank", None):
            # TransformerLens would cut values by the width of queries.
            weight = attn.original_component.o_proj.weight
            return weight.detach().T.unflatten(0, (self.n_head, -1))
        return attn.W_O.detach()

    @cached_property
    def b_o(self) -> Float[Tensor, "layer d_model"]:
        zero = self.w_o.new_zeros(self.d_model)
        biases = {n: self.model.blocks[n].attn.b_O for n in self.attention_layers}
        return self._by_layer({n: zero if b is None else b.detach() for n, b in biases.items()})

    def _by_layer(self, found: Mapping[int, Tensor]) -> Tensor:
        # Blocks of one model may be on several devices.
        device = self.model.original_model.get_input_embeddings().weight.device
        zero = torch.zeros_like(next(iter(found.values())))
        return torch.stack([found.get(n, zero).to(device) for n in range(self.n_layer)])

    def projected_hooks(self, layer: int) -> tuple[str, ...]:
        return (f"blocks.{layer}.attn.hook_out",)

    def forward(
        self, inputs: Tensor, mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a whole forward pass.

        Raises:
            ModelError: prompts of different lengths in a model that turns queries and keys by
                other angles from some length on, which it would do for all of them (LongRoPE).
        """
        rope = getattr(self.config, "rope_parameters", None) or {}
        switch = rope.get("original_max_position_embeddings") or getattr(
            self.config, "original_max_position_embeddings", None
        )
        lengths = mask.sum(dim=1)
        shortest, longest = int(lengths.min()), int(lengths.max())
        if rope.get("rope_type") == "longrope" and switch and shortest < longest > switch:
            raise ModelError(
                f"model {self.name!r} turns queries and keys by other angles in prompts of more "
                f"than {switch} tokens, and these are of {shortest} to {longest}; ask prompts of "
                "one length, or none so long"
            )
        if self.dtype != torch.float64:
            return super().forward(inputs, mask)
        # transformer-lens takes softmax in single precision, where masks of double are infinite,
        # and padding attends to nothing else.
        lowest = torch.finfo(torch.float32).min
        names = [f"blocks.{n}.attn.hook_attn_scores" for n in self.attention_layers]
        with self.hooks([(name, lambda scores, hook: scores.clamp(min=lowest)) for name in names]):
            return super().forward(inputs, mask)

    def final_norm(
        self, residual: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        if not hasattr(self.model, "ln_final"):
            raise ModelError(
                f"model {self.name!r} has no norm behind its last block that TransformerBridge "
                "shows (ln_final), so logits cannot be read off its residual stream; use "
                "Backend.forward, or a model that has one"
            )
        norm = next(self.model.ln_final.parameters(), residual)
        return self.model.ln_final(residual.to(norm.device))

    def logits_of(self, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        # Granite divides them, Cohere multiplies them.
        logits = self.model.unembed(normed) / (getattr(self.config, "logits_scaling", None) or 1.0)
        return logits * (getattr(self.config, "logit_scale", None) or 1.0)

    @property
    def logit_cap(self) -> float | None:
        return getattr(self.config, "final_logit_softcapping", None) or None

    def anatomy(self) -> Anatomy:
        refuse_unknown(_unknown(self.config, self.model))
        rotary = rotaries(self.model)
        return Anatomy(
            blocks=tuple(
                _block(self.model, self.config, n, rotary[n]) for n in range(self.n_layer)
            ),
            n_head=self.n_head,
            n_kv_head=self.n_kv_head,
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
    if getattr(hf_model.config, "kv_lora_rank", None):
        # transformer-lens 3 wants a mask from such models, and fused attention has none to give.
        hf_model.set_attn_implementation("eager")
    base = hf_model.base_model
    without_rotary = getattr(base, "rotary_emb", base) is None
    try:
        bridge = TransformerBridge.boot_transformers(
            type(hf_model).__name__,
            hf_model=hf_model,
            tokenizer=stand_in,
            dtype=dtype,
            device="cpu",
        )
    except (NotImplementedError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        said = str(error).split(" Available architectures")[0].rstrip(".")
        raise ModelError(
            f"TransformerBridge cannot wrap a {type(hf_model).__name__}: {said}; "
            "see transformer-lens' list of supported architectures"
        ) from error
    if without_rotary:
        # transformer-lens puts one in all the same, with nothing inside.
        base.rotary_emb = None
        attending = [block.attn for block in bridge.blocks if "attn" in block.submodules]
        for config in (bridge.cfg, *(attn.config for attn in attending)):
            config.positional_embedding_type = "none"
    bridge.tokenizer = None
    bridge.tokenizer = tokenizer
    bridge.cfg.tokenizer_prepends_bos = tokenizer is not None and bool(special_prefix(tokenizer))
    return bridge


def _unknown(config: Any, model: Any) -> dict[str, bool]:
    """Parts that replay does not know, by name, and whether the model has them."""
    layer_kinds = set(getattr(config, "layer_types", None) or ())
    layer_kinds |= set(getattr(config, "attention_layers", None) or ())
    layer_kinds -= {"full_attention", "global", "sliding_attention", "local"}
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    return {
        f"layer types {sorted(layer_kinds)}": bool(layer_kinds),
        "attention_chunk_size": bool(getattr(config, "attention_chunk_size", None)),
        # Their angles depend on how long the whole sequence is.
        f"rope type {rope!r}": rope in ("dynamic", "longrope"),
        # Queries grow with their position, from some position on.
        "llama_4_scaling_beta": "llama_4_scaling_beta"
        in (getattr(config, "rope_parameters", None) or {}),
        "scale_attn_by_inverse_layer_idx": bool(
            getattr(config, "scale_attn_by_inverse_layer_idx", False)
        ),
        "multi-head latent attention": bool(getattr(config, "kv_lora_rank", None)),
        "a missing norm, attn or ln_final": not all(
            "attn" in block.submodules and (hasattr(block, "ln1") or hasattr(block, "ln1_post"))
            for block in model.blocks
        )
        or not hasattr(model, "ln_final"),
    }


def _block(
    model: Any, config: Any, layer: int, rotate: Callable[[Tensor, Tensor], Tensor] | None
) -> Block:
    block = model.blocks[layer]
    attn = block.attn
    original = attn.original_component
    biases = [attn.b_Q, attn.b_K, attn.b_V]
    b_qkv = None
    if biases[0] is not None:
        b_qkv = torch.cat([b.detach().flatten() for b in biases])
    w_o = attn.W_O.detach()
    scale = 1.0 if type(original).__name__ in _UNSCALED else getattr(original, "scaling", None)
    clip = getattr(config, "clip_qkv", None)
    sinks = getattr(original, "sinks", None)
    norms, parallel = _norms(block), bool(model.cfg.parallel_attn_mlp)
    return Block(
        norm=norms["ln1"] or _as_it_is,
        w_qkv=side_by_side([attn.W_Q, attn.W_K, attn.W_V]),
        b_qkv=b_qkv,
        norm_query=_head_norm(attn, "q_norm"),
        norm_key=_head_norm(attn, "k_norm"),
        clip=float(clip) if clip else None,
        rotate=rotate,
        w_o=w_o.flatten(0, 1),
        b_o=None if attn.b_O is None else attn.b_O.detach(),
        scale=w_o.shape[1] ** -0.5 if scale is None else float(scale),
        cap=getattr(config, "attn_logit_softcapping", None) or None,
        slopes=_slopes(model, original, w_o.device),
        sinks=None if sinks is None else sinks.detach(),
        window=_window(config, layer),
        scale_output=_scaled(norms["ln1_post"], config),
        mlp=BehindNorm(
            # Some parallel blocks have one norm for both.
            norms["ln2"] or (norms["ln1"] if parallel else None) or _as_it_is,
            _mlp(block),
            _scaled(norms["ln2_post"], config),
        ),
        parallel=parallel,
    )


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _norms(block: Any) -> dict[str, Any]:
    """The norms before and behind attention (ln1, ln1_post) and MLP (ln2, ln2_post), or None."""
    found = {name: getattr(block, name, None) for name in ("ln1", "ln1_post", "ln2", "ln2_post")}
    there = {name for name, _ in block.original_component.named_children()}
    before = {"input_layernorm", "pre_feedforward_layernorm"}
    if "post_feedforward_layernorm" in there and not there & before:
        # Both norms stand behind; transformer-lens 3 calls them as if they stood before.
        for name in ("ln1", "ln2"):
            found[f"{name}_post"] = found[f"{name}_post"] or found[name]
            found[name] = None
    return found


def _scaled(norm: Any, config: Any) -> Callable[[Tensor], Tensor] | None:
    """What a block does to the output of attention or MLP before it adds it."""
    factor = getattr(config, "residual_multiplier", None)
    if norm is not None:
        return norm
    return None if factor in (None, 1.0) else partial(torch.mul, torch.tensor(float(factor)))


def _window(config: Any, layer: int) -> int | None:
    """How many positions a layer attends to, its own included; None for all before it."""
    kinds = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None)
    if kinds is not None:
        windows = {"sliding_attention": "sliding_window", "local": "window_size"}
        name = windows.get(kinds[layer])
        return None if name is None else getattr(config, name, None)
    used = getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if used else None


def _slopes(model: Any, original: Any, device: torch.device) -> Float[Tensor, " head"] | None:
    """What ALiBi adds to the scores of every head for each position further right."""
    if model.cfg.positional_embedding_type != "alibi":
        return None
    n_head = int(model.cfg.n_heads)
    module = sys.modules[type(original).__module__]
    if hasattr(module, "build_mpt_alibi_tensor"):
        table = module.build_mpt_alibi_tensor(n_head, 2)
    elif hasattr(module, "build_alibi_tensor"):
        table = module.build_alibi_tensor(torch.ones(1, 2), n_head, torch.float32)
    else:
        raise UnknownArchitectureError("replay does not find the slopes of ALiBi")
    table = table.reshape(n_head, 2)
    return (table[:, 1] - table[:, 0]).to(device)


def _head_norm(attn: Any, name: str) -> Callable[[Tensor], Tensor] | None:
    if name not in attn.submodules:
        return None
    norm = getattr(attn, name)
    if getattr(attn, "_qk_norm_phase", None) == "post_reshape":
        return norm
    return lambda x: norm(x.flatten(-2)).unflatten(-1, x.shape[-2:])


def _mlp(block: Any) -> Callable[[Tensor], Tensor]:
    """The MLP alone, where its two layers stand in the block itself or it adds the residual."""
    mlp, original = block.mlp, block.mlp.original_component
    if mlp.name is None:
        parts, activation = mlp.submodules, block.original_component.activation_fn
        return lambda x: parts["out"](activation(parts["in"](x)))
    if "residual" in inspect.signature(original.forward).parameters:
        return lambda x: mlp(x, torch.zeros_like(x))
    return mlp
