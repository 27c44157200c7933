"""Files written whole or not at all: JSON, Parquet and safetensors, never pickle."""

import hashlib
import io
import json
import os
import shutil
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from safetensors import safe_open

from tvlens.errors import RunError, TvlensError, first_line

if TYPE_CHECKING:
    # torch and pandas are imported where they are used: digests and text need neither.
    from torch import Tensor

OWN = ".tvlens-"
"""Begins the names of temporary files, locks and indices."""

SUFFIXES = (".json", ".parquet", ".safetensors")
"""Endings of files that `encode` makes."""

_DIGEST = "sha256"


K = TypeVar("K", bound="Kept")


class Kept(ABC):
    """A value that keeps itself: in a file of its own, or as a step of a run (`Run.kept`)."""

    @abstractmethod
    def state(self) -> "tuple[dict[str, Tensor], dict[str, Any]]":
        """Everything it is made of: tensors, and facts that JSON can hold."""

    @classmethod
    @abstractmethod
    def of_state(cls: type[K], tensors: "Mapping[str, Tensor]", facts: Mapping[str, Any]) -> K:
        """The value that has this state.

        Raises:
            KeyError: something is missing.
        """

    def save(self, path: Path | str) -> None:
        """Write the value as safetensors, whole or not at all.

        Raises:
            RunError: the file cannot be written.
        """
        save_tensors(path, *self.state())

    @classmethod
    def load(cls: type[K], path: Path | str) -> K:
        """The value written by `save`.

        Raises:
            RunError: the file cannot be read or holds something else.
        """
        return restored(cls, *load_tensors(path), path)


def restored(
    kind: type[K], tensors: "Mapping[str, Tensor]", facts: Mapping[str, Any], path: Path | str
) -> K:
    """The value that was kept in a file.

    Raises:
        TvlensError: the file, at `path`, holds something else, or no sound value.
    """
    wrong: tuple[type[Exception], ...] = (KeyError, TypeError, ValueError, IndexError)
    wrong = (*wrong, AttributeError, RuntimeError, OverflowError)
    try:
        return kind.of_state(tensors, facts)
    except TvlensError as error:
        raise type(error)(f"{path} holds no sound {kind.__name__}: {error}") from error
    except wrong as error:
        lacks = f"it lacks {error}" if isinstance(error, KeyError) else first_line(error)
        has = ", ".join(ascii(name)[1:31].rstrip("'") for name in [*tensors, *facts][:12])
        raise RunError(
            f"{path} holds no {kind.__name__}: {lacks}, it has {has or 'nothing'}; expected a file "
            f"that {kind.__name__}.save or a tvlens command wrote"
        ) from error


def save_tensors(
    path: Path | str, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, Any]
) -> None:
    """Write tensors and JSON-able metadata to one file, with a digest of both, whole or not at all.

    Raises:
        RunError: the file cannot be written.
    """
    texts = {key: json.dumps(value) for key, value in metadata.items()}
    digest = _digest(tensors, texts)
    write(Path(path), encode_tensors(tensors, texts | {_DIGEST: digest}))


def load_tensors(
    path: Path | str, *, signed: bool = False
) -> "tuple[dict[str, Tensor], dict[str, Any]]":
    """Tensors and metadata of a file written by `save_tensors`.

    Args:
        path: the file.
        signed: whether it must have a digest, which files of older versions have not.

    Raises:
        RunError: the file is missing, truncated or not safetensors, or holds something else than
            its digest says.
    """
    with reading(path, "a whole safetensors file that tvlens wrote"):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            texts = dict(file.metadata() or {})
        digest = texts.pop(_DIGEST, None)
        if digest != _digest(tensors, texts) and (signed or digest is not None):
            raise ValueError("it does not hold what was saved")
        metadata = {key: json.loads(text) for key, text in texts.items()}
    return tensors, metadata


def load_checkpoint(
    path: Path | str,
    identity: str,
    restore: "Callable[[Mapping[str, Tensor], Mapping[str, Any]], None]",
) -> None:
    """Go on from a checkpoint that `save_tensors` wrote.

    Args:
        path: the file.
        identity: what tells the training from others, kept under "identity".
        restore: called with the tensors and the metadata.

    Raises:
        RunError: the file is damaged, or of another training.
    """
    with reading(path, "a checkpoint of this training; delete it to begin anew"):
        tensors, metadata = load_tensors(path, signed=True)
        if metadata["identity"] == identity:
            restore(tensors, metadata)
            return
    raise RunError(
        f"checkpoint {path} was made with other settings, seed, task, model, means or start, so it "
        "is of another training; choose another or delete it"
    )


