"""Replayed suffixes give the numbers of hooked whole passes, at every site and position."""

import pytest
import torch

from helpers import zoo
from tvlens.lens.edits import NoEdit
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.patches import Patch
from tvlens.lens.replay import ReplayEngine
from tvlens.lens.sites import PER_HEAD, PER_KEY_VALUE_HEAD, SITE_KINDS, Site

LAYERS = 3


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def suffix_engine(backend):
    return ReplayEngine(backend).anywhere


def n_heads(engine, kind):
    if kind in PER_HEAD:
        return engine.anatomy.n_head
    return engine.anatomy.n_kv_head if kind in PER_KEY_VALUE_HEAD else 0


def patch(engine, batch, kind, seed=0):
    """Every layer at mixed columns, other heads and columns for each variant and prompt."""
    generator = torch.Generator().manual_seed(seed)
    there = engine.sites[kind]
    found = engine.record(batch, [Site(kind, layer) for layer in there])
    order = torch.randperm(len(batch), generator=generator)
    values = {site.layer: x[order] + 0.3 * random(*x.shape) for site, x in found.items()}
    if kind == "pattern":
        # Attention to what a position sees, and nothing else.
        values = {
            site.layer: random(*x.shape).masked_fill(x == 0, -torch.inf).softmax(dim=-1)
            for site, x in found.items()
        }
    n, width = 7, batch.inputs.shape[1]
    layer = torch.tensor(there)[torch.randint(len(there), (n,), generator=generator)]
    heads = n_heads(engine, kind)
    head = torch.randint(-1, heads, (n,), generator=generator) if heads else None
    at = torch.stack(
        [torch.randperm(width, generator=generator)[:3] for _ in range(n * len(batch))]
    ).view(len(batch), n, 3)
    at[:, 1, 1:] = -1
    at[0, 2] = -1
    at[:, 3] = torch.tensor([-1, -1, 0])
    at[:, 4] = torch.stack([batch.query, batch.query - 1, torch.full_like(batch.query, -1)], 1)
    return Patch(kind, LAYERS, layer, head, at.clamp(min=-1), values, at.clamp(min=0))


@pytest.mark.parametrize("batch", zoo.BATCHES.values(), ids=zoo.BATCHES)
@pytest.mark.parametrize("kind", SITE_KINDS)
def test_patches_are_those_of_whole_passes(backend, kind, batch):
    fast, slow = suffix_engine(backend), WholePassEngine(backend)
    if not fast.sites[kind] or not slow.sites[kind]:
        pytest.skip(f"no {kind} to patch by whole passes")
    assert fast.sites[kind] == slow.sites[kind]
    edit = patch(fast, batch, kind)
    reading = fast.read(batch)
    expected = slow.run_batch(batch, edit)
    clean = slow.run_batch(batch, NoEdit(LAYERS))
    assert (expected - clean).abs().max() > 0.05 * clean.std()
    assert zoo.off(fast.run(reading, edit), expected) < zoo.TOLERANCE[torch.float32]
