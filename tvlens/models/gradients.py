"""What needs gradients has them, whatever the caller has switched off."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

from tvlens.errors import ModelError

P = ParamSpec("P")
R = TypeVar("R")


def with_gradients(function: Callable[P, R]) -> Callable[P, R]:
    """The function, run with gradients on and outside of inference mode.

    Raises:
        ModelError: it is given what was made inside of `torch.inference_mode()`.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False), torch.enable_grad():
            try:
                return function(*args, **kwargs)
            except RuntimeError as error:
                if "nference tensor" not in str(error):
                    raise
                raise ModelError(
                    f"{function.__name__} was given a model or a reading made inside of "
                    "torch.inference_mode(), through which no gradient passes; make it outside, "
                    "under torch.no_grad() if need be"
                ) from error

    return run


def outside_inference_mode(function: Callable[P, R]) -> Callable[P, R]:
    """The function, whose tensors can be trained through later, wherever it is called."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with torch.inference_mode(False):
            return function(*args, **kwargs)

    return run
