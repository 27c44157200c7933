"""How fast patching is: against transformer-lens' own functions, and exact against approximate."""

import contextlib
import io
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import add
from statistics import median
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.lens.edits import ReplaceHeads
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.lens import Lens
from tvlens.runs.manifest import peak_memory_gib
from tvlens.scores.agreement import spearman
from tvlens.scores.attributed import attributed_heads
from tvlens.scores.mediation import indirect_effects
from tvlens.scores.metrics import metric_of
from tvlens.scores.pairing import Pairing, Ready, paired
from tvlens.scores.ranking import top_heads
from tvlens.tasks.text.prompts import Prompts
from tvlens.tasks.text.task import Task
from tvlens.timing import Figures, ratios, time_in_turn, with_range


@dataclass(frozen=True)
class PatchBenchSettings:
    """Sizes of the measurement.

    Attributes:
        n_positions: positions of the prompt that are patched, spread over all of it; the time is
            scaled up to all.
        n_head_positions: the same for single heads.
        n_loop_places: places that transformer-lens patches, spread over all; their time is scaled
            up to all.
        n_prompts: label-shuffled prompts whose indirect effects are measured.
        screen: heads whose effects are exact where the others are screened.
        repeats: rounds in which everything is timed in turn.
        seed: seed of the prompts.
    """

    n_positions: int = 12
    n_head_positions: int = 4
    n_loop_places: int = 12
    n_prompts: int = 25
    screen: int = 20
    repeats: int = 3
    seed: int = 0


