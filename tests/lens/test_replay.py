"""Replay gives the numbers of whole forward passes through hooks, for every backend and model."""

import pytest
import torch

from helpers import zoo
from tvlens.errors import ShapeError
from tvlens.lens.edits import AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.readout import target_log_prob
from tvlens.lens.replay import ReplayEngine
from tvlens.lens.steering import ReplaceResidual, TurnResidual, blend_heads

ALL_KINDS = pytest.mark.skipif(len(zoo.KINDS) < 2, reason="transformer-lens 4 has one backend")


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chosen(*shape, seed=1):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.4


def edits(backend, n_prompts=4, dtype=torch.float32):
    """One edit of each kind, those with several variants joining at mixed layers."""
    n_head, d_head, d_model = backend.n_head, backend.d_head, backend.d_model
    mask = chosen(6, 3, n_head)
    mask[4] = False
    active = chosen(5, 3)
    active[3] = False
    return {
        "none": NoEdit(3),
        "each head": ReplaceHeads.each_head(random(3, n_head, d_head, dtype=dtype)),
        "heads, values of variants": ReplaceHeads(
            mask, random(1, 6, 3, n_head, d_head, dtype=dtype)
        ),
        "heads, values of prompts": ReplaceHeads(
            mask, random(n_prompts, 1, 3, n_head, d_head, dtype=dtype)
        ),
        "heads, values of both": ReplaceHeads(
            mask, random(n_prompts, 6, 3, n_head, d_head, dtype=dtype)
        ),
        "vectors": AddToResidual(random(1, 5, 3, d_model, dtype=dtype), active),
        "vectors of prompts": AddToResidual(random(n_prompts, 5, 3, d_model, dtype=dtype), active),
        "vectors everywhere": AddToResidual(
            random(1, 5, 3, d_model, dtype=dtype), torch.ones(5, 3, dtype=torch.bool)
        ),
        "heads moved": blend_heads(
            random(6, 3, n_head, dtype=dtype) * mask, random(1, 6, 3, n_head, d_head, dtype=dtype)
        ),
        "streams replaced": ReplaceResidual(random(1, 5, 3, d_model, dtype=dtype), active),
        "streams turned": TurnResidual(random(n_prompts, 5, 3, d_model, dtype=dtype) / 4, active),
    }


def test_both_backends_are_tested_where_both_exist():
    try:
        from transformer_lens import HookedTransformer
    except ImportError:
        HookedTransformer = None
    names = {name for name, _ in zoo.CASES}
    if HookedTransformer is None:
        assert {kind for _, kind in zoo.CASES} == {"bridge"}
        assert names == {*zoo.CONFIGS, *zoo.BRIDGED_CONFIGS}
    else:
        assert names == {*zoo.CONFIGS, *zoo.BRIDGED_CONFIGS, "attention-only", "folded"}
        assert len(zoo.CASES) == 2 * len(zoo.CONFIGS) + len(zoo.BRIDGED_CONFIGS) + 2


@pytest.mark.parametrize("batch", zoo.BATCHES.values(), ids=zoo.BATCHES)
def test_z_is_that_of_whole_passes(backend, batch):
    fast, slow = ReplayEngine(backend).read(batch), WholePassEngine(backend).read(batch)
    assert slow.z.std() > 0.3
    assert zoo.off(fast.z, slow.z) < zoo.TOLERANCE[torch.float32]


def test_final_streams_are_those_of_whole_passes(backend):
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    engines = (fast, fast.anywhere, slow)
    readings = [engine.read(zoo.batch()) for engine in engines]
    for name, edit in edits(backend).items():
        expected = slow.final(readings[2], edit)
        for engine, reading in zip(engines[:2], readings[:2], strict=True):
            found = engine.final(reading, edit)
            assert zoo.off(found, expected) < zoo.TOLERANCE[torch.float32], name
    for engine, reading in zip(engines, readings, strict=True):
        logits = backend.unembed(engine.final(reading, edit))
        assert zoo.off(logits, engine.run(reading, edit)) < 1e-5


@pytest.mark.parametrize("batch", zoo.BATCHES.values(), ids=zoo.BATCHES)
def test_logits_are_those_of_whole_passes(backend, batch):
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    fast_reading, slow_reading = fast.read(batch), slow.read(batch)
    clean = slow.run(slow_reading, NoEdit(3))
    for name, edit in edits(backend).items():
        expected = slow.run(slow_reading, edit)
        # The comparison means something only where the edits move the logits.
        assert name == "none" or (expected - clean).std() > 0.1, name
        found = fast.run(fast_reading, edit)
        assert zoo.off(found, expected) < zoo.TOLERANCE[torch.float32], name


