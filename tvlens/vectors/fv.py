"""Function vectors: the summed mean outputs of the heads of largest indirect effect (Todd et al.,
ICLR 2024).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd
import torch

from tvlens.console import progress_bar
from tvlens.display import Displayed
from tvlens.errors import ShapeError
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.scores.mediation import IndirectEffects
from tvlens.scores.ranking import Head
from tvlens.tasks.base import KINDS, PromptKind, PromptSet
from tvlens.vectors.choice import ranked
from tvlens.vectors.materials import ByKind, Materials, fitting_ks, for_every_kind
from tvlens.vectors.vector import HeadMixture, TaskVector, Vector

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
    return function_mixture(means, heads, layer=layer, scale=scale).of_means(means)


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
    return function_mixture(means, heads, layer=None, scale=scale).of_means(means)


def function_mixture(
    means: HeadMeans, heads: Sequence[Head], *, layer: int | None, scale: float = 1.0
) -> HeadMixture:
    """The recipe of a function vector, to be made of the outputs of each prompt's own heads.

    Args:
        means: mean head outputs, which say what the model is.
        heads: (layer, head) pairs.
        layer: where their sum is added; None adds every head's output at the head's own layer.
        scale: factor on the vectors.

    Raises:
        ShapeError: a head or the layer is out of range, or no head is given.
    """
    n_layer, n_head = means.outputs.shape[:2]
    _require_heads(means, heads)
    if layer is not None and not 0 <= layer < n_layer:
        raise ShapeError(
            f"layer {layer} is out of range: model {means.model!r} has {n_layer} layers "
            f"(0-{n_layer - 1})"
        )
    mix = torch.zeros(n_layer, n_layer, n_head)
    for from_layer, head in heads:
        mix[from_layer if layer is None else layer, from_layer, head] = scale
    if layer is None:
        layers = tuple(sorted({from_layer for from_layer, _ in heads}))
        where = "each at its layer,"
    else:
        layers, where = (layer,), f"at layer {layer}"
    origin = f"function vector of {len(heads)} heads {where} x {scale:g}"
    return HeadMixture(mix, layers, means.model, origin)


def published_mixture(means: HeadMeans, effects: IndirectEffects) -> HeadMixture:
    """The function vector that Saglam et al. (2025) compare with on regression, by its proportions.

    Their code takes the top 35 of 96 heads and adds a third of their sum at each of layers 6 to 8
    of 12. Models of other depth get the same share of heads, added in equal parts at the layers of
    the same relative depth. Nothing of it is chosen on data.

    Args:
        means: mean head outputs, which say what the model is.
        effects: indirect effects that rank the heads.
    """
    n_layer, n_head = means.outputs.shape[:2]
    heads = effects.top(max(1, round(35 / 96 * means.n_heads)))
    layers = sorted({min(n_layer - 1, n_layer * layer // 12) for layer in (6, 7, 8)})
    mix = torch.zeros(n_layer, n_layer, n_head)
    for to_layer in layers:
        for head in heads:
            mix[to_layer][head] = 1 / len(layers)
    origin = f"function vector of {len(heads)} heads, in equal parts at layers {layers}"
    return HeadMixture(mix, tuple(layers), means.model, origin)


@dataclass(frozen=True)
class FunctionVectorChoice(Displayed):
    """Function vectors chosen on the validation split, per prompt kind.

    Attributes:
        one_layer: best one-layer vector for each kind of prompt.
        per_layer: best per-layer vector for each kind of prompt.
        sweep: every candidate: site, layer (-1 for per layer), k, scale, prompt, and the
            measures of the lens' readout.
    """

    one_layer: dict[PromptKind, Vector]
    per_layer: dict[PromptKind, Vector]
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
    per_prompt: bool = False,
    progress: Callable[[int], None] | None = None,
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
        per_prompt: make each prompt's vector of the head outputs of its own donor, instead of one
            vector of the means for all prompts.
        progress: called with the number of prompts finished, of all kinds together.

    Raises:
        ShapeError: no k fits the model.
        TaskError: `per_prompt` is asked of prompts without donors.
    """
    layers = range(lens.n_layer) if layers is None else layers
    fitting = [k for k in ks if 1 <= k <= means.n_heads]
    if not fitting:
        raise ShapeError(
            f"no k of {tuple(ks)} fits {lens.name!r}, which has {means.n_heads} heads; give a k "
            "between 1 and that"
        )
    candidates: list[tuple[dict[str, object], HeadMixture]] = []
    for k in fitting:
        heads = effects.top(k)
        for scale in scales:
            row: dict[str, object] = {"k": k, "scale": scale}
            mixture = function_mixture(means, heads, layer=None, scale=scale)
            candidates.append(({"site": "per_layer", "layer": -1, **row}, mixture))
            for layer in layers:
                mixture = function_mixture(means, heads, layer=layer, scale=scale)
                candidates.append(({"site": "one_layer", "layer": layer, **row}, mixture))
    mixtures = [mixture for _, mixture in candidates]
    vectors: Sequence[Vector] = (
        mixtures if per_prompt else [mixture.of_means(means) for mixture in mixtures]
    )

    sites = [row["site"] for row, _ in candidates]
    order, sweep = ranked(
        lens,
        [(row, vector) for (row, _), vector in zip(candidates, vectors, strict=True)],
        validation,
        progress=progress,
    )
    best: dict[str, dict[PromptKind, Vector]] = {
        site: {
            kind: next(vectors[i] for i in found if sites[i] == site)
            for kind, found in order.items()
        }
        for site in ("one_layer", "per_layer")
    }
    return FunctionVectorChoice(best["one_layer"], best["per_layer"], sweep)


def make_chosen(site: Literal["one_layer", "per_layer"]) -> Callable[[Materials], ByKind]:
    """How the function vectors chosen on validation at one kind of site are made.

    A kind of prompts without validation prompts gets what is chosen on label-shuffled ones.
    """

    def make(materials: Materials) -> ByKind:
        vectors, _ = materials.kept("function-vectors", lambda: _choose(materials))
        keys = {key.split(".")[1]: key for key in vectors if key.startswith(f"{site}.")}
        return {kind: [vectors[keys.get(kind, keys["shuffled"])]] for kind in KINDS}

    return make


def make_published(materials: Materials) -> ByKind:
    """The function vector of the published proportions, the same for every kind of prompts."""
    mixture = published_mixture(materials.means, materials.effects)
    vector = mixture if materials.per_prompt else mixture.of_means(materials.means)
    return for_every_kind(vector)


def _choose(materials: Materials) -> tuple[dict[str, Vector], pd.DataFrame]:
    prompts = materials.validation()
    n_prompts = sum(len(each) for each in prompts.values())
    with progress_bar(f"{materials.task.name}: choice of function vectors", n_prompts) as advance:
        choice = choose_function_vectors(
            materials.lens,
            materials.means,
            materials.effects,
            prompts,
            ks=fitting_ks(materials.ks, materials.effects.n_heads),
            scales=materials.scales,
            per_prompt=materials.per_prompt,
            progress=advance,
        )
    sites = {"one_layer": choice.one_layer, "per_layer": choice.per_layer}
    flat = {f"{s}.{kind}": vector for s, found in sites.items() for kind, vector in found.items()}
    return flat, choice.sweep


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
        if layer not in means.has_heads:
            raise ShapeError(
                f"layer {layer} of model {means.model!r} has no heads; expected one of layers "
                f"{', '.join(map(str, means.has_heads))}"
            )