def bench_patching(
    lens: Lens,
    task: Task,
    settings: PatchBenchSettings | None = None,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Figures:
    """Ratios of patching by suffix replay to transformer-lens' functions, and of approximations.

    One clean 10-shot prompt is patched into its label-shuffled twin at all layers and positions:
    the residual stream behind each block, and every head's `z`. transformer-lens runs one whole
    pass for each place (`transformer_lens.patching.generic_activation_patch`). Positions and places
    are sampled evenly and scaled to all of them; reading the prompts is counted once. Indirect
    effects of all heads are timed against those to first order on prompts that both have read
    (`attribution_speedup_vs_exact_aie`), and reading included (`attribution_speedup_with_reading`).

    Args:
        lens: the model; one of whole passes is held against loops as slow as itself.
        task: where prompts come from.
        settings: sizes.
        say: called with a line of text when the warm-up or a round begins.

    Returns:
        The ratios with their ranges over the rounds (`_low`, `_high`), `patch_max_abs_diff`
        (probability, against transformer-lens), `attribution_spearman` and
        `attribution_recall_at_10` against exact effects, how many places were sampled of how many,
        the seconds behind the ratios, and the `conditions` of `Timings`.
    """
    settings = settings or PatchBenchSettings()
    say("mean head outputs")
    clean = task.prompts("train", n=20, seed=settings.seed)
    means = mean_head_outputs(lens, clean, answered_only=False)
    shuffled = task.prompts("train", n=settings.n_prompts, seed=settings.seed, kind="shuffled")
    pair = _pair(lens, task, settings.seed)
    n_loop = settings.n_loop_places
    resid = _Places(lens, *pair, site="resid_post", n=settings.n_positions, n_loop=n_loop)
    heads = _Places(lens, *pair, site="z", n=settings.n_head_positions, n_loop=n_loop)
    say(
        f"{resid.rows} of {resid.n_places} residual streams and {heads.rows} of {heads.n_places} "
        f"heads by {lens.engine.anywhere.name}, {n_loop} of each by transformer-"
        f"lens, scaled; effects of {means.n_heads} heads on {len(shuffled)} prompts"
    )
    batch = lens.encode(shuffled)
    z = means.z.to(lens.backend.device, lens.backend.dtype)
    every = ReplaceHeads.each_head(z, means.has_heads)
    with lens.frozen():
        readings = list(lens.readings(batch))
        joined = lens.engine.join(readings)

        def exact() -> None:
            with torch.no_grad():
                for reading in readings:
                    for few in lens.variants(reading, every):
                        lens.readout.score(lens.engine.run(reading, few), reading.batch)

        ways: dict[str, Callable[[], Any]] = {
            "read_pair": resid.read,
            "resid": resid.run,
            "heads": heads.run,
            "loop_resid": resid.loop,
            "loop_heads": heads.loop,
            "exact": exact,
            "attribution": lambda: attributed_heads(lens, joined, z[None])[0],
            "read": lambda: list(lens.readings(batch)),
            "aie": lambda: indirect_effects(lens, shuffled, means),
            "screened": lambda: indirect_effects(lens, shuffled, means, screen=settings.screen),
        }
        timings = time_in_turn(ways, settings.repeats, say=say)
    seconds = timings.seconds
    differences = [
        (timings.results[ours][each.looped] - timings.results[loop]).abs().max()
        for each, ours, loop in ((resid, "resid", "loop_resid"), (heads, "heads", "loop_heads"))
    ]
    approximate = timings.results["attribution"].double().mean(dim=0)
    scores = timings.results["aie"].scores
    k = min(10, means.n_heads)
    return {
        **_speedup("resid", resid, seconds),
        **_speedup("heads", heads, seconds),
        "patch_max_abs_diff": float(max(differences)),
        **with_range(
            "attribution_speedup_vs_exact_aie", ratios(seconds["exact"], seconds["attribution"])
        ),
        **with_range(
            "attribution_speedup_with_reading",
            ratios(seconds["aie"], list(map(add, seconds["read"], seconds["attribution"]))),
        ),
        "attribution_spearman": spearman(scores, approximate.float()).value,
        "attribution_recall_at_10": len(set(top_heads(scores, k)) & set(top_heads(approximate, k)))
        / k,
        **with_range("screened_aie_speedup", ratios(seconds["aie"], seconds["screened"])),
        **{f"{name}_seconds": median(each) for name, each in seconds.items()},
        "n_tokens": resid.n_positions,
        "peak_memory_gib": peak_memory_gib() or float("nan"),
        **timings.conditions,
    }


def _pair(lens: Lens, task: Task, seed: int) -> tuple[Prompts, Prompts]:
    """The first clean prompt whose label-shuffled twin has as many tokens."""
    kinds = [task.prompts("train", n=32, seed=seed, kind=kind) for kind in ("clean", "shuffled")]
    lengths = [lens.encode(each).mask.sum(dim=1) for each in kinds]
    same = (lengths[0] == lengths[1]).nonzero().flatten().tolist()
    first = same[0] if same else 0
    return kinds[0][[first]], kinds[1][[first]]


class _Places:
    """Places of one site in one prompt, by replay and by transformer-lens."""

    def __init__(
        self, lens: Lens, clean: Prompts, shuffled: Prompts, *, site: str, n: int, n_loop: int
    ) -> None:
        self.lens = lens
        self.source, self.target = lens.encode(clean), lens.encode(shuffled)
        self.n_positions = self.target.inputs.shape[1]
        self.positions = _spread(self.n_positions, n)
        self.pairing: Pairing = paired(lens, clean, shuffled, site=site, positions=self.positions)
        self.heads = self.pairing.heads or (0,)
        (self.piece,) = self.pairing.pieces()
        with lens.frozen():
            self.ready = self.read()
            self.edit = self.pairing.patch(self.piece)
        self.looped = _spread(self.rows, n_loop)

    @property
    def rows(self) -> int:
        return self.edit.n_variant

    @property
    def n_places(self) -> int:
        return self.n_positions * self.lens.n_layer * len(self.heads)

    def read(self) -> Ready:
        """What is done once for all places."""
        self.pairing.recorded(self.piece)
        return self.pairing.read(self.piece, metric_of(self.lens, None))

    def run(self) -> Float[Tensor, " place"]:
        """Probability of the answer at the sampled positions, all layers and heads."""
        with torch.no_grad():
            parts = self.lens.variants(self.ready.reading, self.edit)
            return torch.cat([self.ready.measure(few) for few in parts], dim=1)[0].cpu()

    def loop(self) -> Float[Tensor, " looped"]:
        """The same numbers by transformer-lens, for some of the places."""
        from transformer_lens import patching

        model, target = self.lens.backend.model, self.target
        layers, heads = list(self.pairing.layers), list(self.heads)
        rows = []
        for place in self.looped:
            position, rest = divmod(place, len(layers) * len(heads))
            layer, head = divmod(rest, len(heads))
            rows.append((layers[layer], self.positions[position], heads[head]))
        index = pd.DataFrame(rows, columns=["layer", "pos", "head_index"])
        name, setter = "z", patching.layer_pos_head_vector_patch_setter
        if self.pairing.heads is None:
            name, setter = "resid_post", patching.layer_pos_patch_setter
            index = index[["layer", "pos"]]

        def probability(logits: Tensor) -> Tensor:
            return self.lens.readout.score(logits[:, -1:], target)[0, 0]

        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _, cache = model.run_with_cache(self.source.inputs)
            found = patching.generic_activation_patch(
                model, target.inputs, cache, probability, setter, name, index_df=index
            )
        return torch.as_tensor(found).flatten().cpu()


def _spread(n: int, few: int) -> list[int]:
    """So many numbers below `n`, in the middle of parts of equal size."""
    few = min(n, few)
    return [int((i + 0.5) * n / few) for i in range(few)]


def _speedup(name: str, places: _Places, seconds: Mapping[str, list[float]]) -> Figures:
    scale = places.n_places / places.rows
    ours = [
        read + rows * scale for read, rows in zip(seconds["read_pair"], seconds[name], strict=True)
    ]
    loop = [each * places.n_places / len(places.looped) for each in seconds[f"loop_{name}"]]
    return {
        **with_range(f"patch_{name}_speedup_vs_transformer_lens", ratios(loop, ours)),
        f"patch_{name}_places": places.n_places,
        f"patch_{name}_places_sampled": places.rows,
        f"patch_{name}_places_sampled_by_transformer_lens": len(places.looped),
        f"patch_{name}_all_places_seconds": median(ours),
        f"patch_{name}_all_places_seconds_transformer_lens": median(loop),
    }