def test_low_precision_logits_are_those_of_whole_passes(half):
    fast, slow = ReplayEngine(half), WholePassEngine(half)
    batch = zoo.batch()
    fast_reading, slow_reading = fast.read(batch), slow.read(batch)
    for name, edit in edits(half, dtype=torch.bfloat16).items():
        expected, found = slow.run(slow_reading, edit), fast.run(fast_reading, edit)
        assert found.dtype == torch.bfloat16
        difference = (found.float() - expected.float()).square().mean().sqrt()
        assert difference / expected.float().std() < zoo.TOLERANCE[torch.bfloat16], name


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_double_precision_is_kept(kind):
    backend = zoo.new_backend("gpt2", kind, torch.float64)
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    edit = ReplaceHeads.each_head(random(3, 4, 8, dtype=torch.float64))
    with torch.no_grad():
        found, expected = (e.run(e.read(zoo.batch()), edit) for e in (fast, slow))
    assert float((found - expected).abs().max() / expected.std()) < 1e-12


@ALL_KINDS
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_the_two_backends_agree(name):
    """An independent reference: the two share no code below the edits."""
    batch = zoo.batch()
    found = []
    for kind in zoo.KINDS:
        engine = ReplayEngine(zoo.backend(name, kind))
        some = edits(engine.backend)
        found.append(torch.cat([engine.run(engine.read(batch), e) for e in some.values()], dim=1))
    assert zoo.off(*found) < 1e-4


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("name", zoo.CONFIGS)
def test_unedited_logits_are_those_of_the_original_model(name, kind):
    engine = ReplayEngine(zoo.backend(name, kind))
    found = engine.run(engine.read(zoo.batch()), NoEdit(3))
    original = zoo.huggingface(name)
    for i, row in enumerate(zoo.ROWS):
        with torch.no_grad():
            expected = original(torch.tensor([row])).logits[0, -1]
        assert zoo.off(found[i, 0], expected) < 1e-4


@pytest.mark.parametrize("batch", zoo.BATCHES.values(), ids=zoo.BATCHES)
def test_a_batch_of_n_is_n_batches_of_one(backend, batch):
    engine = ReplayEngine(backend)
    together = engine.read(batch)
    width = batch.inputs.shape[1]
    ends = [len(row) - width + 1 + int(q) for row, q in zip(zoo.ROWS, batch.query, strict=True)]
    singly = [engine.read(zoo.batch([row[:end]])) for row, end in zip(zoo.ROWS, ends, strict=True)]
    for name, edit in edits(backend).items():
        logits = engine.run(together, edit)
        for i, reading in enumerate(singly):
            alone = engine.run(reading, edit.of_prompts(i, i + 1))
            assert zoo.off(logits[i], alone[0]) < zoo.TOLERANCE[torch.float32], name


def test_single_tokens_alone(backend):
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    batch = zoo.batch([[17], [30]])
    fast_reading, slow_reading = fast.read(batch), slow.read(batch)
    for name, edit in edits(backend, n_prompts=2).items():
        found, expected = fast.run(fast_reading, edit), slow.run(slow_reading, edit)
        assert zoo.off(found, expected) < zoo.TOLERANCE[torch.float32], name


def test_rows_never_see_each_other(backend):
    engine = ReplayEngine(backend)
    reading = engine.read(zoo.batch())
    for name, edit in edits(backend).items():
        logits = engine.run(reading, edit)
        every = torch.arange(edit.n_variant)
        # Some by themselves, and each in other company.
        for some in (every[:1], every[-1:], every[::2], every[1::2]):
            if len(some):
                found = engine.run(reading, edit.of_variants(some))
                assert zoo.off(found, logits[:, some]) < zoo.TOLERANCE[torch.float32], name


def test_variants_come_back_in_their_order(backend):
    engine = ReplayEngine(backend)
    reading = engine.read(zoo.batch())
    for name, edit in edits(backend).items():
        order = torch.randperm(edit.n_variant, generator=torch.Generator().manual_seed(3))
        logits = engine.run(reading, edit)
        if edit.n_variant > 1:
            assert (logits[:, order] - logits).std() > 0.2
        reordered = engine.run(reading, edit.of_variants(order))
        assert zoo.off(reordered, logits[:, order]) < zoo.TOLERANCE[torch.float32], name


def test_chosen_rows_of_a_reading(backend):
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    batch = zoo.batch()
    index = torch.tensor([3, 0, 3])
    edit = edits(backend)["each head"]
    whole = fast.run(fast.read(batch), edit)
    for engine in (fast, slow):
        some = engine.read(batch).rows(index)
        assert len(some) == 3
        assert some.batch.answers == tuple(batch.answers[i] for i in index)
        assert torch.equal(some.batch.target, batch.target[index])
        assert zoo.off(some.z, engine.read(batch).z[index]) == 0
        assert zoo.off(engine.run(some, edit), whole[index]) < zoo.TOLERANCE[torch.float32]


