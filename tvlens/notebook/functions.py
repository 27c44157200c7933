"""Displays of function classes as tasks: what is drawn, and what a prompt looks like."""

from dataclasses import fields

from tvlens.notebook import pieces
from tvlens.notebook.displays import shows
from tvlens.tasks.regression.task import FunctionTask

SHOTS = 3
"""Examples in the prompt that is shown."""


@shows(FunctionTask)
def _function_task(task: FunctionTask) -> str:
    functions = task.functions
    options = {
        field.name: getattr(functions, field.name)
        for field in fields(functions)
        if field.name != "n_dims"
    }
    prompts = task.prompts("test", shots=SHOTS, n=1)
    rows = [
        ["(" + ", ".join(f"{x:.2f}" for x in xs) + ")", f"{y:.2f}"]
        for xs, y in zip(prompts.xs[0].tolist(), prompts.ys[0].tolist(), strict=True)
    ]
    rows[-1][1] = f"? (f(x) = {float(prompts.target[0]):.2f})"
    told = {
        "functions": type(functions).__name__,
        "variables": functions.n_dims,
        **{name: option for name, option in options.items() if option is not None},
        "variance of f(x)": pieces.number(functions.variance),
        "noise": pieces.number(functions.noise) if functions.noise else None,
        "shift of prompts": task.shift if task.shift != "none" else None,
        "model trained on": f"up to {task.train_points} points" if task.train_points else None,
        "pairs": "drawn anew, a function for every prompt",
    }
    return pieces.card(
        f"Task {task.name}",
        pieces.facts(told),
        pieces.sentence(f"A clean prompt of the test split, {SHOTS} shots:"),
        pieces.table(["x", "y"], rows),
    )
