"""What a model's output at the query position is worth: where modalities differ above the model."""

from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import huber_loss

from tvlens.errors import NumericalError, ShapeError
from tvlens.models.batch import Batch

Outputs = Float[Tensor, "batch variant *read d_out"]

Answer = Literal["first", "whole"]
"""How much of an answer is read: its first token, or all of them and what ends it."""


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
        reads: how much of an answer outputs are about; of whole ones they have an axis `read`.
    """

    score_name: str
    has_text: bool
    reads: Answer
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
    """Text: the first token of the right answer, or of the likeliest of several right ones."""

    score_name = "probability"
    has_text = True
    reads: Answer = "first"
    measures: tuple[Measure, ...] = (Measure("accuracy", True), Measure("cross_entropy", False))

    def loss(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant"]:
        """Cross-entropy of the first answer token, in nats."""
        columns = batch.right.unbind(dim=1)
        found = [target_log_prob(outputs, _beside(outputs, column)) for column in columns]
        return -torch.stack(found).amax(dim=0)

    def score(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant"]:
        """Probability of the first answer token."""
        return (-self.loss(outputs, batch)).exp()

    def measure(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant measure"]:
        """Top-1 accuracy (0 or 1) and cross-entropy in nats of the first answer token."""
        loss = self.loss(outputs, batch)
        return torch.stack([self.answered(outputs, batch).to(loss.dtype), loss], dim=-1)

    def answered(self, outputs: Outputs, batch: Batch) -> Bool[Tensor, "batch variant"]:
        """Whether the first token of a right answer is the likeliest."""
        columns = batch.right.unbind(dim=1)
        return torch.stack([is_top1(outputs, _beside(outputs, c)) for c in columns]).any(dim=0)


def _beside(outputs: Outputs, column: Int[Tensor, " batch"]) -> Int[Tensor, "batch variant"]:
    return column[:, None].expand(outputs.shape[:2])


class WholeAnswer:
    """Text: all tokens of the answer that is shown first and what ends it, each behind the last."""

    score_name = "log-probability"
    has_text = True
    reads: Answer = "whole"
    measures: tuple[Measure, ...] = (Measure("answer_cross_entropy", False),)

    def loss(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant"]:
        """Cross-entropy of the answer and its end, summed over their tokens, in nats."""
        following = _following(outputs, batch)
        found = target_log_prob(outputs, following.clamp(min=0))
        return -found.where(following >= 0, 0.0).sum(dim=-1)

    def score(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant"]:
        """Log-probability of the answer and its end."""
        return -self.loss(outputs, batch)

    def measure(self, outputs: Outputs, batch: Batch) -> Float[Tensor, "batch variant measure"]:
        """Cross-entropy of the answer and its end, in nats."""
        return self.loss(outputs, batch)[..., None]

    def answered(self, outputs: Outputs, batch: Batch) -> Bool[Tensor, "batch variant"]:
        """Whether greedy decoding gives just these tokens."""
        following = _following(outputs, batch)
        return (is_top1(outputs, following.clamp(min=0)) | (following < 0)).all(dim=-1)


def _following(outputs: Outputs, batch: Batch) -> Int[Tensor, "batch variant read"]:
    if batch.following is None:
        raise ShapeError(
            "WholeAnswer: the batch has prompts without answers behind them; encode them with the "
            "lens of whole answers, lens.answering('whole')"
        )
    return batch.following[:, None].expand(outputs.shape[:3])


class SquaredError:
    """Regression: the prediction at the query's x against the function's value there.

    Losses, scores and measures are over `variance`, that of the function's values, so that 1 is
    the error of predicting their mean.
    """

    score_name = "reduction of squared error"
    has_text = False
    reads: Answer = "first"
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


def target_log_prob(
    logits: Float[Tensor, "*batch d_vocab"], target: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Log-probability of each target token, in nats; the cross-entropy is minus this.

    Computed in float32 (float64 for float64 logits) whatever the model's precision, differentiable.

    Raises:
        NumericalError: A row of logits holds NaN or +inf.
        ShapeError: A target is not a token of the vocabulary.
    """
    _check_logits(logits, "logits", target)
    return _log_softmax(logits).gather(-1, target.long().unsqueeze(-1)).squeeze(-1)


def is_top1(
    logits: Float[Tensor, "*batch d_vocab"], target: Int[Tensor, "*batch"]
) -> Bool[Tensor, "*batch"]:
    """True where greedy decoding would emit the target; a tie goes to the lowest token id.

    Raises:
        NumericalError: A row of logits holds NaN or +inf.
        ShapeError: A target is not a token of the vocabulary.
    """
    _check_logits(logits, "logits", target)
    return logits.argmax(dim=-1) == target


def kl_divergence(
    reference_logits: Float[Tensor, "*batch d_vocab"], logits: Float[Tensor, "*batch d_vocab"]
) -> Float[Tensor, "*batch"]:
    """KL(p_reference ‖ p) of the two next-token distributions, in nats.

    Over the whole vocabulary, or over a task's label tokens alone when both arguments hold only
    those columns. Tokens of zero reference probability (a logit of -inf) count nothing.

    Raises:
        NumericalError: A row of either argument holds NaN or +inf.
    """
    _check_logits(reference_logits, "reference_logits")
    _check_logits(logits, "logits")
    reference = _log_softmax(reference_logits)
    probability = reference.exp()
    difference = (reference - _log_softmax(logits)).masked_fill(probability == 0, 0.0)
    # Rounding can leave a few 1e-8 below zero where the two distributions agree.
    return (probability * difference).sum(dim=-1).clamp(min=0.0)


def _log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(dim=-1)


def _check_logits(logits: Tensor, name: str, target: Tensor | None = None) -> None:
    # The maximum carries NaN and +inf along, and -inf only where a whole row is masked out.
    broken = ~torch.isfinite(logits.detach().amax(dim=-1)).reshape(-1)
    if broken.any():
        raise NumericalError(
            f"{name} are NaN or infinite in {int(broken.sum())} of {broken.numel()} rows (first: "
            f"row {int(broken.nonzero()[0])}): a finite maximum is needed in every row; look for "
            "NaN in weights, a diverged vector, or an overflow of the model's precision"
        )
    d_vocab = logits.shape[-1]
    if target is not None and (outside := (target < 0) | (target >= d_vocab)).any():
        raise ShapeError(
            f"target token {int(target[outside][0])} is outside the vocabulary of the logits "
            f"(0 to {d_vocab - 1}): tokenise the answers with the model's own tokenizer"
        )
