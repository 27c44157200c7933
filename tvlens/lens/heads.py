"""Mean head outputs at the query position: what a head says when the task is in the prompt."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

from tvlens.display import Displayed
from tvlens.errors import ModelError, NumericalError, ShapeError, TaskError, UnknownNameError
from tvlens.lens.edits import NoEdit
from tvlens.lens.engine import Reading
from tvlens.lens.lens import Lens
from tvlens.lens.sites import Site
from tvlens.models.batch import Batch
from tvlens.runs.facts import integer_of, integers_of, text_of, wrong
from tvlens.runs.labelled import labelled
from tvlens.runs.storage import Kept
from tvlens.tasks.base import HasDonors, PromptSet
from tvlens.tasks.text.prompts import Prompts, Template

if TYPE_CHECKING:
    import xarray

Where = Literal["query", "answers", "all"]
"""Where head outputs are looked at: at the query position, at the tokens of the answer, or at all
positions of the prompt."""


@dataclass(frozen=True)
class HeadMeans(Kept, Displayed):
    """Mean of every head's `hook_z` over prompts, and the mean contribution.

    Attributes:
        z: mean of `hook_z` at the query position, or where `at` says.
        outputs: mean contribution to the residual stream, without the output bias: `z @ W_O`, or,
            in models that scale what attention writes, the mean of every prompt's own scaled
            `z @ W_O`, which is no product of means.
        kept: indices of the prompts that entered the mean.
        offered: number of prompts that were offered.
        model: name of the model.
        layers: layers that have heads, where some have none; the means of others are zero.
        prompts: digest of the prompts that were offered, where they have one.
        layout: digest of their template, for text.
        at: the positions that it is the mean over.
    """

    z: Float[Tensor, "layer head d_head"]
    outputs: Float[Tensor, "layer head d_model"]
    kept: tuple[int, ...]
    offered: int
    model: str
    layers: tuple[int, ...] | None = None
    prompts: str = ""
    layout: str = ""
    at: Where = "query"

    def __post_init__(self) -> None:
        both = (("z", self.z), ("outputs", self.outputs))
        if (
            any(tensor.ndim != 3 for _, tensor in both)
            or self.z.shape[:2] != self.outputs.shape[:2]
        ):
            raise ShapeError(
                f"head means of {self.model!r}: z has shape {tuple(self.z.shape)}, outputs "
                f"{tuple(self.outputs.shape)}; expected (layer, head, d_head) and (layer, head, "
                "d_model)"
            )
        for name, tensor in both:
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise NumericalError(
                    f"head means of {self.model!r}: {name} are no real, finite numbers; look for "
                    "NaN in the weights, or an overflow of the model's precision"
                )
        outside = [n for n in self.layers or () if not 0 <= n < len(self.z)]
        if outside or not all(0 <= i < self.offered for i in self.kept):
            raise ShapeError(
                f"head means of {self.model!r}: layers {self.layers} of {len(self.z)}, and prompts "
                f"{str(self.kept)[:40]}… of {self.offered}; expected some of these"
            )

    def require_layout(self, template: Template) -> None:
        """Refuse a layout other than that of the prompts that were offered.

        Raises:
            TaskError: it is another one.
        """
        if self.layout not in ("", template.digest):
            raise TaskError(
                f"head means of {self.model!r} were taken over prompts of another layout than "
                f"{template}; give the layout to the task (task.with_template(...)) before any "
                "prompts are made, so that all are of one"
            )

    def to_xarray(self) -> "xarray.Dataset":
        """`z` and `outputs` with names on their axes; needs xarray.

        Their axes are (layer, head, d_head) and (layer, head, d_model).

        Raises:
            ImportError: xarray is not installed.
        """
        z = labelled(self.z, ("layer", "head", "d_head"), "z")
        outputs = labelled(self.outputs, ("layer", "head", "d_model"), "outputs")
        facts = {"model": self.model, "at": self.at, "n": self.count, "offered": self.offered}
        return z.to_dataset().assign(outputs=outputs).assign_attrs(facts)

    @property
    def has_heads(self) -> tuple[int, ...]:
        """Layers that have heads."""
        return tuple(range(len(self.z))) if self.layers is None else self.layers

    @property
    def n_heads(self) -> int:
        """Number of heads of the whole model."""
        return len(self.has_heads) * self.z.shape[1]

    @property
    def count(self) -> int:
        """Number of prompts in the mean."""
        return len(self.kept)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Means and contributions; which prompts entered, how many were offered, and the model."""
        facts = {"kept": list(self.kept), "offered": self.offered, "model": self.model}
        facts |= {"layers": self.layers, "prompts": self.prompts, "layout": self.layout}
        facts |= {} if self.at == "query" else {"at": self.at}
        return {"z": self.z, "outputs": self.outputs}, facts

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "HeadMeans":
        """The means that have this state."""
        at = [each for each in get_args(Where) if each == facts.get("at", "query")]
        if not at:
            raise wrong("at", facts["at"], "'query', 'answers' or 'all'")
        return cls(
            tensors["z"],
            tensors["outputs"],
            integers_of(facts, "kept"),
            integer_of(facts, "offered"),
            text_of(facts, "model"),
            None if facts.get("layers") is None else integers_of(facts, "layers"),
            text_of(facts, "prompts", ""),
            text_of(facts, "layout", ""),
            at[0],
        )

    def require_fit(self, lens: Lens) -> None:
        """Refuse means of a model of another size.

        Raises:
            ShapeError: layers, heads, d_head or d_model differ.
        """
        found = (*self.z.shape, self.outputs.shape[2])
        expected = (lens.n_layer, lens.n_head, lens.backend.d_head, lens.d_model)
        if found != expected:
            raise ShapeError(
                f"means of {self.model!r} have sizes {found} (layer, head, d_head, d_model), "
                f"model {lens.name!r} has {expected}; compute them with this lens"
            )


