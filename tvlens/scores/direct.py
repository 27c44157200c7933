"""Direct logit attribution: what every part of the model adds to the logits by itself.

The residual stream is a sum, and behind the final norm, once its scale is held, logits are linear
in it: so the difference of two logits is a sum over embeddings, heads, biases and MLPs (Elhage et
al. 2021; Wang et al. 2023, arXiv 2211.00593). What a part does by way of others is not in it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.lens.heads import contributions
from tvlens.lens.lens import Lens
from tvlens.lens.norms import frozen
from tvlens.lens.sites import Site
from tvlens.models.batch import Batch
from tvlens.scores.metrics import wrong_tokens
from tvlens.scores.score import Scores
from tvlens.tasks.base import PromptSet


@dataclass(frozen=True, eq=False)
class DirectAttribution:
    """Parts of a logit difference, or of a prediction, on every prompt.

    Attributes:
        heads: part of every head; NaN in layers without heads.
        biases: part of every layer's attention bias.
        blocks: part of what else each block adds: its MLP, and in layers without heads all of it.
        embedding: part of the residual stream before the first block.
        constant: part of the final norm's bias and of the unembedding's, the same whatever is read.
        total: the logit difference itself, before any bound; the sum of all parts.
        task: name of the task.
        model: name of the model.
        unit: what parts are measured in.
    """

    heads: Float[Tensor, "prompt layer head"]
    biases: Float[Tensor, "prompt layer"]
    blocks: Float[Tensor, "prompt layer"]
    embedding: Float[Tensor, " prompt"]
    constant: Float[Tensor, " prompt"]
    total: Float[Tensor, " prompt"]
    task: str
    model: str
    unit: str

    @property
    def sum(self) -> Float[Tensor, " prompt"]:
        """Sum of all parts."""
        each = self.heads.nan_to_num().sum(dim=(1, 2)) + self.biases.sum(1) + self.blocks.sum(1)
        return each + self.embedding + self.constant

    @property
    def scores(self) -> Scores:
        """The heads' parts as a score."""
        return Scores.of_prompts(
            self.heads, name="direct", unit=self.unit, task=self.task, model=self.model
        )


def direct_effects(
    lens: Lens,
    prompts: PromptSet,
    *,
    wrong: PromptSet | None = None,
    progress: Callable[[int], None] | None = None,
) -> DirectAttribution:
    """What embeddings, heads, biases and MLPs add to the logit of the right answer.

    Of text, logits are those of the first token of the right answer that demonstrations show, less
    those of a wrong answer or, without one, their mean over the vocabulary; a model that bounds its
    logits is read before it does. Of numbers, it is the prediction over the standard deviation of
    the function's values, times the sign of the right one: positive parts write towards it.

    Args:
        lens: the model.
        prompts: what it is asked.
        wrong: the same prompts with a wrong answer to each.
        progress: called with the number of prompts finished.

    Raises:
        TaskError: there are not as many wrong answers as prompts.
    """
    batch = lens.encode(prompts)
    others = wrong_tokens(lens, wrong, len(batch))
    parts: list[tuple[Tensor, ...]] = []
    done = 0
    with lens.frozen(), torch.no_grad():
        for reading in lens.readings(batch):
            few = None if others is None else others[done : done + len(reading)]
            outputs = contributions(lens, reading)
            parts.append(_of_reading(lens, reading.batch, outputs, few))
            done += len(reading)
            if progress is not None:
                progress(len(reading))
    found = (torch.cat(each).float().cpu() for each in zip(*parts, strict=True))
    heads, biases, blocks, embedding, constant, total = found
    absent = [n for n in range(lens.n_layer) if n not in lens.backend.attention_layers]
    heads[:, absent] = torch.nan
    unit = "logit difference" if lens.readout.has_text else "prediction towards the target"
    return DirectAttribution(
        heads, biases, blocks, embedding, constant, total, prompts.task, lens.name, unit
    )


def _of_reading(
    lens: Lens,
    batch: Batch,
    outputs: Float[Tensor, "batch layer head d_model"],
    wrong: Int[Tensor, " batch"] | None,
) -> tuple[Tensor, ...]:
    backend, engine = lens.backend, lens.engine.anywhere
    layers, home = backend.attention_layers, backend.device
    sites = [Site("resid_pre", n) for n in range(lens.n_layer)]
    sites += [Site("resid_post", lens.n_layer - 1), *(Site("attn_out", n) for n in layers)]
    recorded = engine.record(batch, sites)
    rows = torch.arange(len(batch), device=home)
    at_query = {site: x.to(home)[rows, batch.query] for site, x in recorded.items()}
    streams = [at_query[Site("resid_pre", n)] for n in range(lens.n_layer)]
    streams.append(at_query[Site("resid_post", lens.n_layer - 1)])
    written = torch.zeros(len(batch), lens.n_layer, lens.d_model).to(streams[0])
    for n in layers:
        written[:, n] = at_query[Site("attn_out", n)]
    heads = outputs.to(written)
    biases = written - heads.sum(dim=2)
    steps = torch.stack([after - before for before, after in pairwise(streams)], dim=1)
    linear = frozen(backend.final_norm, streams[-1][:, None])

    def read(parts: Float[Tensor, "batch part d_model"]) -> Float[Tensor, "batch part"]:
        normed = linear(parts).to(written)
        return _read_out(lens, batch, backend.project_to_logits(normed), wrong) - nothing

    zero = torch.zeros_like(streams[-1][:, None])
    nothing = _read_out(lens, batch, backend.project_to_logits(zero), wrong)
    behind_norm = backend.project_to_logits(backend.final_norm(zero))
    constant = _read_out(lens, batch, behind_norm, wrong)[:, 0]
    last = backend.project_to_logits(backend.final_norm(streams[-1][:, None]))
    return (
        torch.stack([read(heads[:, n]) for n in range(lens.n_layer)], dim=1),
        read(biases),
        read(steps - written),
        read(streams[0][:, None])[:, 0],
        constant,
        _read_out(lens, batch, last, wrong)[:, 0],
    )


def _read_out(
    lens: Lens,
    batch: Batch,
    logits: Float[Tensor, "batch part d_out"],
    wrong: Int[Tensor, " batch"] | None,
) -> Float[Tensor, "batch part"]:
    logits = logits.to(lens.backend.device, torch.promote_types(logits.dtype, torch.float32))
    if not lens.readout.has_text:
        spread = float(getattr(lens.readout, "variance", 1.0)) ** 0.5
        return logits[..., 0] * batch.target.sign().to(logits)[:, None] / spread

    def of(tokens: Int[Tensor, " batch"]) -> Float[Tensor, "batch part"]:
        return logits.gather(-1, tokens[:, None, None].expand(-1, logits.shape[1], 1))[..., 0]

    other = logits.mean(dim=-1) if wrong is None else of(wrong)
    return of(batch.target.to(logits.device)) - other
