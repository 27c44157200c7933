"""Values put in at several sites at once: the same by replay and by hooked whole passes."""

import pytest
import torch

from helpers import zoo
from tvlens.lens.edits import NoEdit
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.patches import PutIn
from tvlens.lens.replay import ReplayEngine
from tvlens.lens.sites import Site

LAYERS, VARIANTS = 3, 4
SITES = [Site("q", 2, 3), Site("q", 2, 0), Site("v", 1, 1), Site("mlp_out", 1), Site("k", 2, 0)]


def edit(engine, batch, sites, *, added):
    """Other values for every prompt and variant, at the query, before it and, for one, nowhere."""
    generator = torch.Generator().manual_seed(0)
    n, d_model, d_head = len(batch), engine.backend.d_model, engine.anatomy.d_head

    def random(width):
        return torch.randn(n, VARIANTS, 2, width, generator=generator)

    at = torch.stack([batch.query, (batch.query - 1).where(torch.arange(n) != 1, -1)], dim=1)
    values = {site: random(d_model if site.head is None else d_head) for site in sites}
    return PutIn(LAYERS, at, values, random(d_model) if added else None)


@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma2", "gpt2"])
def test_values_put_in_are_those_of_whole_passes(name, added):
    backend, batch = zoo.backend(name, "bridge"), zoo.batch()
    fast, slow = ReplayEngine(backend).anywhere, WholePassEngine(backend)
    made = edit(fast, batch, SITES, added=added)
    assert made.n_variant == VARIANTS
    assert made.acting.any(dim=0).tolist() == [False, True, True]
    found, expected = fast.run(fast.read(batch), made), slow.run_batch(batch, made)
    assert zoo.off(found, expected) < zoo.TOLERANCE[torch.float32]
    clean = slow.run_batch(batch, NoEdit(LAYERS))
    assert ((expected - clean).abs().amax(dim=2) > 0.05 * clean.std()).all()
    for parts in ([Site("mlp_out", 1)], [Site("q", 1, 2)]):
        few = edit(fast, batch, parts, added=added)
        expected = slow.run_batch(batch, few)
        assert zoo.off(fast.run(fast.read(batch), few), expected) < zoo.TOLERANCE[torch.float32]


def test_some_variants_of_some_prompts():
    lens, batch = zoo.lens("llama"), zoo.batch()
    engine = lens.engine.anywhere
    made = edit(engine, batch, SITES, added=True)
    whole = engine.run(engine.read(batch), made)
    some = made.of_variants(torch.tensor([2, 0])).of_prompts(1, 3)
    found = engine.run(engine.read(batch[1:3]), some)
    assert zoo.off(found, whole[1:3, [2, 0]]) < zoo.TOLERANCE[torch.float32]
    pieces = lens.outputs(batch, made, lambda outputs, batch: outputs)
    assert zoo.off(pieces, whole) < zoo.TOLERANCE[torch.float32]