@dataclass(frozen=True)
class HeadOutputs:
    """Every head's `hook_z` at the query position of single prompts, and its contribution.

    Attributes:
        z: `hook_z` at the query position.
        outputs: contribution to the residual stream, as `contributions`.
        model: name of the model.
    """

    z: Float[Tensor, "prompt layer head d_head"]
    outputs: Float[Tensor, "prompt layer head d_model"]
    model: str


def contributions(lens: Lens, reading: Reading) -> Float[Tensor, "batch layer head d_model"]:
    """What every head adds to the residual stream at the query, without the output bias.

    That is `z W_O`. A block that scales the output of its attention before it adds it, by a norm or
    a constant, scales every head's part of it alike: its factor at this position, with the norm's
    scale as it is on this prompt, belongs to the contribution. Contributions and the scaled bias
    sum to what attention adds.
    """
    outputs = torch.einsum("blhd,lhdm->blhm", reading.z, lens.w_o)
    return outputs if reading.factor is None else outputs * reading.factor[:, :, None]


def donors_of(prompts: PromptSet) -> PromptSet:
    """The donor of every prompt: a clean prompt of the prompt's own function.

    Raises:
        TaskError: the prompts have no donors.
    """
    if not isinstance(prompts, HasDonors):
        raise TaskError(
            f"{type(prompts).__name__} of task {prompts.task!r} have no donors: vectors of each "
            "prompt's own activations need prompts of a FunctionTask; use one vector for the task"
        )
    return prompts.donors()


def donor_outputs(lens: Lens, prompts: PromptSet) -> HeadOutputs:
    """Head outputs of the donor of every prompt.

    Raises:
        TaskError: the prompts have no donors.
        NumericalError: an activation is not finite.
    """
    batch = lens.encode(donors_of(prompts))
    with lens.frozen(), torch.no_grad():
        readings = list(lens.readings(batch))
        z = torch.cat([reading.z for reading in readings])
        outputs = torch.cat([contributions(lens, reading) for reading in readings])
    if not torch.isfinite(outputs).all():
        raise NumericalError(
            f"head outputs of {lens.name!r} on donors of task {prompts.task!r} are not finite; "
            "expected finite activations; try dtype=torch.float32"
        )
    return HeadOutputs(z, outputs, lens.name)


