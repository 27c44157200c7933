"""Tiny random models, their tokenizer and their task: all that the tests look at, made offline."""

from dataclasses import replace
from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from tvlens.lens.engine import Engine
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.lens.replay import ReplayEngine
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch
from tvlens.models.bridge import BridgeBackend, bridge_from_huggingface
from tvlens.models.hooked import HookedBackend, hooked_from_huggingface
from tvlens.tasks import Pair, Prompt, Prompts, Task, Template

try:
    from transformer_lens import HookedTransformer, HookedTransformerConfig
except ImportError:  # transformer-lens 4
    HookedTransformer = HookedTransformerConfig = None

HAS_HOOKED = HookedTransformer is not None
KINDS = ["bridge", "hooked"] if HAS_HOOKED else ["bridge"]

LETTERS = "abcdefghijklmnopqrstuvw"
SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>"]
WORDS = [*SPECIAL, "Q", "A", ":", "\n", *LETTERS, *(f" {letter}" for letter in LETTERS)]
D_VOCAB, N_CTX, N_LAYER, N_HEAD, D_MODEL = len(WORDS), 128, 3, 4, 32

_LLAMA_LIKE = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 24,
    "num_hidden_layers": N_LAYER,
    "num_attention_heads": N_HEAD,
    "max_position_embeddings": N_CTX,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
_GPT_LIKE = {
    "vocab_size": D_VOCAB,
    "n_positions": N_CTX,
    "n_embd": D_MODEL,
    "n_layer": N_LAYER,
    "n_head": N_HEAD,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # grouped queries, a head size that is not d_model / heads, rotary positions
    "llama": ("Llama", _LLAMA_LIKE | {"num_key_value_heads": 2, "head_dim": 6}),
    # learned positions, biases everywhere, tied embeddings
    "gpt2": ("GPT2", _GPT_LIKE),
    # attention and MLP in parallel, half of each head rotary
    "gpt-neox": ("GPTNeoX", _LLAMA_LIKE | {"rotary_pct": 0.5}),
    # in parallel behind one norm, rotary over neighbouring components
    "gptj": ("GPTJ", _GPT_LIKE | {"rotary_dim": 4}),
    # queries and keys normalised head by head
    "qwen3": ("Qwen3", _LLAMA_LIKE | {"num_key_value_heads": 2, "head_dim": 6}),
    # biases on queries, keys and values alone
    "qwen2": ("Qwen2", _LLAMA_LIKE | {"num_key_value_heads": 2}),
}
# What replay does not know.
UNKNOWN_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "dynamic-rope": (
        "Llama",
        _LLAMA_LIKE | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    ),
    # no norm at all before attention, and projections at both ends
    "opt-projected": (
        "OPT",
        _LLAMA_LIKE | {"word_embed_proj_dim": 16, "ffn_dim": 24, "do_layer_norm_before": False},
    ),
}
_GROUPED = _LLAMA_LIKE | {"num_key_value_heads": 2, "head_dim": 6}
# Blocks that scale what attention writes before they add it, and which module of a block reads the
# residual stream behind that.
SCALED_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma2": ("Gemma2", _GROUPED | {"sliding_window": 4}),
    "gemma3": ("Gemma3", _GROUPED | {"sliding_window": 4}),
    "olmo2": ("Olmo2", _LLAMA_LIKE | {"num_key_value_heads": 2}),
    "olmo3": ("Olmo3", _LLAMA_LIKE | {"num_key_value_heads": 2}),
    "glm4": ("Glm4", _GROUPED | {"pad_token_id": 0}),
    "exaone4": ("Exaone4", _GROUPED | {"sliding_window": 4, "sliding_window_pattern": 2}),
    "granite": (
        "Granite",
        _LLAMA_LIKE
        | {
            "num_key_value_heads": 2,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 3.0,
        },
    ),
}
# What HookedTransformer cannot be made of, and replay knows on the bridge.
BRIDGED_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # a window of attention
    "mistral": ("Mistral", _LLAMA_LIKE | {"num_key_value_heads": 2, "sliding_window": 4}),
    # windows on some layers, scores that are not scaled
    "gpt-neo": (
        "GPTNeo",
        {
            "vocab_size": D_VOCAB,
            "hidden_size": D_MODEL,
            "num_layers": N_LAYER,
            "num_heads": N_HEAD,
            "max_position_embeddings": N_CTX,
            "intermediate_size": 24,
            "attention_types": [[["global", "local", "global"], 1]],
            "window_size": 4,
        },
    ),
    # ALiBi
    "mpt": (
        "Mpt",
        {
            "vocab_size": D_VOCAB,
            "d_model": D_MODEL,
            "n_layers": N_LAYER,
            "n_heads": N_HEAD,
            "max_seq_len": N_CTX,
        },
    ),
    "bloom": (
        "Bloom",
        {"vocab_size": D_VOCAB, "hidden_size": D_MODEL, "n_layer": N_LAYER, "n_head": N_HEAD},
    ),
    # an MLP whose layers stand in the block
    "opt": ("OPT", _LLAMA_LIKE | {"word_embed_proj_dim": D_MODEL, "ffn_dim": 24}),
    # layers without positions
    "smollm3": (
        "SmolLM3",
        _LLAMA_LIKE | {"num_key_value_heads": 2, "no_rope_layers": [1, 0, 1], "pad_token_id": 0},
    ),
    # queries and keys normalised over all heads and clipped, a mixture of experts
    "olmoe": (
        "Olmoe",
        _LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.8},
    ),
    # attention sinks, windows, a rotary table of half the size
    "gpt-oss": (
        "GptOss",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 4},
    ),
    **SCALED_CONFIGS,
}
# Layers without heads, which the one in the middle has, and values that are wider than queries.
HYBRID_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "lfm2": (
        "Lfm2",
        _LLAMA_LIKE | {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "jamba": (
        "Jamba",
        _LLAMA_LIKE
        | {
            "num_key_value_heads": 2,
            "mamba_d_state": 4,
            "mamba_expand": 1,
            "num_experts": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
        },
    ),
    # blocks that scale what they add, too
    "granite-hybrid": (
        "GraniteMoeHybrid",
        _LLAMA_LIKE
        | {
            "num_key_value_heads": 2,
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "residual_multiplier": 0.22,
        },
    ),
}
_LATENT = _LLAMA_LIKE | {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
LATENT_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek-v2": ("DeepseekV2", _LATENT),
    "deepseek-v3": ("DeepseekV3", _LATENT | {"first_k_dense_replace": 1}),
}
READS_BEHIND_ATTENTION = {
    "gemma2": "pre_feedforward_layernorm",
    "gemma3": "pre_feedforward_layernorm",
    "olmo2": "mlp",
    "olmo3": "mlp",
    "glm4": "post_attention_layernorm",
    "exaone4": "mlp",
    "granite": "post_attention_layernorm",
    "bloom": "post_attention_layernorm",
}

ALL_CONFIGS = CONFIGS | BRIDGED_CONFIGS | UNKNOWN_CONFIGS | HYBRID_CONFIGS | LATENT_CONFIGS

OWN = ["attention-only", "folded"] if HAS_HOOKED else []
"""HookedTransformers as users make them."""

CASES = [(name, kind) for name in CONFIGS for kind in KINDS] + [(name, "hooked") for name in OWN]
CASES += [(name, "bridge") for name in BRIDGED_CONFIGS]
"""Every architecture on every backend that is there."""

# Largest difference between two ways to the same number, in standard deviations of it.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.1}

TASK = Task(
    "kind-of-word",
    tuple(
        Pair(first + second, {0: "k", 1: "lm", 2: "no"}[i % 3])
        for i, first in enumerate("abcdefg")
        for second in "abcdefg"
    ),
    "a name for the first letter's place",
    "made up",
    "CC0-1.0",
)


def tokenizer(*, bos: bool = False, eos: bool = False) -> PreTrainedTokenizerFast:
    """One token per character, a space belonging to the letter behind it; " ~" is not read."""
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.normalizer = Replace(" ~", "")
    inner.pre_tokenizer = Split(Regex(r" ?\w|[^\w]"), behavior="isolated")
    inner.decoder = Fuse()
    if bos or eos:
        inner.post_processor = TemplateProcessing(
            single=("<bos> " if bos else "") + "$A" + (" <eos>" if eos else ""),
            special_tokens=[("<bos>", 2), ("<eos>", 3)],
        )
    special = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **special
    )


