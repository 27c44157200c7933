"""The text part of a model that also reads pictures or sounds."""

from typing import Any

import torch

from tvlens.errors import ModelError

# Text parts that have no causal language model of their own, and the one that they are on text
# alone, where positions along time, height and width are the same.
_PLAIN = {
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "qwen3_vl_moe_text": "qwen3_moe",
}


def text_part(model: Any) -> Any:
    """The causal language model inside a Hugging Face model; it itself where that is all it is.

    Weights are shared, not copied.

    Args:
        model: a Hugging Face model.

    Raises:
        ModelError: its text part is no causal language model that transformers has.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = model.config
    if config.is_encoder_decoder or config.get_text_config() is config:
        return model
    text = config.get_text_config()
    parts = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m is not model]
    decoder = next((part for part in parts if type(part.config) is type(text)), None)
    plain = _PLAIN.get(text.model_type)
    if plain is not None:
        text = CONFIG_MAPPING[plain](**_without_sections(text.to_dict()))
    if decoder is None or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"a {type(model).__name__} reads more than text, and transformers has no causal "
            f"language model of its text part ({text.model_type}); expected one, or load the text "
            "part yourself and give it to tvlens.load"
        )
    if decoder.get_output_embeddings() is not None:
        return decoder
    with torch.device("meta"):
        made = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)](text)
    if plain is None:
        setattr(made, made.base_model_prefix, decoder)
    else:
        base = made.base_model
        base.load_state_dict(decoder.state_dict(), assign=True)
        base.rotary_emb = type(base.rotary_emb)(text)
    made.set_output_embeddings(model.get_output_embeddings())
    return made.eval()


def _without_sections(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what shares dimensions out between time, height and width."""
    rope = config.get("rope_parameters") or {}
    kept = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    found = {key: value for key, value in config.items() if key != "model_type"}
    return found | {"rope_parameters": kept}
