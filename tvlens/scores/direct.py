"""Direct logit attribution: what every part of the model itself says for the answer."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.display import Displayed
from tvlens.errors import ModelError, NumericalError, ShapeError
from tvlens.lens.engine import Reading
from tvlens.lens.heads import contributions
from tvlens.lens.lens import Lens
from tvlens.lens.norms import frozen, offset
from tvlens.lens.readout import SquaredError
from tvlens.lens.sites import Site
from tvlens.runs.facts import text_of
from tvlens.runs.storage import Kept
from tvlens.scores.metrics import wrong_tokens
from tvlens.scores.score import Scores
from tvlens.stats import bootstrap_mean_axis
from tvlens.tasks.base import PromptSet

Pick = Callable[[Float[Tensor, "batch d_vocab"]], Float[Tensor, " batch"]]

COLUMNS = ("task", "part", "layer", "head", "value", "ci_low", "ci_high", "n")
"""Columns of a table of parts."""

# Largest difference of sum and whole, as a share of what the parts come to without their signs.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}


# Axes with an underscore are compared below, in words.
@dataclass(frozen=True, eq=False)
class DirectAttribution(Kept, Displayed):
    """What every part writes for the answer, at the query position of each prompt.

    Attributes:
        embeddings: what stands before the first block.
        heads: every head; NaN in layers without heads.
        biases: output bias of each layer's attention; zero where there is none.
        rest: what else each block adds: its MLP, or all of a block without heads.
        constant: biases of the final norm and of the unembedding.
        total: what the model gives, before any cap on its logits: the sum of all these.
        unit: what all are measured in.
        task: name of the task.
        model: name of the model.
    """

    embeddings: Float[Tensor, " _prompt"]
    heads: Float[Tensor, "_prompt _layer _head"]
    biases: Float[Tensor, "_prompt _layer"]
    rest: Float[Tensor, "_prompt _layer"]
    constant: Float[Tensor, " _prompt"]
    total: Float[Tensor, " _prompt"]
    unit: str = "logits"
    task: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        shape = tuple(self.heads.shape)
        expected = dict.fromkeys(("embeddings", "constant", "total"), shape[:1])
        expected |= dict.fromkeys(("biases", "rest"), shape[:2])
        for name, wanted in expected.items():
            found = tuple(getattr(self, name).shape)
            if found != wanted:
                raise ShapeError(
                    f"direct attribution: heads have shape {shape}, {name} {found}; expected "
                    f"{wanted}"
                )

    @property
    def sum(self) -> Float[Tensor, " prompt"]:
        """The sum of all parts: `total`, to the precision of the model."""
        by_layer = self.heads.nansum(dim=2) + self.biases + self.rest
        return self.embeddings + by_layer.sum(dim=1) + self.constant

    @property
    def scores(self) -> Scores:
        """The heads' part as a score, with what each prompt says."""
        return Scores.of_prompts(
            self.heads, name="direct", unit=self.unit, task=self.task, model=self.model
        )

    def to_frame(self, *, seed: int = 0) -> pd.DataFrame:
        """Means over prompts of all parts, with 95% bootstrap intervals: `COLUMNS`.

        Parts are embeddings, head, bias, rest and constant, in the order of the model; their values
        sum to the mean of `total`.

        Args:
            seed: seed of the bootstrap.
        """
        keys: list[tuple[str, int | None, int | None]] = [("embeddings", None, None)]
        columns = [self.embeddings[:, None]]
        for layer in range(self.heads.shape[1]):
            if not self.heads[:, layer].isnan().all():
                keys += [("head", layer, head) for head in range(self.heads.shape[2])]
                keys.append(("bias", layer, None))
                columns += [self.heads[:, layer], self.biases[:, layer, None]]
            keys.append(("rest", layer, None))
            columns.append(self.rest[:, layer, None])
        keys.append(("constant", None, None))
        columns.append(self.constant[:, None])
        ends = bootstrap_mean_axis(torch.cat(columns, dim=1), seed=seed)
        mean_and_ends = {name: x.tolist() for name, x in zip(COLUMNS[4:7], ends, strict=True)}
        frame = pd.DataFrame(keys, columns=["part", "layer", "head"])
        frame = frame.astype({"layer": "Int64", "head": "Int64"})
        frame = frame.assign(task=self.task, n=len(self.heads), **mean_and_ends)
        return frame[list(COLUMNS)]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Every part and the total; unit, task and model."""
        names = ("embeddings", "heads", "biases", "rest", "constant", "total")
        facts = {"unit": self.unit, "task": self.task, "model": self.model}
        return {name: getattr(self, name) for name in names}, facts

    @classmethod
    def of_state(
        cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> "DirectAttribution":
        """The attribution that has this state."""
        return cls(
            tensors["embeddings"],
            tensors["heads"],
            tensors["biases"],
            tensors["rest"],
            tensors["constant"],
            tensors["total"],
            text_of(facts, "unit"),
            text_of(facts, "task"),
            text_of(facts, "model"),
        )


def direct_effects(
    lens: Lens,
    prompts: PromptSet,
    *,
    against: PromptSet | None = None,
    progress: Callable[[int], None] | None = None,
) -> DirectAttribution:
    """What every part of the model adds to the logit of the answer by itself, over no other part.

    The residual stream at the query position is the sum of what embeddings, heads, biases and MLPs
    write. Behind the final norm, its scale held as it is on the prompt, and along
    W_U[answer] - W_U[other], they and the constant part sum to the logit difference before any cap
    (Elhage et al. 2021; Wang et al. 2023, arXiv 2211.00593). Of several right answers the likeliest
    counts.

    Of a regression model, the direction is its read-out: values are contributions to the
    prediction, with the sign of the target, over the standard deviation of the functions' values.

    Example:
        >>> direct_effects(lens, task.prompts("test", n=20)).scores.top(5)  # doctest: +SKIP

    Args:
        lens: the model.
        prompts: what the model is asked.
        against: the prompts with wrong answers, whose first tokens are the other ones; the mean
            over the vocabulary is taken without.
        progress: called with the number of prompts finished.

    Raises:
        TaskError: there are not as many wrong answers as prompts.
        ModelError: the parts do not sum to what the model gives, or wrong answers are given for
            predictions.
        NumericalError: a part is not finite.
    """
    if against is not None and not lens.readout.has_text:
        raise ModelError(
            f"wrong answers are given for {lens.name!r}, whose answers are predictions; expected "
            "against=None, since a prediction is one number"
        )
    found: list[_Parts] = []
    done = 0
    with torch.inference_mode(False), lens.frozen(), torch.no_grad():
        batch = lens.encode(prompts)
        other = wrong_tokens(lens, against, len(batch))
        for reading in lens.readings(batch):
            of_piece = None if other is None else other[done : done + len(reading)]
            found += _of_reading(lens, reading, of_piece)
            done += len(reading)
            if progress is not None:
                progress(len(reading))
    return _attribution(lens, prompts.task, found)


@dataclass(frozen=True)
class _Parts:
    """Parts of some prompts in the order embeddings, heads, biases, rest; constant and total."""

    values: Float[Tensor, "batch part"]
    constant: Float[Tensor, " batch"]
    total: Float[Tensor, " batch"]


def _of_reading(
    lens: Lens, reading: Reading, other: Int[Tensor, " batch"] | None
) -> Iterator[_Parts]:
    """The parts of prompts that were read, of a few of them at a time."""
    layers, backend = list(lens.backend.attention_layers), lens.backend
    sites = [Site("resid_pre", 0), *(Site("resid_post", n) for n in range(lens.n_layer))]
    sites += [Site("attn_out", n) for n in layers]
    records = lens.engine.anywhere.record(reading.batch, sites)
    rows = torch.arange(len(reading), device=reading.batch.query.device)
    at = torch.stack([records[site][rows, reading.batch.query] for site in sites], dim=1)
    last = at[:, lens.n_layer]
    exact = torch.promote_types(at.dtype, torch.float32)
    streams, added = at.to(exact).split([lens.n_layer + 1, len(layers)], dim=1)
    rest = streams.diff(dim=1)
    rest[:, layers] -= added
    bias = backend.b_o if reading.factor is None else backend.b_o * reading.factor
    bias = bias.to(exact).expand(len(rows), -1, -1)[:, layers]
    step = max(1, lens.max_rows // (lens.n_layer * lens.n_head))
    for few in rows.split(step):
        few_rows = slice(int(few[0]), int(few[-1]) + 1)
        reading_of_few = reading.rows(few_rows)
        heads = contributions(lens, reading_of_few)[:, layers].to(exact).flatten(1, 2)
        parts = torch.cat([streams[few, :1], heads, bias[few], rest[few]], dim=1)
        logits = backend.logits_of(backend.final_norm(last[few][:, None]))[:, 0].to(last.device)
        pick = _pick(lens, reading_of_few, logits, None if other is None else other[few])
        direction, constant = _direction(lens, last[few], pick)
        behind = frozen(backend.final_norm, last[few][:, None])(parts)
        yield _Parts(
            torch.einsum("bpm,bm->bp", behind, direction).cpu(), constant.cpu(), pick(logits).cpu()
        )


def _pick(
    lens: Lens,
    reading: Reading,
    logits: Float[Tensor, "batch d_vocab"],
    other: Int[Tensor, " batch"] | None,
) -> Pick:
    """What is attributed, as a linear function of logits before any cap."""
    batch = reading.batch
    if not lens.readout.has_text:
        size = lens.readout.variance**0.5 if isinstance(lens.readout, SquaredError) else 1.0
        sign = batch.target.sign().to(logits) / size
        return lambda outputs: outputs[:, 0] * sign
    right = batch.right.to(logits.device)
    best = right.gather(1, logits.gather(1, right).argmax(dim=1, keepdim=True))

    def difference(outputs: Tensor) -> Tensor:
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        against = outputs.mean(dim=1) if other is None else outputs.gather(1, other[:, None])[:, 0]
        return outputs.gather(1, best)[:, 0] - against

    return difference


def _direction(
    lens: Lens, like: Float[Tensor, "batch d_model"], pick: Pick
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, " batch"]]:
    """Along what the normed stream is read, and what is read off a stream of nothing."""
    with torch.enable_grad():
        nothing = torch.zeros(*like.shape, dtype=like.dtype, device=like.device).requires_grad_()
        read = pick(lens.backend.logits_of(nothing[:, None])[:, 0].to(like.device))
        (direction,) = torch.autograd.grad(read.sum(), nothing)
    direction = direction.to(torch.promote_types(like.dtype, torch.float32))
    bias = offset(lens.backend.final_norm, like)
    return direction, read.detach() + direction @ bias.to(direction)


def _attribution(lens: Lens, task: str, found: list[_Parts]) -> DirectAttribution:
    values = torch.cat([each.values for each in found])
    constant = torch.cat([each.constant for each in found])
    total = torch.cat([each.total for each in found]).to(values.dtype)
    if not torch.isfinite(values).all():
        raise NumericalError(
            f"direct effects on task {task!r} are not finite; expected finite activations of "
            f"{lens.name!r}; try dtype=torch.float32"
        )
    off = (values.sum(dim=1) + constant - total).abs() / values.abs().sum(dim=1).clamp(min=1e-30)
    if (off > _TOLERANCE.get(lens.backend.dtype, 0.1)).any():
        worst = int(off.argmax())
        raise ModelError(
            f"parts of {lens.name!r} sum to {float(values[worst].sum() + constant[worst]):.5g} on "
            f"prompt {worst} of task {task!r}, and the model gives {float(total[worst]):.5g}; "
            "expected the same: it has a part that is no head, bias or block, or reads logits off "
            "something else than its last residual stream"
        )
    layers = list(lens.backend.attention_layers)
    sizes = [1, len(layers) * lens.n_head, len(layers), lens.n_layer]
    embeddings, of_heads, of_biases, rest = values.split(sizes, dim=1)
    heads = values.new_full((len(values), lens.n_layer, lens.n_head), torch.nan)
    heads[:, layers] = of_heads.unflatten(1, (len(layers), lens.n_head))
    biases = torch.zeros_like(rest)
    biases[:, layers] = of_biases
    unit = "logits" if lens.readout.has_text else "standard deviations"
    return DirectAttribution(
        embeddings[:, 0], heads, biases, rest, constant, total, unit, task, lens.name
    )
