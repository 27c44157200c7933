from dataclasses import replace

import pytest
import torch

from helpers import zoo
from tvlens.errors import InterventionError, ShapeError
from tvlens.lens.edits import AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.hooks import WholePassEngine, counted_hooks, intervene, record_heads
from tvlens.lens.replay import ReplayEngine
from tvlens.models.batch import Batch


def n_hooks(backend):
    # A bridge lists some hook points under two names.
    points = {id(point): point for point in backend.model.hook_dict.values()}
    return sum(len(point.fwd_hooks) for point in points.values())


def recorded(backend, names, batch, edit=None):
    """Activations at hook points, whole; read by hooks of the model's own."""
    found = {}
    keep = [(name, lambda a, hook, name=name: found.update({name: a.clone()})) for name in names]
    edit = edit or NoEdit(backend.n_layer)
    # The innermost hooks of a point run last, so they see what the edit left.
    with torch.no_grad(), intervene(backend, edit, batch.query), backend.model.hooks(keep):
        logits = backend.forward(batch.inputs, batch.mask)
    return found, logits


def one_head(backend, layer, head, value):
    mask = torch.zeros(1, backend.n_layer, backend.n_head, dtype=torch.bool)
    mask[0, layer, head] = True
    shape = (1, 1, backend.n_layer, backend.n_head, backend.d_head)
    return ReplaceHeads(mask, torch.full(shape, value))


def add_at(backend, layer, vector):
    vectors = torch.zeros(1, 1, backend.n_layer, backend.d_model)
    vectors[0, 0, layer] = vector
    active = torch.zeros(1, backend.n_layer, dtype=torch.bool)
    active[0, layer] = True
    return AddToResidual(vectors, active)


def test_no_edit_gives_the_models_own_logits(backend):
    batch = zoo.batch()
    engine = WholePassEngine(backend)
    with torch.no_grad():
        plain = backend.model(batch.inputs, attention_mask=batch.mask.long())
    assert torch.equal(engine.run(engine.read(batch), NoEdit(3))[:, 0], plain[:, -1])


def test_read_records_hook_z_and_logits_at_the_query(backend):
    batch = zoo.batch(pad_side="right")
    z, logits = record_heads(backend, batch.inputs, batch.mask, batch.query)
    whole, plain = recorded(backend, [backend.z_hook(n) for n in range(3)], batch)
    rows = torch.arange(len(batch))
    for layer in range(3):
        assert torch.equal(z[:, layer], whole[backend.z_hook(layer)][rows, batch.query])
    assert torch.equal(logits, plain[rows, batch.query])


def test_heads_are_replaced_at_the_query_and_nowhere_else(backend):
    batch = zoo.batch(pad_side="right")
    name, rows = backend.z_hook(1), torch.arange(len(batch))
    clean, _ = recorded(backend, [name], batch)
    edited, _ = recorded(backend, [name], batch, one_head(backend, 1, 2, 7.0))
    expected = clean[name].clone()
    expected[rows, batch.query, 2] = 7.0
    assert torch.equal(edited[name], expected)


def test_vectors_are_added_at_the_query_and_nowhere_else(backend):
    batch = zoo.batch(pad_side="right")
    name, rows = backend.residual_hook(1), torch.arange(len(batch))
    vector = torch.linspace(-1, 1, backend.d_model)
    clean, _ = recorded(backend, [name], batch)
    edited, _ = recorded(backend, [name], batch, add_at(backend, 1, vector))
    expected = clean[name].clone()
    expected[rows, batch.query] += vector
    assert torch.equal(edited[name], expected)


def test_a_replaced_head_changes_the_attention_output_by_its_projection(backend):
    batch = zoo.batch()
    name = backend.attn_out_hook(1)
    z = WholePassEngine(backend).read(batch).z[:, 1, 2]
    clean, _ = recorded(backend, [name], batch)
    edited, _ = recorded(backend, [name], batch, one_head(backend, 1, 2, 0.5))
    expected = (0.5 - z) @ backend.w_o[1, 2]
    assert zoo.off((edited[name] - clean[name])[:, -1], expected) < 1e-5


def test_a_vector_behind_the_last_block_is_unembedded_with_its_residual(backend):
    batch = zoo.batch()
    vector = torch.linspace(-1, 1, backend.d_model)
    name = backend.residual_hook(2)
    clean, _ = recorded(backend, [name], batch)
    engine = WholePassEngine(backend)
    found = engine.run(engine.read(batch), add_at(backend, 2, vector))
    expected = backend.unembed(clean[name][:, -1:] + vector)
    assert zoo.off(found, expected) < 1e-5


def test_clean_into_clean_changes_nothing(backend):
    engine = WholePassEngine(backend)
    reading = engine.read(zoo.batch())
    mask = ReplaceHeads.each_head(reading.z[0]).mask
    clean = engine.run(reading, NoEdit(3))
    found = engine.run(reading, ReplaceHeads(mask, reading.z[:, None]))
    assert zoo.off(found, clean.expand_as(found)) < 1e-5


