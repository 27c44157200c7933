"""Causal head gating: which heads stay open when opening costs, and which when it pays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.display import Displayed
from tvlens.errors import ShapeError, UnknownNameError
from tvlens.lens.fitting import Posed, Schedule, fit_edit
from tvlens.lens.lens import Lens
from tvlens.lens.steering import BlendHeads, blend_heads
from tvlens.runs.facts import text_of
from tvlens.runs.storage import Kept
from tvlens.scores.score import Scores
from tvlens.tasks.base import PromptSet
from tvlens.tasks.streams import generator

DEFAULT_SCHEDULE = Schedule(steps=60, learning_rate=1.0, batch_size=16, patience=None, clip=1.0)
"""Step size and clipping are the published ones."""

PRESSURE = 0.1
"""The published weight of the penalty on mean gate logits."""

_LIMIT = 4.0
_PHASES = 3


@dataclass(frozen=True)
class HeadGates(Kept, Displayed):
    """Trained gates of every head, and what they say of it.

    Attributes:
        kept: gates G⁺ under pressure to open, one mask for each start.
        cut: gates G⁻ under pressure to close, from the same starts.
        loss: mean loss in the last step of the first training, without pressure, of each mask.
        model: name of the model.
        task: name of the task.
    """

    kept: Float[Tensor, "mask layer head"]
    cut: Float[Tensor, "mask layer head"]
    loss: Float[Tensor, " mask"]
    model: str
    task: str

    @property
    def facilitating(self) -> Scores:
        """G⁻: what stays open under pressure to close, the task needs."""
        return self._scores(self.cut, "facilitating")

    @property
    def interfering(self) -> Scores:
        """1 - G⁺: what is closed under pressure to open, is in the task's way."""
        return self._scores(1 - self.kept, "interfering")

    @property
    def irrelevant(self) -> Scores:
        """G⁺ (1 - G⁻): what follows either pressure, makes no difference."""
        return self._scores(self.kept * (1 - self.cut), "irrelevant")

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Gates and loss; model and task."""
        tensors = {"kept": self.kept, "cut": self.cut, "loss": self.loss}
        return tensors, {"model": self.model, "task": self.task}

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "HeadGates":
        """The gates that have this state."""
        gates = tensors["kept"], tensors["cut"], tensors["loss"]
        return cls(*gates, text_of(facts, "model"), text_of(facts, "task"))

    def _scores(self, values: Float[Tensor, "mask layer head"], name: str) -> Scores:
        """The mean over masks; their values take the place of those of prompts."""
        return Scores.of_prompts(values, name=name, unit="gate", task=self.task, model=self.model)


def head_gates(
    lens: Lens,
    prompts: PromptSet,
    *,
    positions: str = "query",
    n_masks: int = 4,
    pressure: float = PRESSURE,
    schedule: Schedule = DEFAULT_SCHEDULE,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> HeadGates:
    """Gates on all heads at once, trained on clean prompts (Nam et al. 2025, arXiv 2505.13737).

    A gate G = sigmoid(g) multiplies z of each head; the loss is -log p(answer) - λ mean(clip(g, -4,
    4)). Gates are trained without pressure (λ = 0) from uniform draws in (0, 1), and from there
    with λ > 0 for G⁺ and with λ < 0 for G⁻. At the query position this is the learned counterpart
    of indirect effects; at every position, as published, it also sees what heads do for the
    demonstrations, and takes as long as training with whole passes.

    Args:
        lens: the model.
        prompts: clean in-context prompts.
        positions: where heads are gated: "query", by replay, or "all".
        n_masks: masks trained from different starts, at once; intervals are over them.
        pressure: λ, in nats for each unit of the mean gate logit.
        schedule: of each of the three trainings.
        seed: seed of the starts and of the order of batches.
        progress: called with the number of steps finished, of all three trainings together.

    Raises:
        UnknownNameError: there are no such positions.
        ShapeError: fewer than one mask is asked for.
        NumericalError: a training diverges.
    """
    if positions not in ("query", "all"):
        raise UnknownNameError(f"unknown positions {positions!r} of gates; expected query or all")
    if n_masks < 1:
        raise ShapeError(f"{n_masks} masks asked for; expected at least 1")
    batch = lens.encode(prompts)
    everywhere = () if positions == "query" else tuple(range(batch.inputs.shape[1]))
    layers = list(lens.backend.attention_layers)
    zeros = torch.zeros(1, 1, lens.n_layer, lens.n_head, lens.backend.d_head)
    zeros = zeros.to(lens.backend.device, lens.backend.dtype)
    there = torch.zeros(lens.n_layer, 1, device=zeros.device)
    there[layers] = 1

    def edit(logits: Float[Tensor, "variant layer head"], _: slice) -> BlendHeads:
        closed = (1 - logits.sigmoid()) * there
        return blend_heads(closed.to(zeros.dtype), zeros).and_at(everywhere)

    engine = lens.engine_for(edit(torch.zeros(1, lens.n_layer, lens.n_head).to(zeros), slice(0)))
    with lens.frozen():
        reading = engine.join(list(lens.readings(batch, engine=engine)))

    def trained(start: Tensor, sign: int, what: str) -> tuple[Tensor, Tensor]:
        def penalty(logits: Float[Tensor, "variant layer head"]) -> Float[Tensor, " variant"]:
            clipped: Tensor = logits[:, layers].clamp(-_LIMIT, _LIMIT).flatten(1)
            return -sign * pressure * clipped.mean(dim=1)

        found = fit_edit(
            lens,
            Posed(reading, edit),
            start,
            what=f"head gates {what} of task {prompts.task!r}",
            schedule=schedule,
            penalty=penalty if sign else None,
            engine=engine,
            seed=seed,
            progress=progress,
        )
        return found.values, found.loss

    drawn = generator("head gates", seed=seed)
    start = torch.rand(n_masks, lens.n_layer, lens.n_head, generator=drawn).logit(eps=1e-3)
    free, loss = trained(start, 0, "without pressure")
    gates = [
        trained(free, sign, what)[0].sigmoid().where(there.bool(), torch.nan).cpu()
        for sign, what in ((1, "under pressure to open"), (-1, "under pressure to close"))
    ]
    return HeadGates(gates[0], gates[1], loss, lens.name, prompts.task)


def steps_of(schedule: Schedule = DEFAULT_SCHEDULE) -> int:
    """Steps of all trainings together, for progress bars."""
    return _PHASES * schedule.steps
