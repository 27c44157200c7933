"""Training of regression transformers with the curriculum of Garg et al. (2022)."""

import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from tvlens.errors import NumericalError, ShapeError, UnknownNameError
from tvlens.models.gradients import with_gradients
from tvlens.models.regression.transformer import RegressionSizes, RegressionTransformer
from tvlens.runs.storage import load_checkpoint, save_tensors
from tvlens.tasks.regression.functions import FunctionClass, function_class
from tvlens.tasks.regression.inputs import Shift, draw_points
from tvlens.tasks.regression.oracles import least_squares
from tvlens.tasks.streams import generator

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Curriculum:
    """Dimensions and points that grow while the model trains (Garg et al. 2022, appendix A.2).

    Attributes:
        dims: dimensions shown at first; the other coordinates of x are zero.
        points: points of the prompts at first.
        every: steps after which both grow.
        more_dims: dimensions added each time.
        more_points: points added each time.
    """

    dims: int
    points: int
    every: int
    more_dims: int = 1
    more_points: int = 2


@dataclass(frozen=True)
class TrainSettings:
    """How a regression transformer is trained.

    Attributes:
        sizes: sizes of the model.
        train_points: points of the longest training prompts, T_train; the positions behind them
            stay untrained.
        options: options of the function class, such as `n_nonzero`.
        steps: optimiser steps.
        batch_size: prompts per step, drawn anew each time.
        learning_rate: largest step size of AdamW.
        warmup: steps over which the step size grows from zero.
        schedule: "cosine" to zero, or "constant", after the warm-up.
        weight_decay: of AdamW.
        curriculum: growing prompts, or None for full ones from the start.
        n_validation: prompts that the error is measured on, drawn apart from those of training.
        evaluate_every: steps between measurements, and between checkpoints.
        precision: of the forward pass; parameters and optimiser stay in float32.
        compiled: whether the model runs through `torch.compile`.
    """

    sizes: RegressionSizes
    train_points: int
    options: dict[str, int | float] = field(default_factory=dict)
    steps: int = 4500
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: int = 200
    schedule: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.01
    curriculum: Curriculum | None = None
    n_validation: int = 1000
    evaluate_every: int = 250
    precision: Precision = "float32"
    compiled: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.train_points <= self.sizes.n_points:
            raise ShapeError(
                f"train_points={self.train_points}: expected between 1 and the model's "
                f"n_points={self.sizes.n_points}"
            )


PRESETS = {
    "tiny": TrainSettings(
        RegressionSizes(n_dims=1, n_points=16, n_layer=2, n_head=2, d_model=32),
        train_points=6,
        steps=600,
        batch_size=32,
        learning_rate=5e-3,
        warmup=20,
        n_validation=200,
        evaluate_every=100,
    ),
    "small": TrainSettings(
        RegressionSizes(n_dims=4, n_points=31, n_layer=6, n_head=4, d_model=128), train_points=12
    ),
    "standard": TrainSettings(
        RegressionSizes(n_dims=20, n_points=101, n_layer=12, n_head=8, d_model=256),
        train_points=41,
        steps=500_000,
        batch_size=64,
        learning_rate=1e-4,
        warmup=0,
        schedule="constant",
        weight_decay=0.0,
        curriculum=Curriculum(dims=5, points=11, every=2000),
        evaluate_every=5000,
        precision="bfloat16",
        compiled=True,
    ),
}
"""Settings by name: `tiny` for tests, `small` for two CPU cores, `standard` the paper's sizes."""


def preset(name: str, **changes: Any) -> TrainSettings:
    """The training settings of this name, with changes.

    Raises:
        UnknownNameError: there is no such preset.
    """
    if name not in PRESETS:
        raise UnknownNameError(f"unknown preset {name!r}; expected one of {', '.join(PRESETS)}")
    return replace(PRESETS[name], **changes)


@dataclass(frozen=True)
class Trained:
    """A trained model and how it came to be.

    Attributes:
        model: the model, in evaluation mode.
        history: step, loss, error, least_squares, dims, points, learning_rate; the loss of the last
            batch, and at `train_points` points the model's and least squares' squared error on
            validation prompts, all over the variance of y.
        times: step, and the seconds of training until then.
    """

    model: RegressionTransformer
    history: pd.DataFrame
    times: pd.DataFrame


