"""What a model's output at the query position is worth: where modalities differ above the model."""

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import huber_loss

from tvlens.models.batch import Batch
from tvlens.stats import is_top1, target_log_prob

Outputs = Float[Tensor, "batch variant d_out"]


class Measure(NamedTuple):
    """A number reported per prompt, and which way is better."""

    name: str
    higher_is_better: bool


@runtime_checkable
class Readout(Protocol):
    """Turns outputs into a loss to train on, a score to measure effects in, and measures.

    Attributes:
        score_name: unit of the score.
        measures: what `measure` returns, the first being the one to choose settings by.
        has_text: whether answers are text, of which more than the first token can be generated.
    """

    score_name: str
    has_text: bool
    measures: tuple[Measure, ...]

    def loss(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant"]:
        """Loss of every output; lower is better."""
        ...

    def score(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant"]:
        """Score of every output; higher is better. Effects are differences of it."""
        ...

    def measure(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant measure"]:
        """Every measure of every output."""
        ...

    def answered(self, outputs: Outputs, batch: Batch) -> Bool[Tensor, "batch variant"]:
        """Whether the model does the task on this prompt."""
        ...


class FirstToken:
    """Text: the first token of the right answer."""

    score_name = "probability"
    has_text = True
    measures: tuple[Measure, ...] = (Measure("accuracy", True), Measure("cross_entropy", False))

    def loss(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant"]:
        """Cross-entropy of the first answer token, in nats."""
        return -target_log_prob(outputs, batch.target[:, None].expand(outputs.shape[:2]))

    def score(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant"]:
        """Probability of the first answer token."""
        return (-self.loss(outputs, batch)).exp()

    def measure(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant measure"]:
        """Top-1 accuracy (0 or 1) and cross-entropy in nats of the first answer token."""
        loss = self.loss(outputs, batch)
        return torch.stack([self.answered(outputs, batch).to(loss.dtype), loss], dim=-1)

    def answered(self, outputs: Outputs, batch: Batch) -> Bool[Tensor, "batch variant"]:
        """Whether the first answer token is the likeliest."""
        return is_top1(outputs, batch.target[:, None].expand(outputs.shape[:2]))


class SquaredError:
    """Regression: the prediction at the query's x against the function's value there.

    Losses, scores and measures are over `variance`, that of the function's values, so that 1 is
    the error of predicting their mean.
    """

    score_name = "reduction of squared error"
    has_text = False
    measures: tuple[Measure, ...] = (Measure("squared_error", False),)

    def __init__(self, variance: float = 1.0) -> None:
        """A readout of errors over `variance`."""
        self.variance = variance

    def loss(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant"]:
        """Huber loss of the scaled prediction, which Saglam et al. (2025) train on."""
        off = self._off(outputs, batch)
        return huber_loss(off, torch.zeros_like(off), reduction="none")

    def score(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant"]:
        """Minus the squared error, so that an effect is the error that a change takes away."""
        return -self._off(outputs, batch).square()

    def measure(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant measure"]:
        """Squared error."""
        return self._off(outputs, batch).square()[..., None]

    def answered(self, outputs: Outputs, batch: Batch) -> Bool[Tensor, "batch variant"]:
        """True: every prediction is more or less right, so no prompt is left out."""
        return torch.ones(outputs.shape[:2], dtype=torch.bool, device=outputs.device)

    def _off(self, outputs: Tensor, batch: Batch) -> Float[Tensor, "batch variant"]:
        exact = torch.promote_types(outputs.dtype, torch.float32)
        return (outputs[..., 0].to(exact) - batch.target[:, None]) / self.variance**0.5
