"""Parameters of edits, trained by running edited prompts, several trainings at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import NumericalError
from tvlens.lens.edits import Edit
from tvlens.lens.engine import Engine, Reading
from tvlens.lens.lens import Lens
from tvlens.models.gradients import with_gradients

EditOf = Callable[[Float[Tensor, "variant ..."], slice], Edit]


@dataclass(frozen=True)
class Posed:
    """Prompts that were read, and what parameters make of them.

    Attributes:
        reading: the prompts.
        edit: the edit of given parameters on some of the prompts, a variant for each training.
    """

    reading: Reading
    edit: EditOf


@dataclass(frozen=True)
class Schedule:
    """How parameters are trained.

    Attributes:
        steps: largest number of steps.
        learning_rate: step size of Adam.
        batch_size: prompts of a step.
        evaluate_every: steps between validations.
        patience: validations in which no variant improves, after which training stops; None never
            stops.
        clip: largest norm of the gradient of each variant; None for no limit.
    """

    steps: int = 60
    learning_rate: float = 0.1
    batch_size: int = 32
    evaluate_every: int = 10
    patience: int | None = 3
    clip: float | None = None


@dataclass(frozen=True)
class Fitted:
    """Trained parameters.

    Attributes:
        values: the parameters of every variant.
        loss: their mean loss on validation prompts, or in the last step where there are none.
        history: one row for each validation and variant: step, variant, train_loss,
            validation_loss.
    """

    values: Float[Tensor, "variant ..."]
    loss: Float[Tensor, " variant"]
    history: pd.DataFrame


DEFAULT_SCHEDULE = Schedule()


@with_gradients
def fit_edit(
    lens: Lens,
    training: Posed,
    start: Float[Tensor, "variant ..."],
    *,
    what: str,
    schedule: Schedule = DEFAULT_SCHEDULE,
    validation: Posed | None = None,
    penalty: Callable[[Float[Tensor, "variant ..."]], Float[Tensor, " variant"]] | None = None,
    engine: Engine[Any] | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Fitted:
    """Parameters of an edit by Adam on the loss of the lens' readout; variants do not meet.

    With validation prompts every variant keeps the parameters of its lowest validation loss,
    without them those of the last step.

    Args:
        lens: the model.
        training: prompts to train on.
        start: parameters to start from, for each variant.
        what: what is trained, in words, for errors.
        schedule: how to train.
        validation: prompts to select on.
        penalty: is added to the loss of each variant.
        engine: that read the prompts, and is to run them; the lens' own by default.
        seed: seed of the order of batches.
        progress: called with the number of steps finished.

    Raises:
        NumericalError: loss or parameters of a variant are not finite, or, without validation
            prompts, a variant's loss ends above twice that of the first step (or 2, if more).
    """
    engine = engine or lens.engine
    width = training.reading.batch.inputs.shape[1]
    fit = _Fit(lens, engine, start.to(lens.backend.device), width, schedule, what)
    generator = torch.Generator().manual_seed(seed)
    waiting: list[int] = []
    n_batches = -(-len(training.reading) // schedule.batch_size)
    with lens.frozen():
        if validation is not None:
            fit.validate(validation, torch.full((len(start),), torch.nan))
        for step in range(schedule.steps):
            if fit.finished:
                break
            if not waiting:
                waiting = torch.randperm(n_batches, generator=generator).tolist()
            first = waiting.pop() * schedule.batch_size
            loss = fit.train_step(training, slice(first, first + schedule.batch_size), penalty)
            if progress is not None:
                progress(1)
            last = step + 1 == schedule.steps
            if validation is not None and ((step + 1) % schedule.evaluate_every == 0 or last):
                fit.validate(validation, loss)
    return fit.result()


class _Fit:
    """Adam on the parameters of all variants, and what was best of each."""

    def __init__(
        self,
        lens: Lens,
        engine: Engine[Any],
        start: Tensor,
        width: int,
        schedule: Schedule,
        what: str,
    ) -> None:
        self.width = width
        self.lens, self.engine, self.schedule, self.what = lens, engine, schedule, what
        self.values = torch.nn.Parameter(start.detach().clone())
        self.adam = torch.optim.Adam([self.values], lr=schedule.learning_rate)
        self.best = start.detach().clone()
        self.best_loss = torch.full((len(start),), torch.inf, dtype=torch.float64)
        self.last_loss = self.best_loss
        self.first_loss: Tensor | None = None
        self.step = self.waited = 0
        self.rows: list[dict[str, float]] = []

    @property
    def finished(self) -> bool:
        patience = self.schedule.patience
        return patience is not None and self.waited >= patience

    def _losses(self, posed: Posed, rows: slice) -> Float[Tensor, "batch variant"]:
        reading = posed.reading.rows(rows)
        outputs = self.engine.run(reading, posed.edit(self.values, rows))
        return self.lens.readout.loss(outputs, reading.batch)

    def _pieces(self, rows: slice, n_prompts: int) -> list[slice]:
        """As many prompts at once as there is room for the rows of all variants."""
        start, stop, _ = rows.indices(n_prompts)
        # Engines that run more than the query position hold a row for every token.
        tokens = 1 if self.engine is self.lens.engine else self.width
        size = max(1, self.lens.max_rows // (len(self.values) * tokens))
        return [slice(i, min(i + size, stop)) for i in range(start, stop, size)]

    def train_step(
        self,
        training: Posed,
        rows: slice,
        penalty: Callable[[Tensor], Tensor] | None,
    ) -> Float[Tensor, " variant"]:
        pieces = self._pieces(rows, len(training.reading))
        count = pieces[-1].stop - pieces[0].start
        self.adam.zero_grad()
        total = torch.zeros(len(self.values), dtype=torch.float64)
        for piece in pieces:
            loss = self._losses(training, piece).sum(dim=0) / count
            loss.sum().backward()
            total += loss.detach().double().cpu()
        if penalty is not None:
            penalty(self.values).sum().backward()
        gradient = self.values.grad
        if gradient is not None and self.schedule.clip is not None:
            norm = gradient.flatten(1).norm(dim=1).clamp(min=1e-12)
            scale = (self.schedule.clip / norm).clamp(max=1)
            gradient *= scale.view(-1, *[1] * (gradient.ndim - 1))
        self.adam.step()
        self.step += 1
        self._require_finite(total)
        if self.first_loss is None:
            self.first_loss = total
        self.last_loss = total
        return total

    def validate(self, validation: Posed, train_loss: Float[Tensor, " variant"]) -> None:
        n_prompts = len(validation.reading)
        with torch.no_grad():
            parts = [
                self._losses(validation, piece).double().cpu()
                for piece in self._pieces(slice(0, n_prompts), n_prompts)
            ]
        loss = torch.cat(parts).mean(dim=0)
        self._require_finite(loss)
        for variant, (trained, validated) in enumerate(zip(train_loss, loss, strict=True)):
            self.rows.append(
                {
                    "step": self.step,
                    "variant": variant,
                    "train_loss": float(trained),
                    "validation_loss": float(validated),
                }
            )
        better = loss < self.best_loss
        self.best_loss = loss.where(better, self.best_loss)
        self.best[better] = self.values.detach()[better]
        self.waited = 0 if bool(better.any()) else self.waited + 1

    def _require_finite(self, loss: Tensor) -> None:
        finite = torch.isfinite(loss) & self.values.detach().isfinite().flatten(1).all(dim=1).cpu()
        if not finite.all():
            raise NumericalError(
                f"training of {self.what} diverged: loss or parameters are not finite at step "
                f"{self.step} (loss {float(loss[~finite][0])}); expected finite numbers; lower "
                f"the learning rate (now {self.schedule.learning_rate}) or look for NaN in what "
                "is trained on"
            )

    def result(self) -> Fitted:
        if self.rows:
            return Fitted(self.best, self.best_loss, pd.DataFrame(self.rows))
        # A model's final norm bounds what an edit can do to its logits, so that a diverged loss
        # does not grow without limit.
        if self.first_loss is not None:
            worse = self.last_loss > 2 * self.first_loss.clamp(min=1.0)
            if worse.any():
                raise NumericalError(
                    f"training of {self.what} diverged: loss {float(self.last_loss[worse][0]):.3g} "
                    f"after step {self.step}, {float(self.first_loss[worse][0]):.3g} in the first; "
                    "expected it to fall; lower the learning rate (now "
                    f"{self.schedule.learning_rate}) or train for longer (now "
                    f"{self.schedule.steps} steps)"
                )
        return Fitted(self.values.detach().clone(), self.last_loss, pd.DataFrame(self.rows))
