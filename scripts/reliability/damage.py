"""Files made wrong, by what their names end in."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random

from reliability.mutate import (
    Mutation,
    mutate_bytes,
    mutate_json,
    mutate_lines,
    mutate_table,
    mutate_yaml,
)
from reliability.tensors import mutate_safetensors, mutate_torch
from tvlens.runs.manifest import digest_of

BY_SUFFIX: dict[str, Mutation] = {
    ".jsonl": mutate_lines,
    ".yaml": mutate_yaml,
    ".csv": mutate_table,
    ".tsv": mutate_table,
    ".safetensors": mutate_safetensors,
    ".pt": mutate_torch,
    ".pth": mutate_torch,
    ".parquet": mutate_bytes,
}
"""Others are JSON."""
INDEX = ".tvlens-step.json"


def _gone(path: Path) -> None:
    path.unlink()


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _circle(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


NO_FILES: list[Callable[[Path], None]] = [_gone, _empty, _folder, _circle]
"""What may be where a file should be."""


def damage(folder: Path, random: Random) -> str:
    """Make one file in a folder wrong; its name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    path = random.choice([path for path in files if path.name != ".tvlens-lock"])
    if random.random() < 0.03:
        random.choice(NO_FILES)(path)
        return str(path.relative_to(folder))
    mutated(path, random)
    if (path.with_name(INDEX)).exists() and path.name != INDEX and random.random() < 0.5:
        sign(path)
    return str(path.relative_to(folder))


def mutated(path: Path, random: Random) -> None:
    """Make the file wrong, by what its name ends in."""
    content = path.read_bytes()
    structured = BY_SUFFIX.get(path.suffix, mutate_json)
    if random.random() < 0.6:
        content = structured(content, random)
    if content == path.read_bytes() or random.random() < 0.15:
        content = mutate_bytes(content, random)
    path.write_bytes(content)


def sign(path: Path) -> None:
    """Let the index of a step say that the file holds what was saved."""
    index = json.loads(path.with_name(INDEX).read_text())
    for saved in index["outputs"].values():
        if saved[0] == path.name:
            saved[1] = hashlib.sha256(path.read_bytes()).hexdigest()
    index["sha256"] = digest_of(index["outputs"])
    path.with_name(INDEX).write_text(json.dumps(index))
