"""The in-context vector of Liu et al. (2024): the direction from inputs to outputs, at every layer,
towards which streams are turned without growing.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import NumericalError, TaskError
from tvlens.lens.edits import AddToResidual
from tvlens.lens.lens import Lens
from tvlens.lens.states import residual_states
from tvlens.lens.steering import TurnResidual
from tvlens.tasks.base import PromptSet
from tvlens.tasks.regression.prompts import PointPrompts
from tvlens.tasks.text.prompts import Pair, Prompt, Prompts, Template
from tvlens.vectors.choice import Training, chosen
from tvlens.vectors.materials import ByKind, Materials
from tvlens.vectors.vector import TaskVector, Vector

STRENGTHS = (0.03, 0.1, 0.2, 0.4, 0.8)
"""Factors λ that are tried; Liu et al. use .1 for most tasks."""

# What would be answered does not matter, but it must begin with a token of its own.
_BARE = Template(
    query_prefix="", answer_prefix="", field_separator="", pair_separator="", answer_space="\n"
)


@dataclass(frozen=True)
class InContextVector(TaskVector):
    """A direction per layer, towards which the block's output is turned; its norm stays.

    The output x becomes x + ‖x‖ v, scaled back to the norm of x (`TurnResidual`).

    Attributes:
        vectors: the directions; layers not in `layers` are not read.
        layers: layers at which streams are turned.
        model: name of the model it was made on.
        origin: how it was made, in words.
        positions: "all" for one that acts at every position of the answer, too.
        everywhere: whether it acts at every position of the prompt, as published; such vectors run
            prompts from their first column on.
    """

    held: ClassVar[str] = "directions"
    acts: ClassVar[type[AddToResidual]] = TurnResidual
    everywhere: bool = False

    @property
    def group(self) -> Hashable:
        """Those that act at the query, or at every position."""
        return super().group, self.everywhere

    @classmethod
    def stack(cls, vectors: Sequence[Any], lens: Lens, prompts: PromptSet) -> AddToResidual:
        """The edit whose variants are the given vectors, which act everywhere all or none."""
        edit = super().stack(vectors, lens, prompts)
        if not vectors[0].everywhere:
            return edit
        return edit.and_at(range(lens.encode(prompts).inputs.shape[1]))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """That of every task vector, and whether it acts everywhere."""
        tensors, facts = super().state()
        return tensors, facts | ({"everywhere": True} if self.everywhere else {})

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "InContextVector":
        """The vector that has this state."""
        made = super().of_state(tensors, facts)
        assert isinstance(made, cls)
        return replace(made, everywhere=facts.get("everywhere") is True)


def in_context_vector(lens: Lens, demonstrations: PromptSet) -> InContextVector:
    """The first principal direction of the difference that outputs make, over all layers at once.

    With h(t) the residual streams behind all blocks at the last token of a text t, one long vector,
    it is the direction that maximises Σ ⟨v, h(y) - h(x)⟩² over demonstrations (Liu et al., ICML
    2024, arXiv 2311.06668, section 3), signed so that outputs lie ahead of inputs. Every layer's
    part is then scaled by one factor, so that their mean square norm is 1. Inputs and outputs of
    text are read alone, as there; of points, which mean nothing alone, h is taken at the x and the
    y of every example of a prompt.

    The direction is added in units of the stream's own norm, so that one strength λ means the same
    in every layer and model: `λ * in_context_vector(…)`.

    Args:
        lens: the model.
        demonstrations: prompts whose examples (points) or whose queries and answers (text) are
            taken.

    Raises:
        TaskError: the prompts are neither of text nor of points, or show no example.
        NumericalError: inputs and outputs have the same streams.
    """
    differences = _differences(lens, demonstrations).double().flatten(1)
    _, sizes, directions = torch.linalg.svd(differences.cpu(), full_matrices=False)
    if not sizes[0] > 0:
        raise NumericalError(
            f"in-context vector of task {demonstrations.task!r}: the streams of inputs and outputs "
            "do not differ, so there is no direction; give demonstrations whose outputs are not "
            "their inputs"
        )
    direction = directions[0] * (1 if directions[0] @ differences.cpu().mean(dim=0) >= 0 else -1)
    vectors = direction.view(lens.n_layer, lens.d_model) * lens.n_layer**0.5
    every = tuple(range(lens.n_layer))
    return InContextVector(vectors.float(), every, lens.name, "in-context vector")


def make(*, everywhere: bool) -> Callable[[Materials], ByKind]:
    """How in-context vectors are made; the strength is chosen on validation.

    Args:
        everywhere: whether they act at every position, those of the answer too, or at the query.
    """

    def make(materials: Materials) -> ByKind:
        def candidates(_: Training) -> list[tuple[dict[str, Any], Vector]]:
            direction = in_context_vector(materials.lens, materials.answered())
            if everywhere:
                direction = replace(direction, everywhere=True, positions="all")
            return [({"strength": each}, direction * each) for each in STRENGTHS]

        return chosen(materials, "icv_all" if everywhere else "icv", candidates)

    return make


def _differences(lens: Lens, prompts: PromptSet) -> Float[Tensor, "pair layer d_model"]:
    if isinstance(prompts, Prompts) and prompts.items:
        asked = list(dict.fromkeys(item.query for item in prompts.items))
        outputs, inputs = (
            residual_states(lens, _alone(prompts, texts))[:, 0]
            for texts in ([pair.output for pair in asked], [pair.input for pair in asked])
        )
        return outputs - inputs
    if isinstance(prompts, PointPrompts) and prompts.shots:
        shown = torch.arange(prompts.shots)
        columns = torch.stack([2 * shown + 1, 2 * shown]).flatten().expand(len(prompts), -1)
        states = residual_states(lens, prompts, columns)
        return (states[:, : len(shown)] - states[:, len(shown) :]).flatten(0, 1)
    raise TaskError(
        f"in-context vectors are made of demonstrations, but {type(prompts).__name__} of task "
        f"{prompts.task!r} have none; give text prompts, or prompts of a FunctionTask with shots"
    )


def _alone(prompts: Prompts, texts: list[str]) -> Prompts:
    """Texts with nothing around them, to be read to their ends."""
    items = tuple(Prompt((), Pair(text, text), "zero", _BARE) for text in texts)
    return replace(prompts, items=items, kind="zero", shots=0)
