"""Names, folders and models in memory to a checked lens."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from tvlens.errors import ModelError, UnknownNameError
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken, Readout, SquaredError
from tvlens.lens.selfcheck import choose_engine
from tvlens.models.backend import Backend
from tvlens.models.bridge import BridgeBackend, bridge_from_huggingface
from tvlens.models.catalogue import (
    BUNDLED,
    bundled_folder,
    is_regression,
    known_models,
    read_regression,
)
from tvlens.models.encode import special_prefix
from tvlens.models.hooked import HookedBackend, hooked_from_huggingface
from tvlens.models.reference import read_reference, require_same
from tvlens.models.regression.points import BridgePoints, HookedPoints
from tvlens.models.regression.transformer import RegressionTransformer

BackendKind = Literal["bridge", "hooked"]


def load(
    model: Any,
    *,
    tokenizer: Any = None,
    backend: BackendKind = "bridge",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device | None = None,
    name: str | None = None,
) -> Lens:
    """A lens on a model, checked on a short prompt.

    Example:
        >>> lens = tvlens.load("smollm2-135m")  # doctest: +SKIP

    Args:
        model: a bundled model's name (`tvlens models` lists them), that of a shipped regression
            model (`tvlens regression models`), a file of one that tvlens trained, a folder or
            Hugging Face name of a causal language model, a Hugging Face model in memory, a
            RegressionTransformer, or a HookedTransformer or TransformerBridge of your own, which is
            used as it is. A bridge takes over the modules of a model in memory: give every lens a
            model of its own.
        tokenizer: overrides the model's tokenizer.
        backend: "bridge" (TransformerBridge) or "hooked" (HookedTransformer, transformer-lens 3);
            ignored for a model of your own that is one of the two.
        dtype: weights' type; ignored for a model of your own.
        device: where the model is put; None leaves it where it is, which is the CPU for a name.
        name: what tables and manifests call the model.

    Raises:
        UnknownNameError: no bundled model, folder or Hugging Face model has this name.
        DownloadError: a bundled model cannot be fetched.
        ModelError: the model cannot be used; the message says which identity it breaks.
    """
    if backend not in ("bridge", "hooked"):
        raise UnknownNameError(f"unknown backend {backend!r}; expected 'bridge' or 'hooked'")
    readout: Readout = FirstToken()
    if is_regression(model):
        name = name or Path(model).name.removesuffix(".safetensors")
        model, card = read_regression(model)
        readout = SquaredError(card["variance"])
    elif isinstance(model, RegressionTransformer):
        readout = SquaredError()
    wrapped = _already_wrapped(model, name, tokenizer)
    if isinstance(model, RegressionTransformer):
        made = HookedPoints if backend == "hooked" else BridgePoints
        wrapped = made(model.to(device, dtype).eval(), name or type(model).__name__)
    elif wrapped is None:
        hf_model, hf_tokenizer, found = _huggingface(model, tokenizer, dtype)
        label = name or found
        hf_model.eval()
        reference = read_reference(hf_model)
        if backend == "hooked":
            inner = hooked_from_huggingface(hf_model, hf_tokenizer, dtype)
            wrapped = HookedBackend(inner, label)
        else:
            inner = bridge_from_huggingface(hf_model, hf_tokenizer, dtype)
            wrapped = BridgeBackend(inner, label)
        require_same(wrapped, reference)
    if device is not None:
        wrapped.model.to(torch.device(device), print_details=False)
    prefix = () if wrapped.tokenizer is None else tuple(special_prefix(wrapped.tokenizer))
    lens = Lens(wrapped, choose_engine(wrapped), readout, prefix)
    return lens if wrapped.device.type == "cpu" else replace(lens, max_tokens=8192)


def _already_wrapped(model: Any, name: str | None, tokenizer: Any) -> Backend | None:
    kinds = {type_.__name__ for type_ in type(model).__mro__}
    label = name or getattr(getattr(model, "cfg", None), "model_name", None) or type(model).__name__
    if "HookedTransformer" in kinds:
        return HookedBackend(model, label, tokenizer)
    if "TransformerBridge" in kinds:
        return BridgeBackend(model, label, tokenizer)
    return None


def _huggingface(model: Any, tokenizer: Any, dtype: torch.dtype) -> tuple[Any, Any, str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

    if isinstance(model, PreTrainedModel):
        return model.to(dtype), tokenizer, type(model).__name__
    if not isinstance(model, str | Path):
        raise ModelError(
            f"cannot look at a {type(model).__name__}; expected a name, a folder, a Hugging Face "
            "causal language model, a HookedTransformer or a TransformerBridge"
        )
    label = str(model)
    source = str(bundled_folder(label)) if label in BUNDLED else label
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(source)
        hf_model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnknownNameError(
            f"model {label!r} cannot be loaded: tvlens knows none of this name (but "
            f"{', '.join(known_models())}) and, as a folder or Hugging Face name, it failed with: "
            f"{reason}; check the spelling, the folder or the network"
        ) from error
    return hf_model, tokenizer, label
