"""What suffix replay keeps of prompts that it has read."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from tvlens.lens.engine import Reading
from tvlens.models.batch import Batch

Around = tuple[int, int]
"""Columns that are put before and behind others."""


@dataclass(frozen=True)
class Passage(Reading):
    """Prompts read once, at all columns, or from the query on where answers stand behind it.

    Attributes:
        batch: the prompts.
        keys: keys of every layer, ready to attend, each where the layer's block is.
        values: values of every layer, alike.
        position: index of every column among the real tokens of its prompt.
        residual: unedited residual streams before each block and at the end, from `start` on.
        heads: unedited `hook_z` of every layer, from `start` on.
        factors: what blocks multiply the output of attention by at the query, or None.
        start: the first column that streams and heads are kept of; keys and values are of all.
    """

    batch: Batch
    keys: tuple[Float[Tensor, "batch kv_head pos d_head"], ...]
    values: tuple[Float[Tensor, "batch kv_head pos d_head"], ...]
    position: Int[Tensor, "batch pos"]
    residual: tuple[Float[Tensor, "batch kept d_model"], ...]
    heads: tuple[Float[Tensor, "batch kept head d_head"], ...]
    factors: Float[Tensor, "batch layer d_model"] | None = None
    start: int = 0

    @property
    def z(self) -> Float[Tensor, "batch layer head d_head"]:
        rows = torch.arange(len(self), device=self.position.device)
        at = self.batch.query - self.start
        return torch.stack([z[rows, at] for z in self.heads], dim=1)

    @property
    def factor(self) -> Float[Tensor, "batch layer d_model"] | None:  # type: ignore[override]
        return self.factors

    def rows(self, index: slice | Int[Tensor, " chosen"]) -> "Passage":
        batch = self.batch.take(index)
        width = batch.inputs.shape[1]

        def chosen(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(
                t[index if isinstance(index, slice) else index.to(t.device)] for t in tensors
            )

        return Passage(
            batch,
            chosen(tuple(keys[:, :, :width] for keys in self.keys)),
            chosen(tuple(values[:, :, :width] for values in self.values)),
            self.position[index, :width],
            chosen(tuple(x[:, : width - self.start] for x in self.residual)),
            chosen(tuple(z[:, : width - self.start] for z in self.heads)),
            None if self.factors is None else self.factors[index],
            self.start,
        )

    @classmethod
    def join(cls, readings: Sequence["Passage"]) -> "Passage":
        """The readings of several groups of prompts as one."""
        added = Batch.paddings([reading.batch for reading in readings])
        starts = [r.start + before for r, (before, _) in zip(readings, added, strict=True)]
        start = min(starts)
        from_start = [(own - start, behind) for own, (_, behind) in zip(starts, added, strict=True)]

        def columns(tensors: Iterable[Tensor], axis_after: int, around: list[Around]) -> Tensor:
            after = (0, 0) * axis_after
            pairs = zip(tensors, around, strict=True)
            return torch.cat([pad(t, (*after, *columns)) for t, columns in pairs])

        def layers(
            parts: list[tuple[Tensor, ...]], axis_after: int, around: list[Around]
        ) -> tuple[Tensor, ...]:
            return tuple(columns(of, axis_after, around) for of in zip(*parts, strict=True))

        factors = [reading.factors for reading in readings if reading.factors is not None]
        return cls(
            Batch.join([reading.batch for reading in readings]),
            layers([reading.keys for reading in readings], 1, added),
            layers([reading.values for reading in readings], 1, added),
            columns([reading.position for reading in readings], 0, added),
            layers([reading.residual for reading in readings], 1, from_start),
            layers([reading.heads for reading in readings], 2, from_start),
            torch.cat(factors) if factors else None,
            start,
        )
