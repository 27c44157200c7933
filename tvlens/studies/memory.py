"""The study of one task in one call, without a run folder."""

from typing import get_args

from tvlens.console import progress_bar
from tvlens.errors import TaskError
from tvlens.lens.lens import Lens
from tvlens.runs.steps import Memory
from tvlens.studies.askable import require_askable
from tvlens.studies.plan import Plan, StudySettings
from tvlens.studies.regression import RegressionPlan, RegressionSettings
from tvlens.studies.study import STAGES, Study, study_task
from tvlens.studies.text import TextPlan, TextSettings
from tvlens.tasks.base import Split
from tvlens.tasks.regression.task import FunctionTask
from tvlens.tasks.text.task import Task


def study(lens: Lens, task: Task | FunctionTask, settings: StudySettings | None = None) -> Study:
    """All that `tvlens study` finds of one task, kept in memory: means, mediation, vectors, scores,
    evaluation and comparison, with a progress bar.

    The numbers are those of the command. It takes minutes, and what is interrupted is lost: for
    many tasks or large models `tvlens study --out RUN` goes on where it was stopped.

    Example:
        >>> lens, task = tvlens.load("smollm2-135m"), tvlens.tasks.load("present-past")
        >>> found = tvlens.study(lens, task)  # doctest: +SKIP
        >>> found.results, found.heads, found.ltvs  # doctest: +SKIP

    Args:
        lens: the model.
        task: a text task, or a function class that knows how many points the model was trained on.
        settings: what is done: `TextSettings` of text, `RegressionSettings` of function classes;
            the defaults of `tvlens study` if None.

    Returns:
        Tables and vectors; the last line of a notebook cell shows them.

    Raises:
        TaskError: task, model and settings are not of one modality, or the model cannot be asked
            the task; or it answers none of the clean prompts.
    """
    plan = _plan(lens, task, settings)
    with progress_bar(f"study of {task.name}, stages", STAGES) as advance:
        return study_task(plan, Memory(), progress=advance)


def _plan(lens: Lens, task: Task | FunctionTask, settings: StudySettings | None) -> Plan:
    of_text = isinstance(task, Task)
    kind = TextSettings if of_text else RegressionSettings
    if lens.readout.has_text != of_text:
        given, expected = ("a text task", "text") if of_text else ("a function class", "points")
        raise TaskError(
            f"study of {task.name!r}: it is {given}, and {lens.name!r} reads "
            f"{'text' if lens.readout.has_text else 'points'}; give a model of {expected}, or a "
            f"task that this one reads"
        )
    chosen = kind() if settings is None else settings
    if not isinstance(chosen, kind):
        raise TaskError(
            f"study of {task.name!r}: settings are {type(chosen).__name__}; expected "
            f"tvlens.studies.{kind.__name__}"
        )
    if isinstance(task, Task) and isinstance(chosen, TextSettings):
        require_askable(lens, {task.name: task}, chosen.shots, get_args(Split), chosen.n_means)
        return TextPlan(lens, task, chosen)
    assert isinstance(task, FunctionTask)
    assert isinstance(chosen, RegressionSettings)
    return RegressionPlan(lens, task, chosen)