def huggingface(name: str, **changes: Any) -> Any:
    """A Hugging Face model with random weights, none of them at a default that hides a mistake."""
    family, config = ALL_CONFIGS[name]
    text = "Text" if family == "Gemma3" else ""
    config_type = getattr(transformers, f"{family}{text}Config")
    model = getattr(transformers, f"{family}ForCausalLM", None) or transformers.GPT2LMHeadModel
    made = model(config_type(**config, **changes)).eval()
    randomise(made)
    return made


def randomise(model: torch.nn.Module, seed: int = 0) -> None:
    """Large random matrices, norms around one, biases that are not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3
            is_norm_weight = parameter.ndim == 1 and bool((parameter == 1).all())
            parameter.copy_(1 + noise if is_norm_weight else noise)


@cache
def backend(name: str, kind: str, dtype: torch.dtype = torch.float32) -> Backend:
    """A backend on one of `CASES`, made once."""
    made = new_backend(name, kind, dtype)
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


@cache
def whole_passes(backend: Backend) -> WholePassEngine:
    """The slow engine of a backend, made once: it has to try which sites there are."""
    return WholePassEngine(backend)


def new_backend(name: str, kind: str, dtype: torch.dtype = torch.float32) -> Backend:
    """A backend that a test may break."""
    if name in OWN:
        return HookedBackend(_own(name, dtype), name)
    model = huggingface(name).to(dtype)
    if kind == "hooked":
        return HookedBackend(hooked_from_huggingface(model, tokenizer(), dtype), name)
    return BridgeBackend(bridge_from_huggingface(model, tokenizer(), dtype), name)


def _own(name: str, dtype: torch.dtype) -> Any:
    if name == "attention-only":
        return attention_only(dtype)
    model = hooked_from_huggingface(huggingface("gpt2"), None, torch.float32)
    model.process_weights_()
    model.tokenizer = tokenizer()
    model.cfg.dtype = dtype
    return model.to(dtype, print_details=False)


def attention_only(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A HookedTransformer without MLPs, from a config of its own."""
    config = {
        "n_layers": N_LAYER,
        "n_heads": N_HEAD,
        "d_model": D_MODEL,
        "d_head": 6,
        "n_ctx": N_CTX,
        "d_vocab": D_VOCAB,
        "attn_only": True,
        "normalization_type": "LN",
        "dtype": dtype,
        "device": "cpu",
    }
    model = HookedTransformer(HookedTransformerConfig(**(config | changes)))
    randomise(model)
    model.tokenizer = tokenizer()
    return model


