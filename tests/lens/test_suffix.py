"""Replayed suffixes give the numbers of hooked whole passes, at every site and position."""

import pytest
import torch

from helpers import tiny_regression, zoo
from tvlens.errors import ShapeError, UnknownNameError
from tvlens.lens.edits import AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.patches import Patch, Shift
from tvlens.lens.replay import ReplayEngine
from tvlens.lens.sites import PER_HEAD, PER_KEY_VALUE_HEAD, SITE_KINDS, Site, site_kind
from tvlens.lens.suffix import SuffixEngine

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


ASKED = {kind: list(zoo.BATCHES)[i % 2] for i, kind in enumerate(SITE_KINDS)}
"""At the end or early, by turns."""


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_patches_are_those_of_whole_passes(backend, kind):
    fast, slow = suffix_engine(backend), zoo.whole_passes(backend)
    if not fast.sites[kind] or not slow.sites[kind]:
        pytest.skip(f"no {kind} to patch by whole passes")
    assert fast.sites[kind] == slow.sites[kind]
    batch = zoo.BATCHES[ASKED[kind]]
    edit = patch(fast, batch, kind)
    reading = fast.read(batch)
    expected = slow.run_batch(batch, edit)
    clean = fast.run(reading, NoEdit(LAYERS))
    assert (expected - clean).abs().max() > 0.05 * clean.std()
    assert zoo.off(fast.run(reading, edit), expected) < zoo.TOLERANCE[torch.float32]


def test_z_and_factors_are_those_of_the_query(backend):
    query, whole = ReplayEngine(backend), suffix_engine(backend)
    for batch in zoo.BATCHES.values():
        expected, found = query.read(batch), whole.read(batch)
        assert torch.equal(found.z, expected.z)
        assert (found.factor is None) == (expected.factor is None)
        if expected.factor is not None:
            assert torch.equal(found.factor, expected.factor)


@pytest.mark.parametrize("name", ["gptj", "gpt-neo", "opt"])
def test_patterns_that_bridges_do_not_read_are_patched_by_replay(name):
    """A pattern put in is the z that it gathers."""
    backend = zoo.backend(name, "bridge")
    engine, batch = suffix_engine(backend), zoo.batch([[31, 6, 9, 40, 12], [8, 33, 20, 7, 9]])
    assert not zoo.whole_passes(backend).sites["pattern"]
    sites = Site("pattern", 1), Site("v", 1)
    with torch.no_grad():
        found = engine.record(batch, sites)
        pattern = found[sites[0]][[1, 0]]
        z = torch.einsum("bqhk,bkhd->bqhd", pattern, found[sites[1]])
        layer, head, at = torch.tensor([1, 1]), torch.tensor([0, 2]), torch.tensor([[[2], [4]]])
        reading = engine.read(batch)
        by_pattern, by_z = (
            engine.run(reading, Patch(kind, LAYERS, layer, head, at, {1: values}, at))
            for kind, values in (("pattern", pattern), ("z", z))
        )
    assert (by_z - engine.run(reading, NoEdit(LAYERS))).abs().max() > 1e-2
    assert zoo.off(by_pattern, by_z) < zoo.TOLERANCE[torch.float32]


def shift(backend, batch, kind):
    """Two variants that add at every site of a kind, and one that adds nowhere."""
    engine = suffix_engine(backend)
    sites = [Site(kind, layer) for layer in engine.sites[kind]]
    found = engine.record(batch, sites)
    added = {
        site: 0.3 * random(len(batch), 3, *x.shape[1:], seed=site.layer) * x[:, None].std()
        for site, x in found.items()
    }
    if kind == "pattern":
        added = {site: x.where(found[site][:, None] > 0, 0.0) for site, x in added.items()}
    active = torch.tensor([[True, True, True], [False, True, False], [False, False, False]])
    return Shift(LAYERS, added, active)


