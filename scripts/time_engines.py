"""Indirect effects of all heads by replay and by whole forward passes, timed in turn.

    python scripts/time_engines.py                      # Gemma-3- and Mistral-like models
    python scripts/time_engines.py gemma2 gpt-oss --n-layer 6

The models are those of `model_kinds.py`, deeper and wider, with random weights: what is timed is
the engine, not the task. Figures are medians of the rounds.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Annotated

import pandas as pd
import torch
import typer
from model_kinds import MODELS
from survey_models import make

import tvlens
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.tasks import Prompts
from tvlens.timing import doubts, ratios, time_in_turn, with_range

WIDER = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}

N_WHOLE = 2
"""Prompts of which every head is patched by whole passes, which take that much longer."""


def effects(lens: Lens, prompts: Prompts, n: int) -> Callable[[], torch.Tensor]:
    """Finds the effects on some prompts; their means are there before."""
    means = tvlens.mean_head_outputs(lens, prompts, answered_only=False)
    return lambda: tvlens.indirect_effects(lens, prompts[:n], means).values


def main(
    kinds: Annotated[list[str] | None, typer.Argument()] = None,
    n_layer: int = 12,
    n_prompts: int = 8,
    n_tokens: int = 120,
    rounds: int = 3,
) -> None:
    """One row for every kind of model."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(4, 54, (n_prompts, n_tokens), generator=generator).tolist()
    prompts = Prompts.of_tokens(rows, [row[0] for row in rows], task="random tokens")
    table = []
    for name in kinds or ["gemma3", "mistral-win"]:
        family, config = MODELS[name]
        sizes = WIDER | {"num_hidden_layers": n_layer}
        MODELS[name] = family, config | sizes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lens = tvlens.load(make(name, torch.float32), name=name)
        slow = replace(lens, engine=WholePassEngine(lens.backend, scaled=lens.engine.scaled))
        timings = time_in_turn(
            {"fast": effects(lens, prompts, n_prompts), "whole": effects(slow, prompts, N_WHOLE)},
            rounds,
        )
        per_prompt = [each / n_prompts for each in timings.seconds["fast"]]
        per_whole = [each / N_WHOLE for each in timings.seconds["whole"]]
        faster = with_range("times faster", ratios(per_whole, per_prompt))
        fast, whole = timings.results["fast"], timings.results["whole"]
        table.append(
            {
                "kind": name,
                "heads": lens.n_layer * lens.n_head,
                "engine": lens.engine.name,
                "seconds a prompt": median(per_prompt),
                "by whole passes": median(per_whole),
                **faster,
                "largest difference over largest effect": float(
                    (fast[:N_WHOLE] - whole).abs().max() / whole.abs().max()
                ),
            }
        )
        for doubt in doubts({**faster, **timings.conditions}):
            print(f"{name}, not to be quoted: {doubt}")
    print(pd.DataFrame(table).to_string(index=False, float_format="{:.2g}".format))


if __name__ == "__main__":
    typer.run(main)
