"""Names, folders and models in memory to a checked lens."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from tvlens.errors import ModelError, TvlensError, UnknownNameError
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
from tvlens.models.text_part import text_part

BackendKind = Literal["bridge", "hooked"]

# Further arguments that say where a model is, and so where its tokenizer is.
_WHERE = ("token", "cache_dir", "local_files_only", "subfolder", "gguf_file", "force_download")


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
        tokenizer: overrides the model's tokenizer.
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
        **from_pretrained: further arguments of transformers' `from_pretrained`.

    Raises:
        UnknownNameError: no bundled model, folder or Hugging Face model has this name, or there is
            no such backend, dtype or device.
        DownloadError: a bundled model cannot be fetched.
        ModelError: the model cannot be used; the message says which identity it breaks.
    """
    if backend not in ("bridge", "hooked"):
        raise UnknownNameError(f"unknown backend {backend!r}; expected 'bridge' or 'hooked'")
    kind, place = _dtype(dtype), _device(device)
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
        wrapped = made(model.to(place, kind).eval(), name or type(model).__name__)
    elif wrapped is None:
        hub = {"revision": revision, "trust_remote_code": trust_remote_code}
        wanted = "auto" if dtype == "auto" else kind
        hf_model, hf_tokenizer, found = _huggingface(model, tokenizer, wanted, hub, from_pretrained)
        label = name or found
        hf_model.eval()
        own = hf_model.dtype
        reference = read_reference(hf_model)
        with _explained(label, "its text part is taken out"):
            hf_model = text_part(hf_model)
        with _explained(label, f"transformer-lens wraps a {type(hf_model).__name__}"):
            if backend == "hooked":
                inner = hooked_from_huggingface(hf_model, hf_tokenizer, own)
                wrapped = HookedBackend(inner, label)
            else:
                inner = bridge_from_huggingface(hf_model, hf_tokenizer, own)
                wrapped = BridgeBackend(inner, label)
        _require_heads(wrapped)
        with _explained(label, "its wrapped form runs"):
            require_same(wrapped, reference)
    if place is not None:
        wrapped.model.to(place, print_details=False)
    prefix = () if wrapped.tokenizer is None else tuple(special_prefix(wrapped.tokenizer))
    _require_heads(wrapped)
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


def _dtype(given: torch.dtype | str | None) -> torch.dtype | None:
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


def _device(given: str | int | torch.device | None) -> torch.device | None:
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


def _huggingface(
    model: Any,
    tokenizer: Any,
    dtype: torch.dtype | str | None,
    hub: dict[str, Any],
    further: dict[str, Any],
) -> tuple[Any, Any, str]:
    from transformers import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoTokenizer,
        PreTrainedModel,
    )

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
        elif isinstance(tokenizer, str | Path):
            tokenizer = AutoTokenizer.from_pretrained(tokenizer, **hub)
        sees = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        auto = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        hf_model = auto.from_pretrained(source, dtype=dtype or torch.float32, **hub, **further)
    except Exception as error:
        is_there = (Path(source) / "config.json").is_file()
        if isinstance(error, OSError | ValueError) and not is_there:
            raise UnknownNameError(
                f"model {label!r} cannot be loaded: tvlens knows none of this name (but "
                f"{', '.join(known_models())}) and, as a folder or Hugging Face name, it failed "
                f"with: {_first_line(error)}; check the spelling, the folder or the network"
            ) from error
        raise ModelError(
            f"model {label!r} is there and cannot be read ({type(error).__name__}: "
            f"{_first_line(error)}); expected a causal language model with its tokenizer, as "
            "save_pretrained writes them; where a file was cut short, copy or fetch it again"
        ) from error
    return hf_model, tokenizer, label


def _first_line(error: BaseException) -> str:
    said = str(error).strip()
    return said.splitlines()[0].rstrip(".;: ") if said else type(error).__name__


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
            f"{_first_line(error)}; expected a decoder with attention heads of one size, which "
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
