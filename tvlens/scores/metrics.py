"""What a patched run is measured by: a number of each prompt, read off the outputs at the query."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.errors import ModelError, NumericalError, ShapeError, TaskError, UnknownNameError
from tvlens.lens.lens import Lens
from tvlens.lens.readout import Outputs, kl_divergence
from tvlens.models.batch import Batch

MetricFunction = Callable[[Outputs, Batch], Tensor]
"""Gives a number for each output: `[batch variant d_out]` and the prompts to `[batch variant]`."""


class Reference(NamedTuple):
    """What a metric may compare outputs with.

    Attributes:
        wrong: first token of a wrong answer to each prompt, or None.
        source: outputs of the run that activations are taken from.
    """

    wrong: Int[Tensor, " batch"] | None
    source: Float[Tensor, "batch d_out"]


@dataclass(frozen=True)
class Metric:
    """A number of every prompt.

    Attributes:
        name: what tables and the command line call it.
        unit: what it is measured in.
        of: gives it.
        of_text: whether it is of answers in text; otherwise it is of predictions.
    """

    name: str
    unit: str
    of: Callable[[Lens, Outputs, Batch, Reference], Tensor]
    of_text: bool = True


def _log_probability(lens: Lens, outputs: Outputs, batch: Batch, reference: Reference) -> Tensor:
    return -lens.readout.loss(outputs, batch)


def _probability(lens: Lens, outputs: Outputs, batch: Batch, reference: Reference) -> Tensor:
    return lens.readout.score(outputs, batch)


def _logit_difference(lens: Lens, outputs: Outputs, batch: Batch, reference: Reference) -> Tensor:
    logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def at(tokens: Tensor) -> Tensor:
        return logits.gather(-1, tokens[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]

    right = torch.stack([at(tokens) for tokens in batch.right.unbind(dim=1)]).amax(dim=0)
    return right - (logits.mean(dim=-1) if reference.wrong is None else at(reference.wrong))


def _kl(lens: Lens, outputs: Outputs, batch: Batch, reference: Reference) -> Tensor:
    return kl_divergence(reference.source[:, None].expand(outputs.shape), outputs)


def _squared_error(lens: Lens, outputs: Outputs, batch: Batch, reference: Reference) -> Tensor:
    return -lens.readout.score(outputs, batch)


METRICS: tuple[Metric, ...] = (
    Metric("probability", "probability", _probability),
    Metric("log_probability", "nats", _log_probability),
    Metric("logit_difference", "logits", _logit_difference),
    Metric("kl", "nats", _kl),
    Metric("squared_error", "squared error", _squared_error, of_text=False),
)
"""Metrics by name. `logit_difference` is that of the right answer and the wrong one that is given,
or the mean over the vocabulary; `kl` is KL(source run || patched run). Of several right answers the
likeliest counts. `squared_error` is over the variance of the task.
"""


def metric_of(lens: Lens, metric: str | MetricFunction | None) -> Metric:
    """The metric of a name, or one made of a function.

    Args:
        lens: the model that is measured.
        metric: a name of `METRICS`, a function of outputs and prompts, or None for the first that
            fits the model.

    Raises:
        UnknownNameError: there is no metric of this name.
        ModelError: it is of text, and the model's outputs are numbers, or the reverse.
    """
    fitting = [each for each in METRICS if each.of_text == lens.readout.has_text]
    if metric is None:
        return fitting[0]
    if not isinstance(metric, str):
        return _checked(metric)
    found = next((each for each in METRICS if each.name == metric), None)
    names = ", ".join(each.name for each in fitting)
    if found is None:
        raise UnknownNameError(
            f"there is no metric {metric!r}; expected one of {names}, or a function of outputs "
            "[batch variant d_out] and their Batch"
        )
    if found not in fitting:
        kind = "text" if lens.readout.has_text else "predictions"
        raise ModelError(
            f"metric {metric!r} is not for {lens.name!r}, whose answers are {kind}; expected one "
            f"of {names}"
        )
    return found


def _checked(function: MetricFunction) -> Metric:
    name = getattr(function, "__name__", type(function).__name__)

    def of(lens: Lens, outputs: Outputs, batch: Batch, reference: Reference) -> Tensor:
        found = function(outputs, batch)
        if not isinstance(found, Tensor) or found.shape != outputs.shape[:2]:
            came = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ShapeError(
                f"metric {name!r} gave {came} for outputs of shape {tuple(outputs.shape)}; "
                f"expected a tensor of {tuple(outputs.shape[:2])}: one number for every prompt and "
                "variant"
            )
        return found

    return Metric(name, name, of)


def measured(
    metric: Metric, lens: Lens, outputs: Outputs, batch: Batch, reference: Reference
) -> Float[Tensor, "batch variant"]:
    """The metric of every output.

    Raises:
        NumericalError: a number is not finite.
        ShapeError: a function of the user's gives something of another shape.
    """
    found = metric.of(lens, outputs, batch, reference)
    if not torch.isfinite(found).all():
        broken = int((~torch.isfinite(found)).sum())
        raise NumericalError(
            f"metric {metric.name!r} is NaN or infinite for {broken} of {found.numel()} outputs of "
            f"{lens.name!r}; expected finite numbers: mend the metric, or try dtype=torch.float32"
        )
    return found


def wrong_tokens(lens: Lens, wrong: object, n_prompts: int) -> Int[Tensor, " prompt"] | None:
    """First tokens of wrong answers, given as prompts whose answers they are.

    Raises:
        TaskError: there are not as many as prompts.
    """
    if wrong is None:
        return None
    batch = lens.encode(wrong)  # type: ignore[arg-type]
    if len(batch) != n_prompts:
        raise TaskError(
            f"{len(batch)} wrong answers for {n_prompts} prompts; expected one for each: give the "
            "prompts again, with the wrong answer as theirs"
        )
    return batch.target.to(lens.backend.device)
