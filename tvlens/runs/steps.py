"""Where what takes long is kept under names: a run folder (`Run`), or memory alone (`Memory`)."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from pandas import DataFrame
from torch import Tensor

from tvlens.errors import RunError
from tvlens.runs.storage import K, decode, encode, restored

JSON: TypeAlias = dict[str, Any] | list[Any] | tuple[Any, ...] | str | int | float | bool | None
"""A value that JSON can hold; no NaN. Tuples come back as lists."""

Outputs: TypeAlias = Mapping[str, DataFrame | Mapping[str, Tensor] | JSON]
"""What a step gives, by name."""


@runtime_checkable
class Steps(Protocol):
    """What the stages of a study ask of the place where they are kept."""

    def step(self, name: str, compute: Callable[[], Outputs]) -> dict[str, Any]:
        """The outputs of a named step, which has been stored and read again."""
        ...

    def kept(self, name: str, kind: type[K], compute: Callable[[], K]) -> K:
        """The value of a named step that keeps itself, as `step`."""
        ...

    def note_filter(self, text: str) -> None:
        """Takes note of a sentence on what was left out of the data."""
        ...

    def checkpoint(self, name: str) -> Path | None:
        """The file from which a training named so goes on; None where it cannot be interrupted."""
        ...


class Memory:
    """Steps that are kept in memory, for as long as the process lives.

    What comes back was encoded and decoded as a run folder does it, so that what follows goes on
    from the same values.

    Attributes:
        filters: sentences on what was left out of the data.
    """

    def __init__(self) -> None:
        self.filters: list[str] = []
        self._names: set[str] = set()

    def step(self, name: str, compute: Callable[[], Outputs]) -> dict[str, Any]:
        """The outputs of a step as a run folder would give them back.

        Raises:
            RunError: an output cannot be stored, or the name has been given before.
        """
        if name in self._names:
            raise RunError(f"step {name!r} has already run; give it another name")
        self._names.add(name)
        return {
            key: decode(*encode(f"output {key!r} of step {name!r}", value, {}))
            for key, value in compute().items()
        }

    def kept(self, name: str, kind: type[K], compute: Callable[[], K]) -> K:
        """The value of a step that keeps itself, as `step`."""

        def outputs() -> dict[str, Any]:
            tensors, facts = compute().state()
            return {"tensors": tensors, "facts": facts}

        saved = self.step(name, outputs)
        return restored(kind, saved["tensors"], saved["facts"], f"step {name!r}")

    def note_filter(self, text: str) -> None:
        """Takes note of a sentence on what was left out of the data, once."""
        if text not in self.filters:
            self.filters.append(text)

    def checkpoint(self, name: str) -> None:
        """None: what is interrupted is lost."""
