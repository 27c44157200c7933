"""The Learnable Task Vector: one weight per head (Saglam et al., ACL Findings 2025)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tvlens.errors import NumericalError, ShapeError, UnknownNameError
from tvlens.lens.edits import ActsAt, QueryEdit, require_positions
from tvlens.lens.lens import Lens
from tvlens.runs.facts import integers_of, text_of, wrong
from tvlens.scores.ranking import top_heads
from tvlens.scores.score import Scores
from tvlens.tasks.base import PromptSet
from tvlens.vectors.ltv.settings import Granularity, Start
from tvlens.vectors.vector import HeadMixture, TaskVector, Vector, acting_facts, positions_of

GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)


class LearnableTaskVector(nn.Module, Vector):
    """One weight per head: v[l] = Σ_j omega[l,j] ā[l,j] is added to the output of block l.

    Attributes:
        omega: the weights, the only parameter, `[layer head]`.
        start: the weights before training.
        outputs: mean head outputs ā, `[layer head d_model]`.
        norms: size of each head's output, `[layer head]`: that of its mean, or with `per_prompt`
            the mean of the sizes on single prompts.
        mask: True at the heads that take part.
        attribution: what each head adds to the score of the answer (`attribute`), NaN
            until it is known.
        layers: layers that have heads, where some have none; None for all.
        history: one row per evaluation of the training: step, train_loss, validation_loss,
            travel, norm.
        per_prompt: whether the weights are for the head outputs of each prompt's own donor; the
            means then only say what a head writes on average.
        positions: where it acts: at the query, or there and at all positions of the answer.
        model: name of the model.
        task: name of the task.
    """

    held = "omega"
    omega: nn.Parameter
    start: Tensor
    outputs: Tensor
    norms: Tensor
    mask: Tensor
    attribution: Tensor

    def __init__(
        self,
        outputs: Float[Tensor, "layer head d_model"],
        *,
        start: Start | Float[Tensor, "_layer _head"] = "zero",
        seed: int = 0,
        granularity: Granularity = "head",
        norms: Float[Tensor, "_layer _head"] | None = None,
        layers: Sequence[int] | None = None,
        positions: ActsAt = "query",
        model: str = "",
        task: str = "",
    ) -> None:
        """An untrained vector.

        Args:
            outputs: mean head outputs, `HeadMeans.outputs`.
            start: zeros, standard normal draws, or given weights.
            seed: seed of the normal draws.
            granularity: "head" weights heads. "block" reproduces the released text code of the
                paper, which weights contiguous slices of the summed head outputs: residual
                coordinates, not heads.
            norms: mean size of each head's output on single prompts, for weights of each prompt's
                own head outputs; None for weights of the means.
            layers: layers that have heads, where some have none; None for all.
            positions: "all" for one that is added at every position of the answer, too.
            model: name of the model.
            task: name of the task.

        Raises:
            ShapeError: the given start does not fit, or d_model cannot be cut into `head` slices.
            NumericalError: outputs or start are not finite.
            UnknownNameError: the start, granularity or positions have no such name.
        """
        super().__init__()
        require_positions("Learnable Task Vector", positions)
        n_layer, n_head, _ = outputs.shape
        if granularity not in GRANULARITIES:
            expected = " or ".join(map(repr, GRANULARITIES))
            raise UnknownNameError(f"granularity {granularity!r}: expected {expected}")
        if granularity == "block":
            outputs = _slices(outputs)
        weights = _start(start, n_layer, n_head, seed)
        for name, tensor in (("head outputs", outputs), ("start weights", weights)):
            if not torch.isfinite(tensor).all():
                raise NumericalError(
                    f"{name} of the Learnable Task Vector hold NaN or infinite numbers; expected "
                    "finite ones; look at the activations they come from"
                )
        self.omega = nn.Parameter(weights.clone())
        self.register_buffer("start", weights.clone())
        self.register_buffer("outputs", outputs.detach().float().clone())
        sizes = self.outputs.norm(dim=-1) if norms is None else norms.detach().float().clone()
        self.register_buffer("norms", sizes)
        self.layers = None if layers is None else tuple(layers)
        self.register_buffer("mask", self.has_heads.clone())
        self.register_buffer("attribution", torch.full((n_layer, n_head), torch.nan))
        self.granularity = granularity
        self.per_prompt = norms is not None
        self.positions = positions
        self.model, self.task = model, task
        self.history = pd.DataFrame()

    def forward(
        self, outputs: Float[Tensor, "*batch layer head d_model"] | None = None
    ) -> Float[Tensor, "*batch layer d_model"]:
        """The vectors v[l], differentiable in omega (Saglam et al. 2025, section 3).

        Args:
            outputs: head outputs of single prompts; the means by default.
        """
        given = self.outputs if outputs is None else outputs
        return torch.einsum("lh,...lhd->...ld", self.weights, given)

    @property
    def has_heads(self) -> Bool[Tensor, "layer head"]:
        """True but in layers without heads."""
        found = torch.ones_like(self.start, dtype=torch.bool)
        if self.layers is not None:
            found[[n for n in range(len(found)) if n not in self.layers]] = False
        return found

    @property
    def weights(self) -> Float[Tensor, "layer head"]:
        """omega where the mask allows it, zero elsewhere."""
        return self.omega * self.mask

    def contributions(self, *, signed: bool = True) -> Float[Tensor, "layer head"]:
        """‖omega ā‖ of every head, negative where the head lowers the answer's probability.

        NaN in layers without heads.

        Args:
            signed: give it the sign of `attribution`.

        Raises:
            NumericalError: the attributions are not known; run `attribute`, or ask for unsigned.
        """
        norm = self._of_heads(self.weights.detach().abs() * self.norms)
        if not signed:
            return norm
        if torch.isnan(self.attribution).any():
            raise NumericalError(
                "the heads' attributions are not known, so contributions have no sign; call "
                "tvlens.attribute(lens, ltv, prompts) first, or contributions(signed=False)"
            )
        return norm * self.attribution.sign()

    def _of_heads(self, found: Float[Tensor, "layer head"]) -> Float[Tensor, "layer head"]:
        return found.where(self.has_heads, torch.nan)

    @property
    def scores(self) -> Float[Tensor, "layer head"]:
        """Signed contributions: what head-set comparison ranks heads by."""
        return self.contributions()

    def top(self, k: int) -> list[tuple[int, int]]:
        """The k heads of largest signed contribution, best first."""
        return top_heads(self.scores, k)

    @property
    def travel(self) -> float:
        """Euclidean distance of the weights from their start."""
        return float((self.weights.detach() - self.start * self.mask).norm())

    @property
    def task_vector(self) -> Vector:
        """What is added, as a plain value: a TaskVector, or a HeadMixture with `per_prompt`."""
        return self.with_weights(self.weights.detach(), f"LTV of {self.task}")

    def keep_top(self, k: int) -> None:
        """Mask all heads but the k of largest ‖omega ā‖.

        Raises:
            ShapeError: k is not between 1 and the number of heads.
        """
        kept = top_heads(self.contributions(signed=False), k)
        self.mask.fill_(False)
        for head in kept:
            self.mask[head] = True

    def with_weights(self, weights: Float[Tensor, "layer head"], origin: str) -> Vector:
        """The task vector of other weights on the same head outputs."""
        if self.per_prompt:
            mixture = HeadMixture.in_place(weights, self.model, origin)
            return replace(mixture, positions=self.positions)
        vectors = torch.einsum("lh,lhd->ld", weights.to(self.outputs), self.outputs)
        layers = tuple(range(len(vectors)))
        return TaskVector(vectors.cpu(), layers, self.model, origin, self.positions)

    @property
    def plain(self) -> Vector:
        """The vector that acts: `task_vector`."""
        return self.task_vector

    @classmethod
    def stack(cls, vectors: Sequence[Any], lens: Lens, prompts: PromptSet) -> QueryEdit:
        """As the task vectors that they are: of means all, or of each prompt's heads all."""
        plain = [vector.task_vector for vector in vectors]
        return type(plain[0]).stack(plain, lens, prompts)

    def head_scores(self, name: Literal["omega", "contribution"] = "contribution") -> Scores:
        """A score of every head: its weight, or the signed norm of what it adds.

        Raises:
            NumericalError: contributions are asked for, and the attributions are not known.
        """
        made = self.contributions if name == "contribution" else self.weights.detach
        found = self._of_heads(made())
        unit = "weight" if name == "omega" else "signed norm"
        return Scores(found.cpu(), name, unit, self.task, self.model)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Weights, start, head outputs, mask and attributions; names and history."""
        tensors = {"omega": self.omega.detach(), "start": self.start, "outputs": self.outputs}
        tensors |= {"mask": self.mask, "attribution": self.attribution}
        tensors |= {"norms": self.norms} if self.per_prompt else {}
        # JSON has no NaN.
        history = self.history.astype(object).where(self.history.notna(), None)
        names = {"model": self.model, "task": self.task, "granularity": self.granularity}
        found = {"layers": self.layers, "history": history.to_dict("list"), **acting_facts(self)}
        return tensors, names | found

    @classmethod
    def of_state(
        cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> "LearnableTaskVector":
        """The vector that has this state.

        Raises:
            ShapeError: its tensors are of different numbers of layers or heads.
            NumericalError: its weights are not finite.
        """
        task = text_of(facts, "task")
        found = [each for each in GRANULARITIES if each == facts["granularity"]]
        if not found:
            expected = " or ".join(map(repr, GRANULARITIES))
            raise wrong("granularity", facts["granularity"], expected)
        if tensors["outputs"].ndim != 3 or not tensors["outputs"].is_floating_point():
            raise ShapeError(
                f"Learnable Task Vector of {task!r}: its head outputs have shape "
                f"{tuple(tensors['outputs'].shape)}; expected (layer, head, d_model)"
            )
        for name in ("start", "omega", "mask", "attribution", "norms"):
            if name in tensors and tensors[name].shape != tensors["outputs"].shape[:2]:
                raise ShapeError(
                    f"Learnable Task Vector of {task!r}: {name} has shape "
                    f"{tuple(tensors[name].shape)}, its head outputs are of "
                    f"{tuple(tensors['outputs'].shape[:2])} (layer, head); expected one number for "
                    "each head"
                )
        for name in ("omega", "norms"):
            if name in tensors and not torch.isfinite(tensors[name]).all():
                raise NumericalError(
                    f"{name} of the Learnable Task Vector of {task!r} hold NaN or infinite "
                    "numbers; expected finite ones"
                )
        layers = None if facts.get("layers") is None else integers_of(facts, "layers")
        if layers is not None and max(layers, default=0) >= len(tensors["outputs"]):
            raise wrong("layers", layers, f"layers below {len(tensors['outputs'])}")
        if not isinstance(facts["history"], dict):
            raise wrong("history", facts["history"], "columns by name")
        made = cls(
            tensors["outputs"],
            start=tensors["start"],
            norms=tensors.get("norms"),
            layers=layers,
            positions=positions_of(facts),
            model=text_of(facts, "model"),
            task=task,
        )
        made.granularity = found[0]
        made.omega.data.copy_(tensors["omega"])
        made.mask.copy_(tensors["mask"])
        made.attribution.copy_(tensors["attribution"])
        made.history = pd.DataFrame(facts["history"])
        return made


def _start(
    start: Start | Tensor, n_layer: int, n_head: int, seed: int
) -> Float[Tensor, "layer head"]:
    if isinstance(start, Tensor):
        if tuple(start.shape) != (n_layer, n_head):
            raise ShapeError(
                f"start weights have shape {tuple(start.shape)}, expected (layer, head) = "
                f"{(n_layer, n_head)}; give one weight per head of this model"
            )
        return start.detach().float()
    if start == "zero":
        return torch.zeros(n_layer, n_head)
    if start == "normal":
        return torch.randn(n_layer, n_head, generator=torch.Generator().manual_seed(seed))
    raise UnknownNameError(f"start {start!r}: expected 'zero', 'normal' or a [layer, head] tensor")


def _slices(outputs: Float[Tensor, "layer head d_model"]) -> Float[Tensor, "layer head d_model"]:
    _, n_head, d_model = outputs.shape
    if d_model % n_head:
        raise ShapeError(
            f"granularity 'block' cuts d_model {d_model} into {n_head} equal slices, which it is "
            "not divisible into; use granularity='head'"
        )
    width = d_model // n_head
    owner: Bool[Tensor, "head d_model"] = (
        torch.arange(d_model)[None] // width == torch.arange(n_head)[:, None]
    )
    return outputs.sum(dim=1, keepdim=True) * owner