def test_a_zero_vector_changes_nothing(backend):
    engine = WholePassEngine(backend)
    reading = engine.read(zoo.batch())
    zero = AddToResidual(torch.zeros(1, 1, 3, backend.d_model), torch.ones(1, 3, dtype=torch.bool))
    assert torch.equal(engine.run(reading, zero), engine.run(reading, NoEdit(3)))


def test_variants_of_one_prompt_lie_next_to_each_other(backend):
    engine = WholePassEngine(backend)
    batch = zoo.batch()
    edit = ReplaceHeads.each_head(torch.ones(3, backend.n_head, backend.d_head))
    together = engine.run(engine.read(batch), edit)
    for i, row in enumerate(zoo.ROWS):
        for v in (0, 7):
            alone = engine.read(zoo.batch([row]))
            single = engine.run(alone, edit.of_variants(torch.tensor([v])))
            assert zoo.off(together[i, v], single[0, 0]) < 1e-5


def test_generation_goes_on_from_what_was_generated(backend):
    engine = WholePassEngine(backend)
    batch = zoo.batch()
    edit = add_at(backend, 1, 2 * torch.linspace(-1, 1, backend.d_model))
    found = engine.generate(engine.read(batch), edit, 3)
    for i, row in enumerate(zoo.ROWS):
        tokens = list(row)
        for _ in range(3):
            inputs = torch.tensor([tokens])
            # The edit stays at the prompt's last token, whatever follows it.
            with torch.no_grad(), intervene(backend, edit, torch.tensor([len(row) - 1])):
                tokens.append(int(backend.model(inputs)[0, -1].argmax()))
        assert found[i, 0].tolist() == tokens[len(row) :]


def test_hooks_are_gone_after_use(backend):
    batch = zoo.batch()
    edit = one_head(backend, 0, 0, 1.0)
    with intervene(backend, edit, batch.query) as fired:
        backend.forward(batch.inputs, batch.mask)
        assert n_hooks(backend) == 1
    assert fired == {backend.z_hook(0): 1}
    assert n_hooks(backend) == 0


def test_hooks_are_gone_after_an_exception(backend):
    batch = zoo.batch()
    edit = add_at(backend, 0, torch.ones(backend.d_model))
    with pytest.raises(KeyError, match="mine"), intervene(backend, edit, batch.query):
        raise KeyError("mine")
    assert n_hooks(backend) == 0
    with pytest.raises(ShapeError), intervene(backend, edit, batch.query):
        backend.forward(batch.inputs[:2], batch.mask[:2])
    assert n_hooks(backend) == 0


def test_a_users_own_hooks_stay(backend):
    batch = zoo.batch()
    seen = []
    point = backend.model.hook_dict[backend.z_hook(0)]
    point.add_hook(lambda a, hook: seen.append(hook.name))
    try:
        WholePassEngine(backend).read(batch)
        assert n_hooks(backend) == 1
        assert len(seen) == 1
    finally:
        point.remove_hooks()


def test_activations_are_not_written_into(backend):
    """What somebody else has kept of a forward pass stays as it was."""
    batch = zoo.batch()
    seen = []
    names = [backend.z_hook(0), backend.residual_hook(0)]
    points = [backend.model.hook_dict[name] for name in names]
    clean, _ = recorded(backend, names, batch)
    for point in points:
        point.add_hook(lambda a, hook: seen.append(a))
    try:
        engine = WholePassEngine(backend)
        engine.run(engine.read(batch), one_head(backend, 0, 0, 9.0))
        engine.run(engine.read(batch), add_at(backend, 0, torch.ones(backend.d_model)))
    finally:
        for point in points:
            point.remove_hooks()
    assert len(seen) == 8
    assert torch.equal(seen[2], clean[names[0]])
    assert torch.equal(seen[7], clean[names[1]])


def test_a_hook_that_never_fires_is_an_error(backend):
    batch = zoo.batch()
    words = rf"1 of 1 hooks on '{backend.name}' never fired \(blocks.1.attn.hook_z\): either the"
    with (
        pytest.raises(InterventionError, match=words),
        intervene(backend, one_head(backend, 1, 0, 1.0), batch.query),
    ):
        pass
    assert n_hooks(backend) == 0


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_hook_point_that_does_not_exist_is_an_error(kind):
    backend = zoo.backend("llama", kind)
    batch = zoo.batch()
    names = [f"blocks.{n}.attn.hook_nowhere" for n in range(4)] + [backend.z_hook(0)]
    words = r"4 of 5 hooks on 'llama' never fired \(.*nowhere, .*, .*, …\).*no such hook points"
    with (
        pytest.raises(InterventionError, match=words),
        counted_hooks(backend, dict.fromkeys(names, lambda a: None)),
    ):
        backend.forward(batch.inputs, batch.mask)
    assert n_hooks(backend) == 0


