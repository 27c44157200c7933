"""Indirect effects of all heads by replay and by whole forward passes, timed in one run.

    python scripts/time_engines.py                      # Gemma-3- and Mistral-like models
    python scripts/time_engines.py gemma2 gpt-oss --n-layer 6

The models are those of `model_kinds.py`, deeper and wider, with random weights: what is timed is
the engine, not the task.
"""

import time
import warnings
from dataclasses import replace
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

WIDER = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}


def timed(lens: Lens, prompts: Prompts, n: int) -> tuple[torch.Tensor, float]:
    """Effects on some prompts, and seconds for each of them; means are not counted."""
    means = tvlens.mean_head_outputs(lens, prompts, answered_only=False)
    start = time.perf_counter()
    found = tvlens.indirect_effects(lens, prompts[:n], means)
    return found.values, (time.perf_counter() - start) / n


def main(
    kinds: Annotated[list[str] | None, typer.Argument()] = None,
    n_layer: int = 12,
    n_prompts: int = 8,
    n_tokens: int = 120,
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
        fast, per_prompt = timed(lens, prompts, n_prompts)
        whole, per_whole = timed(slow, prompts, 2)
        table.append(
            {
                "kind": name,
                "heads": lens.n_layer * lens.n_head,
                "engine": lens.engine.name,
                "seconds a prompt": per_prompt,
                "by whole passes": per_whole,
                "times faster": per_whole / per_prompt,
                "largest difference over largest effect": float(
                    (fast[:2] - whole).abs().max() / whole.abs().max()
                ),
            }
        )
    print(pd.DataFrame(table).to_string(index=False, float_format="{:.2g}".format))


if __name__ == "__main__":
    typer.run(main)
