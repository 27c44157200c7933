"""A tiny model that does two tasks in context, trained while the tests run, and those tasks.

Both tasks name the first letter of a word by another letter, 7 or 14 places further on. A query
alone does not say which of the two is asked; the answers shown in the prompt do.
"""

import copy
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tvlens
from helpers import zoo
from tvlens.lens.lens import Lens
from tvlens.tasks import Pair, Task

SHOTS = 4
PLACES = {"seven-on": 7, "fourteen-on": 14}
TASKS = {
    name: Task(
        name,
        tuple(
            Pair(zoo.LETTERS[first] + second, zoo.LETTERS[first + places])
            for second in zoo.LETTERS[:6]
            for first in range(7)
        ),
        f"word -> the letter {places} places behind its first one",
        "made up",
        "CC0-1.0",
    )
    for name, places in PLACES.items()
}


@cache
def model() -> Any:
    """A Hugging Face llama that answers clean prompts, and about half of the zero-shot ones."""
    tokens = torch.tensor(zoo.tokenizer()(_texts(1024), add_special_tokens=False).input_ids)
    answers = torch.full_like(tokens, -100)
    # A pair is ten tokens long; its answer and the line's end behind it are learned.
    for place in (7, 8):
        answers[:, place::10] = tokens[:, place::10]
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(0)
        config = zoo.CONFIGS["llama"][1] | {"num_hidden_layers": 2}
        made = LlamaForCausalLM(LlamaConfig(**config))
        adam = torch.optim.AdamW(made.parameters(), lr=1e-2)
        mean = 4.0
        for step in range(2000):
            rows = slice(32 * (step % 32), 32 * (step % 32 + 1))
            loss = made(tokens[rows], labels=answers[rows]).loss
            loss.backward()
            adam.step()
            adam.zero_grad()
            mean = 0.9 * mean + 0.1 * float(loss.detach())
            # No model goes below .06: nothing says which task the first of six pairs is of.
            if mean < 0.075:
                return made.eval()
    raise RuntimeError(f"the tiny model has not learned its tasks: loss {mean:.3f}")


def _texts(n: int) -> list[str]:
    rng = random.Random(0)
    texts = []
    for _ in range(n):
        places = rng.choice(list(PLACES.values()))
        pairs = [(rng.randrange(7), rng.choice(zoo.LETTERS[:6])) for _ in range(SHOTS + 2)]
        lines = [f"Q: {zoo.LETTERS[i]}{b}\nA: {zoo.LETTERS[i + places]}\n\n" for i, b in pairs]
        texts.append("".join(lines))
    return texts


@cache
def lens() -> Lens:
    """A lens on `model()`."""
    # A bridge takes over the modules of its model, which could not be saved any more.
    return tvlens.load(copy.deepcopy(model()), tokenizer=zoo.tokenizer(), name="trained")


def save_model(folder: Path) -> Path:
    """The model with its tokenizer in a new folder, as Hugging Face keeps them."""
    model().save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


def save_tasks(folder: Path) -> Path:
    """A new folder with both tasks in the format of the public function-vector data."""
    folder.mkdir()
    for name, task in TASKS.items():
        pairs = [{"input": pair.input, "output": pair.output} for pair in task.pairs]
        (folder / f"{name}.json").write_text(json.dumps(pairs))
    return folder