def test_another_number_of_rows_is_refused(backend):
    batch = zoo.batch()
    edit = ReplaceHeads.each_head(torch.ones(3, backend.n_head, backend.d_head))
    words = "the model was run on 4 rows, the edit is for 4 prompts x 12 variants = 48 rows"
    with pytest.raises(ShapeError, match=words), intervene(backend, edit, batch.query):
        backend.forward(batch.inputs, batch.mask)


def test_an_edit_for_another_number_of_layers_is_refused(backend):
    words = f"NoEdit is for 5 layers, '{backend.name}' has 3; build it from vectors or means of"
    with pytest.raises(ShapeError, match=words), intervene(backend, NoEdit(5), torch.tensor([0])):
        pass


def test_edits_act_at_each_of_several_positions(backend):
    batch = zoo.batch(zoo.ROWS[:2], pad_side="right")
    # The same edit at two positions of its own in each prompt, and three variants of it.
    sites = torch.tensor([[4, 1], [2, 0]])
    vectors = torch.randn(1, 3, 3, backend.d_model, generator=torch.Generator().manual_seed(0))
    edit = AddToResidual(vectors, torch.tensor([[False, True, False]] * 3))
    name = backend.residual_hook(1)
    clean, _ = recorded(backend, [name], batch)
    found = {}

    def keep(activation, hook):
        found[name] = activation.clone()

    inputs, mask = (x.repeat_interleave(3, dim=0) for x in (batch.inputs, batch.mask))
    with (
        torch.no_grad(),
        intervene(backend, edit, sites) as fired,
        backend.model.hooks([(name, keep)]),
    ):
        backend.forward(inputs, mask)
    assert fired == {name: 1}
    expected = clean[name].repeat_interleave(3, dim=0)
    for prompt in range(2):
        for variant in range(3):
            for position in sites[prompt].tolist():
                expected[3 * prompt + variant, position] += vectors[0, variant, 1]
    assert zoo.off(found[name][mask], expected[mask]) < 1e-5


def test_heads_are_replaced_at_each_of_several_positions(backend):
    batch = zoo.batch(zoo.ROWS[:1])
    name = backend.z_hook(1)
    clean, _ = recorded(backend, [name], batch)
    found = {}
    keep = [(name, lambda a, hook: found.update({name: a.clone()}))]
    edit = one_head(backend, 1, 2, 7.0)
    with (
        torch.no_grad(),
        intervene(backend, edit, torch.tensor([[4, 0, 3]])),
        backend.model.hooks(keep),
    ):
        backend.forward(batch.inputs, batch.mask)
    expected = clean[name].clone()
    expected[0, [4, 0, 3], 2] = 7.0
    assert torch.equal(found[name], expected)


def test_further_positions_of_a_batch_are_those_that_edits_act_at():
    batch = replace(zoo.batch(zoo.ROWS[:2]), also=(3, 1))
    assert batch.sites.tolist() == [[4, 3, 1], [4, 3, 1]]
    assert zoo.batch(zoo.ROWS[:2]).sites.tolist() == [[4], [4]]
    assert batch[:1].also == batch.take(torch.tensor([1, 0])).also == (3, 1)
    assert batch.to(torch.device("cpu")).also == (3, 1)


def test_whole_passes_act_at_the_further_positions_of_a_batch(backend):
    batch = zoo.batch(zoo.ROWS[:1])
    edit = add_at(backend, 1, torch.linspace(-1, 1, backend.d_model))
    engine = WholePassEngine(backend)
    found = engine.run_batch(replace(batch, also=(1, 2)), edit)
    with torch.no_grad(), intervene(backend, edit, torch.tensor([[4, 1, 2]])):
        expected = backend.forward(batch.inputs, batch.mask)[:, -1:]
    assert torch.equal(found, expected)
    assert zoo.off(engine.run_batch(batch, edit), expected) > 1e-3


def test_replay_refuses_prompts_with_further_positions(backend):
    engine = ReplayEngine(backend)
    words = r"replay runs the query position alone, but edits of these prompts also act at \(1,\)"
    with pytest.raises(ShapeError, match=words):
        engine.read(replace(zoo.batch(), also=(1,)))


def test_batches_join_only_where_edits_act_at_the_same_places():
    here, there = (replace(zoo.batch(zoo.ROWS[:1]), also=also) for also in ((1,), (2,)))
    longer = replace(zoo.batch(zoo.ROWS[3:4]), also=(1,))
    words = "batches whose edits act at different places cannot be joined; expected prompts of one"
    for parts in ([here, there], [here, zoo.batch(zoo.ROWS[:1])], [here, longer]):
        with pytest.raises(ShapeError, match=words):
            Batch.join(parts)
    joined = Batch.join([here, here])
    assert joined.also == (1,)
    assert joined.sites.tolist() == [[4, 1], [4, 1]]
    assert Batch.join([zoo.batch(zoo.ROWS[:1]), zoo.batch(zoo.ROWS[3:4])]).also == ()
