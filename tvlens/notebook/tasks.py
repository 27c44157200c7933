"""Displays of text tasks: how many pairs, and what a prompt looks like."""

from contextlib import suppress
from dataclasses import asdict
from typing import get_args

from tvlens.errors import TaskError
from tvlens.notebook import pieces
from tvlens.notebook.displays import shows
from tvlens.tasks.base import Split
from tvlens.tasks.text.layouts import TEMPLATES
from tvlens.tasks.text.task import Task

SHOTS = 3
"""Examples in the prompt that is shown, at most."""


@shows(Task)
def _task(task: Task) -> str:
    sizes = {}
    for split in get_args(Split):
        sizes[split] = 0
        with suppress(TaskError):
            sizes[split] = len(task.split(split))
    several = sum(len(pair.answers) > 1 for pair in task.pairs)
    told = {
        "task": task.description,
        "pairs": f"{len(task)}: " + ", ".join(f"{n} {split}" for split, n in sizes.items()),
        "several right answers": f"of {several} inputs" if several else None,
        "layout": _layout(task),
        "source": task.source,
        "licence": task.licence,
    }
    return pieces.card(f"Task {task.name}", pieces.facts(told), *_example(task, sizes))


def _layout(task: Task) -> str:
    own = {name: known for name, known in TEMPLATES.items() if known == task.template}
    if own:
        return next(iter(own))
    plain = asdict(task.template)
    for name, known in TEMPLATES.items():
        if plain | {"instruction": ""} == asdict(known):
            return f"{name}, with an instruction"
    return "of its own"


def _example(task: Task, sizes: dict[str, int]) -> list[str]:
    """A prompt with as many examples as there are pairs for, and its answer."""
    shots, split = min(SHOTS, sizes["train"] - 1), "test" if sizes["test"] else "train"
    if shots < 1:
        return []
    try:
        prompt = task.prompts("test" if split == "test" else "train", shots=shots, n=1)[0]
    except TaskError:
        return []
    return [
        pieces.sentence(f"A clean prompt of the {split} split, {shots} shots:"),
        pieces.verbatim(prompt.text + prompt.continuations[0]),
    ]
