"""Where a model comes from: names, folders and Hugging Face models in memory, as plain weights."""

from os.path import isfile
from pathlib import Path
from typing import Any

import torch

from tvlens.errors import ModelError, TvlensError, UnknownNameError, first_line
from tvlens.models.catalogue import BUNDLED, bundled_folder, known_models

# Further arguments that say where a model is, and so where its tokenizer is.
_WHERE = ("token", "cache_dir", "local_files_only", "subfolder", "gguf_file", "force_download")


def which_dtype(given: torch.dtype | str | None) -> torch.dtype | None:
    """The type that is meant; None for what is there."""
    if given is None or given == "auto":
        return None
    found = given if isinstance(given, torch.dtype) else getattr(torch, given, None)
    if found not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise UnknownNameError(
            f"unknown dtype {str(given)!r}; expected 'float32', 'bfloat16', 'float16', 'float64' "
            "or 'auto'"
        )
    return found


def which_device(given: str | int | torch.device | None) -> torch.device | None:
    """The device that is meant, which is there."""
    if given is None:
        return None
    there = [torch.device("cpu")]
    there += [torch.device("cuda", n) for n in range(torch.cuda.device_count())]
    there += [torch.device("mps")] if torch.backends.mps.is_available() else []
    if given == "auto":
        return there[min(1, len(there) - 1)]
    try:
        wanted = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)
    except RuntimeError:
        wanted = None
    if wanted is not None:
        if wanted.type == "cuda" and wanted.index is None:
            wanted = torch.device("cuda", 0)
        if wanted in there:
            return wanted
    raise UnknownNameError(
        f"there is no device {str(given)!r} here; expected one of "
        f"{', '.join(repr(str(each)) for each in there)} or 'auto'"
    )


def read_tokenizer(given: Any, hub: dict[str, Any]) -> Any:
    """The tokenizer that is meant: one given by folder or name is read.

    Args:
        given: a tokenizer, a folder or a Hugging Face name, or None.
        hub: revision and trust_remote_code.

    Raises:
        UnknownNameError: there is no tokenizer of this name.
    """
    if not isinstance(given, str | Path):
        return given
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(given, **hub)
    except Exception as error:
        raise UnknownNameError(
            f"tokenizer {str(given)!r} cannot be loaded: {first_line(error)}; expected a "
            "tokenizer, or a folder or Hugging Face name of one"
        ) from error


def read_huggingface(
    model: Any,
    tokenizer: Any,
    dtype: torch.dtype | str | None,
    hub: dict[str, Any],
    further: dict[str, Any],
) -> tuple[Any, Any, str]:
    """A Hugging Face model, its tokenizer and what to call it.

    Args:
        model: a bundled model's name, a folder, a Hugging Face name, or a model in memory.
        tokenizer: overrides the model's.
        dtype: weights' type, or "auto"; None for float32, or what a model in memory has.
        hub: revision and trust_remote_code.
        further: further arguments of `from_pretrained`.

    Raises:
        UnknownNameError: there is no model of this name.
        DownloadError: a bundled model cannot be fetched.
        ModelError: it is there and cannot be read, or is none that can be looked at.
    """
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
        PreTrainedModel,
    )

    _require_plain(model)
    if isinstance(model, PreTrainedModel):
        other = isinstance(dtype, torch.dtype) and dtype != model.dtype
        return model.to(dtype) if other else model, tokenizer, type(model).__name__
    if not isinstance(model, str | Path):
        raise ModelError(
            f"cannot look at a {type(model).__name__}; expected a name, a folder, a Hugging Face "
            "causal language model, a HookedTransformer or a TransformerBridge"
        )
    label = str(model)
    source = str(bundled_folder(label)) if label in BUNDLED else label
    where = {key: further[key] for key in _WHERE if key in further} | hub
    try:
        config = AutoConfig.from_pretrained(source, **where)
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source, **where)
        sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        hf_model = auto.from_pretrained(source, dtype=dtype or torch.float32, **hub, **further)
        _require_plain(hf_model)
    except TvlensError:
        raise
    except Exception as error:
        is_there = isfile(Path(source) / "config.json")
        if isinstance(error, OSError | ValueError) and not is_there:
            raise UnknownNameError(
                f"model {label!r} cannot be loaded: tvlens knows none of this name (but "
                f"{', '.join(known_models())}) and, as a folder or Hugging Face name, it failed "
                f"with: {first_line(error)}; check the spelling, the folder or the network"
            ) from error
        raise ModelError(
            f"model {label!r} is there and cannot be read ({type(error).__name__}: "
            f"{first_line(error)}); expected a causal language model with its tokenizer, as "
            "save_pretrained writes them; where a file was cut short, copy or fetch it again"
        ) from error
    return hf_model, tokenizer, label


def _require_plain(model: Any) -> None:
    """Refuse adapters and quantised weights, whose heads write by more than `W_O`."""
    adapted = hasattr(model, "merge_and_unload") or getattr(model, "_hf_peft_config_loaded", False)
    if adapted:
        raise ModelError(
            f"a {type(model).__name__} carries an adapter (LoRA) beside its weights; expected "
            "plain weights: merge it first, model = model.merge_and_unload()"
        )
    if getattr(model, "is_quantized", False):
        raise ModelError(
            f"a {type(model).__name__} has quantised weights; expected plain ones: load it without "
            "quantization_config, or take model.dequantize()"
        )
