"""What a task of any modality is: kinds of prompts, splits, and what prompts are drawn from."""

from typing import Any, Literal, Protocol, get_args, runtime_checkable

PromptKind = Literal["zero", "shuffled", "clean"]
"""Without demonstrations, with those whose answers are shuffled, or with right ones."""
KINDS: tuple[PromptKind, ...] = get_args(PromptKind)


Split = Literal["train", "validation", "test"]
"""Which part of a task's pairs, or of its functions, prompts ask."""


@runtime_checkable
class PromptSet(Protocol):
    """Prompts of any modality: what was asked of which task, and how many there are."""

    @property
    def task(self) -> str: ...

    @property
    def shots(self) -> int: ...

    def __len__(self) -> int: ...


@runtime_checkable
class HasDonors(Protocol):
    """Prompts that each have a clean prompt to take head outputs from, row by row."""

    def donors(self) -> PromptSet:
        """One clean prompt of the same task for each prompt."""
        ...


@runtime_checkable
class HasPlaces(Protocol):
    """Prompts with places, besides the query, at which a vector acts."""

    @property
    def places(self) -> tuple[int, ...]:
        """Columns of the model's input, the same in every prompt."""
        ...


@runtime_checkable
class HasTemplate(Protocol):
    """A task whose prompts are laid out as text."""

    @property
    def template(self) -> Any:
        """The layout."""
        ...


@runtime_checkable
class PromptSource(Protocol):
    """A task of any modality: what prompts are drawn from."""

    @property
    def name(self) -> str: ...

    @property
    def digest(self) -> str: ...

    def prompts(
        self,
        split: Split,
        *,
        shots: int = 10,
        n: int | None = None,
        seed: int = 0,
        kind: PromptKind = "clean",
    ) -> Any:
        """A `PromptSet`."""
        ...
