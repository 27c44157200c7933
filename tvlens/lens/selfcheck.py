"""Checks that a lens makes of its model before anybody trusts a number from it."""

import warnings
from functools import partial

import torch
from torch import Tensor

from tvlens.errors import ModelError
from tvlens.lens.edits import AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.engine import Engine
from tvlens.lens.hooks import Attended, WholePassEngine, counted_hooks, record_attention
from tvlens.lens.replay import ReplayEngine
from tvlens.models.anatomy import UnknownArchitectureError
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch

# Largest difference allowed, in standard deviations of what is compared.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
# Two orders of the same additions drift apart over many layers, so logits are compared by the root
# mean square of their differences, and low precision is given more room.
_LOGIT_TOLERANCE = _TOLERANCE | {torch.bfloat16: 3e-1, torch.float64: 1e-5}
# One layer has no room to drift: what is wrong in it shows in any precision.
_LAYER_TOLERANCE = {
    torch.float64: 1e-5,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}


def choose_engine(backend: Backend) -> Engine:
    """The engine for `backend`: replay where it is exact, whole forward passes otherwise.

    On short random prompts this checks that the contributions of the heads and the bias sum to the
    attention output, which is what is added to the residual stream or, where a norm or a constant
    stands between them, is scaled into it; that zeroing one head's `hook_z` changes that output by
    exactly its `z W_O`, that a large patch moves the logits, and that replay gives the numbers of
    hooked forward passes. A warning says so where it does not.

    Raises:
        ModelError: one of the first three identities is broken; the message says which.
    """
    batch = backend.short_prompts()
    with backend.frozen(), torch.no_grad():
        scaled = _check_contributions(backend, batch)
        _check_large_patch(backend, batch)
        try:
            engine = ReplayEngine(backend)
            if reason := _other_layer(engine, batch):
                return _whole_passes(backend, reason, scaled=scaled)
            difference = _replay_difference(engine, batch, scaled=scaled)
        except UnknownArchitectureError as error:
            return _whole_passes(backend, str(error), scaled=scaled)
        except (RuntimeError, AttributeError, LookupError, TypeError, ValueError) as error:
            # Modules of an architecture nobody has tried can refuse to be called one by one.
            reason = f"replay fails with {type(error).__name__}: {error}"
            return _whole_passes(backend, reason, scaled=scaled)
    limit = _LOGIT_TOLERANCE[backend.dtype]
    if not difference < limit:
        return _whole_passes(
            backend,
            f"replayed logits differ by {difference:.1e} standard deviations, expected < "
            f"{limit:.0e}",
            scaled=scaled,
        )
    return engine


def _whole_passes(backend: Backend, reason: str, *, scaled: bool) -> WholePassEngine:
    warnings.warn(
        f"{backend.name!r} is run by whole forward passes, which is exact but far slower than "
        f"replay: {reason}",
        stacklevel=4,
    )
    return WholePassEngine(backend, scaled=scaled)


def _relative(difference: Tensor, reference: Tensor) -> float:
    return float(difference.float().abs().max() / reference.float().std().clamp(min=1e-12))


def _typical(difference: Tensor, reference: Tensor) -> float:
    spread = reference.float().std().clamp(min=1e-12)
    return float(difference.float().square().mean().sqrt() / spread)


