"""Families of models: what runs them, and why some are slow or refused.

Told for people who choose a model; nothing is decided by it. `tvlens.load` looks at the model that
is given (`tvlens.lens.selfcheck`), and what it finds holds.
"""

from dataclasses import dataclass
from typing import Literal

EngineName = Literal["replay", "whole passes", "refused"]


@dataclass(frozen=True)
class Family:
    """Models that are run alike, for one reason.

    Attributes:
        models: what transformers calls them (`config.model_type`), or one kind of them in words.
        engine: what runs them.
        why: why they are slow or refused.
    """

    models: tuple[str, ...]
    engine: EngineName
    why: str = ""


def _family(models: str, engine: EngineName, why: str = "") -> Family:
    return Family(tuple(models.split(", ")), engine, why)


FAMILIES: tuple[Family, ...] = (
    _family("gpt2, gpt_bigcode, gptj, codegen, gpt_neo, gpt_neox", "replay"),
    _family("llama, mistral, mixtral, smollm3, nemotron, seed_oss, apertus, arcee", "replay"),
    _family("qwen2, qwen2_moe, qwen3, qwen3_moe, phi, phi3, starcoder2", "replay"),
    _family("gemma, gemma2, gemma3_text, gemma3, glm, glm4, glm4_moe", "replay"),
    _family("olmo, olmo2, olmo3, olmoe, exaone4, granite, granitemoe, stablelm", "replay"),
    _family("opt, mpt, bloom, falcon, xglm, gpt_oss, ernie4_5, minimax_m2", "replay"),
    _family("mistral3, qwen2_vl, qwen2_5_vl, qwen3_vl, llava (their text part)", "replay"),
    _family(
        "llama with dynamic rope, phi3 with longrope",
        "whole passes",
        "angles depend on the length of the whole prompt",
    ),
    _family("llama4_text, llama4", "whole passes", "attention in chunks"),
    _family("ministral3", "whole passes", "queries grow with their position"),
    _family("stablelm-2-12b", "whole passes", "a norm of its own for every query and key head"),
    _family("opt-350m", "whole passes", "projections at both ends and no norm before attention"),
    _family(
        "gpt2 scaled by inverse layer, mpt with clip_qkv", "whole passes", "not taken apart yet"
    ),
    _family(
        "hunyuan_v1_dense", "whole passes", "not taken apart yet; refused under transformer-lens 3"
    ),
    _family(
        "lfm2, jamba, bamba, granitemoehybrid, qwen3_next, qwen3_5_text",
        "whole passes",
        "layers without attention",
    ),
    _family("falcon_h1", "whole passes", "a state space beside attention"),
    _family(
        "deepseek_v2, deepseek_v3, glm4_moe_lite",
        "whole passes",
        "multi-head latent attention",
    ),
    _family("cohere, cohere2", "replay", "refused under transformer-lens 3"),
    _family("mamba, nemotron_h, recurrent_gemma", "refused", "no attention heads to be hooked"),
    _family("gemma4_text, gemma4", "refused", "heads of several widths in one model"),
    _family("falcon-11b, falcon-rw, gpt2 unscaled", "refused", "the bridge gives other logits"),
    _family(
        "ministral, phimoe, persimmon, biogpt",
        "refused",
        "transformer-lens has no bridge for them",
    ),
    _family("t5, bart", "refused", "an encoder with a decoder"),
)
"""What is known of families, from the survey in scripts/survey_models.py."""
