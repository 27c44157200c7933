"""Files of tensors made wrong: headers, metadata, numbers, shapes, types, and code in pickles."""

import io
import json
import os
import pickle
import struct
from random import Random
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from reliability import mutate

MARK = "code-ran"
"""The folder that code in a file would make where the process works."""


class Code:
    """An object whose pickle runs code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (MARK,)


def mutate_safetensors(content: bytes, random: Random) -> bytes:
    """The header, one of the values in its metadata, its length, or a tensor changed.

    Mostly without the digest that would tell, as files of older versions are.
    """
    if random.random() < 0.7:
        content = unsigned(content)
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    action = random.choice(("header", "metadata", "metadata", "metadata", "tensor", "length"))
    if action == "tensor":
        kept = change_tensor(safetensors.torch.load(content), random)
        metadata = json.loads(header).get("__metadata__")
        return safetensors.torch.save(kept, metadata)
    if action == "length":
        length = random.choice((0, 1, 7, length + 1, length - 1, 2**31, 2**63, 2**64 - 1))
        return struct.pack("<Q", length) + header + data
    if action == "header":
        header = mutate.mutate_json(header, random)
    else:
        header = change_metadata(header, random)
    return struct.pack("<Q", len(header)) + header + data


def unsigned(content: bytes) -> bytes:
    """The file without the digest in its metadata."""
    (length,) = struct.unpack("<Q", content[:8])
    found = json.loads(content[8 : 8 + length])
    found.get("__metadata__", {}).pop("sha256", None)
    header = json.dumps(found).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def change_metadata(header: bytes, random: Random) -> bytes:
    """The header with one value of the metadata, which is JSON in a text, changed."""
    found = json.loads(header)
    metadata = found.get("__metadata__", {})
    if not metadata:
        return mutate.mutate_json(header, random)
    key = random.choice(sorted(metadata))
    if random.random() < 0.1:
        del metadata[key]
    else:
        metadata[key] = mutate.mutate_json(metadata[key].encode(), random).decode(errors="replace")
    return json.dumps(found).encode()


def change_tensor(tensors: dict[str, Tensor], random: Random) -> dict[str, Tensor]:
    """The tensors with one of them changed, removed, doubled or renamed."""
    name = random.choice(sorted(tensors))
    old = tensors[name]
    flat = old.flatten()
    some = flat.clone()
    if len(some):
        some[random.randrange(len(some))] = random.choice((0, 1, -1))
        if some.is_floating_point():
            bad = random.choice((torch.nan, torch.inf, -torch.inf, 1e38, -1e-40))
            some[random.randrange(len(some))] = bad
    types = (torch.float64, torch.float16, torch.int64, torch.bool, torch.uint8, torch.complex64)
    changed = {
        "value": some.reshape(old.shape),
        "flat": flat,
        "deep": old[None].clone(),
        "empty": flat[:0].clone(),
        "none": torch.zeros(0, *old.shape[1:], dtype=old.dtype),
        "number": torch.tensor(1.0),
        "larger": torch.cat([flat, flat]),
        "turned": old.mT.contiguous() if old.ndim >= 2 else flat[:1].clone(),
        "type": old.to(random.choice(types)),
    }
    action = random.choice(("value", "value", *changed, "remove", "rename"))
    rest = {key: x for key, x in tensors.items() if key != name}
    if action == "remove":
        return rest
    if action == "rename":
        return rest | {random.choice(("x", "a.b.c", "omega", "vectors", "", "model.")): old}
    return rest | {name: changed[action]}


def mutate_torch(content: bytes, random: Random) -> bytes:
    """A tensor changed, other things among them, or code."""
    state = torch.load(io.BytesIO(content), weights_only=True)
    inner = state.get("model_state_dict", state)
    action = random.choice(("tensor", "tensor", "tensor", "other", "other", "code", "pickle"))
    if action == "pickle":
        return pickle.dumps(random.choice((Code(), {"model_state_dict": Code()}, [1], inner.keys)))
    if action == "tensor":
        inner = change_tensor(inner, random)
    elif action == "code":
        inner = random.choice((Code(), inner | {"x": Code()}))
    else:
        values = (None, 1, "x", [], {}, torch.zeros(2).to_sparse(), b"x", {1: torch.zeros(1)})
        key = random.choice(sorted(inner))
        inner = random.choice((*values, inner | {key: random.choice(values)}, {3: inner[key]}))
    kept = io.BytesIO()
    torch.save({"model_state_dict": inner} if random.random() < 0.8 else inner, kept)
    return kept.getvalue()
