"""Named tensors with metadata on disk: safetensors, never pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tvlens.errors import RunError


def save_tensors(
    path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> None:
    """Write tensors and JSON-able metadata to one file, whole or not at all.

    Raises:
        RunError: the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part")
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        content = save(plain, metadata={key: json.dumps(value) for key, value in metadata.items()})
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(
            f"cannot write {path}: {error.strerror or error}; expected a writable folder with "
            "free space"
        ) from error


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of a file written by `save_tensors`.

    Raises:
        RunError: the file is missing, truncated or not safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = {key: json.loads(text) for key, text in (file.metadata() or {}).items()}
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(
            f"cannot read {path}: {error}; expected a whole safetensors file written by tvlens; "
            "delete it and make it again"
        ) from error
    return tensors, metadata
