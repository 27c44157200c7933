"""Sites as hook points of a model that is run whole."""

import warnings
from collections.abc import Callable, Collection
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.lens.sites import PER_HEAD, Site, SiteKind
from tvlens.models.backend import Backend

Change = Callable[[Site, Float[Tensor, "batch pos *rest"]], Tensor]

_BESIDE = {
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
}


def tapped_sites(backend: Backend) -> dict[SiteKind, tuple[int, ...]]:
    """Layers in which each site has the hook points that it takes."""
    there, every = backend.hook_points, range(backend.n_layer)
    with_heads = backend.attention_layers

    def having(point: str) -> tuple[int, ...]:
        return tuple(n for n in with_heads if f"blocks.{n}.{point}" in there)

    return {
        "resid_pre": tuple(every),
        "resid_mid": having("hook_resid_mid"),
        "resid_post": tuple(every),
        "attn_out": with_heads,
        "mlp_out": having("hook_mlp_out"),
        "q": having(_BESIDE["q"]),
        "k": having(_BESIDE["k"]),
        "v": having(_BESIDE["v"]),
        "z": with_heads,
        "pattern": having(_BESIDE["pattern"]),
    }


def taps(
    backend: Backend, sites: Collection[Site], change: Change
) -> dict[str, Callable[[Tensor], Tensor | None]]:
    """A function for each hook point that puts in what `change` makes of the activation.

    What stands between attention and MLP, and what the MLP adds, are reckoned from the streams
    before and behind the block and what attention adds: hook points of these names mean other
    things in other models, such as what the MLP's norm reads.

    Args:
        backend: the model.
        sites: whole sites, each of a layer that has it.
        change: is shown the activation `[batch pos …]`, head by head where there are heads.
    """
    functions: dict[str, Callable[[Tensor], Tensor | None]] = {}
    for layer in {site.layer for site in sites}:
        kinds = {site.kind for site in sites if site.layer == layer}
        functions |= _of_block(backend, layer, kinds, change)
        for kind in kinds & {"q", "k", "v", "z", "pattern"}:
            point = backend.z_hook(layer) if kind == "z" else f"blocks.{layer}.{_BESIDE[kind]}"
            functions[point] = partial(_by_head, backend, Site(kind, layer), change)
    return functions


def _of_block(
    backend: Backend, layer: int, kinds: set[SiteKind], change: Change
) -> dict[str, Callable[[Tensor], Tensor | None]]:
    seen: dict[str, Tensor] = {}

    def shown(kind: SiteKind, activation: Tensor) -> Tensor:
        return change(Site(kind, layer), activation) if kind in kinds else activation

    def before(residual: Tensor) -> Tensor:
        seen["before"] = shown("resid_pre", residual)
        return seen["before"]

    def added(activation: Tensor) -> Tensor:
        out = shown("attn_out", activation)
        if "resid_mid" in kinds:
            start = seen["before"].to(out.device)
            out = shown("resid_mid", start + out) - start
        seen["added"] = out
        return out

    def behind(residual: Tensor) -> Tensor:
        if "mlp_out" in kinds:
            middle = (seen["before"] + seen["added"].to(seen["before"].device)).to(residual.device)
            residual = middle + shown("mlp_out", residual - middle)
        return shown("resid_post", residual)

    first = {"resid_pre", "resid_mid", "mlp_out"}
    points: dict[str, Callable[[Tensor], Tensor | None]] = {}
    if kinds & first:
        points[f"blocks.{layer}.hook_resid_pre"] = before
    if kinds & {"attn_out", "resid_mid", "mlp_out"}:
        points[backend.added_hook(layer)] = added
    if kinds & {"mlp_out", "resid_post"}:
        points[backend.residual_hook(layer)] = behind
    return points


def _by_head(backend: Backend, site: Site, change: Change, activation: Tensor) -> Tensor:
    if site.kind == "pattern":
        return change(site, activation.transpose(1, 2)).transpose(1, 2)
    if site.kind == "z":
        heads = backend.as_heads(activation)
    elif activation.ndim == 4:
        heads = activation
    else:
        n_head = backend.n_head if site.kind in PER_HEAD else backend.n_kv_head
        heads = activation.unflatten(-1, (n_head, -1))
    return change(site, heads).reshape(activation.shape)


def is_inert(backend: Backend, kind: SiteKind, forward: Callable[[], Tensor]) -> bool:
    """Whether what is put in at a site's hook points changes nothing that the model gives.

    Some bridges show activations that nothing reads.

    Args:
        backend: the model.
        kind: the site.
        forward: outputs of a forward pass.
    """
    generator = torch.Generator().manual_seed(0)

    def disturb(site: Site, activation: Tensor) -> Tensor:
        noise = torch.randn(activation.shape, generator=generator).to(activation)
        return activation + (noise.abs() if kind == "pattern" else 3 * noise * activation.std())

    layer = tapped_sites(backend)[kind][0]
    functions = taps(backend, [Site(kind, layer)], disturb)
    fired: set[str] = set()

    def call(name: str, activation: Tensor, hook: object) -> Tensor | None:
        fired.add(name)
        return functions[name](activation)

    before = forward()
    with warnings.catch_warnings():
        # transformer-lens 4 says the same of its own accord.
        warnings.simplefilter("ignore")
        with backend.hooks([(name, partial(call, name)) for name in functions]):
            after = forward()
    moved = (after.float() - before.float()).std()
    return fired != set(functions) or not bool(moved > 1e-2 * before.float().std())
