"""The lens: a frozen model, the engine that edits its prompts, and how its answers are read."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.display import Displayed
from tvlens.errors import ModelError, UnknownNameError
from tvlens.lens.edits import Edit
from tvlens.lens.engine import Engine, Reading
from tvlens.lens.readout import Answer, Readout, WholeAnswer
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch
from tvlens.tasks.base import PromptSet


@dataclass(frozen=True)
class Lens(Displayed):
    """A frozen model seen through its attention heads. Made by `tvlens.load`.

    Attributes:
        backend: the HookedTransformer or TransformerBridge underneath.
        engine: runs edited prompts, by replay where the self-check allows it.
        readout: turns outputs at the query position into losses and scores.
        prefix: special tokens put before every prompt.
        max_tokens: prompt tokens that are read at once; bounds memory. The default keeps what a CPU
            works on in its cache; accelerators want more.
        max_rows: edited rows that are run at once; bounds memory.
    """

    backend: Backend
    engine: Engine[Any]
    readout: Readout
    prefix: tuple[int, ...] = ()
    max_tokens: int = 1024
    max_rows: int = 512

    @property
    def name(self) -> str:
        return self.backend.name

    @property
    def n_layer(self) -> int:
        return self.backend.n_layer

    @property
    def n_head(self) -> int:
        return self.backend.n_head

    @property
    def d_model(self) -> int:
        return self.backend.d_model

    @property
    def w_o(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output projection of every head."""
        return self.backend.w_o

    def __repr__(self) -> str:
        return (
            f"Lens({self.name!r}, {self.backend.kind}, {self.n_layer} layers x {self.n_head} "
            f"heads, d_model {self.d_model}, {self.engine.name})"
        )

    def encode(self, prompts: PromptSet) -> Batch:
        """The prompts as inputs of the model, padded on the left where need be, with their answers.

        Raises:
            TaskError: an answer tokenises to nothing, or a prompt exceeds the context.
            ModelError: the model does not read prompts of this kind.
        """
        batch = self.backend.encode(prompts, prefix=self.prefix)
        whole = self.readout.reads == "whole"
        return self.backend.with_answers(prompts, batch) if whole else batch

    def answering(self, answer: Answer) -> "Lens":
        """The lens that reads so much of the answers: itself, or one of whole answers.

        That has prompts with their answers behind them, and every token of an answer and what ends
        it read off the one before. What is written for a lens, such as `mean_head_outputs`,
        `indirect_effects` and `fit_ltv`, is then about the log-probability of all that.

        Args:
            answer: "first" or "whole".

        Raises:
            UnknownNameError: it is neither.
            ModelError: the model answers with numbers.
        """
        if answer not in get_args(Answer):
            raise UnknownNameError(f"unknown answer {answer!r}; expected 'first' or 'whole'")
        if answer == self.readout.reads:
            return self
        if answer == "first":
            raise ModelError(
                f"first tokens asked of a lens on {self.name!r} that reads whole answers; use the "
                "lens that it was made from"
            )
        self.require_text("answer='whole'")
        return replace(self, engine=self.engine.anywhere, readout=WholeAnswer())

    def require_text(self, what: str) -> None:
        """Refuse what needs answers of several tokens, of a model that answers with numbers.

        Raises:
            ModelError: the model does.
        """
        if not self.readout.has_text:
            raise ModelError(
                f"{what} asked of {self.name!r}, which answers with one number; expected a model "
                "of text: leave it out"
            )

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The model in evaluation mode without parameter gradients; both are restored on exit."""
        with self.backend.frozen():
            yield

    def engine_for(self, edit: Edit) -> Engine[Any]:
        """The engine that can run this edit: the lens' own if it can.

        What is changed before the query changes what the query sees, so such edits need more than
        the query position. Prompts must be read by the engine that runs them.
        """
        return self.engine if self.engine.runs(edit) else self.engine.anywhere

    def readings(
        self, batch: Batch, *, engine: Engine[Any] | None = None, max_prompts: int | None = None
    ) -> Iterator[Reading]:
        """The prompts read in pieces of at most `max_tokens` tokens, one piece at a time.

        Rows that share a prompt stay together.

        Args:
            batch: the prompts.
            engine: reads them, and is the one to run them; the lens' own by default.
            max_prompts: most rows to a piece, as many for each as tokens are read off it.
        """
        engine = engine or self.engine
        step = max(1, self.max_tokens // batch.inputs.shape[1])
        if max_prompts is not None:
            step = max(1, min(step, max_prompts // (batch.shared * batch.n_read)))
        step *= batch.shared
        for start in range(0, len(batch), step):
            yield engine.read(batch[start : start + step])

    def readings_for(
        self, batch: Batch, edits: Sequence[Edit]
    ) -> Iterator[tuple[slice, list[tuple[Engine[Any], Reading]]]]:
        """The prompts piece by piece, each piece read by every engine that is needed.

        An edit that acts elsewhere too does not cost those that do not the engine of the query.

        Args:
            batch: the prompts.
            edits: what will be run.

        Yields:
            Which rows of the batch, and for every edit its engine and what that has read.
        """
        engines = [self.engine_for(edit) for edit in edits]
        needed = list(dict.fromkeys(engines))
        done = 0
        pieces = [self.readings(batch, engine=engine) for engine in needed]
        for found in zip(*pieces, strict=True):
            rows = slice(done, done + len(found[0]))
            read = dict(zip(needed, found, strict=True))
            yield rows, [(engine, read[engine]) for engine in engines]
            done = rows.stop

    def variants(self, reading: Reading, edit: Edit) -> Iterator[Edit]:
        """The edit in pieces of at most `max_rows` rows for these prompts."""
        step = max(1, self.max_rows // (len(reading) * reading.batch.n_read))
        for index in torch.arange(edit.n_variant).split(step):
            yield edit.of_variants(index)

    def outputs(
        self,
        prompts: PromptSet | Batch,
        edit: Edit,
        read: Callable[[Tensor, Batch], Tensor],
        *,
        advance: Callable[[int], None] | None = None,
    ) -> Tensor:
        """`read(outputs, batch)` of every prompt under every variant, in bounded memory.

        Args:
            prompts: what the model is asked.
            edit: what is changed; where it acts decides which engine runs it.
            read: reduces outputs `[batch variant … d_vocab]` to `[batch variant …]`.
            advance: called with the number of prompts finished, for progress bars.

        Returns:
            The reduced outputs of all prompts and variants, `[batch variant …]`.
        """
        batch = prompts if isinstance(prompts, Batch) else self.encode(prompts)
        engine = self.engine_for(edit)
        found: list[Tensor] = []
        done = 0
        with self.frozen(), torch.no_grad():
            for reading in self.readings(batch, engine=engine):
                of_piece = edit.of_prompts(done, done + len(reading))
                parts = [
                    read(engine.run(reading, piece), reading.batch)
                    for piece in self.variants(reading, of_piece)
                ]
                found.append(torch.cat(parts, dim=1))
                done += len(reading)
                if advance is not None:
                    advance(len(reading))
        return torch.cat(found)
