"""Named random streams and digests: every choice has a stream of its own, on every machine the
same, and every value that results depend on a digest.
"""

import hashlib
import json
import random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def stream(purpose: str, **key: int | str) -> random.Random:
    """A random generator of its own for one purpose and key."""
    return random.Random("/".join(["tvlens", purpose, *(f"{k}={v}" for k, v in key.items())]))


def generator(purpose: str, **key: int | str) -> "torch.Generator":
    """The torch generator, on the CPU, that begins with the first number of that stream."""
    # Tasks of text and their draws do without torch.
    import torch

    return torch.Generator().manual_seed(stream(purpose, **key).getrandbits(63))


def digest(value: object, *, separators: tuple[str, str] = (",", ":")) -> str:
    """SHA-256, in hexadecimal, of a value as JSON with sorted keys.

    Args:
        value: anything that JSON can hold.
        separators: what stands between items, and behind a key.
    """
    text = json.dumps(value, ensure_ascii=False, separators=separators, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
