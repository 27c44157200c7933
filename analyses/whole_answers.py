"""Vectors trained on whole answers, and where the first token misleads.

    python -m analyses.whole_answers --preset smoke
    python -m analyses.whole_answers                                 # five shipped tasks
    python -m analyses.whole_answers --tasks first-letter --n-test 20 --out runs/first-letter

Per task: Learnable Task Vectors trained on the first answer token, as in the papers, and on the
whole answer and its end; added once, at the query, or there and at every new position; with head
outputs averaged at the query, or at the tokens of answers. All start at zero and are trained on the
same prompts; weights are those of lowest validation loss, and nothing is chosen on test. Beside
them in-context learning on clean prompts.

Accuracy is of the first answer token; exact match is that the greedy continuation is the answer,
ended as the layout ends it.

Written to the run folder, which resumes
- whole-answers.{csv,md,tex}: by task and method, both measures on zero-shot and shuffled prompts,
  and the seconds that a training step took (median),
- gaps.{csv,md,tex}: by task, exact match of in-context learning and of the whole-answer vector of
  lowest validation loss, what the first token said, and how far the heads of highest effect on the
  first token and on the whole answer are the same,
- results, trainings and effects as tidy tables; figures/whole-answers.{pdf,png}.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import median
from time import perf_counter
from typing import Any

import pandas as pd

import tvlens
from analyses import presets
from tvlens import figures
from tvlens.cli import options
from tvlens.console import progress_bar, say, with_interval
from tvlens.runs.run import Run
from tvlens.runs.tables import write_tables
from tvlens.scores.agreement import spearman
from tvlens.scores.mediation import IndirectEffects
from tvlens.studies import stages
from tvlens.tasks.text.task import Task
from tvlens.vectors.ltv.sample import FitPrompts
from tvlens.vectors.vector import TaskVector, Vector

STUDIED = "present-past,singular-plural,country-nationality,verb-gerund,capitalize-word"
LETTERS = "capitalize-first-letter,first-letter"
LONGER = "choose-first-of-3,uppercase-word,country-capital,country-currency"
ALL = f"{STUDIED},{LETTERS},{LONGER}"
MEASURED = f"{STUDIED},{LETTERS},uppercase-word,country-currency"

FIRST = tvlens.FitSettings()
ONCE = replace(FIRST, answer="whole")
EVERYWHERE = replace(ONCE, positions="all")
TRAININGS: dict[str, tuple[tvlens.FitSettings, Any]] = {
    "first token": (FIRST, "query"),
    "whole, once": (ONCE, "query"),
    "whole, everywhere": (EVERYWHERE, "query"),
    "whole, everywhere, means at answers": (EVERYWHERE, "answers"),
}
"""How vectors are trained, and where the means that they weigh are taken, by name."""

KINDS: tuple[Any, ...] = ("zero", "shuffled")


@dataclass(frozen=True, kw_only=True)
class Size(presets.Size):
    """How much is done.

    Attributes:
        steps: training steps at most, if not the usual.
        n_means: clean prompts of head means.
        n_effects: prompts of indirect effects.
        n_test: test prompts of each kind; every pair if None.
    """

    steps: int | None = None
    n_means: int = 100
    n_effects: int = 25
    n_test: int | None = None


PRESETS: dict[presets.Name, Size] = {
    "smoke": Size(tasks="capitalize-word", steps=2, n_means=12, n_effects=2, n_test=2),
    "small": Size(tasks=MEASURED, steps=40, n_means=60, n_effects=8, n_test=40),
    "paper": Size(tasks=ALL, **presets.PAPER),
}


def main(
    preset: presets.PresetOption = "small",
    tasks: presets.TasksOption = None,
    out: presets.OutOption = None,
    data: options.DataOption = None,
    model: presets.ModelOption = None,
    shots: options.ShotsOption = 10,
    steps: options.StepsOption = None,
    n_means: presets.CountOption = None,
    n_effects: presets.CountOption = None,
    n_test: presets.CountOption = None,
    seed: options.SeedOption = 0,
) -> None:
    """Vectors of first tokens and of whole answers on several tasks, and tables of them."""
    given = {"tasks": tasks, "model": model, "steps": steps, "n_means": n_means}
    size = presets.sized(PRESETS, preset, **given, n_effects=n_effects, n_test=n_test)
    out = presets.folder(out, preset, "whole_answers")
    steps, n_means, n_effects, n_test = size.steps, size.n_means, size.n_effects, size.n_test
    chosen = options.read_tasks(size.tasks, data, "error")
    lens = size.lens()
    trainings = {
        name: (replace(fit, steps=steps or fit.steps), at) for name, (fit, at) in TRAININGS.items()
    }
    numbers = {"shots": shots, "n_means": n_means, "n_effects": n_effects, "n_test": n_test}
    config = {"model": lens.name, **numbers} | {n: asdict(fit) for n, (fit, _) in trainings.items()}
    digests = {name: task.digest for name, task in chosen.items()}
    results, trained, effects, gaps = [], [], [], []
    with Run.open(out, "whole answers", config, data=digests, seeds={"seed": seed}) as run:
        for task in chosen.values():
            clean = task.prompts("train", shots=shots, n=n_means, seed=seed)
            means = {at: _means(lens, run, clean, at) for at in ("query", "answers")}
            vectors: dict[str, tvlens.LearnableTaskVector] = {}
            read = {
                fit.answer: stages.reader(lens, task, fit, seed) for fit, _ in trainings.values()
            }
            for name, (fit, at) in trainings.items():
                made = _train(lens, run, task, means[at], name, fit, seed, read[fit.answer])
                vectors[name], rows = made
                trained.append(rows)
            asked = tvlens.mediation_prompts(task, clean, means["query"], n=n_effects, seed=seed)
            of_heads = {
                answer: _effects(lens, run, asked, means["query"], answer)
                for answer in ("first", "whole")
            }
            effects += [x.to_frame(seed=seed).assign(answer=name) for name, x in of_heads.items()]
            found = _evaluate(lens, run, task, _methods(vectors), shots, n_test, seed)
            results.append(found)
            gaps.append(_gap(task, found, of_heads, _best(vectors)))
        tidy = pd.concat(results, ignore_index=True)
        of_training = pd.concat(trained, ignore_index=True)
        run.write_table("results", tidy)
        run.write_table("trainings", of_training)
        run.write_table("effects", pd.concat(effects, ignore_index=True))
        text = write_tables(out, "whole-answers", *_summary(tidy, of_training))
        gap = pd.DataFrame(gaps)
        print(f"{text}\n{write_tables(out, 'gaps', gap, gap)}")
        run.write_figure("whole-answers", figures.answer_dots(tidy))
    say(f"Wrote {out / 'whole-answers.csv'}")


def _means(lens: tvlens.Lens, run: Run, clean: Any, at: Any) -> tvlens.HeadMeans:
    def compute() -> tvlens.HeadMeans:
        with progress_bar(f"{clean.task}: head means, {at}", len(clean)) as advance:
            return tvlens.mean_head_outputs(lens, clean, at=at, progress=advance)

    means = run.kept(f"{clean.task}/means-{at}", tvlens.HeadMeans, compute)
    run.note_filter(
        f"{clean.task}: head means over the {means.count} of {means.offered} clean prompts whose "
        f"first answer token {lens.name} gets right; effects are of their queries"
    )
    return means


def _train(
    lens: tvlens.Lens,
    run: Run,
    task: Task,
    means: tvlens.HeadMeans,
    name: str,
    settings: tvlens.FitSettings,
    seed: int,
    read: Callable[[], FitPrompts],
) -> tuple[tvlens.LearnableTaskVector, pd.DataFrame]:
    """A trained vector, and a row on its training."""
    label = name.replace(", ", "-").replace(" ", "-")
    checkpoint = run.folder / "checkpoints" / f"{task.name}-{label}.safetensors"

    def compute() -> dict[str, Any]:
        times: list[float] = []
        with progress_bar(f"{task.name}: {name}", settings.steps) as advance:

            def step(n: int) -> None:
                times.append(perf_counter())
                advance(n)

            ltv = tvlens.fit_ltv(
                lens,
                task,
                means,
                settings=settings,
                seed=seed,
                read=read(),
                checkpoint=checkpoint,
                progress=step,
            )
        # Before the first step stands a validation, and before a few others.
        taken = [after - before for before, after in pairwise(times)]
        tensors, facts = ltv.state()
        seconds = pd.DataFrame({"seconds": [median(taken) if taken else float("nan")]})
        return {"ltv": tensors, "facts": facts, "seconds": seconds}

    saved = run.step(f"{task.name}/{label}", compute)
    checkpoint.unlink(missing_ok=True)
    ltv = tvlens.LearnableTaskVector.of_state(saved["ltv"], saved["facts"])
    best = ltv.history["validation_loss"].idxmin()
    row = {
        "task": task.name,
        "training": name,
        "seconds of a step": saved["seconds"]["seconds"].iloc[0],
        "steps": ltv.history["step"].max(),
        "best step": ltv.history["step"][best],
        "validation loss": ltv.history["validation_loss"][best],
        "validation loss without": ltv.history["validation_loss"].iloc[0],
    }
    return ltv, pd.DataFrame([row])


def _best(vectors: dict[str, tvlens.LearnableTaskVector]) -> str:
    """The vector of whole answers that has the lowest validation loss."""
    losses = {name: v.history["validation_loss"].min() for name, v in vectors.items()}
    return min((name for name in losses if name != "first token"), key=losses.__getitem__)


def _effects(
    lens: tvlens.Lens, run: Run, prompts: Any, means: tvlens.HeadMeans, answer: Any
) -> IndirectEffects:
    """Indirect effects of heads at the query on the first token, or on the whole answer."""

    def compute() -> IndirectEffects:
        with progress_bar(f"{prompts.task}: effects, {answer} answer", len(prompts)) as advance:
            return tvlens.indirect_effects(lens, prompts, means, answer=answer, progress=advance)

    return run.kept(f"{prompts.task}/effects-{answer}", IndirectEffects, compute)


def _methods(vectors: dict[str, tvlens.LearnableTaskVector]) -> dict[str, Vector]:
    """What is evaluated: every vector where it was trained to act, and that of the first token
    everywhere too."""
    first = vectors["first token"].task_vector
    assert isinstance(first, TaskVector)
    methods: dict[str, Vector] = {
        "first token, once": first,
        "first token, everywhere": replace(first, positions="all"),
    }
    return methods | {name: ltv for name, ltv in vectors.items() if name != "first token"}


def _evaluate(
    lens: tvlens.Lens,
    run: Run,
    task: Task,
    methods: dict[str, Vector],
    shots: int,
    n_test: int | None,
    seed: int,
) -> pd.DataFrame:
    """First-token accuracy and exact match on test prompts that do not carry the task, and of
    in-context learning on clean ones."""

    def compute() -> dict[str, Any]:
        n = n_test or len(task.split("test"))
        by_kind = {name: dict.fromkeys(KINDS, vector) for name, vector in methods.items()}
        with progress_bar(f"{task.name}: evaluation", 3 * n) as advance:
            table = tvlens.evaluate(
                lens, task, by_kind, shots=shots, n=n_test, seed=seed, progress=advance
            )
        return {"results": table}

    return run.step(f"{task.name}/evaluation", compute)["results"]


def _summary(results: pd.DataFrame, trained: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for each task and method: in numbers, and as text with intervals."""
    seconds = trained.set_index(["task", "training"])["seconds of a step"]
    keys = ["task", "method", "prompt", "metric"]
    cells = results.set_index(keys)[["value", "ci_low", "ci_high"]]
    values, shown = [], []
    for (task, method), own in results.groupby(["task", "method"], sort=False):
        training = "first token" if str(method).startswith("first token") else method
        row: dict[str, Any] = {"task": task, "method": method}
        text = dict(row)
        for kind in ("zero", "shuffled", "clean"):
            for metric in ("accuracy", "exact_match"):
                if kind not in set(own["prompt"]):
                    continue
                cell = cells.loc[(task, method, kind, metric)]
                # In-context learning has its clean prompts in every column.
                for column in KINDS if kind == "clean" else (kind,):
                    row[f"{column}, {metric}"] = cell["value"]
                    text[f"{column}, {metric}"] = with_interval(*cell)
        row["seconds of a step"] = seconds.get((task, training), float("nan"))
        values.append(row)
        shown.append(text | {"seconds of a step": row["seconds of a step"]})
    return pd.DataFrame(values), pd.DataFrame(shown)


def _gap(
    task: Task, results: pd.DataFrame, effects: dict[str, IndirectEffects], best: str
) -> dict[str, Any]:
    """How one task's whole-answer vector compares, and its two rankings of heads."""
    cells = results.set_index(["method", "prompt", "metric"])["value"]
    icl = cells["icl", "clean", "exact_match"]
    whole = cells[best, "zero", "exact_match"]
    k = min(10, effects["first"].n_heads)
    tops = [set(effects[answer].top(k)) for answer in ("first", "whole")]
    return {
        "task": task.name,
        "vector": best,
        "ICL, exact match": icl,
        "zero-shot, exact match": whole,
        "gap": whole - icl,
        "first token of the first-token vector": cells["first token, once", "zero", "accuracy"],
        "its exact match": cells["first token, once", "zero", "exact_match"],
        f"top {k} heads shared by both effects": len(tops[0] & tops[1]),
        "Spearman of both effects": spearman(effects["first"], effects["whole"]).value,
    }


if __name__ == "__main__":
    presets.run(main)
