"""Displays of vectors: where they act, and of which heads they are made."""

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens import figures
from tvlens.notebook import pieces
from tvlens.notebook.displays import html, shows
from tvlens.vectors.fv import FunctionVectorChoice
from tvlens.vectors.hendel import DonorState
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.mixing import HeadBlend
from tvlens.vectors.vector import HeadMixture, TaskVector, Vector

_ACTS = {
    "query": "at the query position",
    "all": "at the query position, and at all positions of the answer",
}
_KINDS = {
    "TaskVector": "added to what blocks write out",
    "StateVector": "put in place of residual streams",
    "InContextVector": "a direction that residual streams are turned towards",
    "HeadMixture": "weights of the head outputs of each prompt's own donor, added layer by layer",
    "HeadBlend": "shares by which heads are moved towards their clean means",
    "DonorState": "the residual stream of each prompt's donor, put in place of its own",
}


@shows(Vector)
def _vector(vector: Vector) -> str:
    return pieces.card(type(vector).__name__, pieces.facts(_facts(vector)))


@shows(TaskVector)
def _task_vector(vector: TaskVector) -> str:
    norms = torch.zeros(len(vector.vectors))
    layers = sorted(vector.layers)
    norms[layers] = vector.vectors[layers].detach().cpu().float().norm(dim=-1)
    told = _facts(vector) | {
        "layers": f"{pieces.layers(layers)} of {len(norms)}",
        "d_model": vector.vectors.shape[1],
        "norm": pieces.number(float(norms.norm())),
    }
    if not layers:
        return pieces.card("Task vector that adds nothing", pieces.facts(told))
    strongest = int(norms.argmax())
    words = f"norm of {vector.origin} by layer, largest at layer {strongest}"
    drawn = figures.layer_bars(norms, label="norm")
    return pieces.card("Task vector", pieces.facts(told), pieces.picture(drawn, words))


@shows(LearnableTaskVector)
def _ltv(ltv: LearnableTaskVector) -> str:
    signed = not bool(torch.isnan(ltv.attribution[ltv.has_heads]).any())
    grid = ltv.contributions(signed=False)
    if signed:
        grid = grid * ltv.attribution.sign()
    plain = ltv.forward().detach()
    told: dict[str, object] = {
        "task": ltv.task,
        "model": ltv.model,
        "weights": "of slices of d_model" if ltv.granularity == "block" else "of heads",
        "of": "each prompt's own head outputs" if ltv.per_prompt else "mean head outputs",
        "heads": f"{int(ltv.mask.sum())} of {int(ltv.has_heads.sum())} take part, in "
        f"{len(ltv.omega)} layers",
        "acts": _ACTS[ltv.positions],
        "norm": pieces.number(float(plain.norm())),
        "trained": f"weights moved by {pieces.number(ltv.travel)}, {len(ltv.history)} evaluations",
    }
    label = "signed norm of contribution" if signed else "norm of contribution"
    note = (
        "Framed: the highest. Blue heads work against the answer within the vector."
        if signed
        else "Framed: the highest. Contributions have no sign yet: tvlens.attribute(lens, ltv, "
        "prompts) gives it."
    )
    return pieces.card(
        "Learnable Task Vector", pieces.facts(told), _map(grid, label, ltv.task), _said(note)
    )


@shows(HeadMixture)
def _mixture(mixture: HeadMixture) -> str:
    told = _facts(mixture) | {"added at layers": pieces.layers(mixture.layers)}
    weights = mixture.mix[sorted(mixture.layers)].sum(dim=0)
    return pieces.card(
        "Head mixture", pieces.facts(told), _map(weights, "sum of weights", mixture.origin)
    )


@shows(HeadBlend)
def _blend(blend: HeadBlend) -> str:
    towards = "each prompt's donor" if blend.z is None else "clean means"
    told = _facts(blend) | {"heads are moved towards": towards}
    return pieces.card("Head blend", pieces.facts(told), _map(blend.alpha, "share", blend.origin))


@shows(DonorState)
def _state(state: DonorState) -> str:
    layers = state.chosen.nonzero().flatten().tolist()
    return pieces.card(
        "Donor state", pieces.facts(_facts(state) | {"layer": pieces.layers(layers)})
    )


@shows(FunctionVectorChoice)
def _choice(choice: FunctionVectorChoice) -> str:
    parts = [
        pieces.sentence(f"{way}, {kind} prompts") + html(vector)
        for way, made in (("one layer", choice.one_layer), ("per layer", choice.per_layer))
        for kind, vector in made.items()
    ]
    return pieces.card("Function vectors, chosen on validation prompts", *parts)


def _facts(vector: Vector) -> dict[str, object]:
    return {
        "made": getattr(vector, "origin", ""),
        "model": vector.model,
        "is": _KINDS.get(type(vector).__name__, ""),
        "acts": _ACTS.get(vector.positions, vector.positions),
    }


def _map(grid: Float[Tensor, "layer head"], label: str, title: str) -> str:
    if not grid.numel():
        return ""
    k = max(1, min(10, grid.numel() // 4))
    drawn = figures.value_map(grid, label=label, title=title, k=k)
    return pieces.picture(drawn, f"{label} of every head by layer, {title}")


def _said(note: str) -> str:
    return pieces.sentence(note)