@pytest.mark.parametrize("kind", SITE_KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "olmo2"])
def test_gradients_are_those_of_whole_passes(name, kind):
    # What padding holds is nobody's business, and patterns have an axis of it.
    rows = zoo.ROWS[:1] * 2 if kind == "pattern" else zoo.ROWS
    backend, batch = zoo.backend(name, "bridge"), zoo.batch(rows)
    fast, slow = suffix_engine(backend), zoo.whole_passes(backend)
    edit = shift(backend, batch, kind)
    leaves = {site: x.requires_grad_() for site, x in edit.added.items()}
    found = []
    for engine in (fast, slow):
        out = engine.run(engine.read(batch), edit)
        found.append((out.detach(), torch.autograd.grad(out.square().sum(), list(leaves.values()))))
    assert zoo.off(found[0][0], found[1][0]) < zoo.TOLERANCE[torch.float32]
    mask = batch.mask[:, None]
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        real = mask.reshape(*mask.shape, *(1,) * (ours.ndim - 3))
        assert zoo.off(ours.where(real, 0.0), theirs.where(real, 0.0)) < 1e-4
        assert theirs[:, 2].abs().max() == 0


@pytest.mark.parametrize("also", [(), (2, 5), (6,)])
def test_edits_of_the_query_run_as_suffixes_too(backend, also):
    """What the query's own replay runs is the special case of one column."""
    batch, engine = zoo.batch(), suffix_engine(backend)
    z = random(LAYERS, backend.n_head, backend.d_head)
    vectors = random(len(batch), 2, LAYERS, backend.d_model, seed=1)
    active = torch.tensor([[True, False, True], [False, True, False]])
    for edit in (ReplaceHeads.each_head(z), AddToResidual(vectors, active), NoEdit(LAYERS)):
        edit = edit.and_at(also)
        found = engine.run(engine.read(batch), edit)
        expected = zoo.whole_passes(backend).run_batch(batch, edit)
        assert zoo.off(found, expected) < zoo.TOLERANCE[torch.float32]
        if not also:
            query = ReplayEngine(backend)
            assert zoo.off(query.run(query.read(batch), edit), found) < 1e-5


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("site", SITE_KINDS)
def test_regression_models_too(kind, site):
    lens = tiny_regression.lens(kind)
    batch = lens.encode(tiny_regression.TASK.prompts("train", shots=4, n=3))
    fast, slow = lens.engine.anywhere, zoo.whole_passes(lens.backend)
    n_layer = lens.n_layer
    given = fast.record(batch, [Site(site, n) for n in range(n_layer)])
    grid = torch.cartesian_prod(torch.arange(n_layer), torch.arange(batch.inputs.shape[1]))
    heads = torch.full((len(grid),), -1) if site in PER_HEAD | PER_KEY_VALUE_HEAD else None
    values = {each.layer: x[[1, 2, 0]] for each, x in given.items()}
    at = grid[None, :, 1:]
    edit = Patch(site, n_layer, grid[:, 0], heads, at, values, at)
    expected = slow.run_batch(batch, edit)
    assert expected.std() > 0.01
    assert zoo.off(fast.run(fast.read(batch), edit), expected) < 1e-4


def test_few_tokens_at_once_change_nothing():
    backend, batch = zoo.backend("llama", "bridge"), zoo.batch()
    engine = suffix_engine(backend)
    small = SuffixEngine(backend, engine.anatomy, max_tokens=9)
    edit = patch(engine, batch, "v")
    found = small.run(small.read(batch), edit)
    assert zoo.off(found, engine.run(engine.read(batch), edit)) < 1e-5


def test_suffixes_are_no_longer_than_they_must_be(monkeypatch):
    """Every variant runs from the first column it changes, or a few more with others."""
    backend, batch = zoo.backend("llama", "bridge"), zoo.batch([list(range(5, 45))])
    engine, ran = suffix_engine(backend), []
    run = engine._run

    def watch(reading, edit, columns, start, end):
        ran.append((edit.n_variant * (end - start), int((end - columns[columns >= 0]).sum())))
        return run(reading, edit, columns, start, end)

    monkeypatch.setattr(engine, "_run", watch)
    at = torch.arange(40).repeat_interleave(3)[None, :, None]
    layers = torch.arange(3).repeat(40)
    given = engine.record(batch, [Site("z", n) for n in range(3)])
    values = {site.layer: x + 1 for site, x in given.items()}
    engine.run(engine.read(batch), Patch("z", LAYERS, layers, layers, at, values, at))
    spent, needed = (sum(each) for each in zip(*ran, strict=True))
    assert needed == 3 * 40 * 41 // 2
    assert needed <= spent <= 1.15 * needed
    assert all(tokens <= engine.max_tokens for tokens, _ in ran)