class _StreamingMean:
    """Mean of batches seen one after another, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: Tensor | float = 0.0

    def add(self, values: Tensor) -> None:
        values = values.double()
        n = values.shape[0]
        if not n:
            return
        self.count += n
        self.mean = self.mean + (values.mean(dim=0) - self.mean) * (n / self.count)


def mean_head_outputs(
    lens: Lens,
    prompts: PromptSet,
    *,
    answered_only: bool = True,
    at: Where = "query",
    progress: Callable[[int], None] | None = None,
) -> HeadMeans:
    """Mean head outputs at the query position over clean prompts.

    Prompts are read in pieces, so memory does not grow with their number.

    Args:
        lens: the model.
        prompts: clean in-context prompts of one task; Todd et al. (2024) use 100 with 10 shots.
        answered_only: keep only prompts whose first answer token the model gets right, as the
            published protocol does. `HeadMeans.kept` says which. Of a lens of whole answers, those
            it gets wholly right.
        at: "answers" takes them at the tokens of the answer that is shown first, put behind each
            prompt, instead: where the model goes on with an answer, and ends it. "all" takes them
            at every position of the prompt, which is what heads are set to there by ablation.
        progress: called with the number of prompts finished.

    Raises:
        TaskError: the model answers none of the prompts, or `at` asks for answers of one token that
            nothing ends.
        NumericalError: an activation is not finite.
        UnknownNameError: there is no such `at`.
        ModelError: `at` asks for answers of a model that answers with a number, or for all
            positions of one whose blocks scale what attention writes.
    """
    if at not in get_args(Where):
        raise UnknownNameError(f"unknown at={at!r}; expected 'query', 'answers' or 'all'")
    if at == "all" and lens.engine.scaled:
        raise ModelError(
            f"blocks of {lens.name!r} scale what attention writes, which is known at the query "
            "position alone; take the means there (at='query')"
        )
    if at == "answers":
        lens.require_text("at='answers'")
    batch = lens.encode(prompts)
    streaming, of_outputs = _StreamingMean(), _StreamingMean()
    kept: list[int] = []
    seen = 0
    unedited = NoEdit(lens.n_layer)
    with lens.frozen(), torch.no_grad():
        for reading in lens.readings(batch):
            right = torch.ones(len(reading), dtype=torch.bool)
            if answered_only:
                outputs = lens.engine.run(reading, unedited)
                right = lens.readout.answered(outputs, reading.batch)[:, 0].cpu()
            answered = right.to(reading.z.device).nonzero().flatten()
            if at == "query":
                _add(lens, reading, answered, streaming, of_outputs)
            kept += [seen + i for i in right.nonzero().flatten().tolist()]
            seen += len(reading)
            if progress is not None:
                progress(len(reading))
    if not kept:
        raise TaskError(
            f"task {prompts.task!r}: {lens.name!r} answers none of {len(prompts)} clean "
            f"{prompts.shots}-shot prompts, so there is no mean over answered prompts; pass "
            "answered_only=False, or a task that the model does"
        )
    if at == "answers":
        _add_answers(lens, prompts, kept, streaming, of_outputs)
    if at == "all":
        _add_everywhere(lens, batch, kept, streaming)
    mean = torch.as_tensor(streaming.mean)
    if not torch.isfinite(mean).all():
        layer, head = (~torch.isfinite(mean)).any(dim=2).nonzero()[0].tolist()
        raise NumericalError(
            f"hook_z of head ({layer}, {head}) of {lens.name!r} is not finite on task "
            f"{prompts.task!r}; expected finite activations; try dtype=torch.float32"
        )
    if of_outputs.count:
        outputs = torch.as_tensor(of_outputs.mean)
    else:
        outputs = torch.einsum("lhd,lhdm->lhm", mean, lens.w_o.double())
    return HeadMeans(
        mean.float(),
        outputs.float(),
        tuple(kept),
        len(prompts),
        lens.name,
        lens.backend.attention_layers,
        getattr(prompts, "digest", ""),
        prompts.template.digest if isinstance(prompts, Prompts) else "",
        at,
    )


def _add(
    lens: Lens,
    reading: Reading,
    index: Int[Tensor, " chosen"],
    z: _StreamingMean,
    outputs: _StreamingMean,
) -> None:
    """Takes the heads of the prompts at `index` into the means, and what blocks scale by itself."""
    z.add(reading.z[index])
    if reading.factor is not None:
        for one in index.split(1):
            outputs.add(contributions(lens, reading.rows(one)))


def _add_everywhere(lens: Lens, batch: Batch, kept: list[int], z: _StreamingMean) -> None:
    """Takes the heads at every position of these prompts into the means."""
    layers = lens.backend.attention_layers
    sites = [Site("z", layer) for layer in layers]
    step = max(1, lens.max_tokens // batch.inputs.shape[1])
    index = torch.tensor(kept, device=batch.query.device)
    with lens.frozen(), torch.no_grad():
        for chosen in index.split(step):
            some = batch.take(chosen)
            found = lens.engine.record(some, sites)
            real = some.mask.to(found[sites[0]].device)
            each = found[sites[0]].new_zeros(
                int(real.sum()), lens.n_layer, *found[sites[0]].shape[2:]
            )
            for site in sites:
                each[:, site.layer] = found[site][real]
            z.add(each)


def _add_answers(
    lens: Lens, prompts: Any, kept: list[int], z: _StreamingMean, outputs: _StreamingMean
) -> None:
    """Takes the heads at every token of these prompts' answers into the means."""
    batch = lens.answering("whole").encode(prompts)
    answers = batch.take(torch.tensor(kept, device=batch.query.device)).at_answers()
    if not len(answers):
        raise TaskError(
            f"task {prompts.task!r}: at='answers' asked of answers of one token that nothing ends, "
            "behind which nothing is read off; take the means at the query"
        )
    with lens.frozen(), torch.no_grad():
        for reading in lens.readings(answers):
            every = torch.arange(len(reading), device=reading.z.device)
            _add(lens, reading, every, z, outputs)
