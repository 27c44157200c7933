"""Vectors: what is added to the residual stream at the query position, layer by layer.

A `TaskVector` is the same for every prompt of a task. A `HeadMixture` is a recipe that makes one
for each prompt from the head outputs of the prompt's donor.
"""

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.display import Displayed
from tvlens.errors import NumericalError, ShapeError
from tvlens.lens.edits import ActsAt, AddHeads, AddToResidual, QueryEdit, require_positions
from tvlens.lens.heads import HeadMeans, donor_outputs
from tvlens.lens.lens import Lens
from tvlens.runs.facts import integers_of, text_of, wrong
from tvlens.runs.storage import Kept
from tvlens.tasks.base import HasPlaces, PromptSet


class Vector(Kept, Displayed):
    """What a method adds: the same for every prompt, or made for each of them.

    Attributes:
        held: the tensor that tells a file of this kind from others.
        model: name of the model it was made on.
        positions: where it acts: at the query, or there and at all positions of the answer.
    """

    held: ClassVar[str]
    model: str
    positions: ActsAt = "query"
    _kinds: ClassVar[dict[str, "type[Vector]"]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        Vector._kinds[cls.held] = cls

    @property
    def plain(self) -> "Vector":
        """The value that acts, for vectors that are more than one, such as a trained module."""
        return self

    @property
    def group(self) -> Hashable:
        """What vectors that one edit can make act, as its variants, have in common."""
        return type(self), self.positions

    @classmethod
    @abstractmethod
    def stack(cls, vectors: Sequence[Any], lens: Lens, prompts: PromptSet) -> QueryEdit:
        """The edit whose variants are the given vectors on these prompts, in order.

        Raises:
            ShapeError: a vector does not fit the model.
            TaskError: the vectors are made of prompts' donors, and these prompts have none.
        """

    def edit(self, lens: Lens, prompts: PromptSet) -> QueryEdit:
        """The edit that makes this vector act on these prompts, as `stack`."""
        plain = self.plain
        return plain.stack([plain], lens, prompts)

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "Vector":
        """The vector, of whatever kind, that has this state."""
        for held, kind in cls._kinds.items():
            if held in tensors:
                return kind.of_state(tensors, facts)
        raise KeyError(" or ".join(cls._kinds))


@dataclass(frozen=True)
class TaskVector(Vector):
    """One vector per layer, added to the block's output at the query position.

    Attributes:
        vectors: the vectors; layers not in `layers` are not read.
        layers: layers at which something is added; empty for no intervention at all.
        model: name of the model it was made on.
        origin: how it was made, in words.
        positions: "all" for one that is added at every position of the answer, too.
    """

    held: ClassVar[str] = "vectors"
    acts: ClassVar[type[AddToResidual]] = AddToResidual
    vectors: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    model: str
    origin: str
    positions: ActsAt = "query"

    def __post_init__(self) -> None:
        require_positions(f"task vector ({self.origin})", self.positions)
        if self.vectors.ndim != 2 or not self.vectors.is_floating_point():
            raise ShapeError(
                f"task vector ({self.origin}) has shape {tuple(self.vectors.shape)} and type "
                f"{self.vectors.dtype}; expected real numbers of (layer, d_model): one row for "
                "each layer, of which `layers` says which are added"
            )
        outside = [n for n in self.layers if not 0 <= n < self.vectors.shape[0]]
        if outside:
            raise ShapeError(
                f"layer {outside[0]} is out of range: the model has {self.vectors.shape[0]} layers "
                f"(0-{self.vectors.shape[0] - 1})"
            )
        if not torch.isfinite(self.vectors[list(self.layers)]).all():
            raise NumericalError(
                f"task vector ({self.origin}) holds NaN or infinite numbers; expected finite ones; "
                "look at the weights and means it was made of"
            )

    @classmethod
    def none(cls, lens: Lens) -> "TaskVector":
        """No intervention on this model."""
        return cls(torch.zeros(lens.n_layer, lens.d_model), (), lens.name, "none")

    def __mul__(self, scale: float | int) -> "TaskVector":
        return replace(self, vectors=self.vectors * scale, origin=f"{self.origin} x {scale:g}")

    __rmul__ = __mul__

    def __truediv__(self, scale: float | int) -> "TaskVector":
        return self * (1 / scale)

    def __neg__(self) -> "TaskVector":
        return self * -1.0

    def __radd__(self, other: int) -> "TaskVector":
        # sum() begins with 0.
        return self if other == 0 else NotImplemented

    def __add__(self, other: "TaskVector") -> "TaskVector":
        return self._combine(other, 1.0, "+")

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self._combine(other, -1.0, "-")

    def _combine(self, other: "TaskVector", sign: float, symbol: str) -> "TaskVector":
        if not type(self) is type(other) is TaskVector:
            return NotImplemented
        require_fit(other, self.vectors.shape[0], self.vectors.shape[1], self.model)
        layers = tuple(sorted({*self.layers, *other.layers}))
        return TaskVector(
            self._where_active() + sign * other._where_active(),
            layers,
            self.model,
            f"({self.origin} {symbol} {other.origin})",
            _positions([self, other]),
        )

    def _where_active(self) -> Float[Tensor, "layer d_model"]:
        active = torch.zeros(self.vectors.shape[0], 1)
        active[list(self.layers)] = 1
        return self.vectors * active

    @classmethod
    def stack(cls, vectors: Sequence[Any], lens: Lens, prompts: PromptSet) -> AddToResidual:
        """The edit whose variants are the given vectors; the prompts make no difference."""
        for vector in vectors:
            require_fit(vector, lens.n_layer, lens.d_model, lens.name)
        stacked = torch.stack([vector.vectors for vector in vectors])[None]
        device, dtype = lens.backend.device, lens.backend.dtype
        return cls.acts(
            stacked.to(device, dtype),
            _active([vector.layers for vector in vectors], lens).to(device),
            positions=_positions(vectors),
        )

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The vectors; layers, model, origin, and where it acts."""
        facts = {"layers": self.layers, "model": self.model, "origin": self.origin}
        return {self.held: self.vectors}, facts | acting_facts(self)

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "TaskVector":
        """The vector that has this state."""
        return cls(tensors[cls.held], *_said(facts), positions_of(facts))


@dataclass(frozen=True)
class HeadMixture(Vector):
    """A task vector for each prompt: weighted sums of the head outputs of its own donor.

    v[t] = Σ_{l,j} mix[t, l, j] a[l, j] is added to the output of block t.

    Attributes:
        mix: the weights.
        layers: layers t at which something is added.
        model: name of the model it was made on.
        origin: how it was made, in words.
        positions: "all" for one that is added at every position of the answer, too.
    """

    held: ClassVar[str] = "mix"
    mix: Float[Tensor, "to_layer layer head"]
    layers: tuple[int, ...]
    model: str
    origin: str
    positions: ActsAt = "query"

    def __post_init__(self) -> None:
        require_positions(self.origin, self.positions)
        n_layer = len(self.mix) if self.mix.ndim else 0
        shaped = self.mix.ndim == 3 and self.mix.shape[1] == n_layer
        inside = all(0 <= n < n_layer for n in self.layers)
        if not (shaped and inside and self.mix.is_floating_point()):
            raise ShapeError(
                f"{self.origin}: mix of shape {tuple(self.mix.shape)} and type {self.mix.dtype} "
                f"with layers {self.layers}; expected real numbers of (to_layer, layer, head), as "
                "many layers to add at as there are layers of heads, and layers from 0 to "
                f"{n_layer - 1}"
            )
        if not torch.isfinite(self.mix).all():
            raise NumericalError(
                f"weights of {self.origin} hold NaN or infinite numbers; expected finite ones"
            )

    @classmethod
    def in_place(
        cls, weights: Float[Tensor, "layer head"], model: str, origin: str
    ) -> "HeadMixture":
        """Every head's output added, so many times, at the head's own layer."""
        n_layer = len(weights)
        mix = torch.zeros(n_layer, *weights.shape, dtype=weights.dtype)
        mix[range(n_layer), range(n_layer)] = weights.detach().cpu()
        return cls(mix, tuple(range(n_layer)), model, origin)

    def of_means(self, means: HeadMeans) -> TaskVector:
        """The vector of mean head outputs: one for the whole task."""
        return self.of_outputs(means.outputs)

    def of_outputs(self, outputs: Float[Tensor, "layer head d_model"]) -> TaskVector:
        """The vector of these head outputs.

        Raises:
            ShapeError: they are of a model of another size.
        """
        _require_same(self, tuple(outputs.shape[:2]), self.model)
        vectors = torch.einsum("tlh,lhd->td", self.mix.to(outputs), outputs)
        return TaskVector(vectors.cpu(), self.layers, self.model, self.origin, self.positions)

    @classmethod
    def stack(cls, vectors: Sequence[Any], lens: Lens, prompts: PromptSet) -> AddHeads:
        """The edit whose variants are the given mixtures of each prompt's own head outputs."""
        for mixture in vectors:
            _require_same(mixture, (lens.n_layer, lens.n_head), lens.name)
        outputs = donor_outputs(lens, prompts).outputs
        mix = torch.stack([mixture.mix for mixture in vectors])
        active = _active([mixture.layers for mixture in vectors], lens)
        active = active.to(outputs.device)
        return AddHeads(outputs, mix.to(outputs), active, positions=_positions(vectors))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights; layers, model, origin, and where it acts."""
        facts = {"layers": self.layers, "model": self.model, "origin": self.origin}
        return {"mix": self.mix}, facts | acting_facts(self)

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "HeadMixture":
        """The mixture that has this state."""
        return cls(tensors["mix"], *_said(facts), positions_of(facts))


def _said(facts: Mapping[str, Any]) -> tuple[tuple[int, ...], str, str]:
    return integers_of(facts, "layers"), text_of(facts, "model"), text_of(facts, "origin")


def acting_facts(vector: Vector) -> dict[str, Any]:
    """Where a vector acts, for its file; nothing where only at the query, as in older files."""
    return {} if vector.positions == "query" else {"positions": vector.positions}


def positions_of(facts: Mapping[str, Any]) -> ActsAt:
    """Where a vector acts that has these facts.

    Raises:
        RunError: they say something else.
    """
    said = facts.get("positions", "query")
    for known in get_args(ActsAt):
        if said == known:
            return known
    raise wrong("positions", said, "'query' or 'all'")


def _positions(vectors: Sequence[Any]) -> ActsAt:
    """Where all these vectors act.

    Raises:
        ShapeError: some act where others do not.
    """
    found: list[ActsAt] = list(dict.fromkeys(vector.positions for vector in vectors))
    if len(found) > 1:
        raise ShapeError(
            f"task vectors act at positions {' and '.join(map(repr, found))}; expected one and the "
            "same of those that are added or run together: dataclasses.replace(v, positions=...)"
        )
    return found[0]


def _require_same(mixture: HeadMixture, sizes: tuple[int, ...], model: str) -> None:
    if tuple(mixture.mix.shape[1:]) != sizes:
        raise ShapeError(
            f"{mixture.origin} of {mixture.model!r} weighs {tuple(mixture.mix.shape[1:])} (layer, "
            f"head), model {model!r} has {sizes}; make it on the model it is used on"
        )


def require_fit(vector: TaskVector, n_layer: int, d_model: int, model: str) -> None:
    """Refuse a vector made for a model of another size.

    Raises:
        ShapeError: layers or d_model differ.
    """
    if tuple(vector.vectors.shape) != (n_layer, d_model):
        raise ShapeError(
            f"task vector of {vector.model!r} has {vector.vectors.shape[0]} layers and d_model "
            f"{vector.vectors.shape[1]}, model {model!r} has {n_layer} and {d_model}; make the "
            "vector on the model it is used on"
        )


def edits_of(
    vectors: Sequence[Vector], lens: Lens, prompts: PromptSet
) -> list[tuple[QueryEdit, list[int]]]:
    """The edits that together make every vector of the list act on these prompts.

    They act at the query, and at the places that the prompts have for vectors.

    Args:
        vectors: what is added.
        lens: the model.
        prompts: what it is asked; mixtures read the donors of these.

    Returns:
        One edit for each group of vectors that is there, with the places in the list that its
        variants have.

    Raises:
        ShapeError: a vector does not fit the model.
        TaskError: there is a mixture, and the prompts have no donors.
    """
    groups: dict[Hashable, dict[int, Vector]] = {}
    for i, vector in enumerate(vectors):
        plain = vector.plain
        groups.setdefault(plain.group, {})[i] = plain
    places = prompts.places if isinstance(prompts, HasPlaces) else ()
    return [
        (type(each[0]).stack(each, lens, prompts).and_at(places), list(found))
        for found in groups.values()
        if (each := list(found.values()))
    ]


def _active(layers: Sequence[Sequence[int]], lens: Lens) -> Bool[Tensor, "variant layer"]:
    active = torch.zeros(len(layers), lens.n_layer, dtype=torch.bool)
    for row, chosen in zip(active, layers, strict=True):
        row[list(chosen)] = True
    return active