def _check_contributions(backend: Backend, batch: Batch) -> bool:
    """Whether blocks scale what heads write before they add it; refuses what is no scaling."""
    limit = _TOLERANCE.get(backend.dtype)
    if limit is None:
        raise ModelError(
            f"model {backend.name!r} has dtype {backend.dtype}; expected one of "
            f"{', '.join(map(str, _TOLERANCE))}; load it with dtype=torch.float32"
        )
    rows, columns = batch.mask.nonzero(as_tuple=True)
    record = partial(record_attention, backend, batch.inputs, batch.mask, columns, rows=rows)
    found = record()
    if not torch.isfinite(found.added).all():
        raise ModelError(
            f"model {backend.name!r} gives activations that are not finite on a short prompt; "
            "expected finite numbers; check its weights and dtype"
        )
    w_o = backend.w_o
    if found.z.shape[2:] != w_o.shape[1:3]:
        raise ModelError(
            f"model {backend.name!r}: hook_z has (head, d_head) {tuple(found.z.shape[2:])}, W_O "
            f"has {tuple(w_o.shape[1:3])}; both must describe the same query heads"
        )
    summed = torch.einsum("blhd,lhdm->blm", found.z, w_o) + backend.b_o
    written, scaled = found.added, False
    error = _relative(summed - written, written)
    if not error < limit and found.projected is not None:
        written, scaled = found.projected, True
        error = min(error, _relative(summed - written, written))
    if not error < limit:
        raise ModelError(
            f"model {backend.name!r}: head contributions plus bias do not sum to the attention "
            f"output (off by {error:.1e} standard deviations, expected < {limit:.0e}); something "
            "stands between hook_z and the residual stream, so heads have no separate contribution"
        )
    if scaled:
        _check_scaling(backend, found, limit)
    layers = backend.attention_layers
    layer, head = layers[len(layers) // 2], backend.n_head // 2

    def without_one(at: int, z: Tensor) -> Tensor | None:
        if at != layer:
            return None
        z = z.clone()
        z[:, :, head] = 0
        return z

    zeroed = record(change_z=without_one)
    after = zeroed.projected if scaled and zeroed.projected is not None else zeroed.added
    expected = -(found.z[:, layer, head] @ w_o[layer, head])
    error = _relative((after - written)[:, layer] - expected, written)
    if not error < limit:
        raise ModelError(
            f"model {backend.name!r}: zeroing z of head ({layer}, {head}) does not change the "
            f"attention output by its z W_O (off by {error:.1e} standard deviations, expected "
            f"< {limit:.0e}); hook_z is not where the output projection reads"
        )
    return scaled


def _check_scaling(backend: Backend, found: Attended, limit: float) -> None:
    """Refuse what stands behind attention and does not multiply its output.

    A constant or a norm multiplies coordinate m at position p by w[m] u[p]: over positions and
    coordinates, factors have rank one.
    """
    factor = found.factor
    assert factor is not None
    sizes = torch.linalg.svdvals(factor.float().transpose(0, 1))
    error = float((sizes[:, 1] / sizes[:, 0].clamp(min=1e-12)).max())
    if not error < limit:
        raise ModelError(
            f"model {backend.name!r}: what stands between attention and the residual stream is no "
            f"scaling (its factors differ from a norm's by {error:.1e} of their size, expected < "
            f"{limit:.0e}), so heads have no separate contribution"
        )


def _check_large_patch(backend: Backend, batch: Batch) -> None:
    engine = WholePassEngine(backend)
    reading = engine.read(batch)
    clean = engine.run(reading, NoEdit(backend.n_layer))
    mask = torch.zeros(1, backend.n_layer, backend.n_head, dtype=torch.bool, device=backend.device)
    first = backend.attention_layers[0]
    mask[0, first] = True
    values = 10 * reading.z.abs().amax().clamp(min=1.0) * torch.ones_like(reading.z[:, None])
    moved = _relative(engine.run(reading, ReplaceHeads(mask, values)) - clean, clean)
    if not moved > 1e-4:
        raise ModelError(
            f"model {backend.name!r}: a large patch of all heads of layer {first} moves the logits "
            f"by {moved:.1e} standard deviations, expected > 1e-4; hook_z does not reach the output"
        )


def _other_layer(engine: ReplayEngine, batch: Batch) -> str | None:
    """What replay does otherwise in one layer, given what the model has before it; None if nothing.

    Layers are looked at one by one, so that no error hides behind later ones or in the noise of low
    precision that gathers over all of them.
    """
    backend = engine.backend
    found: dict[str, Tensor] = {}

    def names(layer: int) -> tuple[str, str, str]:
        before = f"blocks.{layer}.hook_resid_pre"
        return before, backend.z_hook(layer), backend.residual_hook(layer)

    def keep(name: str, activation: Tensor) -> None:
        found[name] = activation.clone()

    layers = range(backend.n_layer)
    with counted_hooks(backend, {name: partial(keep, name) for n in layers for name in names(n)}):
        backend.forward(batch.inputs, batch.mask)
    limit = _LAYER_TOLERANCE[backend.dtype]
    for layer in layers:
        before, z, after = (found[name] for name in names(layer))
        off = _typical((engine.heads_of(layer, before, batch.mask) - z)[batch.mask], z[batch.mask])
        if not off < limit:
            return (
                f"replayed heads of layer {layer} differ by {off:.1e} standard deviations, "
                f"expected < {limit:.0e}"
            )
        change = (after - before)[batch.mask].float()
        error = (engine.write(layer, before, z) - after)[batch.mask].float()
        # Of all positions the middle one: a mixture of experts may choose otherwise at some.
        off = float((error.norm(dim=-1) / change.norm(dim=-1).clamp(min=1e-12)).median())
        if not off < limit:
            return (
                f"what replay writes in layer {layer} differs by {off:.1e} of its size, expected < "
                f"{limit:.0e}"
            )
    return None


def _replay_difference(engine: ReplayEngine, batch: Batch, *, scaled: bool) -> float:
    backend = engine.backend
    slow = WholePassEngine(backend, scaled=scaled)
    fast_reading, slow_reading = engine.read(batch), slow.read(batch)
    worst = _typical(fast_reading.z - slow_reading.z, slow_reading.z)
    if engine.scaled != scaled:
        raise UnknownArchitectureError("replay does not know how its blocks scale attention")
    if fast_reading.factor is not None and slow_reading.factor is not None:
        off = fast_reading.factor - slow_reading.factor
        worst = max(worst, float(off.abs().mean() / slow_reading.factor.abs().mean()))
    generator = torch.Generator().manual_seed(1)
    spread = slow_reading.z.float().std()
    shape = (backend.n_layer, backend.n_head, backend.d_head)
    z = (torch.randn(shape, generator=generator).to(backend.device) * spread).to(backend.dtype)
    ends = ReplaceHeads.each_head(z).of_variants(
        torch.tensor([0, backend.n_layer * backend.n_head - 1])
    )
    vectors = torch.randn(1, 1, backend.n_layer, backend.d_model, generator=generator)
    vectors = (vectors.to(backend.device) * backend.b_o.float().std().clamp(min=0.1)).to(z.dtype)
    active = torch.ones(1, backend.n_layer, dtype=torch.bool, device=backend.device)
    for edit in (NoEdit(backend.n_layer), ends, AddToResidual(vectors, active)):
        reference = slow.run(slow_reading, edit)
        worst = max(worst, _typical(engine.run(fast_reading, edit) - reference, reference))
    return worst
