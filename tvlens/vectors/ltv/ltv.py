"""The Learnable Task Vector: one weight per head (Saglam et al., ACL Findings 2025)."""

from pathlib import Path
from typing import Literal

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tvlens.errors import NumericalError, ShapeError, UnknownNameError
from tvlens.lens.heads import HeadMeans
from tvlens.runs.storage import load_tensors, save_tensors
from tvlens.scores.agreement import top_heads
from tvlens.vectors.vector import HeadMixture, TaskVector, Vector

Granularity = Literal["head", "block"]
Start = Literal["zero", "normal"]


class LearnableTaskVector(nn.Module):
    """One weight per head: v[l] = Σ_j omega[l,j] ā[l,j] is added to the output of block l.

    Attributes:
        omega: the weights, the only parameter, `[layer head]`.
        start: the weights before training.
        outputs: mean head outputs ā, `[layer head d_model]`.
        norms: size of each head's output, `[layer head]`: that of its mean, or with `per_prompt`
            the mean of the sizes on single prompts.
        mask: True at the heads that take part.
        effect: what each head adds to the log-probability of the answer (`attribute`), NaN
            until it is known.
        history: one row per evaluation of the training: step, train_loss, validation_loss,
            travel, norm.
        per_prompt: whether the weights are for the head outputs of each prompt's own donor; the
            means then only say what a head writes on average.
        model: name of the model.
        task: name of the task.
    """

    omega: nn.Parameter
    start: Tensor
    outputs: Tensor
    norms: Tensor
    mask: Tensor
    effect: Tensor

    def __init__(
        self,
        outputs: Float[Tensor, "layer head d_model"],
        *,
        start: Start | Float[Tensor, "_layer _head"] = "zero",
        seed: int = 0,
        granularity: Granularity = "head",
        norms: Float[Tensor, "_layer _head"] | None = None,
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
            model: name of the model.
            task: name of the task.

        Raises:
            ShapeError: the given start does not fit, or d_model cannot be cut into `head` slices.
            NumericalError: outputs or start are not finite.
            UnknownNameError: the start or granularity has no such name.
        """
        super().__init__()
        n_layer, n_head, _ = outputs.shape
        if granularity not in ("head", "block"):
            raise UnknownNameError(f"granularity {granularity!r}: expected 'head' or 'block'")
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
        self.register_buffer("mask", torch.ones(n_layer, n_head, dtype=torch.bool))
        self.register_buffer("effect", torch.full((n_layer, n_head), torch.nan))
        self.granularity = granularity
        self.per_prompt = norms is not None
        self.model, self.task = model, task
        self.history = pd.DataFrame()

    @classmethod
    def of_means(cls, means: HeadMeans, **options: object) -> "LearnableTaskVector":
        """An untrained vector over the mean outputs of `means`."""
        return cls(means.outputs, model=means.model, **options)  # type: ignore[arg-type]

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
    def weights(self) -> Float[Tensor, "layer head"]:
        """omega where the mask allows it, zero elsewhere."""
        return self.omega * self.mask

    def contributions(self, *, signed: bool = True) -> Float[Tensor, "layer head"]:
        """‖omega ā‖ of every head, negative where the head lowers the answer's probability.

        Args:
            signed: give it the sign of `effect`.

        Raises:
            NumericalError: the effects are not known; run `attribute` first or ask for unsigned.
        """
        norm = self.weights.detach().abs() * self.norms
        if not signed:
            return norm
        if torch.isnan(self.effect).any():
            raise NumericalError(
                "the heads' effects are not known, so contributions have no sign; call "
                "tvlens.attribute(lens, ltv, prompts) first, or contributions(signed=False)"
            )
        return norm * self.effect.sign()

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
            return HeadMixture.in_place(weights, self.model, origin)
        vectors = torch.einsum("lh,lhd->ld", weights.to(self.outputs), self.outputs)
        return TaskVector(vectors.cpu(), tuple(range(len(vectors))), self.model, origin)

    def save(self, path: Path | str) -> None:
        """Write weights, start, outputs, effects and names as safetensors."""
        tensors = {"omega": self.omega, "start": self.start, "outputs": self.outputs}
        tensors |= {"mask": self.mask, "effect": self.effect}
        tensors |= {"norms": self.norms} if self.per_prompt else {}
        names = {"model": self.model, "task": self.task, "granularity": self.granularity}
        save_tensors(path, tensors, names | {"history": self.history.to_dict("list")})

    @classmethod
    def load(cls, path: Path | str) -> "LearnableTaskVector":
        """The vector written by `save`."""
        tensors, names = load_tensors(path)
        made = cls(
            tensors["outputs"],
            start=tensors["start"],
            norms=tensors.get("norms"),
            model=names["model"],
            task=names["task"],
        )
        made.granularity = names["granularity"]
        made.omega.data.copy_(tensors["omega"])
        made.mask.copy_(tensors["mask"])
        made.effect.copy_(tensors["effect"])
        made.history = pd.DataFrame(names["history"])
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
