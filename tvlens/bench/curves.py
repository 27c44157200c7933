"""How fast error curves are by replay: every number of points is a row on one reading."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from tvlens.lens.edits import AddToResidual, Edit, NoEdit
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.lens.loading import load
from tvlens.models.regression.training import PRESETS
from tvlens.models.regression.transformer import RegressionTransformer
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.prompts import PointCurves
from tvlens.tasks.regression.task import FunctionTask
from tvlens.timing import Figures, ratios, time_in_turn, with_range


@dataclass(frozen=True)
class CurveBenchSettings:
    """What the benchmark of error curves measures.

    Attributes:
        seed: seed of weights, prompts and vectors.
        preset: sizes of the model, whose weights are random: times do not depend on them.
        n_points: longest prompts; 41 are the paper's.
        n_prompts: prompts that curves are drawn over.
        n_vectors: vectors whose curves are drawn together.
        repeats: rounds in which everything is timed in turn.
    """

    seed: int = 0
    preset: str = "standard"
    n_points: int = 41
    n_prompts: int = 16
    n_vectors: int = 8
    repeats: int = 3


def bench_curves(
    settings: CurveBenchSettings, *, say: Callable[[str], None] = lambda _: None
) -> Figures:
    """Times the two ways in turn, bare and under vectors.

    The loop cuts every prompt to each number of points and runs all prompts of that length through
    the model at once, whole, with the hooks that make the edit; replay reads every prompt once.

    Args:
        settings: sizes.
        say: called with a line of text when the warm-up or a round begins.

    Returns:
        `ratio_bare` and `ratio_vectors` (time of the loop over that of replay, the median of the
        rounds) with their ranges (`_low`, `_high`), the median seconds behind them, the largest
        differences between the two curves, the sizes, and the `conditions` of `Timings`.
    """
    sizes = PRESETS[settings.preset].sizes
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = RegressionTransformer(sizes).eval()
    lens = load(model, name=settings.preset)
    task = FunctionTask("linear", function_class("linear", sizes.n_dims))
    points = tuple(range(1, settings.n_points + 1))
    curves = task.curves("test", points=points, n=settings.n_prompts, seed=settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    shape = 1, settings.n_vectors, lens.n_layer, lens.d_model
    vectors = AddToResidual(
        torch.randn(shape, generator=generator), torch.ones(shape[1:3], dtype=torch.bool)
    )
    ways: dict[str, Callable[[], Tensor]] = {}
    for name, edit in (("bare", NoEdit(lens.n_layer)), ("vectors", vectors)):
        ways[f"loop_{name}"] = partial(_loop_over_points, lens, curves, edit)
        ways[f"replay_{name}"] = partial(_replayed_curves, lens, curves, edit)
    timings = time_in_turn(ways, settings.repeats, say=say)
    found: Figures = {"n_points": settings.n_points, "n_prompts": settings.n_prompts}
    found["n_vectors"] = settings.n_vectors
    for name in ("bare", "vectors"):
        loop, replay = f"loop_{name}", f"replay_{name}"
        off = (timings.results[loop] - timings.results[replay]).abs().max()
        found |= {f"{way}_seconds": median(timings.seconds[way]) for way in (loop, replay)}
        found |= with_range(f"ratio_{name}", ratios(timings.seconds[loop], timings.seconds[replay]))
        found[f"largest_difference_{name}"] = float(off)
    return found | timings.conditions


def _replayed_curves(lens: Lens, curves: PointCurves, edit: Edit) -> Tensor:
    predicted = lens.outputs(curves, edit, lambda outputs, _: outputs[..., 0])
    return predicted.unflatten(0, (-1, len(curves.points)))


def _loop_over_points(lens: Lens, curves: PointCurves, edit: Edit) -> Tensor:
    engine = WholePassEngine(lens.backend)
    columns = []
    with lens.frozen(), torch.no_grad():
        for points in curves.points:
            batch = lens.encode(curves.at(points))
            columns.append(engine.run_batch(batch, edit)[..., 0])
    return torch.stack(columns, dim=1)
