"""How fast ablation at the query is: all sets by replay, against one hooked pass for each."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.bench.replay import hooked_score
from tvlens.evaluation.ablation import Ablation, ablate
from tvlens.lens.edits import ReplaceHeads
from tvlens.lens.heads import HeadMeans, mean_head_outputs
from tvlens.lens.lens import Lens
from tvlens.runs.manifest import peak_memory_gib
from tvlens.scores.ablation import HeadSet, top_share
from tvlens.scores.score import Scores
from tvlens.tasks.text.prompts import Prompts
from tvlens.tasks.text.task import Task
from tvlens.timing import Figures, ratios, time_in_turn, with_range


@dataclass(frozen=True)
class AblationBenchSettings:
    """Sizes of the measurement.

    Attributes:
        n_scores: scores of all heads, drawn at random.
        n_sets: sets of the best heads by each, of 1%, 2%, … of them.
        n_prompts: clean test prompts that all sets are ablated on.
        n_passes: sets and prompts that are run by hooked passes, spread over all; their time is
            scaled up to all.
        n_clean: clean prompts that head means are taken over.
        repeats: rounds in which everything is timed in turn.
        seed: seed of scores and prompts.
    """

    n_scores: int = 5
    n_sets: int = 20
    n_prompts: int = 16
    n_passes: int = 16
    n_clean: int = 20
    repeats: int = 3
    seed: int = 0


def bench_ablation(
    lens: Lens,
    task: Task,
    settings: AblationBenchSettings | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Ratios of hooked passes, one for each set and prompt, to `tvlens.ablate` of all of them.

    Heads are set to their means at the query. Scores are random, so that sets begin in early layers
    and little of the model is spared. Reading the prompts counts for replay. Hooked passes are of
    single prompts, with logits of all positions, and of the last one alone; they are run for a few
    sets and prompts and their time is scaled up.

    Args:
        lens: the model; one of whole passes is held against loops as slow as itself.
        task: where prompts come from.
        settings: sizes.
        say: called with a line of text when the warm-up or a round begins.

    Returns:
        `ablation_speedup_vs_hooked_passes` and `ablation_speedup_vs_last_logits_passes` with their
        ranges over the rounds (`_low`, `_high`), `ablation_max_abs_diff` (probability of the right
        answer), how many sets, prompts and hooked passes there were, the seconds behind the ratios
        (of hooked passes scaled), and the `conditions` of `Timings`.
    """
    settings = settings or AblationBenchSettings()
    say("mean head outputs")
    clean = task.prompts("train", n=settings.n_clean, seed=settings.seed)
    means = mean_head_outputs(lens, clean, answered_only=False)
    sets = random_sets(lens, settings)
    n = min(settings.n_prompts, len(task.split("test")))
    prompts = task.prompts("test", n=n, seed=settings.seed)
    n_all = len(sets) * len(prompts)
    n_passes = min(settings.n_passes, n_all)
    places = [divmod(int((i + 0.5) * n_all / n_passes), len(prompts)) for i in range(n_passes)]
    say(
        f"{len(sets)} sets on {len(prompts)} prompts by {lens.engine.name}, {n_passes} of these "
        f"{n_all} by hooked passes, scaled"
    )
    passes = partial(_hooked, lens, prompts, sets, means, places)
    ways: dict[str, Callable[[], Ablation | Tensor]] = {
        "ablation": lambda: ablate(lens, prompts, sets, means=means),
        "passes": partial(passes, last_only=False),
        "last_logits_passes": partial(passes, last_only=True),
    }
    timings = time_in_turn(ways, settings.repeats, say=say)
    found: Ablation = timings.results["ablation"]
    loss = found.values[..., found.measures.index("cross_entropy")]
    ours = torch.stack([(-loss[prompt, chosen]).exp() for chosen, prompt in places])
    off = (ours - timings.results["passes"].double()).abs().max()
    scale = n_all / n_passes
    seconds = {
        name: [each * (1.0 if name == "ablation" else scale) for each in of_way]
        for name, of_way in timings.seconds.items()
    }
    return {
        **with_range(
            "ablation_speedup_vs_hooked_passes", ratios(seconds["passes"], seconds["ablation"])
        ),
        **with_range(
            "ablation_speedup_vs_last_logits_passes",
            ratios(seconds["last_logits_passes"], seconds["ablation"]),
        ),
        "ablation_max_abs_diff": float(off),
        "n_sets": len(sets),
        "n_prompts": len(prompts),
        "n_tokens": lens.encode(prompts).inputs.shape[1],
        "n_hooked_passes": n_all,
        "n_hooked_passes_sampled": n_passes,
        "ablation_seconds": median(seconds["ablation"]),
        "hooked_passes_seconds": median(seconds["passes"]),
        "last_logits_passes_seconds": median(seconds["last_logits_passes"]),
        "peak_memory_gib": peak_memory_gib() or float("nan"),
        **timings.conditions,
    }


def random_sets(lens: Lens, settings: AblationBenchSettings) -> list[HeadSet]:
    """The best heads by scores drawn at random."""
    generator = torch.Generator().manual_seed(settings.seed)
    sets = []
    for number in range(settings.n_scores):
        values = torch.full((lens.n_layer, lens.n_head), torch.nan)
        layers = list(lens.backend.attention_layers)
        values[layers] = torch.randn(len(layers), lens.n_head, generator=generator)
        scores = Scores(values, f"random {number}", "none", model=lens.name)
        sets += [top_share(scores, (i + 1) / 100) for i in range(settings.n_sets)]
    return sets


def _hooked(
    lens: Lens,
    prompts: Prompts,
    sets: list[HeadSet],
    means: HeadMeans,
    places: list[tuple[int, int]],
    *,
    last_only: bool,
) -> Float[Tensor, " place"]:
    """Probability of the answer, by one hooked pass for each set and prompt of `places`."""
    z = means.z.to(lens.backend.device, lens.backend.dtype)[None, None]
    found = []
    with lens.frozen():
        for number, prompt in places:
            mask = sets[number].mask(lens.n_layer, lens.n_head).to(z.device)
            batch = lens.encode(prompts[[prompt]]).to(lens.backend.device)
            edit = ReplaceHeads(mask[None], z)
            found.append(hooked_score(lens, batch, edit, last_only=last_only)[0, 0].cpu())
    return torch.stack(found)
