"""Named random streams: every choice has one of its own, on every machine the same."""

import random


def stream(purpose: str, **key: int | str) -> random.Random:
    """A random generator of its own for one purpose and key."""
    return random.Random("/".join(["tvlens", purpose, *(f"{k}={v}" for k, v in key.items())]))