def load_weights(path: Path | str) -> Any:
    """What a file of `torch.save` holds, if that is weights and no more than its own bytes.

    No code in it is run (`torch.load(weights_only=True)`).

    Raises:
        RunError: the file is missing, damaged, or holds something else.
    """
    import pickle
    import zipfile

    import torch

    with reading(path, "a file of torch.save (1.6 or newer) that holds weights and no code"):
        size = Path(path).stat().st_size
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        if unpacked > size:
            raise ValueError(f"its {size} bytes unpack to {unpacked}")
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError("it holds more than weights") from error


@contextmanager
def reading(path: Path | str, expected: str) -> Iterator[None]:
    """Whatever goes wrong while a file is read becomes one error that names the file.

    Raises:
        RunError: the block failed.
    """
    try:
        yield
    except TvlensError:
        raise
    except Exception as error:
        raise RunError(
            f"cannot read {path}: {first_line(error)}; expected {expected}, or name another file"
        ) from error


def _digest(tensors: "Mapping[str, Tensor]", texts: Mapping[str, str]) -> str:
    """SHA-256, in hexadecimal, of tensors and texts by name."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        kept = tensor.detach().cpu().contiguous()
        found.update(f"{name} {kept.dtype} {tuple(kept.shape)}\n".encode())
        found.update(kept.reshape(-1).view(torch.uint8).numpy().tobytes() if kept.numel() else b"")
    for name, text in sorted(texts.items()):
        found.update(f"{name} {len(text)} {text}\n".encode())
    return found.hexdigest()


def encode(what: str, value: Any, metadata: Mapping[str, str]) -> tuple[str, bytes]:
    """File suffix and content of a DataFrame, of tensors by name, or of a JSON value.

    Raises:
        RunError: `value`, called `what` in the message, cannot be stored.
    """
    from pandas import DataFrame
    from torch import Tensor

    if isinstance(value, DataFrame):
        if value.index.names != [None]:
            raise RunError(f"{what} has a named index, which is not saved; use reset_index()")
        try:
            return ".parquet", value.to_parquet(None, index=False)
        except (ValueError, TypeError) as error:
            raise RunError(f"{what} cannot be stored as Parquet: {error}") from error
    if isinstance(value, Mapping) and value and all(isinstance(t, Tensor) for t in value.values()):
        return ".safetensors", encode_tensors(value, metadata)
    return ".json", encode_json(what, value)


def decode(suffix: str, content: bytes) -> Any:
    """What `encode` made such content of; tensors are on the CPU."""
    if suffix == ".json":
        return json.loads(content)
    if suffix == ".parquet":
        import pandas as pd

        return pd.read_parquet(io.BytesIO(content))
    import safetensors.torch

    return safetensors.torch.load(content)


def encode_json(what: str, value: Any) -> bytes:
    """JSON text of `value`.

    Raises:
        RunError: `value`, called `what` in the message, cannot be stored.
    """
    try:
        text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False)
        return f"{text}\n".encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise RunError(f"{what} cannot be stored as JSON: {first_line(error)}") from error


def encode_tensors(tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str]) -> bytes:
    """Content of a safetensors file; the same tensors and metadata give the same bytes."""
    import safetensors.torch

    plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in tensors.items()}
    content = safetensors.torch.save(plain, metadata=dict(metadata))
    # safetensors writes metadata in random order; sorting the header makes equal runs equal bytes.
    end = 8 + struct.unpack("<Q", content[:8])[0]
    header = json.dumps(json.loads(content[8:end]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + content[end:]


def read(path: Path, digest: str | None, remedy: str) -> Any:
    """What a file written by `encode` holds; checked against its SHA-256 where one is given.

    Raises:
        RunError: the file is missing or damaged; the message gives the remedy.
    """
    try:
        content = path.read_bytes()
        if digest is not None and hashlib.sha256(content).hexdigest() != digest:
            raise ValueError("it does not hold what was saved")
        return decode(path.suffix, content)
    except Exception as error:
        raise RunError(
            f"'{path}' is damaged: {first_line(error)}; {remedy} and run the same command again"
        ) from error


def write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all.

    Raises:
        RunError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path, which becomes `path` if the block ends well and vanishes if not."""
    temporary = path.with_name(f"{OWN}tmp-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        remove(temporary)
        if isinstance(error, OSError) and not isinstance(error, RunError):
            raise RunError(
                f"'{path}' cannot be written: {error.strerror or error}; make room or permit "
                "writing there, then run the same command again to resume"
            ) from error
        raise


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
