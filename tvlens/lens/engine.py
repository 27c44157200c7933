"""How edited prompts are run: the interface that replay and whole forward passes share."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from tvlens.lens.edits import Edit
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch


class Reading(ABC):
    """Prompts that a model has read once, unedited, ready to be run again with edits.

    Attributes:
        batch: the prompts.
        factor: what each block multiplies the output of its attention by at the query position,
            coordinate by coordinate, before it adds it to the residual stream; None for models
            that add it as it is.
    """

    batch: Batch
    factor: Float[Tensor, "batch layer d_model"] | None = None

    def __len__(self) -> int:
        return len(self.batch)

    @property
    @abstractmethod
    def z(self) -> Float[Tensor, "batch layer head d_head"]:
        """`hook_z` of every head at the query position of the unedited prompts."""

    @abstractmethod
    def rows(self, index: slice | Int[Tensor, " chosen"]) -> "Reading":
        """The reading of the prompts at `index` only, in that order; a slice copies nothing."""


R = TypeVar("R", bound=Reading)

FIRST = range(1)
"""The query position alone, of all positions that tokens are read off."""


class Engine(ABC, Generic[R]):
    """Runs a model on prompts that are edited, and reads it at their query positions.

    Attributes:
        backend: the model.
        name: "replay" or "whole passes", as written into manifests.
        scaled: whether blocks scale what attention writes before they add it; readings then hold
            the factor.
    """

    name: str

    def __init__(self, backend: Backend, *, scaled: bool = False) -> None:
        self.backend = backend
        self.scaled = scaled

    @abstractmethod
    def read(self, batch: Batch) -> R:
        """The prompts read once, without gradients."""

    @abstractmethod
    def join(self, readings: Sequence[R]) -> R:
        """The readings of several groups of prompts as one."""

    @abstractmethod
    def run(self, reading: R, edit: Edit) -> Float[Tensor, "batch variant d_vocab"]:
        """Logits at the query position under every variant, differentiable in the edit's values."""

    @abstractmethod
    def generate(
        self, reading: R, edit: Edit, n_tokens: int, steps: range = FIRST
    ) -> Int[Tensor, "batch variant n_tokens"]:
        """Greedy continuation of every prompt.

        Args:
            reading: the prompts.
            edit: what is changed.
            n_tokens: how many tokens are generated.
            steps: at which of them: 0 is the query position, which the first token is read off, 1
                the first token's own position, and so on.

        Raises:
            ShapeError: something follows the query position of a prompt.
        """
