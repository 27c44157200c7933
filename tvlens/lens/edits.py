"""What an intervention changes, and where, as plain values.

An `Edit` holds a number of *variants*, each a different change of the same prompts. It says at
which sites it acts (`tvlens.lens.sites`) and at which columns, and nothing of how the change is
carried out: `tvlens.lens.hooks` applies it with hooks during whole forward passes,
`tvlens.lens.suffix` to replayed ends of prompts, and `tvlens.lens.replay` to replayed last
positions, which are all that edits of the query alone need. All read the same value, so they can be
compared on it.

Axes: `batch` prompts, `variant` changes tried on each of them. An axis of a stored tensor may have
size 1 where the change is the same for every prompt.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens.errors import ShapeError, UnknownNameError
from tvlens.lens.sites import Site

E = TypeVar("E", bound="QueryEdit")

ActsAt = Literal["query", "all"]
"""Where something acts: at the query position alone, or there and at every column behind it, at
which the tokens of an answer stand, be it given or generated."""

Activation = Float[Tensor, "batch variant at *rest"]
Tokens = Float[Tensor, "batch variant token *rest"]
Index = Int[Tensor, "batch variant at"]


class Edit(ABC):
    """A batch of changes to make, `n_variant` of them for every prompt."""

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
    def acting(self) -> Bool[Tensor, "variant layer"]:
        """Layers that each variant changes."""

    @property
    def first_layer(self) -> Int[Tensor, " variant"]:
        """First layer that each variant changes; `n_layer` for a variant that changes nothing."""
        acting = self.acting
        first = acting.int().argmax(dim=1)
        return torch.where(acting.any(dim=1), first, acting.shape[1])

    @property
    def sites(self) -> frozenset[Site]:
        """Sites at which `change` has something to do, whole ones."""
        return frozenset()

    @property
    @abstractmethod
    def at_query_only(self) -> bool:
        """Whether the edit acts at the query position of prompts and nowhere else in them."""

    @abstractmethod
    def columns(self, query: Int[Tensor, " batch"]) -> Int[Tensor, "#batch #variant at"]:
        """Columns of the model's input at which each variant acts on each prompt; -1 for none."""

    def change(self, site: Site, activation: Activation) -> Activation:
        """What stands at a site after the change, at all columns; the first variants may be given.

        Args:
            site: where.
            activation: what stands there, `[batch variant at …]`; what follows are the site's own
                axes: `d_model`, `head d_head`, or `head key` for a pattern.
        """
        return activation

    def over(self, answers: Sequence[int]) -> "Edit":
        """The edit as it acts on prompts with answers behind them, at these columns."""
        return self

    def steps(self, n_tokens: int) -> range:
        """At which of so many generated tokens it acts: the first is read off the query."""
        return range(1)

    @abstractmethod
    def of_variants(self, index: Int[Tensor, " chosen"]) -> "Edit":
        """The same edit with the variants at `index` only, in that order."""

    @abstractmethod
    def of_prompts(self, start: int, stop: int) -> "Edit":
        """The same edit for prompts `start` to `stop - 1` only."""


@dataclass(frozen=True, kw_only=True)
class QueryEdit(Edit):
    """A change made at the query position, and alike at further columns.

    Attributes:
        also: further columns of the model's input, the same in every row, at which the edit acts as
            at the query.
        positions: whether it acts at answers behind the query as well.
    """

    also: tuple[int, ...] = ()
    positions: ActsAt = "query"

    @property
    def at_query_only(self) -> bool:
        return not self.also

    def columns(self, query: Int[Tensor, " batch"]) -> Int[Tensor, "#batch #variant at"]:
        below = [column for column in self.also if column < 0]
        if below:
            raise ShapeError(
                f"{type(self).__name__} acts at column {below[0]}; expected columns counted from "
                "0, padding included"
            )
        also = torch.tensor(self.also, dtype=query.dtype, device=query.device)
        return torch.cat([query[:, None], also.expand(len(query), -1)], dim=1)[:, None]

    def over(self: E, answers: Sequence[int]) -> E:
        return self.and_at(answers) if self.positions == "all" else self

    def steps(self, n_tokens: int) -> range:
        return range(n_tokens if self.positions == "all" else 1)

    def and_at(self: E, columns: Sequence[int]) -> E:
        """The same edit, acting at these columns too."""
        return replace(self, also=(*self.also, *columns))


@dataclass(frozen=True)
class NoEdit(QueryEdit):
    """The prompts as they are: one variant that changes nothing."""

    layers: int

    @property
    def n_variant(self) -> int:
        return 1

    @property
    def n_layer(self) -> int:
        return self.layers

    @property
    def acting(self) -> Bool[Tensor, "variant layer"]:
        return torch.zeros(1, self.layers, dtype=torch.bool)

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "NoEdit":
        return self

    def of_prompts(self, start: int, stop: int) -> "NoEdit":
        return self