def lens(name: str = "llama", kind: str = "bridge", **changes: Any) -> Lens:
    """A lens on one of `CASES`."""
    inner = backend(name, kind)
    return Lens(inner, ReplayEngine(inner), FirstToken(), **changes)


ROWS = [[31, 6, 9, 40, 12], [8, 33, 20], [17], [5, 44, 10, 30, 9, 21, 36]]
"""Token ids of prompts of different lengths, one of them a single token."""


def batch(rows: list[list[int]] | None = None) -> Batch:
    """The prompts of `ROWS`, or others."""
    rows = ROWS if rows is None else rows
    answers = [[10 + i, 20 + i] for i in range(len(rows))]
    return Batch.pad(rows, [[answer] for answer in answers])


def asked_early() -> Batch:
    """The prompts of `ROWS`, asked at different columns, most of them before the last token."""
    return replace(batch(), query=torch.tensor([4, 5, 6, 3]))


BATCHES = {"asked at the end": batch(), "asked early": asked_early()}


class Watched(Engine):
    """Passes everything on and notes how much it was given at once."""

    name = "watched"

    def __init__(self, inner):
        super().__init__(inner.backend)
        self.inner, self.tokens, self.rows, self.grads = inner, [], [], []

    @property
    def sites(self):
        return self.inner.sites

    @property
    def anywhere(self):
        return self.inner.anywhere

    def runs(self, edit):
        return self.inner.runs(edit)

    def record(self, batch, sites):
        return self.inner.record(batch, sites)

    def read(self, batch):
        self.tokens.append(batch.inputs.numel())
        return self.inner.read(batch)

    def join(self, readings):
        return self.inner.join(readings)

    def run(self, reading, edit):
        self.rows.append(len(reading) * edit.n_variant)
        self.grads.append(torch.is_grad_enabled())
        return self.inner.run(reading, edit)

    def final(self, reading, edit):
        return self.inner.final(reading, edit)

    def generate(self, reading, edit, n_tokens, *steps):
        return self.inner.generate(reading, edit, n_tokens, *steps)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in standard deviations of what is expected."""
    found, expected = found.detach(), expected.detach()
    spread = expected.float().std() if expected.numel() > 1 else expected.float().abs().max()
    return float((found.float() - expected.float()).abs().max() / spread)


def linear_model() -> Any:
    """A HookedTransformer whose logits are linear and known on paper.

    Its residual stream has one coordinate per token, read in and out by the identity, and every
    head attends to all tokens alike. Head (1, 0) reads " k" and writes 30 times " k"; head (0, 1)
    reads "Q" and writes 5 times "<pad>". The other two heads write nothing.
    """
    model = attention_only(
        n_layers=2, n_heads=2, d_head=2, d_model=D_VOCAB, normalization_type=None
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.embed.W_E.copy_(torch.eye(D_VOCAB))
        model.unembed.W_U.copy_(torch.eye(D_VOCAB))
        for layer, head, read, write, size in ((1, 0, " k", " k", 30.0), (0, 1, "Q", "<pad>", 5.0)):
            attn = model.blocks[layer].attn
            attn.W_V[head, WORDS.index(read), 0] = 1.0
            attn.W_O[head, 0, WORDS.index(write)] = size
    return model


def linear_lens(readout: Any = None) -> Lens:
    """A lens on `linear_model`."""
    inner = HookedBackend(linear_model(), "linear")
    return Lens(inner, ReplayEngine(inner), readout or FirstToken())


def one_shot(label: str, query: str = "b", answer: str = "k", kind: str = "clean") -> Prompt:
    """A prompt of 15 tokens, two of them "Q", with `label` as the one answer shown."""
    return Prompt((Pair("a", label),), Pair(query, answer), kind, Template())


def prompts(*items: Prompt, task: str = "made-up", split: str = "train", shots: int = 1) -> Prompts:
    """A set of prompts made by hand."""
    return Prompts(task, split, items[0].kind, shots, 0, items)
