"""What a model is asked: pairs, the text layout around them, single prompts and sets of prompts.

The default layout is that of Todd et al. (ICLR 2024, arXiv 2310.15213, section 2)::

    Q: {x}
    A: {y}

    Q: {query}
    A:

These are plain frozen values. Drawing demonstrations and queries for a task is done by
`Task.prompts`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, groupby
from typing import overload

from tvlens.errors import TaskError
from tvlens.tasks.base import PromptKind, Split
from tvlens.tasks.streams import digest


def require_text(what: str, text: str) -> None:
    """Refuse what no file can hold: half of a surrogate pair.

    Raises:
        TaskError: the text, called `what` in the message, holds one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TaskError(
            f"{what} holds half a surrogate pair, {text[error.start]!a}, at position "
            f"{error.start}, which is no Unicode text; correct it"
        ) from error


@dataclass(frozen=True)
class Pair:
    """One input of a task and its output.

    Attributes:
        input: What is asked.
        output: The right answer, which demonstrations show.
        also: Other right answers.
    """

    input: str
    output: str
    also: tuple[str, ...] = ()

    @property
    def answers(self) -> tuple[str, ...]:
        """All right answers, the one that is shown first."""
        return (self.output, *self.also)


@dataclass(frozen=True)
class Span:
    """Characters of a prompt's text that play one role.

    Attributes:
        role: "start" (opening, instruction and the separator behind it), "input 1" and on, and
            "answer 1" and on, of the demonstrations, "separators" (all that stands between these,
            and before the query), "query" (what is asked), or "answer prefix" (what ends the text).
        start: The first character.
        stop: The character behind the last.
    """

    role: str
    start: int
    stop: int


@dataclass(frozen=True)
class Template:
    """The text layout of a prompt.

    Attributes:
        query_prefix: Stands before every input.
        answer_prefix: Stands before every output, and ends the prompt.
        field_separator: Stands between an input and its answer prefix.
        pair_separator: Stands between two pairs.
        answer_space: Stands between the answer prefix and an output, and so begins the
            continuation.
        instruction: Opens the prompt, followed by one `pair_separator`; empty for none.
        opening: Stands before all of that as it is.
    """

    query_prefix: str = "Q: "
    answer_prefix: str = "A:"
    field_separator: str = "\n"
    pair_separator: str = "\n\n"
    answer_space: str = " "
    instruction: str = ""
    opening: str = ""

    def __post_init__(self) -> None:
        for name, text in asdict(self).items():
            require_text(f"template: {name}", text)

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all its parts."""
        return digest(asdict(self))

    @property
    def behind_answer(self) -> str:
        """What stands behind an answer before the next input."""
        return self.pair_separator + self.query_prefix

    def render(self, demos: Sequence[Pair], query_input: str) -> str:
        """The prompt text: the demonstrations in order, then the query without its answer."""
        return "".join(text for _, text in self._pieces(demos, query_input))

    def spans(self, demos: Sequence[Pair], query_input: str) -> tuple[Span, ...]:
        """The roles that the characters of the prompt text play, in order, none left out.

        None for a text that is given as it is: without demonstrations, or anything around it.
        """
        roles = [role for role, text in self._pieces(demos, query_input) for _ in text]
        if not {*roles} - {"query"}:
            return ()
        parts = [(role, len([*each])) for role, each in groupby(roles)]
        ends = accumulate(length for _, length in parts)
        return tuple(
            Span(role, end - length, end) for (role, length), end in zip(parts, ends, strict=True)
        )

    def _pieces(self, demos: Sequence[Pair], query_input: str) -> Iterator[tuple[str, str]]:
        """Role and text of all that the prompt is put together from."""
        before_answer = self.field_separator + self.answer_prefix
        yield "start", self.opening
        if self.instruction:
            yield "start", self.instruction + self.pair_separator
        for i, demo in enumerate(demos, start=1):
            yield "separators", self.query_prefix
            yield f"input {i}", demo.input
            yield "separators", before_answer
            yield f"answer {i}", self.answer_space + demo.output
            yield "separators", self.pair_separator
        yield "separators", self.query_prefix
        yield "query", query_input
        yield "answer prefix", before_answer


@dataclass(frozen=True)
class Prompt:
    """One prompt as a value: its demonstrations as shown, the pair asked, and the layout.

    With `kind="shuffled"` the demonstrations hold the outputs that are shown, not the true ones.
    """

    demos: tuple[Pair, ...]
    query: Pair
    kind: PromptKind
    template: Template

    @property
    def text(self) -> str:
        """The text that the model reads; it ends with the template's answer prefix."""
        return self.template.render(self.demos, self.query.input)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The roles that the characters of `text` play, in order, none left out; none at all for a
        text that no layout surrounds."""
        return self.template.spans(self.demos, self.query.input)

    @property
    def answer(self) -> str:
        """The correct output of the query, without leading space."""
        return self.query.output

    @property
    def continuations(self) -> tuple[str, ...]:
        """What follows `text` when the model answers correctly: each right answer with its leading
        space."""
        return tuple(self.template.answer_space + answer for answer in self.query.answers)


@dataclass(frozen=True)
class TokenPrompts:
    """Prompts that are tokens already, for models without a tokenizer or tasks without words.

    Made by `Prompts.of_tokens`. The model reads them as they are: no special token is put before.

    Attributes:
        rows: token ids of each prompt.
        answers: token ids of each right answer.
        task: Name of the task.
        split: Name of the split that was asked.
        kind: The kind of every prompt.
        shots: Demonstrations per prompt.
        seed: The seed they were drawn with.
    """

    rows: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]
    task: str = "tokens"
    split: Split = "train"
    kind: PromptKind = "clean"
    shots: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.rows) != len(self.answers) or not self.rows:
            raise TaskError(
                f"task {self.task!r}: {len(self.rows)} rows of tokens and {len(self.answers)} "
                "answers; expected one answer for each of at least one row"
            )
        for what, each in (("row", self.rows), ("answer", self.answers)):
            for i, tokens in enumerate(each):
                if not tokens or min(tokens) < 0:
                    raise TaskError(
                        f"task {self.task!r}: {what} {i} is {list(tokens)}; expected one token id "
                        "or more, none of them negative"
                    )

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: slice | Sequence[int]) -> "TokenPrompts":
        """The chosen prompts, in the order asked."""
        chosen = range(len(self))[index] if isinstance(index, slice) else index
        rows, answers = (tuple(each[i] for i in chosen) for each in (self.rows, self.answers))
        return replace(self, rows=rows, answers=answers)

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of kind, rows and answers."""
        return digest([self.kind, self.rows, self.answers])