def test_joined_readings_are_those_of_all_prompts(backend):
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    batch = zoo.batch()
    edit = edits(backend)["heads, values of both"]
    whole = fast.run(fast.read(batch), edit)
    for engine in (fast, slow):
        # Each part is narrower than the whole, so joining has to widen.
        parts = [engine.read(zoo.batch(zoo.ROWS[:3])), engine.read(zoo.batch(zoo.ROWS[3:]))]
        assert parts[0].batch.inputs.shape[1] != parts[1].batch.inputs.shape[1]
        joined = engine.join(parts)
        assert len(joined) == len(batch)
        assert torch.equal(joined.batch.mask, batch.mask)
        assert torch.equal(joined.batch.query, batch.query)
        assert zoo.off(joined.z, engine.read(batch).z) < zoo.TOLERANCE[torch.float32]
        assert zoo.off(engine.run(joined, edit), whole) < zoo.TOLERANCE[torch.float32]
        words = joined.batch.inputs.where(joined.batch.mask, -1)
        assert torch.equal(words, batch.inputs.where(batch.mask, -1))


def test_gradients_are_those_through_hooks(backend):
    batch = zoo.batch()
    active = chosen(5, 3)
    found = []
    for engine in (ReplayEngine(backend), WholePassEngine(backend)):
        vectors = random(1, 5, 3, backend.d_model).requires_grad_()
        values = random(4, 5, 3, backend.n_head, backend.d_head).requires_grad_()
        mask = chosen(5, 3, backend.n_head, seed=2)
        reading = engine.read(batch)
        for edit in (AddToResidual(vectors, active), ReplaceHeads(mask, values)):
            logits = engine.run(reading, edit)
            target = batch.target[:, None].expand(logits.shape[:2])
            target_log_prob(logits, target).sum().backward()
        found.append((vectors.grad, values.grad))
    for fast, slow in zip(*found, strict=True):
        assert slow.abs().max() > 0.1
        assert zoo.off(fast, slow) < 1e-4
    assert not found[0][0][0][~active].any()


def test_reading_takes_no_gradients():
    engine = ReplayEngine(zoo.new_backend("llama", "bridge"))
    assert all(p.requires_grad for p in engine.backend.parameters())
    reading = engine.read(zoo.batch())
    tensors = [*reading.keys, *reading.values, reading.residual, reading.heads]
    assert not any(tensor.requires_grad for tensor in tensors)


def test_generation_is_that_of_whole_passes(backend):
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    batch = zoo.batch()
    fast_reading, slow_reading = fast.read(batch), slow.read(batch)
    tokens = {}
    # What variants and prompts are given by themselves, they are in both ways at once.
    covered = ("heads, values of variants", "heads, values of prompts", "vectors")
    for name, edit in edits(backend).items():
        if name in covered:
            continue
        found = fast.generate(fast_reading, edit, 3)
        assert found.shape == (len(batch), edit.n_variant, 3)
        assert torch.equal(found, slow.generate(slow_reading, edit, 3)), name
        tokens[name] = found
    clean, each_head = tokens["none"], tokens["each head"]
    assert not torch.equal(each_head, clean.expand_as(each_head))
    assert len(each_head.unique()) > 1


def test_the_first_generated_token_is_the_likeliest(backend):
    engine = ReplayEngine(backend)
    reading = engine.read(zoo.batch())
    edit = edits(backend)["vectors"]
    found = engine.generate(reading, edit, 1)
    assert torch.equal(found[..., 0], engine.run(reading, edit).argmax(dim=-1))


def test_generation_may_fill_the_context(backend):
    room = 2
    rows = [[8 + i % 40 for i in range(zoo.N_CTX - room)], [9, 10]]
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    batch = zoo.batch(rows)
    found = fast.generate(fast.read(batch), NoEdit(3), room + 1)
    assert torch.equal(found, slow.generate(slow.read(batch), NoEdit(3), room + 1))


def test_generation_needs_the_query_last(backend):
    words = "some query positions lie before it; ask every prompt at its last input, curves at one"
    for engine in (ReplayEngine(backend), WholePassEngine(backend)):
        with pytest.raises(ShapeError, match=words):
            engine.generate(engine.read(zoo.asked_early()), NoEdit(3), 1)


def test_an_edit_of_another_number_of_layers_is_refused(backend):
    engine = ReplayEngine(backend)
    reading = engine.read(zoo.batch())
    words = f"NoEdit is for 2 layers, '{backend.name}' has 3; build it from vectors or means"
    with pytest.raises(ShapeError, match=words):
        engine.run(reading, NoEdit(2))
    with pytest.raises(ShapeError, match=words):
        engine.generate(reading, NoEdit(2), 1)


def test_prompts_longer_than_any_before_are_read_right(backend):
    """Tables of rotary angles grow as they are needed."""
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    for n in (3, 20, 90):
        batch = zoo.batch([[8 + i % 40 for i in range(n)]])
        found, expected = (
            fast.run(fast.read(batch), NoEdit(3)),
            slow.run(slow.read(batch), NoEdit(3)),
        )
        assert zoo.off(found, expected) < 1e-4
