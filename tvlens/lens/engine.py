"""How edited prompts are run: the interface that replay and whole forward passes share."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Generic, TypeVar

from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import ShapeError
from tvlens.lens.edits import Edit
from tvlens.lens.sites import Site, SiteKind, require_sites
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


class Engine(ABC, Generic[R]):
    """Runs a model on prompts that are edited, and reads it at their query positions.

    Attributes:
        backend: the model.
        name: "replay", "suffix replay" or "whole passes", as written into manifests.
        scaled: whether blocks scale what attention writes before they add it; readings then hold
            the factor.
    """

    name: str

    def __init__(self, backend: Backend, *, scaled: bool = False) -> None:
        self.backend = backend
        self.scaled = scaled

    @property
    @abstractmethod
    def sites(self) -> Mapping[SiteKind, tuple[int, ...]]:
        """Layers that have each site at which edits can act."""

    @property
    def anywhere(self) -> "Engine[Any]":
        """The engine that runs edits at any site and column, and records there."""
        return self

    def runs(self, edit: Edit) -> bool:
        """Whether the engine runs edits like this one."""
        return True

    @abstractmethod
    def read(self, batch: Batch) -> R:
        """The prompts read once, without gradients."""

    @abstractmethod
    def record(
        self, batch: Batch, sites: Collection[Site]
    ) -> dict[Site, Float[Tensor, "batch pos *rest"]]:
        """What stands at whole sites of the unedited prompts, at all columns, without gradients.

        Raises:
            UnknownNameError: the model lacks a site.
            ShapeError: a layer lacks it.
        """

    @abstractmethod
    def join(self, readings: Sequence[R]) -> R:
        """The readings of several groups of prompts as one."""

    @abstractmethod
    def run(self, reading: R, edit: Edit) -> Float[Tensor, "batch variant *read d_vocab"]:
        """Logits at the query position under every variant, differentiable in the edit's values.

        Of whole answers, those of every column that a token of the answer or its end is read off.
        """

    @abstractmethod
    def final(self, reading: R, edit: Edit) -> Float[Tensor, "batch variant *read d_model"]:
        """Residual streams behind the last block, where `run` gives their logits."""

    @abstractmethod
    def generate(
        self, reading: R, edit: Edit, n_tokens: int, steps: range | None = None
    ) -> Int[Tensor, "batch variant n_tokens"]:
        """Greedy continuation of every prompt.

        Args:
            reading: the prompts.
            edit: what is changed.
            n_tokens: how many tokens are generated.
            steps: at which of them: 0 is the query position, which the first token is read off, 1
                the first token's own position, and so on; by default where the edit acts.

        Raises:
            ShapeError: something follows the query position of a prompt.
        """

    def require_sites(self, sites: Collection[Site]) -> None:
        """Refuse sites that the model lacks.

        Raises:
            UnknownNameError: no layer has the site.
            ShapeError: this layer lacks it.
        """
        require_sites(self.backend.name, self.sites, sites)

    def require_fit(self, edit: Edit) -> None:
        """Refuse edits that are not for this model.

        Raises:
            UnknownNameError: the model lacks a site.
            ShapeError: the edit is for a model with another number of layers, or a layer lacks a
                site.
        """
        require_layers(edit, self.backend)
        self.require_sites(edit.sites)


def require_layers(edit: Edit, backend: Backend) -> None:
    """Refuse an edit of another number of layers.

    Raises:
        ShapeError: the model has more or fewer.
    """
    if edit.n_layer != backend.n_layer:
        raise ShapeError(
            f"{type(edit).__name__} is for {edit.n_layer} layers, {backend.name!r} has "
            f"{backend.n_layer}; build it from vectors or means of this model"
        )


def require_columns(
    edit: Edit, columns: Int[Tensor, "batch variant at"], width: int, start: int = 0
) -> None:
    """Refuse columns that the prompts do not have, or that were not kept of them.

    Raises:
        ShapeError: a column is beyond the last, or before `start`.
    """
    before = columns[(columns >= 0) & (columns < start)]
    if len(before):
        raise ShapeError(
            f"{type(edit).__name__} acts at column {int(before[0])}, but of prompts with whole "
            f"answers only what stands from the query on, column {start}, is kept; edit there, or "
            "ask for first tokens"
        )
    outside = columns[(columns >= width) | (columns < -1)]
    if len(outside):
        raise ShapeError(
            f"{type(edit).__name__} acts at column {int(outside[0])}, but the model was run on "
            f"{width} columns; expected columns from 0 to {width - 1}: count them in the "
            "batch, padding included"
        )