@dataclass(frozen=True)
class Prompts:
    """An ordered set of prompts and where it came from.

    Attributes:
        task: Name of the task.
        split: Name of the split that was asked.
        kind: The kind of every prompt.
        shots: Demonstrations per prompt.
        seed: The seed they were drawn with.
        items: The prompts.
    """

    task: str
    split: Split
    kind: PromptKind
    shots: int
    seed: int
    items: tuple[Prompt, ...]

    @staticmethod
    def of_tokens(
        rows: Sequence[Sequence[int]],
        answers: Sequence[int | Sequence[int]],
        *,
        task: str = "tokens",
        split: Split = "train",
        kind: PromptKind = "clean",
        shots: int = 0,
        seed: int = 0,
    ) -> TokenPrompts:
        """Prompts given as tokens, which need no tokenizer.

        Example:
            >>> Prompts.of_tokens([[7, 12, 113], [3, 9, 113]], [19, 12]).answers
            ((19,), (12,))

        Args:
            rows: token ids of each prompt, asked at its end; of a tensor, its `tolist()`.
            answers: token id, or ids, of each right answer.
            task: name of the task.
            split: what the prompts are for.
            kind: whether they carry the task ("clean"), or hide it.
            shots: demonstrations in each.
            seed: the seed they were drawn with.

        Raises:
            TaskError: there are no rows, not as many answers, or a row or answer is empty.
        """
        several = [answer if isinstance(answer, Sequence) else [answer] for answer in answers]
        return TokenPrompts(
            tuple(map(tuple, rows)), tuple(map(tuple, several)), task, split, kind, shots, seed
        )

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.items)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice | Sequence[int]) -> "Prompts": ...

    def __getitem__(self, index: int | slice | Sequence[int]) -> "Prompt | Prompts":
        """One prompt for an int; the chosen prompts, in the order asked, for a slice or several
        ints."""
        if isinstance(index, int):
            return self.items[index]
        if isinstance(index, slice):
            return replace(self, items=self.items[index])
        return replace(self, items=tuple(self.items[i] for i in index))

    @property
    def template(self) -> Template:
        """The layout of all prompts.

        Raises:
            TaskError: they have several.
        """
        found = {prompt.template for prompt in self.items}
        if len(found) != 1:
            raise TaskError(
                f"prompts of task {self.task!r} have {len(found)} layouts; expected one"
            )
        return found.pop()

    @property
    def texts(self) -> list[str]:
        """The text of every prompt, in order."""
        return [prompt.text for prompt in self.items]

    @property
    def answers(self) -> list[str]:
        """The correct output of every prompt, in order."""
        return [prompt.answer for prompt in self.items]

    @property
    def continuations(self) -> list[tuple[str, ...]]:
        """What may follow every text, in order: right answers behind the template's answer
        space."""
        return [prompt.continuations for prompt in self.items]

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of kind, text and continuations of every prompt in order."""
        content = [[prompt.kind, prompt.text, *prompt.continuations] for prompt in self.items]
        return digest(content)
