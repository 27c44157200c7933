"""How fast replay is: ratios measured in turn in one run, on this machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens import timing
from tvlens.lens.edits import AddToResidual, Edit, NoEdit, ReplaceHeads
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.hooks import WholePassEngine, counted_hooks, intervene
from tvlens.lens.lens import Lens
from tvlens.models.batch import Batch
from tvlens.runs.manifest import peak_memory_gib
from tvlens.scores.mediation import indirect_effects
from tvlens.tasks.text.task import Task
from tvlens.timing import Figures, ratios, time_in_turn, with_range
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
        repeats: rounds in which everything is timed in turn.
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
) -> Figures:
    """Ratios of replay to loops of whole forward passes, all measured here and now.

    Loops (a) and (b) are hooked TransformerLens passes, one per head: (a) with the logits of every
    position, (b) with those of the last position only. The published LTV step recomputes the mean
    head outputs over all clean prompts and runs its prompts whole, one by one, forward and
    backward (released code of Saglam et al. 2025). Loops are timed on evenly spread heads and a few
    prompts and scaled to all of them.

    Everything is timed in turn, in rounds. Figures are medians over the rounds, ratios those of
    the ratios within each round.

    Args:
        lens: the model; one that is not replayed is held against loops as slow as itself.
        task: where prompts come from.
        settings: sizes.
        say: called with a line of text when the warm-up or a round begins.

    Returns:
        aie_speedup_vs_transformer_lens (a), aie_speedup_vs_last_logits_loop (b), aie_max_abs_diff
        (probability, replay against loop (a)), ltv_step_speedup_vs_published,
        flops_fraction_of_matmul, peak_memory_gib of this process, the seconds and speeds behind
        the ratios, and the `conditions` of `Timings`. Beside each ratio stand the smallest
        (`_low`) and the largest (`_high`) of the rounds.
    """
    settings = settings or BenchSettings()
    say("mean head outputs")
    clean = task.prompts("train", n=min(20, settings.n_clean), seed=settings.seed)
    means = mean_head_outputs(lens, clean, answered_only=False)
    prompts = task.prompts("train", n=settings.n_prompts, seed=settings.seed, kind="shuffled")
    encoded = lens.encode(prompts)
    chosen = torch.linspace(0, means.n_heads - 1, settings.n_loop_heads).round().long().unique()
    z = means.z.to(lens.backend.device, lens.backend.dtype)
    edit = ReplaceHeads.each_head(z, means.has_heads)
    product, n_operations = _matmul(lens)
    say(
        f"effects of all heads and one LTV step by {lens.engine.name}, against loops (a) and (b) "
        f"of {len(chosen)} hooked passes, the published LTV step and matrix products, in turn"
    )
    with lens.frozen():
        ways = {
            "effects": _Way(
                lambda: indirect_effects(lens, prompts, means).values, 1 / len(prompts)
            ),
            "loop a": _loop(lens, encoded[:1], edit, chosen, last_only=False),
            "loop b": _loop(lens, encoded[:1], edit, chosen, last_only=True),
            "matmul": product,
            "step": _replayed_step(lens, task, means.outputs, settings),
            **_published_step(lens, task, means.outputs, settings),
        }
        timings = time_in_turn(
            {name: way.run for name, way in ways.items()}, settings.repeats, say=say
        )
    replayed = timings.results["effects"][0, list(means.has_heads)].flatten()[chosen]
    difference = (replayed - timings.results["loop a"].cpu()).abs().max()
    seconds = {
        name: [way.scale * each for each in timings.seconds[name]] for name, way in ways.items()
    }
    return {
        **_figures(seconds, n_operations, _aie_flops(lens, encoded) / len(prompts)),
        "aie_max_abs_diff": float(difference),
        "peak_memory_gib": peak_memory_gib() or float("nan"),
        **timings.conditions,
    }


@dataclass(frozen=True)
class _Way:
    """Work to be timed; `scale` times its seconds are those of all that it stands for."""

    run: Callable[[], Any]
    scale: float = 1.0


def _figures(
    seconds: Mapping[str, list[float]], matmul_operations: float, aie_operations: float
) -> Figures:
    """Medians and ranges of scaled seconds; those of effects are of one prompt."""
    effects, step = seconds["effects"], seconds["step"]
    published = [sum(parts) for parts in zip(seconds["means"], seconds["training"], strict=True)]
    matmul = [matmul_operations / 1e9 / each for each in seconds["matmul"]]
    achieved = [aie_operations / 1e9 / each for each in effects]
    return {
        **with_range("aie_speedup_vs_transformer_lens", ratios(seconds["loop a"], effects)),
        **with_range("aie_speedup_vs_last_logits_loop", ratios(seconds["loop b"], effects)),
        **with_range("ltv_step_speedup_vs_published", ratios(published, step)),
        **with_range("flops_fraction_of_matmul", ratios(achieved, matmul)),
        "aie_seconds_per_prompt": median(effects),
        "loop_a_seconds_per_prompt": median(seconds["loop a"]),
        "loop_b_seconds_per_prompt": median(seconds["loop b"]),
        "ltv_step_seconds": median(step),
        "published_step_seconds": median(published),
        "matmul_gflops": median(matmul),
        "achieved_gflops": median(achieved),
    }


def doubts(figures: Figures) -> list[str]:
    """Returns why figures of this module are not to be quoted, one line for each reason."""
    found = timing.doubts(figures)
    if figures.get("flops_fraction_of_matmul", 0) > 1:
        found.append(
            "flops_fraction_of_matmul is above 1, which cannot be: the matrix products were slowed "
            "down, and the figure means nothing"
        )
    return found


@torch.no_grad()
def hooked_score(
    lens: Lens, batch: Batch, change: Edit, *, last_only: bool
) -> Float[Tensor, "batch variant"]:
    """Score of prompts that end at their queries, by one hooked forward pass.

    Args:
        lens: the model.
        batch: the prompts.
        change: one change of them.
        last_only: whether logits are made of the last position alone.
    """
    backend = lens.backend
    last_block = backend.residual_hook(lens.n_layer - 1)
    with intervene(backend, change, batch.query):
        if not last_only:
            logits = backend.forward(batch.inputs, batch.mask)[:, -1:]
        else:
            # The final norm and the unembedding then see one position. Not Backend.forward, which
            # promises the logits of all.
            with counted_hooks(backend, {last_block: lambda residual: residual[:, -1:]}):
                logits = backend.model(batch.inputs, attention_mask=batch.mask.long())
    return lens.readout.score(logits, batch)


def _loop(lens: Lens, batch: Batch, edit: ReplaceHeads, heads: Tensor, *, last_only: bool) -> _Way:
    """Effects of some heads on one prompt by one hooked forward pass each, for all heads."""

    def score(change: Edit) -> Tensor:
        return hooked_score(lens, batch, change, last_only=last_only)

    base = score(NoEdit(lens.n_layer))
    edits = [edit.of_variants(head[None]) for head in heads]
    return _Way(
        lambda: torch.cat([score(change) - base for change in edits]).flatten(),
        edit.n_variant / len(heads),
    )


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


def _replayed_step(lens: Lens, task: Task, outputs: Tensor, settings: BenchSettings) -> _Way:
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

    return _Way(step)


def _published_step(
    lens: Lens, task: Task, outputs: Tensor, settings: BenchSettings
) -> dict[str, _Way]:
    """The two parts of the step, on a few prompts, for all of them."""
    engine = WholePassEngine(lens.backend)
    omega = _zero_weights(lens)
    outputs = outputs.to(omega.device)
    n = settings.n_loop_prompts
    clean = lens.encode(task.prompts("train", n=n, seed=settings.seed))
    batches = _step_batch(lens, task, settings)
    few = [batch[i : i + 1] for batch in batches for i in range(min(n, len(batch)))]
    readings = [engine.read(batch) for batch in few]

    def read() -> None:
        for i in range(n):
            engine.read(clean[i : i + 1])

    def train() -> None:
        for reading in readings:
            logits = engine.run(reading, _add_weighted(omega, outputs))
            lens.readout.loss(logits, reading.batch).mean().backward()

    return {
        "means": _Way(read, settings.n_clean / n),
        "training": _Way(train, sum(map(len, batches)) / len(few)),
    }


def _matmul(lens: Lens) -> tuple[_Way, float]:
    """Products of the size that replay spends its time in, and their floating-point operations."""
    d_mlp = int(getattr(lens.backend.model.cfg, "d_mlp", None) or 4 * lens.d_model)
    a = lens.w_o.new_ones(lens.max_rows, lens.d_model)
    b = lens.w_o.new_ones(lens.d_model, d_mlp)
    n_products = 50

    def multiply() -> None:
        for _ in range(n_products):
            torch.mm(a, b)

    return _Way(multiply), 2.0 * n_products * a.shape[0] * a.shape[1] * b.shape[1]


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
