"""The task vector of Hendel et al. (2023): the residual stream itself, put in place of another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import ShapeError
from tvlens.lens.edits import AddToResidual
from tvlens.lens.heads import donors_of
from tvlens.lens.lens import Lens
from tvlens.lens.states import residual_states
from tvlens.lens.steering import ReplaceResidual
from tvlens.runs.facts import text_of
from tvlens.tasks.base import PromptSet
from tvlens.vectors.choice import Training, chosen
from tvlens.vectors.materials import ByKind, Materials
from tvlens.vectors.vector import TaskVector, Vector


@dataclass(frozen=True)
class StateVector(TaskVector):
    """A residual stream per layer, which replaces the block's output at the query position.

    Attributes:
        vectors: the streams; layers not in `layers` are not read.
        layers: layers at which the stream is replaced; behind the last of them the others are lost.
        model: name of the model they were taken from.
        origin: how they were made, in words.
    """

    held: ClassVar[str] = "states"
    acts: ClassVar[type[AddToResidual]] = ReplaceResidual


@dataclass(frozen=True)
class DonorState(Vector):
    """The residual stream of each prompt's own donor, put in place of the prompt's own.

    Attributes:
        chosen: 1 at the layer whose output is replaced, 0 elsewhere.
        model: name of the model it is for.
        origin: how it was made, in words.
    """

    held: ClassVar[str] = "donor_state"
    chosen: Float[Tensor, " layer"]
    model: str
    origin: str

    @classmethod
    def stack(cls, vectors: Sequence[Any], lens: Lens, prompts: PromptSet) -> ReplaceResidual:
        """The edit whose variants replace the streams of these layers."""
        for vector in vectors:
            if len(vector.chosen) != lens.n_layer:
                raise ShapeError(
                    f"{vector.origin} of {vector.model!r} is for {len(vector.chosen)} layers, "
                    f"model {lens.name!r} has {lens.n_layer}; make it on the model it is used on"
                )
        states = residual_states(lens, donors_of(prompts))[:, 0]
        active = torch.stack([vector.chosen for vector in vectors]).bool().to(states.device)
        each = states[:, None].expand(-1, len(vectors), -1, -1)
        return ReplaceResidual(each, active)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The layer; model and origin."""
        return {self.held: self.chosen}, {"model": self.model, "origin": self.origin}

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "DonorState":
        """The vector that has this state."""
        return cls(tensors[cls.held], text_of(facts, "model"), text_of(facts, "origin"))


def state_vector(lens: Lens, clean: PromptSet, layer: int) -> StateVector:
    """The mean residual stream behind one block at the query position of clean prompts.

    It *replaces* that of prompts that do not carry the task (Hendel, Geva and Globerson, Findings
    of EMNLP 2023, arXiv 2310.15916), so nothing of the query's own up to this layer is left.

    Args:
        lens: the model.
        clean: clean in-context prompts of the task.
        layer: where it is put.

    Raises:
        ShapeError: the layer is out of range.
        NumericalError: a stream is not finite.
    """
    states = residual_states(lens, clean)[:, 0].double().mean(dim=0).float().cpu()
    return StateVector(states, (layer,), lens.name, _origin(layer))


def make(materials: Materials) -> ByKind:
    """The layer is chosen on validation, for each kind of prompts."""
    lens = materials.lens
    every = range(lens.n_layer)

    def candidates(_: Training) -> list[tuple[dict[str, Any], Vector]]:
        if materials.per_prompt:
            eye = torch.eye(lens.n_layer)
            return [({"layer": n}, DonorState(eye[n], lens.name, _origin(n))) for n in every]
        first = state_vector(lens, materials.answered(), 0)
        return [
            ({"layer": n}, StateVector(first.vectors, (n,), lens.name, _origin(n))) for n in every
        ]

    return chosen(materials, "hendel", candidates)


def _origin(layer: int) -> str:
    return f"mean residual stream behind layer {layer}"
