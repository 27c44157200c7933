"""Methods against the same test prompts: one tidy table."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import ModelError, NumericalError, UnknownNameError, VectorError
from tvlens.evaluation.answers import first_tokens_tell, whole_answers
from tvlens.lens.lens import Lens
from tvlens.stats import Interval, bootstrap_mean, share_interval
from tvlens.tasks.base import KINDS, PromptKind, PromptSet, PromptSource, Split
from tvlens.tasks.text.prompts import Prompts
from tvlens.vectors.catalogue import load_vector
from tvlens.vectors.vector import TaskVector, Vector, edits_of

RESULT_COLUMNS = ["task", "method", "prompt", "metric", "value", "ci_low", "ci_high", "n"]
RESULT_COLUMNS += ["answers"]
SHARES = ("accuracy", "exact_match")
"""Metrics that are shares of prompts."""

BARE = "bare"
"""The method that adds nothing, which is always measured."""

Draws = Vector | Path | str | Sequence[Vector] | None
Method = Draws | Mapping[PromptKind, Draws]
"""A vector, the file of one, draws to average over, nothing, or one of these per prompt kind."""


@dataclass(frozen=True)
class Measured:
    """What every method does on every prompt.

    Attributes:
        methods: names of the methods; `bare` is the first.
        measures: names of the measures.
        values: the measures; those of several draws are averaged, prompt by prompt.
        answers: right answers of the prompt that has most.
        first_tokens: that its right answers begin with.
        telling: whether first tokens tell the answers of different prompts apart
            (`first_tokens_tell`).
    """

    methods: tuple[str, ...]
    measures: tuple[str, ...]
    values: Float[Tensor, "prompt method measure"]
    answers: int = 1
    first_tokens: int = 0
    telling: bool = True

    def of(self, method: str, measure: str) -> Float[Tensor, " prompt"]:
        """One measure of one method on every prompt."""
        return self.values[:, self.methods.index(method), self.measures.index(measure)]


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
    progress: Callable[[int], None] | None = None,
) -> pd.DataFrame:
    """Every method on the same prompts: mean and 95% interval over prompts.

    Intervals are of the bootstrap; those of shares that are 0 or 1 are Wilson's (`share_interval`).

    Two rows of methods are always there: `none`, no vector on prompts that do not carry the task
    (zero, shuffled), and `icl`, no vector on clean prompts.

    Example:
        >>> table = evaluate(lens, task, {"LTV": ltv, "FV": fv})  # doctest: +SKIP

    Args:
        lens: the model.
        task: where prompts are drawn from.
        methods: what is added to the residual stream, by name: a vector, the file of one, several
            draws to average over, or one of these for each kind of prompts (kinds left out have no
            rows).
        split: whose pairs are asked.
        kinds: kinds of prompts.
        shots: examples in prompts that have any.
        n: number of prompts; each pair of the split once by default.
        seed: seed of the prompts and of the bootstrap.
        exact_match: also generate whole answers greedily and compare them; by default where the
            model's answers are text.
        progress: called with the number of prompts finished, of all kinds together.

    Returns:
        A tidy table with columns task, method, prompt, metric, value, ci_low, ci_high, n (number
        of prompts), answers (right answers of the prompt that has most). Metrics are the measures
        of the lens' readout; for text accuracy and cross_entropy (first answer token; cross-entropy
        in nats), perplexity, and exact_match (the greedy continuation is the answer). Any right
        answer counts in accuracy and exact_match, the likeliest in cross_entropy. Of a lens of
        whole answers the one metric is answer_cross_entropy, summed over an answer's tokens and its
        end. Where first
        tokens do not tell answers apart, a warning says so, and exact_match comes first.

    Raises:
        UnknownNameError: a method is called `none`, `icl` or `bare`, or is for kinds of prompts
            that do not exist or are not asked.
        VectorError: a method is no vector, or has no draws.
        RunError: a file holds no vector.
        ShapeError: a vector does not fit the model.
    """
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise UnknownNameError(f"unknown kind {unknown[0]!r} of prompts; expected {_LISTED}")
    reserved = sorted({"none", "icl", BARE} & set(methods))
    if reserved:
        raise UnknownNameError(
            f"method name {reserved[0]!r} is taken by the baseline without a vector; rename yours"
        )
    vectors = {name: by_kind(lens, name, method, kinds) for name, method in methods.items()}
    rows: list[dict[str, Any]] = []
    telling = True
    for kind in kinds:
        prompts = task.prompts(split, shots=shots, n=n, seed=seed, kind=kind)
        asked = {name: given[kind] for name, given in vectors.items() if kind in given}
        found = evaluate_prompts(lens, prompts, asked, exact_match=exact_match, progress=progress)
        if telling and not found.telling:
            telling = False
            warnings.warn(
                f"task {task.name!r} under {lens.name!r}: its answers begin with only "
                f"{found.first_tokens} different tokens, which most of them share with others, so "
                "that first-token accuracy and cross-entropy say little; look at exact_match",
                stacklevel=2,
            )
        for method in found.methods:
            label = method if method != BARE else "icl" if kind == "clean" else "none"
            for metric in found.measures:
                make = share_interval if metric in SHARES else bootstrap_mean
                interval = make(found.of(method, metric), seed=seed)
                intervals = {metric: interval}
                if metric == "cross_entropy":
                    intervals["perplexity"] = interval.map(partial(_perplexity, label))
                for name, each in intervals.items():
                    rows.append(_row(task.name, label, kind, name, each, found.answers))
    return pd.DataFrame(rows, columns=RESULT_COLUMNS)


def evaluate_prompts(
    lens: Lens,
    prompts: PromptSet,
    methods: Mapping[str, Draws],
    *,
    exact_match: bool | None = None,
    progress: Callable[[int], None] | None = None,
) -> Measured:
    """Every method, and the model without a vector, on every prompt.

    Methods of several draws are averaged over their draws, prompt by prompt.

    Args:
        lens: the model.
        prompts: what is asked.
        methods: what is added, by name.
        exact_match: also generate whole answers; by default where answers are text.
        progress: called with the number of prompts finished.

    Raises:
        ModelError: exact_match is asked of a model whose answers are not text.
        VectorError: a method is no vector, or has no draws.
        ShapeError: a vector does not fit the model.
        TaskError: a method is made for each prompt, and the prompts have no donors.
    """
    if exact_match is None:
        exact_match = lens.readout.has_text and lens.readout.reads == "first"
    if exact_match and not lens.readout.has_text:
        raise ModelError(
            f"exact_match compares generated text, but {lens.name!r} answers with numbers; pass "
            "exact_match=False or leave it out"
        )
    draws = {name: draws_of(lens, name, given) for name, given in {BARE: None, **methods}.items()}
    every = [vector for each in draws.values() for vector in each]
    edits = edits_of(every, lens, prompts)
    batch = lens.encode(prompts)
    template = prompts.template if isinstance(prompts, Prompts) else None
    names = [measure.name for measure in lens.readout.measures]
    answers = max(1, *map(len, batch.answers)) if lens.readout.has_text else 1
    first_tokens, telling = first_tokens_tell(batch.answers) if lens.readout.has_text else (0, True)
    if exact_match:
        names = [*names, "exact_match"] if telling else ["exact_match", *names]
    measured = torch.full((len(batch), len(every), len(names)), torch.nan, dtype=torch.float64)
    with lens.frozen(), torch.no_grad():
        for rows, read in lens.readings_for(batch, [edit for edit, _ in edits]):
            for (edit, index), (engine, reading) in zip(edits, read, strict=True):
                values = []
                for piece in lens.variants(reading, edit.of_prompts(rows.start, rows.stop)):
                    outputs = engine.run(reading, piece)
                    values.append(lens.readout.measure(outputs, reading.batch).double().cpu())
                    if exact_match:
                        started = lens.readout.answered(outputs, reading.batch)
                        right = whole_answers(engine, reading, piece, started, template)
                        parts = [values[-1], right[..., None]]
                        values[-1] = torch.cat(parts if telling else parts[::-1], dim=-1)
                measured[rows, index] = torch.cat(values, dim=1)
            if progress is not None:
                progress(rows.stop - rows.start)
    sizes = [len(each) for each in draws.values()]
    means = [part.mean(dim=1) for part in measured.split(sizes, dim=1)]
    measures, by_method = tuple(names), torch.stack(means, dim=1)
    return Measured(tuple(draws), measures, by_method, answers, first_tokens, telling)


def _perplexity(method: str, nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError as error:
        raise NumericalError(
            f"method {method!r} has a cross-entropy of {nats:.4g} nats, whose perplexity is too "
            "large for a number; add a smaller vector"
        ) from error


_LISTED = ", ".join(map(repr, KINDS))
_REMEDY = (
    "give a TaskVector, HeadMixture or LearnableTaskVector, the file of one, a list of them, or "
    "one of these for each kind of prompts"
)


def by_kind(
    lens: Lens, name: str, method: Method, kinds: Sequence[PromptKind]
) -> dict[PromptKind, Sequence[Vector]]:
    """What the method adds on each kind of prompts; the kinds asked for which it has something."""
    if not isinstance(method, Mapping):
        return dict.fromkeys(kinds, draws_of(lens, name, method))
    strange = [kind for kind in method if kind not in KINDS]
    if strange:
        raise UnknownNameError(
            f"method {name!r} is given for unknown kind {strange[0]!r} of prompts; expected "
            f"{_LISTED}"
        )
    found = {kind: draws_of(lens, name, method[kind]) for kind in kinds if kind in method}
    if not found:
        raise UnknownNameError(
            f"method {name!r} is given for {', '.join(map(repr, method)) or 'no kind'} of prompts, "
            f"but {', '.join(map(repr, kinds))} are asked; give it for one of these"
        )
    return found


def draws_of(lens: Lens, name: str, given: Draws) -> Sequence[Vector]:
    """The vectors that a method averages over."""
    if given is None:
        return [TaskVector.none(lens)]
    if isinstance(given, Vector):
        return [given]
    if isinstance(given, str | Path):
        return [load_vector(given)]
    if not isinstance(given, Sequence):
        raise VectorError(f"method {name!r} is a {type(given).__name__}, no vector; {_REMEDY}")
    if not given:
        raise VectorError(f"method {name!r} is an empty list: there is no vector; {_REMEDY}")
    for number, vector in enumerate(given):
        if not isinstance(vector, Vector):
            raise VectorError(
                f"method {name!r}: number {number} of its {len(given)} draws is a "
                f"{type(vector).__name__}, no vector; {_REMEDY}"
            )
    return [vector for vector in given if isinstance(vector, Vector)]


def _row(
    task: str, method: str, kind: str, metric: str, interval: Interval, answers: int
) -> dict[str, Any]:
    return {
        "task": task,
        "method": method,
        "prompt": kind,
        "metric": metric,
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "n": interval.n,
        "answers": answers,
    }
