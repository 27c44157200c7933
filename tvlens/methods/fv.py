"""Function vectors: the summed mean outputs of the heads of largest indirect effect (Todd et al.,
ICLR 2024).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from tvlens.errors import ShapeError
from tvlens.heads import HeadMeans
from tvlens.headsets import Head
from tvlens.lens import Lens
from tvlens.mediation import IndirectEffects
from tvlens.methods.vector import TaskVector, stack_vectors
from tvlens.tasks.prompts import PromptKind, PromptSet

DEFAULT_KS = (3, 10, 30)
# By validation: 1 was never the best on ten tasks, and 8 worse than 4 on the three it was tried on.
DEFAULT_SCALES = (2.0, 4.0)


def function_vector(
    means: HeadMeans, heads: Sequence[Head], *, layer: int, scale: float = 1.0
) -> TaskVector:
    """The function vector: mean outputs of `heads` summed and added at one layer's output.

    v = scale * sum over (l, j) in heads of z̄[l,j] W_O[l,j]  (Todd et al. 2024, section 2.3).

    Args:
        means: mean head outputs on clean prompts.
        heads: (layer, head) pairs, usually `IndirectEffects.top(k)`.
        layer: where the vector is added.
        scale: factor on the vector.

    Raises:
        ShapeError: a head or the layer is out of range, or no head is given.
    """
    _require_heads(means, heads)
    vectors = torch.zeros(means.outputs.shape[0], means.outputs.shape[2])
    if not 0 <= layer < len(vectors):
        raise ShapeError(
            f"layer {layer} is out of range: model {means.model!r} has {len(vectors)} layers "
            f"(0-{len(vectors) - 1})"
        )
    vectors[layer] = scale * torch.stack([means.outputs[head] for head in heads]).sum(dim=0)
    origin = f"function vector of {len(heads)} heads at layer {layer} x {scale:g}"
    return TaskVector(vectors, (layer,), means.model, origin)


def function_vector_per_layer(
    means: HeadMeans, heads: Sequence[Head], *, scale: float = 1.0
) -> TaskVector:
    """The function vector with every head's output added at the head's own layer.

    Adds where a Learnable Task Vector adds, so the two differ only in their weights.

    Args:
        means: mean head outputs on clean prompts.
        heads: (layer, head) pairs.
        scale: factor on the vectors.

    Raises:
        ShapeError: a head is out of range, or no head is given.
    """
    _require_heads(means, heads)
    weights = torch.zeros(means.outputs.shape[:2])
    for head in heads:
        weights[head] = scale
    vectors = torch.einsum("lh,lhd->ld", weights, means.outputs)
    layers = tuple(sorted({layer for layer, _ in heads}))
    origin = f"function vector of {len(heads)} heads, each at its layer, x {scale:g}"
    return TaskVector(vectors, layers, means.model, origin)


@dataclass(frozen=True)
class FunctionVectorChoice:
    """Function vectors chosen on the validation split, per prompt kind.

    Attributes:
        one_layer: best one-layer vector for each kind of prompt.
        per_layer: best per-layer vector for each kind of prompt.
        sweep: every candidate: site, layer (-1 for per layer), k, scale, prompt, and the
            measures of the lens' readout.
    """

    one_layer: dict[PromptKind, TaskVector]
    per_layer: dict[PromptKind, TaskVector]
    sweep: pd.DataFrame


def choose_function_vectors(
    lens: Lens,
    means: HeadMeans,
    effects: IndirectEffects,
    validation: Mapping[PromptKind, PromptSet],
    *,
    layers: Sequence[int] | None = None,
    ks: Sequence[int] = DEFAULT_KS,
    scales: Sequence[float] = DEFAULT_SCALES,
) -> FunctionVectorChoice:
    """The best function vectors over layer, number of heads and scale, by validation.

    Each kind of prompt gets the candidate that is best on its own validation prompts by the first
    measure of the lens' readout (accuracy for text), ties broken by the next (cross-entropy). So a
    function vector is never judged on a setting chosen for another.

    Args:
        lens: the model.
        means: mean head outputs on clean prompts.
        effects: indirect effects that rank the heads.
        validation: prompts of the validation split, by kind.
        layers: layers to try for the one-layer vector; all by default.
        ks: numbers of heads to try; those above the number of heads are left out.
        scales: factors to try.

    Raises:
        ShapeError: no k fits the model.
    """
    layers = range(lens.n_layer) if layers is None else layers
    fitting = [k for k in ks if 1 <= k <= lens.n_layer * lens.n_head]
    if not fitting:
        raise ShapeError(
            f"no k of {tuple(ks)} fits {lens.name!r}, which has "
            f"{lens.n_layer * lens.n_head} heads; give a k between 1 and that"
        )
    candidates: list[tuple[dict[str, object], TaskVector]] = []
    for k in fitting:
        heads = effects.top(k)
        for scale in scales:
            row: dict[str, object] = {"k": k, "scale": scale}
            vector = function_vector_per_layer(means, heads, scale=scale)
            candidates.append(({"site": "per_layer", "layer": -1, **row}, vector))
            for layer in layers:
                vector = function_vector(means, heads, layer=layer, scale=scale)
                candidates.append(({"site": "one_layer", "layer": layer, **row}, vector))
    edit = stack_vectors([vector for _, vector in candidates], lens)

    measures = lens.readout.measures
    frames = []
    best: dict[str, dict[PromptKind, TaskVector]] = {"one_layer": {}, "per_layer": {}}
    for kind, prompts in validation.items():
        values = lens.outputs(prompts, edit, lens.readout.measure).double().mean(dim=0)
        frame = pd.DataFrame([row for row, _ in candidates])
        frame["prompt"] = kind
        for column, measure in enumerate(measures):
            frame[measure.name] = values[:, column].tolist()
        frames.append(frame)
        order = frame.sort_values(
            [m.name for m in measures], ascending=[not m.higher_is_better for m in measures]
        ).index
        for site, chosen in best.items():
            chosen[kind] = next(candidates[i][1] for i in order if frame["site"][i] == site)
    return FunctionVectorChoice(
        best["one_layer"], best["per_layer"], pd.concat(frames, ignore_index=True)
    )


def _require_heads(means: HeadMeans, heads: Sequence[Head]) -> None:
    n_layer, n_head = means.outputs.shape[:2]
    if not heads:
        raise ShapeError("a function vector needs at least one head, got none; ask for k >= 1")
    for layer, head in heads:
        if not (0 <= layer < n_layer and 0 <= head < n_head):
            raise ShapeError(
                f"head ({layer}, {head}) is out of range: model {means.model!r} has {n_layer} "
                f"layers (0-{n_layer - 1}) of {n_head} heads (0-{n_head - 1})"
            )