def test_readings_are_joined_and_cut():
    backend, batch = zoo.backend("gemma2", "bridge"), zoo.batch()
    engine = suffix_engine(backend)
    whole = engine.read(batch)
    joined = engine.join(
        [engine.read(zoo.batch(zoo.ROWS[:1])), engine.read(zoo.batch(zoo.ROWS[1:]))]
    )
    edit = patch(engine, batch, "k")
    # Answers differ, what is read does not.
    assert zoo.off(engine.run(joined, edit), engine.run(whole, edit)) < 1e-5
    some = whole.rows(torch.tensor([2, 0]))
    clean = engine.run(whole, NoEdit(LAYERS))
    assert zoo.off(engine.run(some, NoEdit(LAYERS)), clean[[2, 0]]) < 1e-5
    assert torch.equal(whole.rows(slice(1, 3)).z, whole.z[1:3])
    assert zoo.off(joined.factor, whole.factor) < 1e-4


def test_generation_goes_on_by_whole_passes():
    backend, batch = zoo.backend("llama", "bridge"), zoo.batch([[31, 6, 9], [8, 33, 20]])
    engine, slow = suffix_engine(backend), zoo.whole_passes(backend)
    edit = AddToResidual(random(1, 1, LAYERS, backend.d_model), torch.ones(1, 3, dtype=torch.bool))
    edit = edit.and_at((1,))
    found = engine.generate(engine.read(batch), edit, 3)
    assert torch.equal(found, slow.generate(slow.read(batch), edit, 3))
    patching = patch(engine, batch, "z")
    with pytest.raises(ShapeError, match=r"Patch acts at columns of its own, and generated tokens"):
        engine.generate(engine.read(batch), patching, 3)


def test_sites_that_a_model_lacks_are_named():
    backend = zoo.backend("gpt-neox", "bridge")
    for engine in (suffix_engine(backend), zoo.whole_passes(backend)):
        with pytest.raises(UnknownNameError, match=r"'gpt-neox' has no site 'resid_mid' at which"):
            engine.record(zoo.batch(), [Site("resid_mid", 0)])
        with pytest.raises(ShapeError, match=r"layer 3 of 'gpt-neox' has no 'z'; it is in layers"):
            engine.record(zoo.batch(), [Site("z", 3)])
    wrong = Patch("z", 5, torch.tensor([0]), None, torch.tensor([[[0]]]), {}, torch.tensor([[[0]]]))
    engine = suffix_engine(backend)
    with pytest.raises(ShapeError, match=r"Patch is for 5 layers, 'gpt-neox' has 3"):
        engine.run(engine.read(zoo.batch()), wrong)
    with pytest.raises(UnknownNameError, match=r"there is no site 'hook_z'; sites are resid_pre"):
        site_kind("hook_z")


def test_sites_that_bridges_only_show_are_refused_in_whole_passes():
    """Their hook points fire, and what is put in there changes nothing."""
    engine, batch = WholePassEngine(zoo.backend("gpt-neo", "bridge")), zoo.batch()
    edit = Patch(
        "pattern",
        LAYERS,
        torch.tensor([1]),
        torch.tensor([0]),
        torch.tensor([[[6]]]),
        {1: torch.zeros(4, 7, 4, 7)},
        torch.tensor([[[6]]]),
    )
    with pytest.raises(
        UnknownNameError, match=r"'gpt-neo' has no site 'pattern' at which .* it has"
    ):
        engine.run_batch(batch, edit)


def test_hybrids_are_patched_in_the_layers_that_have_the_site():
    engine = WholePassEngine(zoo.backend("lfm2", "bridge"))
    assert engine.sites["resid_post"] == (0, 1, 2)
    assert engine.sites["z"] == engine.sites["attn_out"] == (1,)
    batch = zoo.batch([[31, 6, 9, 40], [8, 33, 20, 7]])
    found = engine.record(batch, [Site("attn_out", 1), Site("z", 1), Site("v", 1)])
    assert found[Site("z", 1)].shape == (2, 4, 4, 8)
    assert found[Site("v", 1)].shape == (2, 4, 2, 8)
    at = torch.tensor([[[2]]])
    edit = Patch(
        "v", LAYERS, torch.tensor([1]), torch.tensor([0]), at, {1: found[Site("v", 1)][[1, 0]]}, at
    )
    clean = engine.run_batch(batch, NoEdit(LAYERS))
    assert (engine.run_batch(batch, edit) - clean).abs().max() > 1e-4
    with pytest.raises(ShapeError, match=r"layer 0 of 'lfm2' has no 'v'; it is in layers 1 only"):
        engine.record(batch, [Site("v", 0)])