@with_gradients
def train(
    functions: str,
    settings: TrainSettings,
    *,
    seed: int = 0,
    start: RegressionTransformer | None = None,
    device: str | torch.device = "cpu",
    checkpoint: Path | str | None = None,
    progress: Callable[[int], None] | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Trained:
    """A regression transformer trained on one function class.

    The loss is the mean squared error of the predictions at all points (Garg et al. 2022, eq. 2).
    Every batch has a random stream of its own, so a resumed run sees what an unbroken one sees.

    Args:
        functions: name of the function class.
        settings: sizes and schedule.
        seed: seed of the initial weights and of every batch.
        start: a trained model to go on from instead of random weights.
        device: where to train.
        checkpoint: file to save to at every measurement, and to resume from where it exists.
        progress: called with the number of steps finished.
        say: called with a line of text at every measurement.

    Raises:
        ShapeError: `start` has other sizes.
        NumericalError: the loss is not finite.
        RunError: the checkpoint is of another training, or cannot be read or written.
    """
    drawn = function_class(functions, settings.sizes.n_dims, **settings.options)
    trainer = _Trainer(drawn, settings, seed, start, torch.device(device))
    described = {"functions": functions, "settings": asdict(settings), "seed": seed}
    described["start"] = None if start is None else _fingerprint(start)
    identity = json.dumps(described, sort_keys=True)
    if checkpoint is not None and Path(checkpoint).exists():
        load_checkpoint(checkpoint, identity, trainer.restore)
        if progress is not None:
            progress(trainer.step)
    if not trainer.rows:
        trainer.measure(float("nan"))
    while trainer.step < settings.steps:
        loss = trainer.train_step()
        if progress is not None:
            progress(1)
        if trainer.step % settings.evaluate_every == 0 or trainer.step == settings.steps:
            say(trainer.measure(float(loss)))
            if checkpoint is not None:
                trainer.save(Path(checkpoint), identity)
    table = pd.DataFrame(trainer.rows)
    history = table.drop(columns="seconds")
    return Trained(trainer.model.to("cpu").eval(), history, table[["step", "seconds"]])


def model_card(
    functions: str,
    settings: TrainSettings,
    seed: int,
    start: str | None,
    device: str | torch.device,
    trained: Trained,
) -> dict[str, Any]:
    """What a model was trained on, where, and how well it does: kept in its file."""
    last = trained.history.iloc[-1]
    return {
        "functions": functions,
        "inputs": "x ~ N(0, I), a new function for every prompt",
        "train_points": settings.train_points,
        "variance": function_class(functions, settings.sizes.n_dims, **settings.options).variance,
        "error": float(last["error"]),
        "least_squares": float(last["least_squares"]),
        "n_validation": settings.n_validation,
        "settings": asdict(settings),
        "seed": seed,
        "start": start,
        "machine": f"{platform.machine()}, {device}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }


def _fingerprint(model: RegressionTransformer) -> list[float]:
    return [round(float(weight.double().sum()), 6) for weight in model.state_dict().values()]


class _Trainer:
    """AdamW on a regression transformer, its measurements and their checkpoint."""

    def __init__(
        self,
        drawn: FunctionClass,
        settings: TrainSettings,
        seed: int,
        start: RegressionTransformer | None,
        device: torch.device,
    ) -> None:
        self.drawn, self.settings, self.seed, self.device = drawn, settings, seed, device
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.model = RegressionTransformer(settings.sizes)
        if start is not None:
            if start.sizes != settings.sizes:
                raise ShapeError(
                    f"the model to start from has {start.sizes}, expected {settings.sizes}; "
                    "start from a model of the same preset"
                )
            self.model.load_state_dict(start.state_dict())
        self.model.to(device).train()
        if device.type == "cpu" and settings.precision != "float32":
            # Torch's fused attention has no fast backward pass in low precision on a CPU.
            self.model.backbone.set_attn_implementation("eager")
        self.adam = torch.optim.AdamW(
            self.model.parameters(),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "float16")
        self.forward = torch.compile(self.model) if settings.compiled else self.model
        self.step = 0
        self.seconds = 0.0
        self.rows: list[dict[str, float]] = []
        random = generator("validation", seed=seed)
        drawn_points = draw_points(drawn, settings.n_validation, settings.train_points, random)
        xs, ys = self.validation = drawn_points.xs, drawn_points.ys
        predicted = least_squares()(xs[:, :-1], ys[:, :-1], xs[:, -1])
        self.oracle = float((predicted - ys[:, -1]).square().mean()) / drawn.variance

    def growth(self) -> tuple[int, int]:
        """Dimensions and points of the prompts of this step."""
        dims, points = self.settings.sizes.n_dims, self.settings.train_points
        curriculum = self.settings.curriculum
        if curriculum is None:
            return dims, points
        grown = self.step // curriculum.every
        return (
            min(dims, curriculum.dims + grown * curriculum.more_dims),
            min(points, curriculum.points + grown * curriculum.more_points),
        )

    def learning_rate(self) -> float:
        """Step size of this step."""
        s = self.settings
        warm = min(1.0, (self.step + 1) / s.warmup) if s.warmup else 1.0
        if s.schedule == "constant":
            return s.learning_rate * warm
        done = max(0.0, (self.step - s.warmup) / max(1, s.steps - s.warmup))
        return s.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * done))

    def train_step(self) -> Tensor:
        began = time.perf_counter()
        dims, points = self.growth()
        random = generator("training", seed=self.seed, step=self.step)
        among_first = torch.arange(self.drawn.n_dims) < dims
        first_only = Shift(lambda xs, _: xs * among_first)
        drawn = draw_points(self.drawn, self.settings.batch_size, points, random, shift=first_only)
        xs, ys = drawn.xs.to(self.device), drawn.ys.to(self.device)
        for group in self.adam.param_groups:
            group["lr"] = self.learning_rate()
        low = getattr(torch, self.settings.precision)
        cast = nullcontext() if low == torch.float32 else torch.autocast(self.device.type, low)
        self.adam.zero_grad(set_to_none=True)
        with cast:
            loss = (self.forward(xs, ys).float() - ys).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.adam)
        self.scaler.update()
        self.step += 1
        self.seconds += time.perf_counter() - began
        return loss.detach()

    def measure(self, loss: float) -> str:
        """Append a row to the history; returns it in words."""
        xs, ys = (tensor.to(self.device) for tensor in self.validation)
        with torch.no_grad():
            predicted = self.model.eval()(xs, ys)
        self.model.train()
        error = float((predicted - ys)[:, -1].square().double().mean()) / self.drawn.variance
        if not math.isfinite(error):
            raise NumericalError(
                f"training is not finite at step {self.step} (loss {loss}, error {error}); lower "
                f"learning_rate (now {self.settings.learning_rate})"
            )
        dims, points = self.growth()
        self.rows.append(
            {
                "step": self.step,
                "loss": loss / self.drawn.variance,
                "error": error,
                "least_squares": self.oracle,
                "dims": dims,
                "points": points,
                "learning_rate": self.learning_rate(),
                "seconds": round(self.seconds, 1),
            }
        )
        return (
            f"step {self.step}: loss {loss / self.drawn.variance:.4f}, error at "
            f"{self.settings.train_points} points {error:.4f} (least squares {self.oracle:.4f}), "
            f"{self.seconds:.0f} s"
        )

    def save(self, path: Path, identity: str) -> None:
        tensors = {f"model.{name}": x for name, x in self.model.state_dict().items()}
        for number, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{key}": value for key, value in state.items()}
        metadata = {"identity": identity, "step": self.step, "seconds": self.seconds}
        metadata |= {"rows": self.rows, "scaler": self.scaler.state_dict()}
        save_tensors(path, tensors, metadata)

    def restore(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        model: dict[str, Tensor] = {}
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            kind, rest = name.split(".", 1)
            if kind == "model":
                model[rest] = tensor
            else:
                number, key = rest.split(".")
                state.setdefault(int(number), {})[key] = tensor
        self.model.load_state_dict(model)
        self.adam.load_state_dict(self.adam.state_dict() | {"state": state})
        self.scaler.load_state_dict(metadata["scaler"])
        self.step, self.seconds = metadata["step"], metadata["seconds"]
        self.rows = metadata["rows"]
