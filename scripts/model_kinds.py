"""Tiny random models of every kind that people bring, by name: family and configuration."""

from typing import Any

LLAMA: dict[str, Any] = {
    "vocab_size": 54,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GROUPED = LLAMA | {"num_key_value_heads": 2}
SIZED = GROUPED | {"head_dim": 6}
LATENT = LLAMA | {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
GPT: dict[str, Any] = {
    "vocab_size": 54,
    "n_positions": 128,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2", GPT),
    "gpt-bigcode": ("GPTBigCode", GPT),
    "gptj": ("GPTJ", GPT | {"rotary_dim": 4}),
    "codegen": ("CodeGen", GPT | {"rotary_dim": 4}),
    "gpt-neo": (
        "GPTNeo",
        {
            "vocab_size": 54,
            "hidden_size": 32,
            "num_layers": 4,
            "num_heads": 4,
            "max_position_embeddings": 128,
            "intermediate_size": 24,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 4,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
    ),
    "neox": ("GPTNeoX", LLAMA | {"rotary_pct": 0.5}),
    "llama": ("Llama", GROUPED),
    "llama-hd": ("Llama", SIZED),
    "llama-bias": ("Llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama-linear": (
        "Llama",
        GROUPED
        | {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "llama-yarn": (
        "Llama",
        GROUPED
        | {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "llama-3": (
        "Llama",
        GROUPED
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 4.0,
                "rope_theta": 10000.0,
                "original_max_position_embeddings": 32,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            }
        },
    ),
    "llama-dynamic": (
        "Llama",
        GROUPED
        | {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral": ("Mistral", GROUPED | {"sliding_window": None}),
    "mistral-win": ("Mistral", GROUPED | {"sliding_window": 8}),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4, "sliding_window": None}),
    "ministral": ("Ministral", SIZED | {"sliding_window": 8}),
    "ministral3": (
        "Ministral3",
        SIZED
        | {
            "sliding_window": None,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.5,
            },
        },
    ),
    "qwen2": ("Qwen2", GROUPED),
    "qwen2-win": (
        "Qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2-moe": (
        "Qwen2Moe",
        GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "qwen3": ("Qwen3", SIZED),
    "qwen3-moe": (
        "Qwen3Moe",
        SIZED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "qwen3-next": (
        "Qwen3Next",
        SIZED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "gemma": ("Gemma", SIZED | {"pad_token_id": 0}),
    "gemma2": ("Gemma2", SIZED | {"pad_token_id": 0, "sliding_window": 8}),
    "gemma3": ("Gemma3Text", SIZED | {"pad_token_id": 0, "sliding_window": 8}),
    "phi": ("Phi", LLAMA),
    "phi3": ("Phi3", GROUPED | {"pad_token_id": 0, "sliding_window": None}),
    "phi3-win": ("Phi3", GROUPED | {"pad_token_id": 0, "sliding_window": 8}),
    "phi3-long": (
        "Phi3",
        GROUPED
        | {
            "pad_token_id": 0,
            "original_max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.0, 1.0, 1.0],
                "long_factor": [2.0, 2.0, 2.0, 2.0],
            },
        },
    ),
    "phimoe": ("Phimoe", GROUPED | {"num_local_experts": 4}),
    "stablelm": ("StableLm", GROUPED),
    "stablelm-qk": ("StableLm", GROUPED | {"qk_layernorm": True}),
    "stablelm-par": ("StableLm", GROUPED | {"use_parallel_residual": True}),
    "olmo": ("Olmo", GROUPED),
    "olmo-clip": ("Olmo", GROUPED | {"clip_qkv": 0.3}),
    "olmo2": ("Olmo2", GROUPED),
    "olmo3": ("Olmo3", GROUPED | {"sliding_window": 8}),
    "olmoe": ("Olmoe", GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "nemotron": ("Nemotron", GROUPED),
    "seed-oss": ("SeedOss", SIZED),
    "apertus": ("Apertus", GROUPED),
    "arcee": ("Arcee", GROUPED),
    "glm": ("Glm", SIZED | {"pad_token_id": 0}),
    "glm4": ("Glm4", SIZED | {"pad_token_id": 0}),
    "glm4-moe": (
        "Glm4Moe",
        SIZED
        | {
            "pad_token_id": 0,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    "opt": ("OPT", LLAMA | {"word_embed_proj_dim": 32, "ffn_dim": 24}),
    "opt-proj": (
        "OPT",
        LLAMA | {"word_embed_proj_dim": 16, "ffn_dim": 24, "do_layer_norm_before": False},
    ),
    "mpt": (
        "Mpt",
        {"vocab_size": 54, "d_model": 32, "n_layers": 3, "n_heads": 4, "max_seq_len": 128},
    ),
    "bloom": ("Bloom", {"vocab_size": 54, "hidden_size": 32, "n_layer": 3, "n_head": 4}),
    "falcon": (
        "Falcon",
        {
            "vocab_size": 54,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 2,
            "eos_token_id": 3,
        },
    ),
    "falcon-rw": (
        "Falcon",
        {
            "vocab_size": 54,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "multi_query": False,
            "parallel_attn": False,
            "alibi": True,
            "bias": True,
        },
    ),
    "falcon-new": (
        "Falcon",
        {
            "vocab_size": 54,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "multi_query": False,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
        },
    ),
    "xglm": (
        "XGLM",
        {
            "vocab_size": 54,
            "d_model": 32,
            "ffn_dim": 24,
            "num_layers": 3,
            "attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "starcoder2": ("Starcoder2", GROUPED),
    "starcoder2-win": ("Starcoder2", GROUPED | {"sliding_window": 8}),
    "gpt-oss": (
        "GptOss",
        SIZED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    "ernie4.5": ("Ernie4_5", SIZED),
    "llama4": (
        "Llama4Text",
        SIZED | {"num_local_experts": 2, "attention_chunk_size": 16, "intermediate_size_mlp": 24},
    ),
    "smollm3": ("SmolLM3", GROUPED | {"pad_token_id": 0, "no_rope_layers": [1, 0, 1]}),
    "minimax-m2": ("MiniMaxM2", SIZED | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "exaone4": ("Exaone4", SIZED | {"sliding_window": 8, "sliding_window_pattern": 2}),
    "granite": (
        "Granite",
        GROUPED
        | {
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "logits_scaling": 3.0,
        },
    ),
    "granite-moe": (
        "GraniteMoe",
        GROUPED | {"residual_multiplier": 0.22, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "cohere": ("Cohere", GROUPED | {"pad_token_id": 0}),
    "cohere2": ("Cohere2", GROUPED | {"pad_token_id": 0, "sliding_window": 8}),
    "hunyuan": ("HunYuanDenseV1", SIZED | {"pad_token_id": 0}),
    "helium": ("Helium", SIZED),
    "persimmon": ("Persimmon", LLAMA),
    "biogpt": ("BioGpt", LLAMA),
    "lfm2": ("Lfm2", GROUPED | {"layer_types": ["conv", "full_attention", "conv"]}),
    "jamba": (
        "Jamba",
        GROUPED
        | {
            "mamba_d_state": 4,
            "mamba_expand": 1,
            "num_experts": 2,
            "attn_layer_offset": 1,
            "attn_layer_period": 2,
        },
    ),
    "qwen3.5": (
        "Qwen3_5Text",
        SIZED
        | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "granite-hybrid": (
        "GraniteMoeHybrid",
        GROUPED
        | {
            "layer_types": ["mamba", "attention", "mamba"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
            "position_embedding_type": "rope",
            "residual_multiplier": 0.22,
        },
    ),
    "bamba": (
        "Bamba",
        GROUPED
        | {
            "attn_layer_indices": [1],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    "falcon-h1": (
        "FalconH1",
        GROUPED
        | {
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_ssm": 32,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "attention_out_multiplier": 0.4,
        },
    ),
    "nemotron-h": (
        "NemotronH",
        GROUPED
        | {
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 1,
        },
    ),
    "recurrent-gemma": (
        "RecurrentGemma",
        GROUPED
        | {
            "block_types": ["recurrent", "attention"],
            "lru_width": 32,
            "attention_window_size": 8,
        },
    ),
    "gemma4": ("Gemma4Text", GROUPED),
    "glm4-moe-lite": ("Glm4MoeLite", LATENT | {"first_k_dense_replace": 1}),
    "deepseek-v2": ("DeepseekV2", LATENT),
    "deepseek-v3": ("DeepseekV3", LATENT | {"first_k_dense_replace": 1}),
    "mamba": (
        "Mamba",
        {"vocab_size": 54, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "falcon-bias": (
        "Falcon",
        {
            "vocab_size": 54,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "bias": True,
        },
    ),
    "gpt2-unscaled": ("GPT2", GPT | {"scale_attn_weights": False}),
    "gpt2-inverse-layer": ("GPT2", GPT | {"scale_attn_by_inverse_layer_idx": True}),
    "neox-sequential": ("GPTNeoX", LLAMA | {"use_parallel_residual": False}),
    "llama-one-head": ("Llama", GROUPED | {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "llama-one-key-head": ("Llama", GROUPED | {"num_key_value_heads": 1}),
    "llama-tied": ("Llama", GROUPED | {"tie_word_embeddings": True}),
    "qwen2-tied": ("Qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen3-win": (
        "Qwen3",
        SIZED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "phi-qk": ("Phi", LLAMA | {"qk_layernorm": True}),
    "mistral-hd": ("Mistral", SIZED | {"sliding_window": None}),
    "mixtral-win": ("Mixtral", GROUPED | {"num_local_experts": 4, "sliding_window": 8}),
    "gemma-tied": ("Gemma", SIZED | {"pad_token_id": 0, "tie_word_embeddings": True}),
    "gemma2-no-cap": (
        "Gemma2",
        SIZED
        | {
            "pad_token_id": 0,
            "sliding_window": 8,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "gemma2-full": (
        "Gemma2",
        SIZED
        | {
            "pad_token_id": 0,
            "layer_types": ["full_attention", "full_attention", "full_attention"],
        },
    ),
    "gemma3-full": (
        "Gemma3Text",
        SIZED
        | {
            "pad_token_id": 0,
            "layer_types": ["full_attention", "full_attention", "full_attention"],
            "sliding_window": 8,
        },
    ),
    "mpt-clip": (
        "Mpt",
        {
            "vocab_size": 54,
            "d_model": 32,
            "n_layers": 3,
            "n_heads": 4,
            "max_seq_len": 128,
            "attn_config": {"clip_qkv": 0.5},
        },
    ),
    "bloom-post": (
        "Bloom",
        {
            "vocab_size": 54,
            "hidden_size": 32,
            "n_layer": 3,
            "n_head": 4,
            "apply_residual_connection_post_layernorm": True,
        },
    ),
    "granite-plain": ("Granite", GROUPED),
    "olmo3-full": (
        "Olmo3",
        GROUPED | {"layer_types": ["full_attention", "full_attention", "full_attention"]},
    ),
    "exaone4-full": (
        "Exaone4",
        SIZED
        | {
            "sliding_window": None,
            "layer_types": ["full_attention", "full_attention", "full_attention"],
        },
    ),
    "smollm3-all": ("SmolLM3", GROUPED | {"pad_token_id": 0, "no_rope_layers": [1, 1, 1]}),
    "opt-gelu": (
        "OPT",
        LLAMA | {"word_embed_proj_dim": 32, "ffn_dim": 24, "activation_function": "gelu"},
    ),
    "cohere-qk": ("Cohere", GROUPED | {"pad_token_id": 0, "use_qk_norm": True}),
    "codegen-all": ("CodeGen", GPT | {"rotary_dim": 8}),
    "stablelm-partial": ("StableLm", GROUPED | {"partial_rotary_factor": 0.5}),
    "glm-partial": (
        "Glm",
        SIZED | {"head_dim": 8, "pad_token_id": 0, "partial_rotary_factor": 0.5},
    ),
}
