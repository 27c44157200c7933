"""Prompts as a model reads them: inputs, padding, where the query is, and what should follow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tvlens.errors import ShapeError


@dataclass(frozen=True)
class Batch:
    """Encoded prompts, padded on the left; of whole answers, with these behind them.

    Attributes:
        inputs: token ids, or vectors for models that read numbers; padding holds a valid input
            that the mask hides.
        mask: True at real inputs.
        query: column at which each prompt is asked, the query position: that of its last input, or
            an earlier one for prompts asked at several positions.
        target: first token of the right answer, or the right number; of several right answers,
            that of the one shown in demonstrations, which stands first.
        answers: all tokens of every right answer, per prompt; empty for numbers.
        shared: so many neighbouring rows hold the same inputs, asked at different positions; they
            are read once.
        following: tokens that should follow the query, which is then at one column in all prompts,
            and each column behind it: those of the answer and its end; -1 where there are no more.
            None where only the first is asked for.
    """

    inputs: Int[Tensor, "batch pos"] | Float[Tensor, "batch pos n_dims"]
    mask: Bool[Tensor, "batch pos"]
    query: Int[Tensor, " batch"]
    target: Int[Tensor, " batch"] | Float[Tensor, " batch"]
    answers: tuple[tuple[tuple[int, ...], ...], ...]
    shared: int = 1
    following: Int[Tensor, "batch read"] | None = None

    def __len__(self) -> int:
        return self.inputs.shape[0]

    def __getitem__(self, rows: slice) -> "Batch":
        shared = 1 if self.whole_prompts(rows) is None else self.shared
        return self._map(lambda tensor: tensor[rows], self.answers[rows], shared)._narrowed()

    def whole_prompts(self, rows: slice) -> slice | None:
        """Which of the prompts that rows share `rows` holds all rows of; None if it cuts one."""
        start, stop, step = rows.indices(len(self))
        if self.shared > 1 and (step != 1 or start % self.shared or stop % self.shared):
            return None
        return slice(start // self.shared, stop // self.shared, step)

    @property
    def prompt_of_row(self) -> Int[Tensor, " batch"]:
        """Number of the prompt behind every row, counting prompts that rows share once."""
        return torch.arange(len(self), device=self.inputs.device) // self.shared

    @property
    def n_read(self) -> int:
        """At how many columns of each prompt tokens are read off, from the query on."""
        return 1 if self.following is None else self.following.shape[1]

    @property
    def answer_columns(self) -> range:
        """Columns behind the query at which tokens are read off."""
        if self.following is None:
            return range(0)
        query = int(self.query[0])
        return range(query + 1, query + self.n_read)

    @property
    def read_columns(self) -> Int[Tensor, "batch read"]:
        """Columns at which tokens are read off, from the query on."""
        return self.query[:, None] + torch.arange(self.n_read, device=self.query.device)

    @property
    def right(self) -> Int[Tensor, "batch answer"]:
        """First tokens of all right answers; prompts that have fewer repeat their first."""
        most = max(map(len, self.answers))
        if most == 1:
            return self.target[:, None]
        rows = [[answer[0] for answer in each] for each in self.answers]
        padded = [[*row, *row[:1] * (most - len(row))] for row in rows]
        return torch.tensor(padded, device=self.target.device)

    def _map(
        self,
        change: Callable[[Tensor], Tensor],
        answers: tuple[tuple[tuple[int, ...], ...], ...],
        shared: int = 1,
    ) -> "Batch":
        inputs, mask = change(self.inputs), change(self.mask)
        query, target = change(self.query), change(self.target)
        following = None if self.following is None else change(self.following)
        return Batch(inputs, mask, query, target, answers, shared, following)

    def take(self, index: slice | Int[Tensor, " chosen"]) -> "Batch":
        """The prompts at `index`, in that order; a slice copies nothing."""
        if isinstance(index, slice):
            return self[index]
        answers = tuple(self.answers[i] for i in index.tolist())
        return self._map(lambda tensor: tensor[index], answers)._narrowed()

    def _narrowed(self) -> "Batch":
        """The prompts without the columns behind them off which none is read."""
        if self.following is None:
            return self
        n = int((self.following >= 0).any(dim=0).sum())
        width = self.inputs.shape[1] - self.n_read + n
        inputs, mask = self.inputs[:, :width], self.mask[:, :width]
        return replace(self, inputs=inputs, mask=mask, following=self.following[:, :n])

    @classmethod
    def join(cls, parts: Sequence["Batch"]) -> "Batch":
        """The prompts of several batches, padded as `paddings` says."""
        added = cls.paddings(parts)

        def widen(tensors: list[Tensor]) -> Tensor:
            return torch.cat(
                [
                    pad(t, (0, 0) * (t.ndim - 2) + around)
                    for t, around in zip(tensors, added, strict=True)
                ]
            )

        following = [
            pad(part.following, (0, behind), value=-1)
            for part, (_, behind) in zip(parts, added, strict=True)
            if part.following is not None
        ]
        return cls(
            widen([part.inputs for part in parts]),
            widen([part.mask for part in parts]),
            torch.cat([part.query + n for part, (n, _) in zip(parts, added, strict=True)]),
            torch.cat([part.target for part in parts]),
            tuple(answer for part in parts for answer in part.answers),
            parts[0].shared if len({part.shared for part in parts}) == 1 else 1,
            torch.cat(following) if following else None,
        )

    @staticmethod
    def paddings(parts: Sequence["Batch"]) -> list[tuple[int, int]]:
        """Columns before and behind each of several batches that make them equally wide.

        Prompts end at one column, and so do answers behind them.
        """
        answers = [part.n_read - 1 for part in parts]
        prompts = [part.inputs.shape[1] - n for part, n in zip(parts, answers, strict=True)]
        return [
            (max(prompts) - prompt, max(answers) - answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]

    def with_answers(self, ends: Sequence[Sequence[int]]) -> "Batch":
        """The prompts with the answers that are shown first behind them, padded on the right.

        Each token of an answer is read off the column before it, and what ends it off its last.

        Args:
            ends: tokens that end each answer, none for those that nothing ends.
        """
        rows = [[*several[0], *end] for several, end in zip(self.answers, ends, strict=True)]
        most = max(map(len, rows))
        padded = [[*row, *[-1] * (most - len(row))] for row in rows]
        following = torch.tensor(padded, device=self.inputs.device)
        # What nothing follows is read off, and not read.
        real = following[:, 1:] >= 0
        answers = following[:, :-1].where(real, 0)
        return replace(
            self,
            inputs=torch.cat([self.inputs, answers.to(self.inputs.dtype)], dim=1),
            mask=torch.cat([self.mask, real], dim=1),
            following=following,
        )

    def at_answers(self) -> "Batch":
        """A row for every token of the answers behind the prompts, asked there."""
        if self.following is None:
            return self[:0]
        row, behind = (self.following[:, 1:] >= 0).nonzero(as_tuple=True)
        target = self.following[row, behind + 1]
        return replace(
            self.take(row),
            query=self.query[row] + behind + 1,
            target=target,
            answers=tuple(((token,),) for token in target.tolist()),
            following=None,
        )

    def require_query_last(self) -> None:
        """Refuse a batch in which something follows a query position.

        Raises:
            ShapeError: a prompt is asked before its last input.
        """
        width = self.inputs.shape[1]
        if not bool((self.query == width - 1).all()):
            raise ShapeError(
                "Batch: generation continues after the last column, but some query positions lie "
                "before it; ask every prompt at its last input, curves at one number of points"
            )

    def to(self, device: torch.device) -> "Batch":
        """The batch on `device`."""
        return self._map(lambda tensor: tensor.to(device), self.answers, self.shared)

    @classmethod
    def of_sequences(
        cls, inputs: Float[Tensor, "batch pos n_dims"], target: Float[Tensor, " batch"]
    ) -> "Batch":
        """Sequences of vectors of one length, whose query is the last position."""
        mask = torch.ones(inputs.shape[:2], dtype=torch.bool, device=inputs.device)
        query = torch.full((len(inputs),), inputs.shape[1] - 1, device=inputs.device)
        return cls(inputs, mask, query, target, ((),) * len(inputs))

    @classmethod
    def pad(
        cls,
        rows: Sequence[Sequence[int]],
        answers: Sequence[Sequence[Sequence[int]]],
        *,
        pad_id: int = 0,
    ) -> "Batch":
        """The batch of token rows padded on the left to the longest one, each asked at its end.

        Args:
            rows: token ids of each prompt.
            answers: token ids of every right answer, at least one of one token for each prompt.
            pad_id: id written into padding.
        """
        width = max(len(row) for row in rows)
        inputs = torch.full((len(rows), width), pad_id, dtype=torch.long)
        mask = torch.zeros((len(rows), width), dtype=torch.bool)
        for i, row in enumerate(rows):
            inputs[i, width - len(row) :] = torch.tensor(row, dtype=torch.long)
            mask[i, width - len(row) :] = True
        query = torch.full((len(rows),), width - 1)
        target = torch.tensor([each[0][0] for each in answers], dtype=torch.long)
        kept = tuple(tuple(map(tuple, each)) for each in answers)
        return cls(inputs, mask, query, target, kept)
