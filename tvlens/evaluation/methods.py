"""Methods against the same test prompts: one tidy table."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.errors import ModelError, UnknownNameError
from tvlens.lens.edits import Edit
from tvlens.lens.engine import Engine, Reading
from tvlens.lens.lens import Lens
from tvlens.stats import Interval, bootstrap_mean
from tvlens.tasks.base import PromptKind, PromptSet, PromptSource, Split
from tvlens.vectors.vector import HeadMixture, TaskVector, Vector, edits_of

RESULT_COLUMNS = ["task", "method", "prompt", "metric", "value", "ci_low", "ci_high", "n"]
KINDS: tuple[PromptKind, ...] = ("zero", "shuffled", "clean")


@runtime_checkable
class HasTaskVector(Protocol):
    """Anything that has a task vector, such as a LearnableTaskVector."""

    @property
    def task_vector(self) -> Vector: ...


Draws = Vector | HasTaskVector | Sequence[Vector] | None
Method = Draws | Mapping[PromptKind, Draws]
"""A vector, something that has one, draws to average over, or one of these per prompt kind."""


def evaluate(
    lens: Lens,
    task: PromptSource,
    methods: Mapping[str, Method],
    *,
    split: Split = "test",
    kinds: Sequence[PromptKind] = KINDS,
    shots: int = 10,
    n: int | None = None,
    seed: int = 0,
    exact_match: bool | None = None,
) -> pd.DataFrame:
    """Every method on the same prompts: mean and 95% bootstrap interval over prompts.

    Two rows of methods are always there: `none`, no vector on prompts that do not carry the task
    (zero, shuffled), and `icl`, no vector on clean prompts.

    Example:
        >>> table = evaluate(lens, task, {"LTV": ltv, "FV": fv})  # doctest: +SKIP

    Args:
        lens: the model.
        task: where prompts are drawn from.
        methods: what is added to the residual stream, by name.
        split: whose pairs are asked.
        kinds: kinds of prompts.
        shots: examples in prompts that have any.
        n: number of prompts; each pair of the split once by default.
        seed: seed of the prompts and of the bootstrap.
        exact_match: also generate whole answers greedily and compare them; by default where the
            model's answers are text.

    Returns:
        A tidy table with columns task, method, prompt, metric, value, ci_low, ci_high, n. Metrics
        are the measures of the lens' readout; for text accuracy and cross_entropy (first answer
        token; cross-entropy in nats), perplexity, and exact_match (the first line of the greedy
        continuation is the answer).

    Raises:
        UnknownNameError: a method is called `none` or `icl`.
        ShapeError: a vector does not fit the model.
    """
    reserved = sorted({"none", "icl"} & set(methods))
    if reserved:
        raise UnknownNameError(
            f"method name {reserved[0]!r} is taken by the baseline without a vector; rename yours"
        )
    rows: list[dict[str, Any]] = []
    for kind in kinds:
        prompts = task.prompts(split, shots=shots, n=n, seed=seed, kind=kind)
        values = evaluate_prompts(lens, prompts, methods, kind=kind, exact_match=exact_match)
        for (method, metric), frame in values.groupby(["method", "metric"], sort=False):
            interval = bootstrap_mean(torch.tensor(frame["value"].to_numpy()), seed=seed)
            rows.append(_row(task.name, method, kind, metric, interval))
            if metric == "cross_entropy":
                rows.append(_row(task.name, method, kind, "perplexity", interval.map(math.exp)))
    return pd.DataFrame(rows, columns=RESULT_COLUMNS)


def evaluate_prompts(
    lens: Lens,
    prompts: PromptSet,
    methods: Mapping[str, Method],
    *,
    kind: PromptKind,
    exact_match: bool | None = None,
) -> pd.DataFrame:
    """Every method on every prompt: columns method, prompt_index, metric, value.

    Methods of several draws are averaged over their draws, prompt by prompt.

    Args:
        lens: the model.
        prompts: what is asked.
        methods: what is added, by name; the baseline without a vector is put first.
        kind: kind of the prompts, which picks the vector of methods that have one per kind.
        exact_match: also generate whole answers; by default where answers are text.

    Raises:
        ModelError: exact_match is asked of a model whose answers are not text.
        ShapeError: a vector does not fit the model.
        TaskError: a method is made for each prompt, and the prompts have no donors.
    """
    exact_match = lens.readout.has_text if exact_match is None else exact_match
    if exact_match and not lens.readout.has_text:
        raise ModelError(
            f"exact_match compares generated text, but {lens.name!r} answers with numbers; pass "
            "exact_match=False or leave it out"
        )
    baseline = "icl" if kind == "clean" else "none"
    draws: dict[str, list[Vector]] = {baseline: [TaskVector.none(lens)]}
    for name, method in methods.items():
        found = _draws(method, kind, lens)
        if found:
            draws[name] = found
    every = [vector for vectors in draws.values() for vector in vectors]
    edits = edits_of(every, lens, prompts)
    engine = lens.engine_for(*(edit for edit, _ in edits))
    batch = lens.encode(prompts)
    names = [measure.name for measure in lens.readout.measures]
    if exact_match:
        names.append("exact_match")
    measured = torch.empty(len(batch), len(every), len(names), dtype=torch.float64)
    done = 0
    with lens.frozen(), torch.no_grad():
        for reading in lens.readings(batch, engine=engine):
            rows = slice(done, done + len(reading))
            for edit, index in edits:
                values = []
                for piece in lens.variants(reading, edit.of_prompts(rows.start, rows.stop)):
                    outputs = engine.run(reading, piece)
                    values.append(lens.readout.measure(outputs, reading.batch).double().cpu())
                    if exact_match:
                        started = lens.readout.answered(outputs, reading.batch)
                        right = _exact_match(lens, engine, reading, piece, started)
                        values[-1] = torch.cat([values[-1], right[..., None]], dim=-1)
                measured[rows, index] = torch.cat(values, dim=1)
            done = rows.stop
    frames = []
    first = 0
    for name, vectors in draws.items():
        mean = measured[:, first : first + len(vectors)].mean(dim=1)
        first += len(vectors)
        frame = pd.DataFrame(mean.numpy(), columns=names)
        frame.insert(0, "prompt_index", range(len(frame)))
        frame.insert(0, "method", name)
        frames.append(frame)
    wide = pd.concat(frames, ignore_index=True)
    return wide.melt(id_vars=["method", "prompt_index"], var_name="metric")


def _draws(method: Method, kind: PromptKind, lens: Lens) -> list[Vector]:
    if method is None:
        return [TaskVector.none(lens)]
    if isinstance(method, TaskVector | HeadMixture):
        return [method]
    if isinstance(method, Mapping):
        return _draws(method[kind], kind, lens) if kind in method else []
    if isinstance(method, HasTaskVector):
        return [method.task_vector]
    return list(method)


def _exact_match(
    lens: Lens,
    engine: Engine[Any],
    reading: Reading,
    edit: Edit,
    started: Bool[Tensor, "batch variant"],
) -> Float[Tensor, "batch variant"]:
    """1 where the first line of the greedy continuation is the whole answer, else 0.

    A variant that starts no answer of these prompts right is not continued.
    """
    right = torch.zeros(started.shape, dtype=torch.float64)
    alive = started.any(dim=0).nonzero().flatten()
    if not len(alive):
        return right
    decode = lens.backend.tokenizer.batch_decode
    answers = [text.strip() for text in decode([list(a) for a in reading.batch.answers])]
    # One token more than the answer, so that a continuation that goes on is seen.
    length = max(len(answer) for answer in reading.batch.answers) + 1
    tokens = engine.generate(reading, edit.of_variants(alive), length)
    for column, variant in enumerate(alive.tolist()):
        for row, (text, answer) in enumerate(zip(decode(tokens[:, column]), answers, strict=True)):
            right[row, variant] = float(text.split("\n")[0].strip() == answer)
    return right


def _row(task: str, method: str, kind: str, metric: str, interval: Interval) -> dict[str, Any]:
    return {
        "task": task,
        "method": method,
        "prompt": kind,
        "metric": metric,
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "n": interval.n,
    }
