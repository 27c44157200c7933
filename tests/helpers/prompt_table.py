"""What `evaluate_prompts` measures as a long table, one row per method, prompt and measure."""

from collections.abc import Mapping

import pandas as pd

from tvlens.evaluation.methods import BARE, Measured, evaluate_prompts
from tvlens.lens.edits import AddToResidual
from tvlens.lens.lens import Lens
from tvlens.vectors.vector import TaskVector


def prompt_table(lens, prompts, methods, *, kind, exact_match=None) -> pd.DataFrame:
    """Columns method, prompt_index, metric, value; methods may have one vector per kind."""
    own = {}
    for name, method in methods.items():
        if not isinstance(method, Mapping):
            own[name] = method
        elif kind in method:
            own[name] = method[kind]
    return as_table(evaluate_prompts(lens, prompts, own, exact_match=exact_match), kind)


def as_table(found: Measured, kind: str) -> pd.DataFrame:
    """The measures, with the model without a vector called as in tables of text."""
    bare = "icl" if kind == "clean" else "none"
    rows = [
        (bare if method == BARE else method, i, metric, value)
        for method in found.methods
        for metric in found.measures
        for i, value in enumerate(found.of(method, metric).tolist())
    ]
    return pd.DataFrame(rows, columns=["method", "prompt_index", "metric", "value"])


def stacked(vectors: list[TaskVector], lens: Lens) -> AddToResidual:
    """The edit of task vectors, which are the same for all prompts."""
    from helpers import zoo

    return TaskVector.stack(vectors, lens, zoo.TASK.prompts("test", n=1, kind="zero"))
