"""Every exception that tvlens raises for a reason a user can cause.

All derive from `TvlensError`, so `except tvlens.errors.TvlensError` catches exactly what tvlens
says on purpose. Messages name the object, what was expected, what came, and the remedy.
"""

LONGEST = 600
"""Characters of the longest message; longer ones lose their middle, for their ends say most."""


class TvlensError(Exception):
    """Base class of all errors raised on purpose by tvlens."""

    def __init__(self, message: str = "") -> None:
        """An error with this message, cut in its middle where it is longer than `LONGEST`."""
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} … {message[3 - LONGEST // 2 :]}"
        super().__init__(message)


class UnknownNameError(TvlensError, KeyError):
    """A task, model, method or measure was asked for by a name that does not exist."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which would quote and escape the sentence.
        return str(self.args[0]) if self.args else ""


class TaskError(TvlensError, ValueError):
    """Task data or a request for prompts cannot be honoured."""


class ModelError(TvlensError, ValueError):
    """A model cannot be loaded, or fails the checks a lens makes before it is used."""


class DownloadError(TvlensError, OSError):
    """A bundled model could not be fetched, verified or unpacked."""


class ShapeError(TvlensError, ValueError):
    """Two objects that must agree in layers, heads or dimensions do not."""


class VectorError(TvlensError, TypeError):
    """Something was given as a vector, or as what is added, that is none."""


class InterventionError(TvlensError, RuntimeError):
    """An intervention did not do what it was asked to do, for example never fired."""


class NumericalError(TvlensError, ArithmeticError):
    """A weight, an activation or a loss is not finite."""


class RunError(TvlensError, OSError):
    """A run folder cannot be created, resumed or written."""


def first_line(error: BaseException) -> str:
    """What an exception says first, in 200 printable characters at most, without a stop."""
    said = str(error).strip()
    if not said:
        return type(error).__name__
    return "".join(filter(str.isprintable, said.splitlines()[0])).rstrip(".;: ")[:200]
