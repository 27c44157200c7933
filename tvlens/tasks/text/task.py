"""A text task: pairs of input and output, split once and for all, and the prompts made of them."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

from tvlens.display import Displayed
from tvlens.errors import TaskError
from tvlens.tasks.base import PromptKind, Split
from tvlens.tasks.streams import digest, stream
from tvlens.tasks.text.draw import draw_queries, shuffle_labels
from tvlens.tasks.text.prompts import Pair, Prompt, Prompts, Template, require_text

_SPLIT_SEED = 0
_SPLIT_PERCENT = {"train": 70, "validation": 9}
_DEFAULT_TEMPLATE = Template()


@dataclass(frozen=True)
class Task(Displayed):
    """A relation given by pairs, each input once.

    Attributes:
        name: Short name, as in file names and tables.
        pairs: The pairs; their order decides the splits.
        description: What the output is of the input, in a sentence.
        source: Where the pairs come from.
        licence: SPDX expression and holder.
        template: The text layout of its prompts.

    Raises:
        TaskError: There is no pair, a string is empty or no Unicode text, an input occurs twice, or
            a right answer of one input does.
    """

    name: str
    pairs: tuple[Pair, ...]
    description: str
    source: str
    licence: str
    template: Template = _DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        if not self.pairs:
            raise TaskError(
                f"task {self.name!r} is empty: it has no pairs, at least one is expected; add pairs"
            )
        for text in (self.name, self.description, self.source, self.licence):
            require_text(f"task {self.name[:20]!a}", text)
        for pair in self.pairs:
            self._require_usable(pair)
        twice = [text for text, k in Counter(pair.input for pair in self.pairs).items() if k > 1]
        if twice:
            raise TaskError(
                f"task {self.name!r}: {len(twice)} inputs occur more than once, the first is "
                f"{twice[0]!r}; each input may occur once (tvlens.tasks.load_file merges identical "
                "pairs)"
            )

    def _require_usable(self, pair: Pair) -> None:
        if not pair.input or not all(pair.answers):
            raise TaskError(
                f"task {self.name!r}: {pair} has an empty string; every input and output needs "
                "a character"
            )
        if len(set(pair.answers)) < len(pair.answers):
            raise TaskError(
                f"task {self.name!r}: the right answers to {pair.input!r} repeat one; give each "
                "once"
            )
        for text in (pair.input, *pair.answers):
            require_text(f"task {self.name!r}: the pair of {pair.input[:20]!a}", text)

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of the pairs in order, without names or descriptions.

        And of the template, where it is not the default.
        """
        content: list[Any] = [[pair.input, *pair.answers] for pair in self.pairs]
        return digest(
            content if self.template == _DEFAULT_TEMPLATE else [content, asdict(self.template)]
        )

    def with_template(self, template: Template) -> "Task":
        """The same task, asked in another layout wherever its prompts are made.

        An instruction of the task opens the prompts still, unless the template has one itself.
        """
        own = self.template.instruction
        if own and own not in template.opening and not template.instruction:
            template = replace(template, instruction=own)
        return replace(self, template=template)

    def split(self, which: Split) -> tuple[Pair, ...]:
        """The pairs of one split: 70% train, 9% validation, 21% test (Todd et al., section 3).

        The positions 0 to n-1 are shuffled by `random.Random(0)`; the first 70% (rounded) are
        train, the next 9% (rounded) validation, the rest test. So two tasks of equal length are
        split alike: where a task and its inverse list their pairs in the same order, what one
        trains on the other never tests on.

        Raises:
            TaskError: The name is not a split, or the task is too small to have that split.
        """
        _require(self.name, "split", which, get_args(Split))
        n = len(self.pairs)
        order = list(range(n))
        random.Random(_SPLIT_SEED).shuffle(order)
        train_end = (_SPLIT_PERCENT["train"] * n + 50) // 100
        validation_end = train_end + (_SPLIT_PERCENT["validation"] * n + 50) // 100
        bounds = {
            "train": (0, train_end),
            "validation": (train_end, validation_end),
            "test": (validation_end, n),
        }
        start, end = bounds[which]
        if start == end:
            raise TaskError(
                f"task {self.name!r}: the {which} split is empty, because {n} pairs split 70/9/21 "
                "leave none for it; use a task with at least 6 pairs"
            )
        return tuple(self.pairs[i] for i in order[start:end])

    def prompts(
        self,
        split: Split,
        *,
        shots: int = 10,
        n: int | None = None,
        seed: int = 0,
        kind: PromptKind = "clean",
        template: Template | None = None,
        queries: Sequence[Pair] | None = None,
    ) -> Prompts:
        """Prompts that ask the pairs of one split; demonstrations always come from the train split.

        A demonstration never has the query's input. Prompts drawn with the same `split` and `seed`
        ask the same queries, whatever their kind and number of shots; "clean" and "shuffled"
        prompts with the same `shots` also show the same demonstration inputs in the same order, so
        effects can be compared prompt by prompt. Every choice has a random stream of its own, named
        by purpose, seed, split, shots and the prompt's number (`tvlens.tasks.text.draw`).

        Args:
            split: The split that is asked.
            shots: Demonstrations per prompt, at least 1; kind "zero" shows none and ignores it.
            n: Number of prompts. None asks each pair of the split once, in its order; a number
                draws queries in shuffled rounds, so more prompts than pairs ask pairs again, with
                fresh demonstrations.
            seed: Decides queries (with `n`), demonstrations and label permutations.
            kind: "clean"; "zero", without demonstrations; or "shuffled", with the outputs of the
                demonstrations permuted so that none keeps its own, as far as the outputs allow.
            template: The text layout, with its own instruction or none; the task's by default.
            queries: Ask these pairs of the split instead of all, for example those a model answers
                correctly.

        Raises:
            TaskError: Unknown split or kind, `shots` or `n` below 1, fewer train pairs than
                `shots + 1`, an empty split, or queries that are none or not in the split.
        """
        _require(self.name, "kind", kind, get_args(PromptKind))
        template = self.template if template is None else template
        pool = list(self.split(split)) if queries is None else self._checked(queries, split)
        if n is not None and n < 1:
            raise TaskError(f"task {self.name!r}: n={n} prompts asked for; n must be at least 1")
        asked = draw_queries(pool, n, seed=seed, split=split)
        if kind == "zero":
            items = tuple(Prompt((), query, kind, template) for query in asked)
            return Prompts(self.name, split, kind, 0, seed, items)
        train = self._train(shots)
        items = tuple(
            Prompt(self._demos(query, train, split, shots, seed, i, kind), query, kind, template)
            for i, query in enumerate(asked)
        )
        return Prompts(self.name, split, kind, shots, seed, items)

    def _demos(
        self,
        query: Pair,
        train: Sequence[Pair],
        split: str,
        shots: int,
        seed: int,
        number: int,
        kind: PromptKind,
    ) -> tuple[Pair, ...]:
        key: dict[str, int | str] = {"seed": seed, "split": split, "shots": shots, "prompt": number}
        candidates = [pair for pair in train if pair.input != query.input]
        demos = stream("demos", **key).sample(candidates, shots)
        if kind == "shuffled":
            return shuffle_labels(demos, candidates, stream("labels", **key))
        return tuple(demos)

    def _train(self, shots: int) -> tuple[Pair, ...]:
        if shots < 1:
            raise TaskError(
                f"task {self.name!r}: shots={shots}; clean and shuffled prompts need at least 1 "
                "demonstration, use kind='zero' for prompts without any"
            )
        train = self.split("train")
        if len(train) < shots + 1:
            raise TaskError(
                f"task {self.name!r}: {shots} shots need at least {shots + 1} train pairs, it has "
                f"{len(train)} (70% of {len(self.pairs)}); use at most {len(train) - 1} shots or "
                "add pairs"
            )
        return train

    def _checked(self, queries: Sequence[Pair], split: Split) -> list[Pair]:
        if not queries:
            raise TaskError(
                f"task {self.name!r}: queries is empty, at least one pair of the {split} split is "
                "expected; pass queries=None to ask the whole split"
            )
        members = set(self.split(split))
        strangers = [query for query in queries if query not in members]
        if strangers:
            raise TaskError(
                f"task {self.name!r}: {len(strangers)} of {len(queries)} queries are not in the "
                f"{split} split, the first is {strangers[0].input!r} -> {strangers[0].output!r}; "
                f"take them from task.split({split!r})"
            )
        return list(queries)


def _require(task: str, what: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        names = ", ".join(repr(name) for name in allowed)
        raise TaskError(f"task {task!r}: unknown {what} {value!r}; expected one of {names}")
