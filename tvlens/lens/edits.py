"""What an intervention changes, and where, as plain values.

An `Edit` holds a number of *variants*, each a different change of the same prompts. It acts at the
query position, and at further columns where it names some. It says nothing of how the change is
carried out: `tvlens.lens.hooks` applies it with hooks during whole forward passes and
`tvlens.lens.replay` applies it to replayed last positions, which are all that edits of the query
alone need. Both read the same value, so both can be compared on it.

Axes: `batch` prompts, `variant` changes tried on each of them. An axis of a stored tensor may have
size 1 where the change is the same for every prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens.errors import ShapeError

E = TypeVar("E", bound="Edit")


@dataclass(frozen=True, kw_only=True)
class Edit(ABC):
    """A batch of changes to make, `n_variant` of them for every prompt.

    Attributes:
        also: further columns of the model's input, the same in every row, at which the edit acts as
            at the query.
    """

    also: tuple[int, ...] = ()

    @property
    def at_query_only(self) -> bool:
        """Whether the edit acts at the query position and nowhere else."""
        return not self.also

    def sites(self, query: Int[Tensor, " batch"]) -> Int[Tensor, "batch site"]:
        """Every column at which the edit acts on each prompt: its query, and those of `also`."""
        also = torch.tensor(self.also, dtype=query.dtype, device=query.device)
        return torch.cat([query[:, None], also.expand(len(query), -1)], dim=1)

    def and_at(self: E, columns: Sequence[int]) -> E:
        """The same edit, acting at these columns too."""
        return replace(self, also=(*self.also, *columns))

    @property
    @abstractmethod
    def n_variant(self) -> int:
        """Number of variants."""

    @property
    @abstractmethod
    def n_layer(self) -> int:
        """Number of layers of the model the edit is written for."""

    @property
    @abstractmethod
    def first_layer(self) -> Int[Tensor, " variant"]:
        """First layer that each variant changes; `n_layer` for a variant that changes nothing."""

    @property
    def head_layers(self) -> frozenset[int]:
        """Layers at which `edit_heads` has something to do."""
        return frozenset()

    @property
    def residual_layers(self) -> frozenset[int]:
        """Layers at which `edit_residual` has something to do."""
        return frozenset()

    def edit_heads(
        self, layer: int, z: Float[Tensor, "batch variant head d_head"]
    ) -> Float[Tensor, "batch variant head d_head"]:
        """`hook_z` of `layer` after the change; `z` may hold only the first variants."""
        return z

    def edit_residual(
        self, layer: int, residual: Float[Tensor, "batch variant d_model"]
    ) -> Float[Tensor, "batch variant d_model"]:
        """Output of block `layer` after the change; it may hold only the first variants."""
        return residual

    @abstractmethod
    def of_variants(self, index: Int[Tensor, " chosen"]) -> "Edit":
        """The same edit with the variants at `index` only, in that order."""

    @abstractmethod
    def of_prompts(self, start: int, stop: int) -> "Edit":
        """The same edit for prompts `start` to `stop - 1` only."""


def _first_true(mask: Bool[Tensor, "variant layer"]) -> Int[Tensor, " variant"]:
    first = mask.int().argmax(dim=1)
    return torch.where(mask.any(dim=1), first, mask.shape[1])


@dataclass(frozen=True)
class NoEdit(Edit):
    """The prompts as they are: one variant that changes nothing."""

    layers: int

    @property
    def n_variant(self) -> int:
        return 1

    @property
    def n_layer(self) -> int:
        return self.layers

    @property
    def first_layer(self) -> Int[Tensor, " variant"]:
        return torch.tensor([self.layers])

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "NoEdit":
        return self

    def of_prompts(self, start: int, stop: int) -> "NoEdit":
        return self


@dataclass(frozen=True)
class ReplaceHeads(Edit):
    """`hook_z` of the chosen heads is replaced by given values.

    Attributes:
        mask: which heads each variant replaces.
        values: what they are replaced by; first two axes may have size 1.
    """

    # Axes with an underscore are compared below, in words.
    mask: Bool[Tensor, "variant layer head"]
    values: Float[Tensor, "some_batch some_variant _layer _head d_head"]

    def __post_init__(self) -> None:
        if self.values.shape[2:4] != self.mask.shape[1:]:
            raise ShapeError(
                f"ReplaceHeads: mask is for {tuple(self.mask.shape[1:])} (layer, head), "
                f"values for {tuple(self.values.shape[2:4])}; both must come from the same model"
            )
        if self.values.shape[1] not in (1, self.mask.shape[0]):
            raise ShapeError(
                f"ReplaceHeads: {self.mask.shape[0]} variants in the mask, "
                f"{self.values.shape[1]} in the values; give one value per variant or a single one"
            )

    @classmethod
    def each_head(
        cls,
        values: Float[Tensor, "*batch layer head d_head"],
        layers: Sequence[int] | None = None,
    ) -> "ReplaceHeads":
        """One variant per head, in (layer, head) order, each replacing that head alone.

        Args:
            values: what heads are replaced by, for all prompts or for each.
            layers: layers that have heads; all by default.
        """
        n_layer, n_head, d_head = values.shape[-3:]
        mask = torch.eye(n_layer * n_head, dtype=torch.bool, device=values.device)
        mask = mask.view(n_layer, n_head, n_layer, n_head)
        mask = mask if layers is None else mask[list(layers)]
        each = values.reshape(-1, 1, n_layer, n_head, d_head)
        return cls(mask.flatten(0, 1), each)

    @property
    def n_variant(self) -> int:
        return self.mask.shape[0]

    @property
    def n_layer(self) -> int:
        return self.mask.shape[1]

    @property
    def first_layer(self) -> Int[Tensor, " variant"]:
        return _first_true(self.mask.any(dim=2))

    @property
    def head_layers(self) -> frozenset[int]:
        return frozenset(self.mask.any(dim=2).any(dim=0).nonzero().flatten().tolist())

    def edit_heads(
        self, layer: int, z: Float[Tensor, "batch variant head d_head"]
    ) -> Float[Tensor, "batch variant head d_head"]:
        n = z.shape[1]
        mask = self.mask[None, :n, layer, :, None]
        return torch.where(mask, self.values[:, :n, layer].to(z.dtype), z)

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "ReplaceHeads":
        values = self.values if self.values.shape[1] == 1 else self.values[:, index]
        return replace(self, mask=self.mask[index], values=values)

    def of_prompts(self, start: int, stop: int) -> "ReplaceHeads":
        if self.values.shape[0] == 1:
            return self
        return replace(self, values=self.values[start:stop])


class _Addition(Edit):
    """Something is added to the output of the blocks that `active` names for each variant."""

    active: Bool[Tensor, "variant layer"]

    @property
    def n_variant(self) -> int:
        return self.active.shape[0]

    @property
    def n_layer(self) -> int:
        return self.active.shape[1]

    @property
    def first_layer(self) -> Int[Tensor, " variant"]:
        return _first_true(self.active)

    @property
    def residual_layers(self) -> frozenset[int]:
        return frozenset(self.active.any(dim=0).nonzero().flatten().tolist())


@dataclass(frozen=True)
class AddToResidual(_Addition):
    """A vector is added to the output of each chosen block.

    Attributes:
        vectors: what is added after each block; the batch axis may have size 1.
        active: layers at which each variant adds; the vectors of other layers are not read.
    """

    vectors: Float[Tensor, "some_batch _variant _layer d_model"]
    active: Bool[Tensor, "variant layer"]

    def __post_init__(self) -> None:
        if self.vectors.shape[1:3] != self.active.shape:
            raise ShapeError(
                f"AddToResidual: vectors are for {tuple(self.vectors.shape[1:3])} (variant, "
                f"layer), active for {tuple(self.active.shape)}; both must be of the same size"
            )

    def edit_residual(
        self, layer: int, residual: Float[Tensor, "batch variant d_model"]
    ) -> Float[Tensor, "batch variant d_model"]:
        n = residual.shape[1]
        active = self.active[None, :n, layer, None]
        # Not a product: vectors that are not active may hold anything, NaN included.
        return residual + self.vectors[:, :n, layer].where(active, 0.0).to(residual.dtype)

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "AddToResidual":
        return replace(self, vectors=self.vectors[:, index], active=self.active[index])

    def of_prompts(self, start: int, stop: int) -> "AddToResidual":
        if self.vectors.shape[0] == 1:
            return self
        return replace(self, vectors=self.vectors[start:stop])


@dataclass(frozen=True)
class AddHeads(_Addition):
    """A weighted sum of given head outputs is added to the output of each chosen block.

    Attributes:
        outputs: head outputs that are given for each prompt; the batch axis may have size 1.
        mix: weight of every head in what each variant adds after each block.
        active: layers at which each variant adds.
    """

    outputs: Float[Tensor, "some_batch layer head d_model"]
    mix: Float[Tensor, "_variant _to_layer _layer _head"]
    active: Bool[Tensor, "variant layer"]

    def __post_init__(self) -> None:
        n_variant, n_layer = self.active.shape
        expected = (n_variant, n_layer, *self.outputs.shape[1:3])
        if self.mix.shape != expected:
            raise ShapeError(
                f"AddHeads: mix has shape {tuple(self.mix.shape)}, expected {expected} (variant, "
                "to_layer, layer, head); all must come from the same model"
            )

    def edit_residual(
        self, layer: int, residual: Float[Tensor, "batch variant d_model"]
    ) -> Float[Tensor, "batch variant d_model"]:
        n = residual.shape[1]
        active = self.active[:n, layer, None]
        added = torch.einsum("vlh,blhd->bvd", self.mix[:n, layer], self.outputs)
        return residual + added.where(active, 0.0).to(residual.dtype)

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "AddHeads":
        return replace(self, mix=self.mix[index], active=self.active[index])

    def of_prompts(self, start: int, stop: int) -> "AddHeads":
        if self.outputs.shape[0] == 1:
            return self
        return replace(self, outputs=self.outputs[start:stop])
