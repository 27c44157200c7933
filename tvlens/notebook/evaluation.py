"""Displays of ablations."""

import torch

from tvlens.evaluation.ablation import Ablation
from tvlens.notebook import pieces
from tvlens.notebook.displays import shows

_COLUMNS = ("score", "rule", "share", "draw", "k")


@shows(Ablation)
def _ablation(ablation: Ablation) -> str:
    told = {
        "task": ablation.task,
        "model": ablation.model,
        "heads are set to": ablation.set_to,
        "at": "all positions" if ablation.positions == "all" else "the query position",
        "prompts": len(ablation.values),
        **{
            f"{measure}, nothing ablated": _mean(ablation.unablated[:, i])
            for i, measure in enumerate(ablation.measures)
        },
    }
    return pieces.card("Ablation", pieces.facts(told), _table(ablation))


def _table(ablation: Ablation) -> str:
    """A row for each set of heads; with intervals where all numbers are finite."""
    finite = torch.isfinite(ablation.values).all() and torch.isfinite(ablation.unablated).all()
    cells: dict[str, list[str]] = {}
    if finite and len(ablation.values):
        rows = ablation.to_frame()
        for measure in ablation.measures:
            part = rows[rows["metric"] == measure]
            ends = zip(part["value"], part["ci_low"], part["ci_high"], strict=True)
            cells[measure] = [pieces.with_ends(*map(float, each)) for each in ends]
    else:
        for i, measure in enumerate(ablation.measures):
            cells[measure] = [_mean(column) for column in ablation.values[:, :, i].T]
    sets = [
        [one.name, one.rule, one.share, one.draw, one.k, *row]
        for one, *row in zip(ablation.sets, *cells.values(), strict=True)
    ]
    # Columns that say nothing of any set are left out.
    columns = [*_COLUMNS, *cells]
    shown = [i for i in range(len(columns)) if any(row[i] is not None for row in sets)]
    return pieces.table([columns[i] for i in shown], [[row[i] for i in shown] for row in sets])


def _mean(values: torch.Tensor) -> str:
    return pieces.number(float(values.double().mean())) if len(values) else ""
