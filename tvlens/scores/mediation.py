"""Causal mediation: how much each head, put back alone, restores the task (Todd et al., 2024)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tvlens.errors import NumericalError, ShapeError, TaskError
from tvlens.lens.edits import ActsAt, ReplaceHeads, require_positions
from tvlens.lens.heads import HeadMeans, donor_outputs
from tvlens.lens.lens import Lens
from tvlens.lens.readout import Answer
from tvlens.models.batch import Batch
from tvlens.models.gradients import with_gradients
from tvlens.scores.attributed import attributed_heads
from tvlens.scores.score import HEAD_KEYS, Scores
from tvlens.tasks.base import PromptSet
from tvlens.tasks.text.prompts import Prompts
from tvlens.tasks.text.task import Task

S = TypeVar("S", bound="IndirectEffects")


@dataclass(frozen=True, eq=False)
class IndirectEffects(Scores):
    """Indirect effect of every head on every prompt; their mean `scores` is the AIE.

    Attributes:
        values: score with the head's z replaced minus score without, per prompt.
        baseline: score of each prompt without a replacement.
        exact: which heads' effects are exact where the others were only screened; None where all
            are.
    """

    values: Float[Tensor, "prompt _layer _head"] = field(kw_only=True)
    exact: Bool[Tensor, "_layer _head"] | None = None

    @classmethod
    def of(
        cls,
        values: Float[Tensor, "prompt layer head"],
        baseline: Float[Tensor, " prompt"],
        *,
        task: str,
        model: str,
        unit: str,
        exact: Bool[Tensor, "layer head"] | None = None,
    ) -> "IndirectEffects":
        """The effects with these values; `unit` is that of the score, "probability" for text."""
        found = cls.of_prompts(
            values, name="aie", unit=unit, task=task, model=model, baseline=baseline
        )
        return found if exact is None else replace(found, exact=exact)

    def to_frame(self, *, seed: int = 0) -> pd.DataFrame:
        """As of every score; screened effects have a column `aie_exact` too."""
        table = super().to_frame(seed=seed)
        if self.exact is None:
            return table
        rows = (table[name].to_numpy() for name in HEAD_KEYS[1:])
        return table.assign(aie_exact=self.exact.numpy()[tuple(rows)])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """That of every score, and which heads are exact."""
        tensors, facts = super().state()
        return (tensors if self.exact is None else tensors | {"exact": self.exact}), facts

    @classmethod
    def of_state(cls: type[S], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> S:
        """The effects that have this state."""
        return replace(super().of_state(tensors, facts), exact=tensors.get("exact"))


def mediation_prompts(
    task: Task, clean: Prompts, means: HeadMeans, *, n: int = 25, seed: int = 0
) -> Prompts:
    """Label-shuffled prompts whose queries the model answers when the prompt is clean.

    They are laid out as the clean ones.

    Args:
        task: where demonstrations are drawn from.
        clean: the prompts that `means` was offered.
        means: mean head outputs; its `kept` says which prompts were answered.
        n: number of prompts; Todd et al. (2024) use 25.
        seed: seed of the draws.

    Raises:
        TaskError: the means were offered other prompts than `clean`, or `clean` has several
            layouts.
    """
    if means.prompts not in ("", clean.digest):
        raise TaskError(
            f"the means were offered {means.offered} other prompts than these {len(clean)} of task "
            f"{clean.task!r}; give the prompts that mean_head_outputs was given"
        )
    queries = list(dict.fromkeys(clean[i].query for i in means.kept))
    return task.prompts(
        clean.split,
        shots=clean.shots,
        n=n,
        seed=seed,
        kind="shuffled",
        template=clean.template,
        queries=queries,
    )


def indirect_effects(
    lens: Lens,
    prompts: PromptSet,
    means: HeadMeans | None,
    *,
    screen: int | None = None,
    answer: Answer = "first",
    positions: ActsAt = "query",
    progress: Callable[[int], None] | None = None,
) -> IndirectEffects:
    """Indirect effects of all heads on prompts that do not carry the task.

    For head (l, j) and a prompt: the score of the right answer with the head's `hook_z` at the
    query position replaced by its mean over clean prompts, minus the score without replacement
    (Todd et al. 2024, section 2.2; their protocol is 25 label-shuffled 10-shot prompts whose
    queries the model answers when the prompt is clean).

    Args:
        lens: the model.
        prompts: label-shuffled prompts.
        means: mean head outputs over clean prompts of the same task; None replaces each prompt's
            heads by those of its own donor.
        screen: exact effects of only so many heads, those of highest mean effect to first order
            (`attributed_heads`); the others keep that approximation, and `exact` says which. The
            prompts' keys and values are held meanwhile.
        answer: "whole" takes the log-probability of all tokens of the answer and what ends it for
            the score.
        positions: where heads are replaced: at the query, or with "all" there and at every position
            of a whole answer.
        progress: called with the number of prompts finished.

    Raises:
        ShapeError: the means are of another model, or more heads are to be exact than there are.
        TaskError: no means are given, and the prompts have no donors; or heads are to be replaced
            behind the query without whole answers there, or with a screen, which sees the query.
        NumericalError: an effect is not finite.
        UnknownNameError: `answer` or `positions` has no such name.
        ModelError: whole answers are asked of a model that answers with numbers.
    """
    lens = lens.answering(answer)
    require_positions("indirect_effects", positions)
    if positions == "all" and (lens.readout.reads == "first" or screen is not None):
        raise TaskError(
            "indirect_effects: positions='all' replaces heads at the positions of whole answers, "
            f"but answer={answer!r} and screen={screen}; expected answer='whole' and no screen, "
            "which looks at the query alone"
        )
    if means is None:
        z = donor_outputs(lens, prompts).z
    else:
        means.require_fit(lens)
        z = means.z[None]
    batch = lens.encode(prompts)
    layers = lens.backend.attention_layers
    each = ReplaceHeads.each_head(z.to(lens.backend.device, lens.backend.dtype), layers)
    each = replace(each, positions=positions)
    exact = None
    if screen is None:
        # One more variant, which replaces nothing, gives the baseline from the same reading.
        edit = replace(each, mask=torch.cat([each.mask, torch.zeros_like(each.mask[:1])]))
        scores = lens.outputs(batch, edit, lens.readout.score, advance=progress).cpu()
        found, baseline = scores[:, :-1] - scores[:, -1:], scores[:, -1]
    else:
        found, baseline, exact = _screened(lens, batch, each, z, screen, progress)
    found = found.unflatten(1, (len(layers), lens.n_head))
    if not torch.isfinite(found).all():
        raise NumericalError(
            f"indirect effects on task {prompts.task!r} are not finite; expected finite "
            f"probabilities from {lens.name!r}; try dtype=torch.float32"
        )
    values = found.new_full((len(found), lens.n_layer, lens.n_head), torch.nan)
    values[:, list(layers)] = found
    return IndirectEffects.of(
        values,
        baseline,
        task=prompts.task,
        model=lens.name,
        unit=lens.readout.score_name,
        exact=exact,
    )


@with_gradients
def _screened(
    lens: Lens,
    batch: Batch,
    each: ReplaceHeads,
    z: Float[Tensor, "some_batch layer head d_head"],
    screen: int,
    progress: Callable[[int], None] | None,
) -> tuple[Tensor, Tensor, Bool[Tensor, "layer head"]]:
    """Effects of the variants of `each`, scores before, and which heads are exact."""
    layers, n_heads = list(lens.backend.attention_layers), each.n_variant
    if not 1 <= screen <= n_heads:
        raise ShapeError(
            f"exact effects of the best {screen} heads asked for, and {lens.name!r} has {n_heads} "
            f"heads; choose screen from 1 to {n_heads}, or None for all"
        )
    z = z.to(lens.backend.device, lens.backend.dtype)
    with lens.frozen():
        held = list(lens.readings(batch))
        # One row a prompt: the more at once, the less often weights are fetched.
        approximate, before = attributed_heads(lens, lens.engine.join(held), z)
        values, before = approximate[:, layers].flatten(1).cpu(), before.cpu()
        best = values.double().mean(dim=0).topk(screen).indices.sort().values
        chosen, done = each.of_variants(best.to(each.mask.device)), 0
        with torch.no_grad():
            for reading in held:
                rows = slice(done, done + len(reading))
                edit = chosen.of_prompts(rows.start, rows.stop)
                parts = [
                    lens.readout.score(lens.engine.run(reading, few), reading.batch).cpu()
                    for few in lens.variants(reading, edit)
                ]
                effects = torch.cat(parts, dim=1) - before[rows, None]
                values[rows, best] = effects.to(values.dtype)
                done = rows.stop
                if progress is not None:
                    progress(len(reading))
    exact = torch.zeros(lens.n_layer, lens.n_head, dtype=torch.bool)
    exact[torch.tensor(layers)[best // lens.n_head], best % lens.n_head] = True
    return values, before, exact
