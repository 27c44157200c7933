"""Whether a model can be asked a task at all, before anything long is begun."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

from tvlens.tasks.base import KINDS, Split

if TYPE_CHECKING:
    # Commands look at this before they load anything heavy.
    from tvlens.lens.lens import Lens
    from tvlens.tasks import Task


def require_askable(
    lens: "Lens",
    chosen: "Mapping[str, Task]",
    shots: int,
    splits: Sequence[Split],
    n: int | None,
) -> None:
    """Refuse tasks that the model cannot be asked.

    Args:
        lens: the model.
        chosen: the tasks.
        shots: examples in a prompt.
        splits: whose pairs are asked.
        n: prompts of every kind that are tried; all pairs of a split if it has fewer.

    Raises:
        TaskError: a split is too small, or a prompt cannot be read by the model.
    """
    for task, split, kind in product(chosen.values(), splits, KINDS):
        some = min(n or len(task.pairs), len(task.split(split)))
        lens.encode(task.prompts(split, shots=shots, n=some, kind=kind))
