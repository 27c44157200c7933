"""Displays of a lens, and of mean head outputs."""

from tvlens import figures
from tvlens.lens.heads import HeadMeans
from tvlens.lens.lens import Lens
from tvlens.notebook import pieces
from tvlens.notebook.displays import shows

_RUNS = {
    "replay": "by exact replay of the last position; edits elsewhere by suffix replay",
    "suffix replay": "by exact replay from the first edited column on",
    "whole passes": "by whole forward passes, for replay does not know this architecture",
}
_BACKENDS = {"bridge": "TransformerBridge", "hooked": "HookedTransformer"}
_AT = {
    "query": "the query position",
    "answers": "the tokens of the answer",
    "all": "all positions of the prompt",
}


@shows(Lens)
def _lens(lens: Lens) -> str:
    backend, there = lens.backend, lens.backend.attention_layers
    lacking = sorted({*range(lens.n_layer)} - {*there})
    reads = "text" if lens.readout.has_text else "points, and answers with one number"
    told = {
        "model": lens.name,
        "backend": _BACKENDS.get(backend.kind, backend.kind),
        "heads": f"{lens.n_layer} layers x {lens.n_head} heads of size {backend.d_head}",
        "layers without heads": pieces.layers(lacking) if lacking else None,
        "key/value heads": backend.n_kv_head if backend.n_kv_head != lens.n_head else None,
        "d_model": lens.d_model,
        "positions": backend.n_ctx,
        "edited prompts run": _RUNS.get(lens.engine.name, lens.engine.name),
        "reads": reads,
        "effects are differences in": lens.readout.score_name
        + (" of whole answers" if lens.readout.reads == "whole" else ""),
        "before every prompt": f"special tokens {list(lens.prefix)}" if lens.prefix else None,
        "weights": f"{str(backend.dtype).removeprefix('torch.')} on {backend.device}",
    }
    return pieces.card(f"Lens on {lens.name}", pieces.facts(told))


@shows(HeadMeans)
def _means(means: HeadMeans) -> str:
    n_layer, n_head, d_head = means.z.shape
    lacking = sorted({*range(n_layer)} - {*means.has_heads})
    told = {
        "model": means.model,
        "mean over": f"{means.count} of {means.offered} prompts offered",
        "at": _AT[means.at],
        "heads": f"{n_layer} layers x {n_head} heads of size {d_head}",
        "layers without heads": pieces.layers(lacking) if lacking else None,
        "d_model": means.outputs.shape[2],
    }
    parts = [pieces.facts(told)]
    norms = means.outputs.detach().float().norm(dim=-1)
    if norms.numel():
        drawn = figures.value_map(norms, label="norm of the mean output", k=0)
        words = "norm of the mean output of every head by layer"
        parts.append(pieces.picture(drawn, words))
    return pieces.card("Mean head outputs", *parts)
