"""The display of every public value, in the module that belongs to the value's own."""

from collections.abc import Callable
from functools import singledispatch
from importlib import import_module
from typing import Any

from tvlens.notebook import pieces

MODULES = {
    "evaluation": "evaluation",
    "lens": "lens",
    "scores": "scores",
    "studies": "studies",
    "tasks.regression": "functions",
    "tasks.text": "tasks",
    "vectors": "vectors",
}
"""Where displays stand, by where the classes do; each is loaded for the first value of its own."""


@singledispatch
def _html(value: object) -> str:
    return pieces.card(type(value).__name__, pieces.facts({"value": repr(value)[:500]}))


def shows(kind: type) -> Callable[[Callable[[Any], str]], Callable[[Any], str]]:
    """Makes a function the display of values of this class, and of those that have no other."""
    return _html.register(kind)


def html(value: object) -> str:
    """A value as HTML, as notebooks show it: facts, a picture, or a table. All text is escaped.

    Example:
        >>> "5 pairs" in tvlens.notebook.html(task)  # doctest: +SKIP

    Args:
        value: a task, a lens, head means, scores, effects, vectors, an ablation or a study; of
            anything else what `repr` says.
    """
    for kind in type(value).__mro__:
        for place, module in MODULES.items():
            if f"{kind.__module__}.".startswith(f"tvlens.{place}."):
                import_module(f"tvlens.notebook.{module}")
    return _html(value)
