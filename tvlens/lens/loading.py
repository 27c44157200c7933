"""Names, folders and models in memory to a checked lens."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from tvlens.errors import ModelError, TvlensError, UnknownNameError, first_line
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken, Readout, SquaredError
from tvlens.lens.selfcheck import choose_engine
from tvlens.models.backend import Backend
from tvlens.models.bridge import BridgeBackend, bridge_from_huggingface
from tvlens.models.catalogue import is_regression, read_regression
from tvlens.models.encode import special_prefix
from tvlens.models.gradients import outside_inference_mode
from tvlens.models.hooked import HookedBackend, hooked_from_huggingface
from tvlens.models.reference import Reference, read_reference, require_same
from tvlens.models.regression.points import BridgePoints, HookedPoints
from tvlens.models.regression.transformer import RegressionTransformer
from tvlens.models.source import (
    read_huggingface,
    read_tokenizer,
    which_device,
    which_dtype,
)
from tvlens.models.text_part import text_part

BackendKind = Literal["bridge", "hooked"]


@outside_inference_mode
def load(
    model: Any,
    *,
    tokenizer: Any = None,
    backend: BackendKind = "bridge",
    dtype: torch.dtype | str | None = None,
    device: str | int | torch.device | None = None,
    name: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **from_pretrained: Any,
) -> Lens:
    """A lens on a model, checked on a short prompt.

    Example:
        >>> lens = tvlens.load("smollm2-135m")  # doctest: +SKIP

    Args:
        model: a bundled model's name (`tvlens models` lists them), that of a shipped regression
            model (`tvlens regression models`), a file of one that tvlens trained, a folder or
            Hugging Face name of a causal language model, a Hugging Face model in memory, a
            RegressionTransformer, or a HookedTransformer or TransformerBridge of your own, which is
            used as it is. Of a model that sees pictures the text part is looked at. A bridge takes
            over the modules of a model in memory: give every lens a model of its own.
        tokenizer: overrides the model's tokenizer; a folder or Hugging Face name is read.
        backend: "bridge" (TransformerBridge) or "hooked" (HookedTransformer, transformer-lens 3);
            ignored for a model of your own that is one of the two.
        dtype: weights' type, such as torch.bfloat16 or "bfloat16"; "auto" is that of the file. By
            default float32 for a name or a folder, and its own for a model in memory, which is
            converted itself where another one is asked for. Ignored for a HookedTransformer or
            TransformerBridge of your own.
        device: where the model is put, such as "cuda:1" or 1; "auto" is the first accelerator, if
            there is one. None leaves it where it is, which is the CPU for a name.
        name: what tables and manifests call the model.
        revision: branch, tag or commit of a Hugging Face model.
        trust_remote_code: whether code that comes with a Hugging Face model may be run.
        **from_pretrained: further arguments of transformers' `from_pretrained`, such as
            `device_map`: blocks of a model that is spread over devices stay where they are.

    Raises:
        UnknownNameError: no bundled model, folder or Hugging Face model has this name, or there is
            no such backend, dtype or device.
        DownloadError: a bundled model cannot be fetched.
        ModelError: the model cannot be used; the message says which identity it breaks.
    """
    if backend not in ("bridge", "hooked"):
        raise UnknownNameError(f"unknown backend {backend!r}; expected 'bridge' or 'hooked'")
    kind, place = which_dtype(dtype), which_device(device)
    if place is not None and from_pretrained.get("device_map") is not None:
        raise UnknownNameError(
            f"device={device!r} and device_map={from_pretrained['device_map']!r} both say where "
            "the model is put; give one of them"
        )
    hub = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = read_tokenizer(tokenizer, hub)
    readout: Readout = FirstToken()
    if is_regression(model):
        name = name or Path(model).name.removesuffix(".safetensors")
        model, _ = read_regression(model)
    if isinstance(model, RegressionTransformer):
        readout = SquaredError(model.variance)
    wrapped = own_model = _already_wrapped(model, name, tokenizer)
    reference: Reference | None = None
    if isinstance(model, RegressionTransformer):
        made = HookedPoints if backend == "hooked" else BridgePoints
        wrapped = made(model.to(place, kind).eval(), name or type(model).__name__)
    elif wrapped is None:
        wanted = "auto" if dtype == "auto" else kind
        read = read_huggingface(model, tokenizer, wanted, hub, from_pretrained)
        hf_model, hf_tokenizer = read[:2]
        label = name or read[2]
        hf_model.eval()
        own = hf_model.dtype
        reference = read_reference(hf_model)
        with _explained(label, "its text part is taken out"):
            hf_model = text_part(hf_model)
        with _explained(label, f"transformer-lens wraps a {type(hf_model).__name__}"):
            if backend == "hooked":
                inner = hooked_from_huggingface(hf_model, hf_tokenizer, own)
                wrapped = HookedBackend(inner, label)
                place = place or hf_model.device
            else:
                inner = bridge_from_huggingface(hf_model, hf_tokenizer, own)
                wrapped = BridgeBackend(inner, label)
    # Before anything of the model is read and kept.
    if place is not None:
        wrapped.model.to(place, print_details=False)
    _require_heads(wrapped)
    if reference is not None:
        with _explained(wrapped.name, "its wrapped form runs"):
            require_same(wrapped, reference)
    prefix = _prefix(wrapped, own=own_model is not None, given=tokenizer is not None)
    with _explained(wrapped.name, "its heads are looked at"):
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


def _prefix(backend: Backend, *, own: bool, given: bool) -> tuple[int, ...]:
    """Tokens put before every prompt.

    Args:
        backend: the model.
        own: whether it is a model of transformer-lens, which is set to put one there or not.
        given: whether its tokenizer was given beside it.
    """
    tokenizer, cfg = backend.tokenizer, backend.model.cfg
    if tokenizer is None or (own and not getattr(cfg, "default_prepend_bos", True)):
        return ()
    if not own or given or cfg.tokenizer_prepends_bos is None:
        return tuple(special_prefix(tokenizer))
    begins = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    found = tuple(special_prefix(tokenizer) or begins)
    if found:
        warnings.warn(
            f"prompts to {backend.name!r} begin with {tokenizer.decode(found)!r}, as its "
            "cfg.default_prepend_bos says; a model that tvlens loads by its name gets only what "
            "its tokenizer puts there. Set model.cfg.default_prepend_bos = False for none",
            stacklevel=3,
        )
    return found


@contextmanager
def _explained(model: str, doing: str) -> Iterator[None]:
    """Whatever a dependency raises becomes one error that names the model and what was done."""
    try:
        yield
    except TvlensError:
        raise
    except Exception as error:
        raise ModelError(
            f"model {model!r} cannot be looked at: when {doing}, {type(error).__name__}: "
            f"{first_line(error)}; expected a decoder with attention heads of one size, which "
            "transformer-lens supports"
        ) from error


def _require_heads(backend: Backend) -> None:
    """Refuse models without attention heads.

    Raises:
        ModelError: no layer has heads, or their output projection cannot be read.
    """
    if not backend.attention_layers:
        raise ModelError(
            f"model {backend.name!r} has no attention heads in any of its {backend.n_layer} "
            "layers that transformer-lens hooks; expected a decoder with attention"
        )
    with _explained(backend.name, "its output projections are read"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _ = backend.w_o
