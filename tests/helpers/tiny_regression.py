"""A tiny regression model that learns lines, trained while the tests run, and its task."""

import copy
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import tvlens
from tvlens.lens.edits import AddToResidual
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.models.regression.training import Trained, model_card, preset, train
from tvlens.models.regression.transformer import RegressionTransformer, save_regression
from tvlens.studies.regression import RegressionSettings
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.prompts import PointPrompts
from tvlens.tasks.regression.task import FunctionTask
from tvlens.vectors.ltv.settings import FitSettings

TRAINED = 6
TASK = FunctionTask("linear", function_class("linear", 1), train_points=TRAINED)


@dataclass(frozen=True)
class SmallSettings(RegressionSettings):
    """A study that says little and takes seconds."""

    n_means: int = 32
    n_mediation: int = 8
    n_oracle: int = 4
    n_slow: int = 2
    n_dummy: int = 5
    ltv: FitSettings = field(
        default_factory=lambda: FitSettings(
            learning_rate=0.05, n_prompts=32, n_validation=16, evaluate_every=5
        )
    )
    ks: tuple[int, ...] = (1, 2)
    scales: tuple[float, ...] = (0.5, 1.0)
    control_draws: int = 2


@cache
def _training() -> Trained:
    return train("linear", preset("tiny"))


@cache
def trained() -> RegressionTransformer:
    """A model that learns lines from up to 6 points, with positions for 16."""
    # A bridge takes over the modules of its model, which could not be saved any more.
    return copy.deepcopy(_training().model)


def lens(kind: str = "bridge") -> Lens:
    """A lens on `trained()`, the same one every time: a second bridge would take its modules."""
    return _lens(kind)


@cache
def _lens(kind: str) -> Lens:
    return tvlens.load(trained(), backend=kind, name="tiny")


def save(path: Path) -> None:
    """`trained()` in a file as `tvlens regression train` writes it."""
    card = model_card("linear", preset("tiny"), 0, None, "cpu", _training())
    save_regression(_training().model, path, card, dtype=torch.float32)


def row(prompts: PointPrompts, i: int) -> PointPrompts:
    """One of the prompts, alone."""
    one = slice(i, i + 1)
    return replace(
        prompts, xs=prompts.xs[one], ys=prompts.ys[one], target=prompts.target[one], donor=None
    )


@torch.no_grad()
def head_outputs(lens: Lens, prompts: PointPrompts) -> Tensor:
    """What every head writes at each prompt's query, `[prompt layer head d_model]`, read whole."""
    z = WholePassEngine(lens.backend).read(lens.encode(prompts)).z
    return torch.stack([z[:, n, :, None] @ lens.w_o[n] for n in range(lens.n_layer)], 1)[..., 0, :]


@torch.no_grad()
def predictions(
    lens: Lens, prompts: PointPrompts, donors: PointPrompts, mix: Tensor, layers: tuple[int, ...]
) -> Tensor:
    """Each prompt run whole and alone, with the vectors that its own donor's heads add up to.

    `mix` is of shape `[to_layer layer head]`.
    """
    engine = WholePassEngine(lens.backend)
    active = torch.zeros(1, lens.n_layer, dtype=torch.bool)
    active[0, list(layers)] = True
    found = []
    for i in range(len(prompts)):
        outputs = head_outputs(lens, row(donors, i))[0]
        vectors = (mix[..., None] * outputs).sum(dim=(1, 2))
        edit = AddToResidual(vectors[None, None], active)
        found.append(engine.run_batch(lens.encode(row(prompts, i)), edit)[0, 0, 0])
    return torch.stack(found)


def points(n=4, n_points=5, n_dims=3, seed=0):
    """Random points, whose ys have nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, n_points, n_dims, generator=generator),
        torch.randn(n, n_points, generator=generator),
    )
