"""How fast replay is: ratios measured side by side in one run, on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.lens.edits import AddToResidual, Edit, NoEdit, ReplaceHeads
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.hooks import WholePassEngine, counted_hooks, intervene
from tvlens.lens.lens import Lens
from tvlens.lens.loading import load
from tvlens.models.batch import Batch
from tvlens.models.regression.training import PRESETS
from tvlens.models.regression.transformer import RegressionTransformer
from tvlens.runs.run import peak_memory_gib
from tvlens.scores.mediation import indirect_effects
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.prompts import PointCurves
from tvlens.tasks.regression.task import FunctionTask
from tvlens.tasks.text.task import Task
from tvlens.vectors.ltv.settings import FitSettings


@dataclass(frozen=True)
class BenchSettings:
    """Sizes of the measurement.

    Attributes:
        n_prompts: 10-shot prompts whose effects are measured by replay.
        n_loop_heads: heads that the loops patch, spread over all; their time is scaled up to all.
        n_step_prompts: prompts of an LTV step.
        n_clean: clean prompts whose means the published step recomputes.
        n_loop_prompts: whole prompts timed one by one, scaled up to the two counts above.
        repeats: repetitions of the fast measurements, of which the fastest counts.
        seed: seed of the prompts.
    """

    n_prompts: int = 4
    n_loop_heads: int = 18
    n_step_prompts: int = 32
    n_clean: int = 100
    n_loop_prompts: int = 4
    repeats: int = 3
    seed: int = 0


def bench(
    lens: Lens,
    task: Task,
    settings: BenchSettings | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, float]:
    """Ratios of replay to loops of whole forward passes, all measured here and now.

    Loops (a) and (b) are hooked TransformerLens passes, one per head: (a) with the logits of every
    position, (b) with those of the last position only. The published LTV step recomputes the mean
    head outputs over all clean prompts and runs its prompts whole, one by one, forward and
    backward (released code of Saglam et al. 2025). Loops are timed on evenly spread heads and a few
    prompts and scaled to all of them.

    Args:
        lens: the model; it must be replayed.
        task: where prompts come from.
        settings: sizes.
        say: called with a line of text when a measurement begins.

    Returns:
        aie_speedup_vs_transformer_lens (a), aie_speedup_vs_last_logits_loop (b), aie_max_abs_diff
        (probability, replay against loop (a)), ltv_step_speedup_vs_published,
        flops_fraction_of_matmul, peak_memory_gib of this process, and the seconds behind the
        ratios.
    """
    settings = settings or BenchSettings()
    say("mean head outputs")
    clean = task.prompts("train", n=min(20, settings.n_clean), seed=settings.seed)
    means = mean_head_outputs(lens, clean, answered_only=False)
    prompts = task.prompts("train", n=settings.n_prompts, seed=settings.seed, kind="shuffled")
    with lens.frozen():
        say("indirect effects of all heads by replay")
        replayed, aie_seconds = _fastest(
            lambda: indirect_effects(lens, prompts, means).values, settings.repeats
        )
        per_prompt = aie_seconds / len(prompts)
        say("matrix products")
        matmul = _matmul_flops(lens, settings.repeats)
        achieved = _aie_flops(lens, lens.encode(prompts)) / aie_seconds
        batch = lens.encode(prompts)[:1]
        chosen = torch.linspace(0, means.n_heads - 1, settings.n_loop_heads).round().long().unique()
        z = means.z.to(lens.backend.device, lens.backend.dtype)
        edit = ReplaceHeads.each_head(z, means.has_heads)
        say(f"loop (a): {len(chosen)} hooked passes, logits of all positions")
        effects, seconds_a = _loop(lens, batch, edit, chosen, last_only=False)
        say(f"loop (b): {len(chosen)} hooked passes, logits of the last position")
        _, seconds_b = _loop(lens, batch, edit, chosen, last_only=True)
        scale = means.n_heads / len(chosen)
        of_heads = replayed[0, list(means.has_heads)].flatten()
        difference = (of_heads[chosen] - effects.cpu()).abs().max()
        say("one LTV step by replay")
        step = _replayed_step(lens, task, means.outputs, settings)
        say("one LTV step as published")
        published = _published_step(lens, task, means.outputs, settings)
    return {
        "aie_speedup_vs_transformer_lens": seconds_a * scale / per_prompt,
        "aie_speedup_vs_last_logits_loop": seconds_b * scale / per_prompt,
        "aie_max_abs_diff": float(difference),
        "ltv_step_speedup_vs_published": published / step,
        "flops_fraction_of_matmul": achieved / matmul,
        "peak_memory_gib": peak_memory_gib() or float("nan"),
        "aie_seconds_per_prompt": per_prompt,
        "loop_a_seconds_per_prompt": seconds_a * scale,
        "loop_b_seconds_per_prompt": seconds_b * scale,
        "ltv_step_seconds": step,
        "published_step_seconds": published,
        "matmul_gflops": matmul / 1e9,
        "achieved_gflops": achieved / 1e9,
    }


def _clock() -> float:
    """Seconds, after everything that an accelerator was given to do is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def _fastest(run: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    best, result = float("inf"), None
    for _ in range(repeats):
        start = _clock()
        result = run()
        best = min(best, _clock() - start)
    return result, best


def _loop(
    lens: Lens, batch: Batch, edit: ReplaceHeads, heads: Tensor, *, last_only: bool
) -> tuple[Float[Tensor, " head"], float]:
    """Effects of some heads on one prompt by one hooked forward pass each, and the seconds."""
    backend = lens.backend
    last_block = backend.residual_hook(lens.n_layer - 1)

    def forward(change: Any) -> Tensor:
        with intervene(backend, change, batch.query):
            if not last_only:
                return backend.forward(batch.inputs, batch.mask)[:, -1:]
            # The final norm and the unembedding then see one position. Not Backend.forward, which
            # promises the logits of all.
            with counted_hooks(backend, {last_block: lambda residual: residual[:, -1:]}):
                return backend.model(batch.inputs, attention_mask=batch.mask.long())

    with torch.no_grad():
        base = lens.readout.score(forward(NoEdit(lens.n_layer)), batch)
        edits = [edit.of_variants(head[None]) for head in heads]
        start = _clock()
        found = [lens.readout.score(forward(change), batch) - base for change in edits]
        seconds = _clock() - start
    return torch.cat(found).flatten(), seconds


def _step_batch(lens: Lens, task: Task, settings: BenchSettings) -> list[Batch]:
    default = FitSettings()
    each = settings.n_step_prompts // len(default.kinds)
    return [
        lens.encode(
            task.prompts("train", shots=default.lengths[0], n=each, seed=settings.seed, kind=kind)
        )
        for kind in default.kinds
    ]


def _add_weighted(omega: Tensor, outputs: Tensor) -> AddToResidual:
    vectors = torch.einsum("lh,lhd->ld", omega, outputs)[None, None]
    return AddToResidual(vectors, vectors.new_ones(1, len(omega), dtype=torch.bool))


def _zero_weights(lens: Lens) -> Float[Tensor, "layer head"]:
    device = lens.backend.device
    return torch.zeros(lens.n_layer, lens.n_head, device=device, requires_grad=True)


def _replayed_step(lens: Lens, task: Task, outputs: Tensor, settings: BenchSettings) -> float:
    engine = lens.engine
    reading = engine.join([engine.read(batch) for batch in _step_batch(lens, task, settings)])
    omega = _zero_weights(lens)
    adam = torch.optim.Adam([omega])
    outputs = outputs.to(omega.device)
    every = torch.arange(len(reading), device=omega.device)

    def step() -> None:
        adam.zero_grad()
        logits = engine.run(reading.rows(every), _add_weighted(omega, outputs))
        lens.readout.loss(logits, reading.batch).mean().backward()
        adam.step()

    return _fastest(step, settings.repeats)[1]


def _published_step(lens: Lens, task: Task, outputs: Tensor, settings: BenchSettings) -> float:
    engine = WholePassEngine(lens.backend)
    omega = _zero_weights(lens)
    outputs = outputs.to(omega.device)
    n = settings.n_loop_prompts
    clean = lens.encode(task.prompts("train", n=n, seed=settings.seed))
    start = _clock()
    for i in range(n):
        engine.read(clean[i : i + 1])
    means = (_clock() - start) / n * settings.n_clean

    seconds = 0.0
    for batch in _step_batch(lens, task, settings):
        kinds = min(n, len(batch))
        spent = 0.0
        for i in range(kinds):
            reading = engine.read(batch[i : i + 1])
            start = _clock()
            logits = engine.run(reading, _add_weighted(omega, outputs))
            lens.readout.loss(logits, reading.batch).mean().backward()
            spent += _clock() - start
        seconds += spent / kinds * len(batch)
    return means + seconds


def _matmul_flops(lens: Lens, repeats: int) -> float:
    """Floating-point operations per second of a product of the size replay spends its time in."""
    d_mlp = int(getattr(lens.backend.model.cfg, "d_mlp", None) or 4 * lens.d_model)
    a = lens.w_o.new_ones(lens.max_rows, lens.d_model)
    b = lens.w_o.new_ones(lens.d_model, d_mlp)
    run = partial(torch.mm, a, b)
    run()

    def many() -> None:
        for _ in range(50):
            run()

    return 50 * 2 * a.shape[0] * a.shape[1] * b.shape[1] / _fastest(many, repeats)[1]


def _aie_flops(lens: Lens, batch: Batch) -> float:
    """Operations of the matrix products in AIE of all heads: prefixes, rows and unembeddings."""
    cfg = lens.backend.model.cfg
    n_kv = int(getattr(cfg, "n_key_value_heads", None) or lens.n_head)
    d_head = lens.backend.d_head
    d_mlp = 0 if getattr(cfg, "attn_only", False) else int(cfg.d_mlp or 4 * lens.d_model)
    gated = 3 if getattr(cfg, "gated_mlp", False) else 2
    into_heads = 2 * lens.d_model * d_head * (lens.n_head + 2 * n_kv)
    after_heads = 2 * lens.d_model * (lens.n_head * d_head + gated * d_mlp)
    n_prompts, width = batch.inputs.shape
    n_heads = lens.n_head * lens.n_layer
    # A row branches off behind the heads of its own layer and attends in the layers after it.
    attending = n_heads * (lens.n_layer - 1) // 2
    read = width * lens.n_layer * (into_heads + after_heads)
    rest = attending * into_heads + (attending + n_heads) * after_heads
    scores = 4 * lens.n_head * d_head * width * (attending + lens.n_layer * width)
    unembedded = 2 * (n_heads + 1) * lens.d_model * lens.backend.d_vocab
    return float(n_prompts * (read + rest + scores + unembedded))


@dataclass(frozen=True)
class CurveBenchSettings:
    """What the benchmark of error curves measures.

    Attributes:
        seed: seed of weights, prompts and vectors.
        preset: sizes of the model, whose weights are random: times do not depend on them.
        n_points: longest prompts; 41 are the paper's.
        n_prompts: prompts that curves are drawn over.
        n_vectors: vectors whose curves are drawn together.
        repeats: times that everything is timed, in turn; the fastest counts.
    """

    seed: int = 0
    preset: str = "standard"
    n_points: int = 41
    n_prompts: int = 16
    n_vectors: int = 8
    repeats: int = 3


def bench_curves(settings: CurveBenchSettings) -> dict[str, Any]:
    """Times the two ways side by side, bare and under vectors.

    The loop cuts every prompt to each number of points and runs all prompts of that length through
    the model at once, whole, with the hooks that make the edit; replay reads every prompt once.

    Returns:
        `ratio_bare` and `ratio_vectors` (time of the loop over that of replay), the seconds behind
        them, the largest differences between the two curves, and the sizes.
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
    found: dict[str, Any] = {"n_points": settings.n_points, "n_prompts": settings.n_prompts}
    found["n_vectors"] = settings.n_vectors
    for name, edit in (("bare", NoEdit(lens.n_layer)), ("vectors", vectors)):
        ways: dict[str, Callable[[Lens, PointCurves, Edit], Tensor]] = {
            "loop": _loop_over_points,
            "replay": _replayed_curves,
        }
        seconds = {way: float("inf") for way in ways}
        errors = {}
        for _ in range(settings.repeats):
            for way, draw in ways.items():
                began = time.perf_counter()
                errors[way] = draw(lens, curves, edit)
                seconds[way] = min(seconds[way], time.perf_counter() - began)
        off = (errors["loop"] - errors["replay"]).abs().max()
        found |= {f"{way}_{name}_seconds": value for way, value in seconds.items()}
        found[f"ratio_{name}"] = seconds["loop"] / seconds["replay"]
        found[f"largest_difference_{name}"] = float(off)
    return found


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
