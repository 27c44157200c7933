"""Training of Learnable Task Vectors by replay: prompts are read once, a step runs one position."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import NumericalError, TaskError
from tvlens.lens.edits import require_positions
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.models.gradients import with_gradients
from tvlens.runs.storage import load_checkpoint, save_tensors
from tvlens.tasks.base import HasTemplate, PromptSource
from tvlens.vectors.ltv.attribution import STEPS, add_vectors, attribute_samples
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.sample import FitPrompts, Sample, read_fit_prompts
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.materials import ByKind, Materials

DEFAULT_SETTINGS = FitSettings()


@with_gradients
def fit_ltv(
    lens: Lens,
    task: PromptSource,
    means: HeadMeans,
    *,
    settings: FitSettings = DEFAULT_SETTINGS,
    start: Float[Tensor, "layer head"] | None = None,
    seed: int = 0,
    read: FitPrompts | None = None,
    checkpoint: Path | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> LearnableTaskVector:
    """A trained Learnable Task Vector, with its `history` and the attribution of every head.

    Training prompts ask queries of the train split and do not carry the task (zero-shot and
    label-shuffled). The weights returned are those of lowest validation loss, on prompts of the
    validation split. Method: Saglam et al. 2025, section 3; theirs is trained on the first token of
    answers, and `settings.answer="whole"` trains on all of them and their end.

    Args:
        lens: the model.
        task: where prompts are drawn from.
        means: mean head outputs on clean prompts of the task.
        settings: how to train; `FitSettings.paper()` is the released code's.
        start: weights to start from, instead of `settings.start`.
        seed: seed of prompts, batches and a random start.
        read: prompts that `read_fit_prompts` read for the same settings and seed, whatever is
            weighed; several trainings can share them.
        checkpoint: file to save to at every validation, and to resume from where it exists.
        progress: called with the number of steps finished.

    Raises:
        ShapeError: the means are of another model.
        NumericalError: the loss is not finite, or training diverges.
        RunError: the checkpoint is of other settings, means or start, or cannot be read.
        TaskError: `settings.per_prompt` is asked of a task whose prompts have no donors, or `read`
            holds other prompts than these settings ask for.
        ModelError: whole answers, or vectors at all positions, of a model that answers in numbers.
        UnknownNameError: `settings.answer` or `settings.positions` has no such name.
    """
    means.require_fit(lens)
    require_positions("fit_ltv", settings.positions)
    if settings.positions == "all":
        lens.require_text("positions='all'")
    lens = lens.answering(settings.answer)
    if isinstance(task, HasTemplate):
        means.require_layout(task.template)
    if settings.per_prompt and settings.granularity != "head":
        raise TaskError(
            "fit_ltv: per_prompt=True weighs heads, so it needs granularity='head', not "
            f"{settings.granularity!r}"
        )
    if read is None:
        read = read_fit_prompts(lens, task, settings, seed)
    read.require_fit(task, settings, seed)
    training, validation = read.training, read.validation
    if not settings.per_prompt:
        training, validation = training.without_donors(), validation.without_donors()
    own = training.outputs
    ltv = LearnableTaskVector(
        means.outputs,
        start=settings.start if start is None else start,
        seed=seed,
        granularity=settings.granularity,
        norms=None if own is None else own.norm(dim=-1).mean(dim=0).cpu(),
        layers=means.layers,
        positions=settings.positions,
        model=lens.name,
        task=task.name,
    )
    ltv.to(lens.backend.device)
    trainer = _Trainer(ltv, settings, seed, lens)
    identity = json.dumps(
        {
            "settings": asdict(settings),
            "seed": seed,
            "task": task.digest,
            "model": lens.name,
            "start": _digest(ltv.start),
            "outputs": _digest(ltv.outputs),
        },
        sort_keys=True,
    )
    if checkpoint is not None and Path(checkpoint).exists():
        load_checkpoint(checkpoint, identity, trainer.restore)
    with lens.frozen():
        if not trainer.rows:
            trainer.validate(validation, float("nan"))
        for step in range(trainer.step, settings.steps):
            if trainer.finished:
                break
            loss = trainer.train_step(training)
            if progress is not None:
                progress(1)
            if (step + 1) % settings.evaluate_every == 0 or step + 1 == settings.steps:
                trainer.validate(validation, loss)
                if checkpoint is not None:
                    trainer.save(Path(checkpoint), identity)
        ltv.omega.data.copy_(trainer.best)
        ltv.mask.copy_(trainer.best_mask)
        ltv.history = pd.DataFrame(trainer.rows)
        rows = max(1, lens.max_rows // (STEPS * validation.reading.batch.n_read))
        attribute_samples(lens, ltv, validation.pieces(rows), STEPS)
    return ltv


def make(name: str) -> Callable[[Materials], ByKind]:
    """How the vectors that a study trained under this name are made."""
    return lambda materials: {kind: [ltv] for kind, ltv in materials.trained.get(name, {}).items()}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.cpu().numpy().tobytes()).hexdigest()[:16]


class _Trainer:
    """Adam on omega, validation, early stopping, and their checkpoint."""

    def __init__(
        self, ltv: LearnableTaskVector, settings: FitSettings, seed: int, lens: Lens
    ) -> None:
        self.ltv, self.settings, self.lens = ltv, settings, lens
        self.generator = torch.Generator().manual_seed(seed)
        self.adam = torch.optim.Adam([ltv.omega], lr=settings.learning_rate)
        self.step = 0
        self.best = ltv.omega.detach().clone()
        self.best_mask = ltv.mask.clone()
        self.best_loss = float("inf")
        self.waited = 0
        self.rows: list[dict[str, float]] = []
        self.waiting: list[int] = []

    @property
    def finished(self) -> bool:
        """Whether patience has run out; never before a top-k mask is set."""
        patience = self.settings.patience
        waiting_for_mask = self.settings.top_k is not None and self.step <= self.settings.steps // 2
        return patience is not None and self.waited >= patience and not waiting_for_mask

    def _losses(self, sample: Sample) -> Float[Tensor, " batch"]:
        vectors = self.ltv()[None] if sample.outputs is None else self.ltv(sample.outputs)
        outputs = self.lens.engine.run(
            sample.reading, add_vectors(vectors[:, None], self.ltv.positions)
        )
        return self.lens.readout.loss(outputs, sample.reading.batch)[:, 0]

    def train_step(self, training: Sample) -> float:
        if self.settings.top_k is not None and self.step == self.settings.steps // 2:
            self.ltv.keep_top(self.settings.top_k)
            # What was best with all heads does not count among vectors of k heads.
            self.best_loss, self.waited = float("inf"), 0
        self.adam.zero_grad()
        loss = self._losses(training.rows(self._next_batch(len(training)))).mean()
        loss.backward()
        total = float(loss.detach())
        self._require_finite(total)
        self.adam.step()
        if self.settings.l1:
            self._shrink()
        self.step += 1
        return total

    def _shrink(self) -> None:
        """The proximal step of the L1 penalty, in the metric of Adam's own step."""
        state, options = self.adam.state[self.ltv.omega], self.adam.param_groups[0]
        correction = 1 - options["betas"][1] ** float(state["step"])
        scale = (state["exp_avg_sq"] / correction).sqrt() + options["eps"]
        threshold = self.settings.l1 * self.settings.learning_rate / scale
        omega = self.ltv.omega.data
        omega.copy_(omega.sign() * (omega.abs() - threshold).clamp(min=0))

    def _next_batch(self, n_prompts: int) -> slice:
        size = self.settings.batch_size
        if not self.waiting:
            n_batches = -(-n_prompts // size)
            self.waiting = torch.randperm(n_batches, generator=self.generator).tolist()
        first = self.waiting.pop() * size
        return slice(first, first + size)

    def validate(self, validation: Sample, train_loss: float) -> None:
        with torch.no_grad():
            loss = float(self._losses(validation).double().mean())
        self._require_finite(loss)
        self.rows.append(
            {
                "step": self.step,
                "train_loss": train_loss,
                "validation_loss": loss,
                "travel": self.ltv.travel,
                "norm": float(self.ltv.weights.detach().norm()),
            }
        )
        # A model's final norm bounds what vectors can do to its logits, however large they are, so
        # a diverged loss does not grow without limit.
        start = self.rows[0]["validation_loss"]
        if loss > 2 * max(1.0, start):
            raise NumericalError(
                f"LTV training on {self.ltv.task!r} diverged: validation loss {loss:.3g} after "
                f"step {self.step}, {start:.3g} at the start; expected it to fall; lower "
                f"learning_rate (now {self.settings.learning_rate})"
            )
        if loss < self.best_loss:
            self.best_loss, self.waited = loss, 0
            self.best = self.ltv.omega.detach().clone()
            self.best_mask = self.ltv.mask.clone()
        else:
            self.waited += 1

    def _require_finite(self, loss: float) -> None:
        if not torch.isfinite(torch.tensor(loss)) or not torch.isfinite(self.ltv.omega).all():
            raise NumericalError(
                f"LTV training on {self.ltv.task!r}: loss or weights are not finite at step "
                f"{self.step} (loss {loss}); expected finite numbers; lower learning_rate (now "
                f"{self.settings.learning_rate}) or look for NaN in the mean head outputs"
            )

    def save(self, path: Path, identity: str) -> None:
        state = self.adam.state[self.ltv.omega]
        tensors = {
            "omega": self.ltv.omega.detach(),
            "mask": self.ltv.mask,
            "best": self.best,
            "best_mask": self.best_mask,
            "generator": self.generator.get_state(),
            **{f"adam.{key}": value for key, value in state.items()},
        }
        save_tensors(
            path,
            tensors,
            {
                "identity": identity,
                "step": self.step,
                "best_loss": self.best_loss,
                "waited": self.waited,
                "waiting": self.waiting,
                "rows": self.rows,
            },
        )

    def restore(self, tensors: Mapping[str, Tensor], names: Mapping[str, Any]) -> None:
        device = self.ltv.omega.device
        self.ltv.omega.data.copy_(tensors["omega"])
        self.ltv.mask.copy_(tensors["mask"])
        self.best, self.best_mask = tensors["best"].to(device), tensors["best_mask"].to(device)
        self.generator.set_state(tensors["generator"])
        self.adam.state[self.ltv.omega] = {
            key.removeprefix("adam."): value if key == "adam.step" else value.to(device)
            for key, value in tensors.items()
            if key.startswith("adam.")
        }
        self.step, self.waited = names["step"], names["waited"]
        self.best_loss, self.rows = names["best_loss"], names["rows"]
        self.waiting = names["waiting"]
