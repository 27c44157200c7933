"""Task vectors: what is added to the residual stream at the query position, layer by layer.

A `TaskVector` is the same for every prompt of a task. A `HeadMixture` is a recipe that makes one
for each prompt from the head outputs of the prompt's donor.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import NumericalError, ShapeError
from tvlens.lens.edits import AddHeads, AddToResidual, Edit
from tvlens.lens.heads import HeadMeans, donor_outputs
from tvlens.lens.lens import Lens
from tvlens.runs.storage import load_tensors, save_tensors
from tvlens.tasks.base import HasPlaces, PromptSet


@dataclass(frozen=True)
class TaskVector:
    """One vector per layer, added to the block's output at the query position.

    Attributes:
        vectors: the vectors; layers not in `layers` are not read.
        layers: layers at which something is added; empty for no intervention at all.
        model: name of the model it was made on.
        origin: how it was made, in words.
    """

    vectors: Float[Tensor, "layer d_model"]
    layers: tuple[int, ...]
    model: str
    origin: str

    def __post_init__(self) -> None:
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

    def __mul__(self, scale: float) -> "TaskVector":
        return replace(self, vectors=self.vectors * scale, origin=f"{self.origin} x {scale:g}")

    __rmul__ = __mul__

    def __add__(self, other: "TaskVector") -> "TaskVector":
        return self._combine(other, 1.0, "+")

    def __sub__(self, other: "TaskVector") -> "TaskVector":
        return self._combine(other, -1.0, "-")

    def _combine(self, other: "TaskVector", sign: float, symbol: str) -> "TaskVector":
        require_fit(other, self.vectors.shape[0], self.vectors.shape[1], self.model)
        layers = tuple(sorted({*self.layers, *other.layers}))
        return TaskVector(
            self._where_active() + sign * other._where_active(),
            layers,
            self.model,
            f"({self.origin} {symbol} {other.origin})",
        )

    def _where_active(self) -> Float[Tensor, "layer d_model"]:
        active = torch.zeros(self.vectors.shape[0], 1)
        active[list(self.layers)] = 1
        return self.vectors * active

    def save(self, path: Path | str) -> None:
        """Write the vector and its metadata as safetensors."""
        metadata = {"layers": self.layers, "model": self.model, "origin": self.origin}
        save_tensors(path, {"vectors": self.vectors}, metadata)

    @classmethod
    def load(cls, path: Path | str) -> "TaskVector":
        """The vector written by `save`."""
        tensors, metadata = load_tensors(path)
        layers = tuple(metadata["layers"])
        return cls(tensors["vectors"], layers, metadata["model"], metadata["origin"])


@dataclass(frozen=True)
class HeadMixture:
    """A task vector for each prompt: weighted sums of the head outputs of its own donor.

    v[t] = Σ_{l,j} mix[t, l, j] a[l, j] is added to the output of block t.

    Attributes:
        mix: the weights.
        layers: layers t at which something is added.
        model: name of the model it was made on.
        origin: how it was made, in words.
    """

    mix: Float[Tensor, "to_layer layer head"]
    layers: tuple[int, ...]
    model: str
    origin: str

    def __post_init__(self) -> None:
        n_layer = self.mix.shape[1]
        if self.mix.shape[0] != n_layer or not all(0 <= n < n_layer for n in self.layers):
            raise ShapeError(
                f"{self.origin}: mix of shape {tuple(self.mix.shape)} (to_layer, layer, head) with "
                f"layers {self.layers}; expected as many layers to add at as there are layers of "
                f"heads, and layers from 0 to {n_layer - 1}"
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
        return TaskVector(vectors.cpu(), self.layers, self.model, self.origin)

    def save(self, path: Path | str) -> None:
        """Write the weights and their metadata as safetensors."""
        metadata = {"layers": self.layers, "model": self.model, "origin": self.origin}
        save_tensors(path, {"mix": self.mix}, metadata)

    @classmethod
    def load(cls, path: Path | str) -> "HeadMixture":
        """The mixture written by `save`."""
        tensors, metadata = load_tensors(path)
        layers = tuple(metadata["layers"])
        return cls(tensors["mix"], layers, metadata["model"], metadata["origin"])


Vector = TaskVector | HeadMixture
"""What a method adds: the same for every prompt, or made for each from its donor."""


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


def stack_vectors(vectors: Sequence[TaskVector], lens: Lens) -> AddToResidual:
    """The edit whose variants are the given vectors, in order.

    Raises:
        ShapeError: a vector does not fit the model.
    """
    for vector in vectors:
        require_fit(vector, lens.n_layer, lens.d_model, lens.name)
    active = torch.zeros(len(vectors), lens.n_layer, dtype=torch.bool)
    for i, vector in enumerate(vectors):
        active[i, list(vector.layers)] = True
    device, dtype = lens.backend.device, lens.backend.dtype
    stacked = torch.stack([vector.vectors for vector in vectors])[None]
    return AddToResidual(stacked.to(device, dtype), active.to(device))


def stack_mixtures(
    mixtures: Sequence[HeadMixture], outputs: Float[Tensor, "batch layer head d_model"], lens: Lens
) -> AddHeads:
    """The edit whose variants are the given mixtures of each prompt's own head outputs, in order.

    Raises:
        ShapeError: a mixture does not fit the model.
    """
    for mixture in mixtures:
        _require_same(mixture, (lens.n_layer, lens.n_head), lens.name)
    active = torch.zeros(len(mixtures), lens.n_layer, dtype=torch.bool)
    for i, mixture in enumerate(mixtures):
        active[i, list(mixture.layers)] = True
    mix = torch.stack([mixture.mix for mixture in mixtures])
    return AddHeads(outputs, mix.to(outputs), active.to(outputs.device))


def edits_of(
    vectors: Sequence[Vector], lens: Lens, prompts: PromptSet
) -> list[tuple[Edit, list[int]]]:
    """The edits that together make every vector of the list act on these prompts.

    They act at the query, and at the places that the prompts have for vectors.

    Args:
        vectors: what is added.
        lens: the model.
        prompts: what it is asked; mixtures read the donors of these.

    Returns:
        One edit for the vectors that all prompts share and one for the mixtures, as far as there
        are any, each with the places in the list that its variants have.

    Raises:
        ShapeError: a vector does not fit the model.
        TaskError: there is a mixture, and the prompts have no donors.
    """
    plain = {i: vector for i, vector in enumerate(vectors) if isinstance(vector, TaskVector)}
    mixed = {i: vector for i, vector in enumerate(vectors) if isinstance(vector, HeadMixture)}
    edits: list[tuple[Edit, list[int]]] = []
    if plain:
        edits.append((stack_vectors(list(plain.values()), lens), list(plain)))
    if mixed:
        outputs = donor_outputs(lens, prompts).outputs
        edits.append((stack_mixtures(list(mixed.values()), outputs, lens), list(mixed)))
    places = prompts.places if isinstance(prompts, HasPlaces) else ()
    return [(edit.and_at(places), index) for edit, index in edits]
