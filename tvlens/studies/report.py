"""A report of finished runs: one page that opens without a network (`tvlens.figures.report`)."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tvlens.console import progress_bar
from tvlens.errors import RunError, TvlensError, first_line
from tvlens.figures.report import ranks
from tvlens.figures.report.contents import Contents, Example, RunTables
from tvlens.figures.report.page import report_page
from tvlens.lens.lens import Lens
from tvlens.runs.finished import FoundRun, find_run
from tvlens.runs.storage import reading, write
from tvlens.studies.examples import examples_of
from tvlens.tasks.base import PromptSource

PAGE = "report.html"
"""What the page of a study is called, in its run folder."""

NOT_LOOKED_AT = "What heads attend to is left out: the report was made with --no-attention."

_WEIGHTS = "weights and tokenizer"
_TASKS = {"study text": "tasks", "mediate": "tasks", "fit": "tasks", "evaluate": "tasks"}
_TASKS |= {"ablate": "tasks", "score": "task", "patch": "task"}
_OTHERS = ("study regression", "compare")


@dataclass(frozen=True)
class Asked:
    """What example prompts of a task are drawn from, and what is asked.

    Attributes:
        lens: the model.
        source: where prompts are drawn from.
        shots: examples in a prompt.
        seed: seed of the prompts.
    """

    lens: Lens
    source: PromptSource
    shots: int
    seed: int


def find_runs(folders: Sequence[Path | str]) -> list[FoundRun]:
    """The runs in these folders, all of one model.

    Raises:
        RunError: a folder is no run folder, one of a newer version, or without tables; or two runs
            are of different models.
    """
    runs = [find_run(folder) for folder in dict.fromkeys(map(Path, folders))]
    known = [(run, models) for run in runs if (models := _models(run.manifest))]
    for run, models in known[1:]:
        first, others = known[0]
        both = [name for name in models if name in others]
        if not both or any(None not in (a, b) and a != b for a, b in _both(models, others, both)):
            of = [" and ".join(each) for each in (others, models)]
            same = " with other weights" if both else ""
            raise RunError(
                f"runs of different models cannot stand in one report: '{first.folder}' is of "
                f"{of[0]}, '{run.folder}' of {of[1]}{same}; make a report of each"
            )
    return runs


def require_writable(out: Path | str) -> None:
    """Refuse a file that a page cannot be written to, before anything long is begun.

    Raises:
        RunError: it is a folder, or its folder cannot be made or written.
    """
    out = Path(out)
    if out.is_dir():
        raise RunError(
            f"the report cannot be written: '{out}' is a folder; name a file, such as {out / PAGE}"
        )
    problem = ""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problem = error.strerror or str(error)
    if problem or not os.access(out.parent, os.W_OK):
        raise RunError(
            f"the report cannot be written: '{out.parent}' "
            f"{f'cannot be made ({problem})' if problem else 'does not permit writing'}; choose "
            "another --out"
        )


def write_report(
    runs: Sequence[FoundRun],
    out: Path | str,
    asked: Mapping[str, Asked] | None = None,
    unseen: Mapping[str, str] | None = None,
) -> Path:
    """Returns the path of the page that shows these runs.

    Args:
        runs: the runs, as `find_runs` finds them.
        out: the file.
        asked: what example prompts are drawn from, by task or class of functions; nothing of
            others is looked at.
        unseen: why a task is not among them, in a sentence.

    Raises:
        RunError: a table holds something else than its command writes, or the file cannot be
            written.
    """
    out = Path(out)
    require_writable(out)
    names = list(dict.fromkeys(name for run in runs for name in _models(run.manifest)))
    folders = " and ".join(str(run.folder) for run in runs)
    with reading(folders, "tables and manifests as tvlens commands write them"):
        tables = [_tables(run, out.parent) for run in runs]
        examples, reasons = _examples(tables, asked or {}, unseen or {})
        contents = Contents(" and ".join(names) or "a model", tables, examples, reasons)
        page = report_page(contents)
    write(out, page.encode())
    return out


def _examples(
    runs: Sequence[RunTables], asked: Mapping[str, Asked], unseen: Mapping[str, str]
) -> tuple[dict[str, tuple[Example, ...]], dict[str, str]]:
    """Examples of every task whose heads are scored, and why there are none of others."""
    scores = ranks.by_task(runs)
    examples: dict[str, tuple[Example, ...]] = {}
    reasons = {}
    with progress_bar("report: what heads attend to", len(scores)) as advance:
        for task, some in scores.items():
            name = ranks.asked_of(task)[0]
            own = asked.get(task) or asked.get(name)
            if own is None:
                reasons[task] = unseen.get(task) or unseen.get(name) or NOT_LOOKED_AT
            else:
                try:
                    best = ranks.best_of(some)
                    examples[task] = examples_of(
                        own.lens, own.source, best, shots=own.shots, seed=own.seed
                    )
                except TvlensError as error:
                    reasons[task] = f"What heads attend to is left out: {first_line(error)}."
            advance(1)
    return examples, reasons


def _tables(run: FoundRun, beside: Path) -> RunTables:
    name = os.path.relpath(run.folder, beside).replace(os.sep, "/")
    return RunTables(
        name,
        command_of(run.manifest),
        run.manifest,
        run.tables,
        run.missing,
        run.finished,
        _tokens(run),
    )


def command_of(manifest: Mapping[str, Any]) -> str:
    """The command of a run, as one types it, as far as its manifest tells; without --out."""
    words, _, by = str(manifest["command"]).partition(" by ")
    if words not in (*_TASKS, *_OTHERS):
        return str(manifest["command"])
    config, parts = manifest["config"], [f"tvlens {words}"]
    if words == "compare":
        return " ".join([*parts, *(str(config.get(key, "")) for key in ("first", "second"))])
    functions = config.get("functions")
    if functions:
        parts.append(f"--functions {','.join(functions)}")
    elif words in _TASKS:
        tasks = [name for name in manifest["data"] if name != _WEIGHTS and "." not in name]
        parts += [f"--model {config.get('model')}", f"--{_TASKS[words]} {','.join(tasks)}"]
    if by:
        parts.append(f"--by {by}")
    seeds = manifest["seeds"]
    if isinstance(seeds, dict) and "seed" in seeds:
        parts.append(f"--seed {seeds['seed']}")
    return " ".join(parts)


def _models(manifest: Mapping[str, Any]) -> dict[str, str | None]:
    """Digests of the weights of a run's models by name, None where none is noted."""
    config, data = manifest["config"], manifest["data"]
    functions = config.get("functions")
    if isinstance(functions, list):
        return {str(name): data.get(f"{name}, weights") for name in functions}
    return {str(config["model"]): data.get(_WEIGHTS)} if "model" in config else {}


def _both(
    a: Mapping[str, str | None], b: Mapping[str, str | None], names: Sequence[str]
) -> list[tuple[str | None, str | None]]:
    return [(a[name], b[name]) for name in names]


def _tokens(run: FoundRun) -> dict[str, tuple[str, ...]]:
    """Tokens of the prompts that maps of positions are of, where the run's steps have kept them."""
    found: dict[str, tuple[str, ...]] = {}
    if "patching" not in run.tables:
        return found
    for file in sorted(run.folder.glob("steps/*/*/*/0/facts.json")):
        task, site = file.parts[-5], file.parts[-4]
        try:
            facts = json.loads(file.read_bytes())
        except (OSError, ValueError):
            continue
        if isinstance(facts, dict) and isinstance(facts.get("tokens"), list):
            found.setdefault(f"{task}/{site}", tuple(map(str, facts["tokens"])))
    return found