@dataclass(frozen=True)
class ReplaceHeads(QueryEdit):
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
    def acting(self) -> Bool[Tensor, "variant layer"]:
        return self.mask.any(dim=2)

    @property
    def sites(self) -> frozenset[Site]:
        layers = self.mask.any(dim=2).any(dim=0).nonzero().flatten().tolist()
        return frozenset(Site("z", layer) for layer in layers)

    def change(self, site: Site, activation: Activation) -> Activation:
        n = activation.shape[1]
        mask = self.mask[None, :n, None, site.layer, :, None]
        return torch.where(
            mask, self.values[:, :n, None, site.layer].to(activation.dtype), activation
        )

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "ReplaceHeads":
        values = self.values if self.values.shape[1] == 1 else self.values[:, index]
        return replace(self, mask=self.mask[index], values=values)

    def of_prompts(self, start: int, stop: int) -> "ReplaceHeads":
        if self.values.shape[0] == 1:
            return self
        return replace(self, values=self.values[start:stop])


class _AtBlockOutput(QueryEdit):
    """Something is done to the output of the blocks that `active` names for each variant."""

    active: Bool[Tensor, "variant layer"]

    @property
    def n_variant(self) -> int:
        return self.active.shape[0]

    @property
    def n_layer(self) -> int:
        return self.active.shape[1]

    @property
    def acting(self) -> Bool[Tensor, "variant layer"]:
        return self.active

    @property
    def sites(self) -> frozenset[Site]:
        layers = self.active.any(dim=0).nonzero().flatten().tolist()
        return frozenset(Site("resid_post", layer) for layer in layers)


@dataclass(frozen=True)
class AddToResidual(_AtBlockOutput):
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
                f"{type(self).__name__}: vectors are for {tuple(self.vectors.shape[1:3])} "
                f"(variant, layer), active for {tuple(self.active.shape)}; both must be of the "
                "same size"
            )

    def given(self, site: Site, activation: Activation) -> tuple[Tensor, Tensor]:
        """The vectors after a block, zero for variants that do not act there, and which do."""
        n = activation.shape[1]
        active = self.active[None, :n, None, site.layer, None]
        # Not a product: vectors that are not active may hold anything, NaN included.
        given = self.vectors[:, :n, None, site.layer].where(active, 0.0)
        return given.to(activation.dtype), active

    def change(self, site: Site, activation: Activation) -> Activation:
        return activation + self.given(site, activation)[0]

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "AddToResidual":
        return replace(self, vectors=self.vectors[:, index], active=self.active[index])

    def of_prompts(self, start: int, stop: int) -> "AddToResidual":
        if self.vectors.shape[0] == 1:
            return self
        return replace(self, vectors=self.vectors[start:stop])


@dataclass(frozen=True)
class AddHeads(_AtBlockOutput):
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

    def change(self, site: Site, activation: Activation) -> Activation:
        n = activation.shape[1]
        active = self.active[:n, site.layer, None]
        added = torch.einsum("vlh,blhd->bvd", self.mix[:n, site.layer], self.outputs)
        return activation + added.where(active, 0.0).to(activation.dtype)[:, :, None]

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "AddHeads":
        return replace(self, mix=self.mix[index], active=self.active[index])

    def of_prompts(self, start: int, stop: int) -> "AddHeads":
        if self.outputs.shape[0] == 1:
            return self
        return replace(self, outputs=self.outputs[start:stop])


def require_positions(what: str, positions: str) -> None:
    """Refuse words for where something acts that mean nothing.

    Raises:
        UnknownNameError: it is neither "query" nor "all".
    """
    if positions not in get_args(ActsAt):
        raise UnknownNameError(
            f"{what}: unknown positions {positions!r}; expected 'query', or 'all' for the query "
            "and every position of the answer behind it"
        )


def act_on(edit: Edit, site: Site, tokens: Tokens, index: Index) -> Tokens:
    """What an edit makes of rows of tokens at a site.

    Args:
        edit: what is changed; the first of its variants may be given.
        site: where.
        tokens: what stands there.
        index: which token each column of the edit is, below 0 for none of these.
    """
    rows, variants = _rows_and_variants(index)
    return put(tokens, index, edit.change(site, tokens[rows, variants, index.clamp(min=0)]))


def put(tokens: Tokens, index: Index, values: Activation) -> Tokens:
    """The tokens with values put in at `index`, where that is not below 0."""
    rows, variants = _rows_and_variants(index)
    there = index >= 0
    if there.all():
        return tokens.index_put((rows, variants, index), values.to(tokens.dtype))
    each = [x.expand(index.shape)[there] for x in (rows, variants, index)]
    return tokens.index_put((each[0], each[1], each[2]), values[there].to(tokens.dtype))


def _rows_and_variants(index: Index) -> tuple[Tensor, Tensor]:
    rows = torch.arange(index.shape[0], device=index.device)[:, None, None]
    return rows, torch.arange(index.shape[1], device=index.device)[None, :, None]
