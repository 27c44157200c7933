"""How types are checked while tests run."""

from collections.abc import Callable
from typing import Any

import beartype


def outermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """By beartype, but for functions made in others: they would be made ready at every call."""
    return function if "<locals>" in function.__qualname__ else beartype.beartype(function)
