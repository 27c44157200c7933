"""A task vector: what is added to the residual stream at the query position, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.edits import AddToResidual
from tvlens.errors import NumericalError, ShapeError
from tvlens.lens import Lens
from tvlens.storage import load_tensors, save_tensors


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
