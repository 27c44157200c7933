"""How a Learnable Task Vector is trained, as plain values."""

from dataclasses import dataclass, replace
from typing import Literal

from tvlens.lens.edits import ActsAt
from tvlens.lens.readout import Answer
from tvlens.tasks.base import PromptKind

Granularity = Literal["head", "block"]


Start = Literal["zero", "normal"]


@dataclass(frozen=True)
class FitSettings:
    """How a Learnable Task Vector is trained.

    Attributes:
        start: weights before training.
        learning_rate: step size of Adam. A weight travels at most about steps x learning_rate.
        steps: largest number of steps.
        batch_size: prompts per step. Batches are drawn once and visited in a new order each round.
        kinds: kinds of training prompts, mixed in equal parts.
        shots: examples in prompts that have any; several numbers train at several lengths.
        n_prompts: training prompts of each kind and length; they are read once and used again.
        n_validation: validation prompts of each kind and length; by default as many as the task
            gives.
        evaluate_every: steps between validations.
        patience: validations without improvement after which training stops; None never stops.
        l1: weight of the penalty Σ|omega|, applied as soft thresholding, so weights reach zero:
            those of heads that lower the loss by less than `l1` per unit of weight.
        top_k: from half of the steps on, keep only the k heads of largest ‖omega ā‖.
        granularity: "head", or "block" for the released text code of the paper.
        per_prompt: weight the head outputs of each prompt's own donor instead of their means over
            the task, as the paper does for regression, where every prompt has its own function.
        answer: what the loss is the cross-entropy of: the first answer token, as in the papers, or
            the "whole" answer and what the layout ends it with.
        positions: where the vector is added: once, at the query, or at "all" positions from there
            on, at which answers go on and end.
    """

    start: Start = "zero"
    learning_rate: float = 0.1
    steps: int = 60
    batch_size: int = 32
    kinds: tuple[PromptKind, ...] = ("zero", "shuffled")
    shots: int | tuple[int, ...] = 3
    n_prompts: int = 160
    n_validation: int | None = None
    evaluate_every: int = 10
    patience: int | None = 3
    l1: float = 0.0
    top_k: int | None = None
    granularity: Granularity = "head"
    per_prompt: bool = False
    answer: Answer = "first"
    positions: ActsAt = "query"

    @property
    def lengths(self) -> tuple[int, ...]:
        """Every number of shots that is trained on."""
        return (self.shots,) if isinstance(self.shots, int) else self.shots

    @classmethod
    def paper(cls, **changes: object) -> "FitSettings":
        """The settings of the released code: omega ~ N(0, 1), Adam at 5e-5, 2,000 steps, no stop.

        A weight can travel 0.1 at most, so the result is mostly its random start.
        """
        paper = cls(start="normal", learning_rate=5e-5, steps=2000, patience=None, batch_size=8)
        return replace(paper, **{"evaluate_every": 50, **changes})  # type: ignore[arg-type]
