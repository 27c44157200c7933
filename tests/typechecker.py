"""How types are checked while tests run."""

from collections.abc import Callable
from typing import Any

import beartype


def outermost(function: Callable[..., Any]) -> Callable[..., Any]:
    """By beartype, if it is no function made in another, which would be made ready at every call."""
    return function if "<locals>" in function.__qualname__ else beartype.beartype(function)
