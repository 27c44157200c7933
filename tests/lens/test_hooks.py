from dataclasses import replace

import pytest
import torch

from helpers import zoo
from tvlens.errors import InterventionError, ShapeError
from tvlens.lens.edits import AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.hooks import WholePassEngine, counted_hooks, intervene, record_attention
from tvlens.lens.replay import ReplayEngine


def n_hooks(backend):
    # A bridge lists some hook points under two names.
    points = {id(point): point for point in backend.model.hook_dict.values()}
    # transformer-lens 4 has some of its own on OPT.
    return sum(not hook.is_permanent for point in points.values() for hook in point.fwd_hooks)


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


def test_what_attention_does_is_recorded_at_the_query(backend):
    batch = zoo.asked_early()
    found = record_attention(backend, batch.inputs, batch.mask, batch.query)
    names = [(backend.z_hook(n), backend.added_hook(n)) for n in range(3)]
    whole, _ = recorded(backend, [name for pair in names for name in pair], batch)
    rows = torch.arange(len(batch))
    for layer, (z, added) in enumerate(names):
        assert torch.equal(found.z[:, layer], whole[z][rows, batch.query])
        assert torch.equal(found.added[:, layer], whole[added][rows, batch.query])


def test_heads_are_replaced_at_the_query_and_nowhere_else(backend):
    batch = zoo.asked_early()
    name, rows = backend.z_hook(1), torch.arange(len(batch))
    clean, _ = recorded(backend, [name], batch)
    edited, _ = recorded(backend, [name], batch, one_head(backend, 1, 2, 7.0))
    expected = clean[name].clone()
    expected[rows, batch.query, 2] = 7.0
    assert torch.equal(edited[name], expected)


def test_vectors_are_added_at_the_query_and_nowhere_else(backend):
    batch = zoo.asked_early()
    name, rows = backend.residual_hook(1), torch.arange(len(batch))
    vector = torch.linspace(-1, 1, backend.d_model)
    clean, _ = recorded(backend, [name], batch)
    edited, _ = recorded(backend, [name], batch, add_at(backend, 1, vector))
    expected = clean[name].clone()
    expected[rows, batch.query] += vector
    assert torch.equal(edited[name], expected)


def test_a_replaced_head_changes_the_attention_output_by_its_projection(backend):
    batch = zoo.batch()
    # Before anything scales it.
    name = (*backend.projected_hooks(1), backend.added_hook(1))[0]
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
            assert zoo.off(together[i, v], single[0, 0]) < zoo.TOLERANCE[torch.float32]


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


def test_a_context_removes_its_own_hooks_only(backend):
    batch, name = zoo.batch(), backend.z_hook(0)
    seen = []

    def hook(word):
        return lambda activation, hook: seen.append(word)

    def interrupted():
        with backend.hooks([(name, hook("inner"))]):
            backend.forward(batch.inputs, batch.mask)
            raise KeyError("mine")

    with torch.no_grad(), backend.hooks([(name, hook("outer")), ("no.such.point", hook("none"))]):
        with pytest.raises(KeyError, match="mine"):
            interrupted()
        backend.forward(batch.inputs, batch.mask)
    assert seen == ["outer", "inner", "outer"]
    assert n_hooks(backend) == 0


def test_a_bridge_lists_its_hook_points_once(monkeypatch):
    backend = zoo.new_backend("llama", "bridge")
    asked = []
    listed = type(backend.model).hook_dict.fget

    def hook_dict(model):
        asked.append(model)
        return listed(model)

    monkeypatch.setattr(type(backend.model), "hook_dict", property(hook_dict))
    engine = WholePassEngine(backend)
    engine.run(engine.read(zoo.batch()), one_head(backend, 0, 0, 9.0))
    assert len(asked) == 1


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


def test_edits_act_at_the_query_and_at_each_further_column(backend):
    # Asked at different columns, and three variants of the edit.
    batch = replace(zoo.batch([zoo.ROWS[0], zoo.ROWS[3][:5]]), query=torch.tensor([4, 3]))
    vectors = torch.randn(1, 3, 3, backend.d_model, generator=torch.Generator().manual_seed(0))
    edit = AddToResidual(vectors, torch.tensor([[False, True, False]] * 3)).and_at((1, 0))
    name = backend.residual_hook(1)
    clean, _ = recorded(backend, [name], batch)
    found = {}

    def keep(activation, hook):
        found[name] = activation.clone()

    inputs, mask = (x.repeat_interleave(3, dim=0) for x in (batch.inputs, batch.mask))
    with (
        torch.no_grad(),
        intervene(backend, edit, batch.query) as fired,
        backend.model.hooks([(name, keep)]),
    ):
        backend.forward(inputs, mask)
    assert fired == {name: 1}
    expected = clean[name].repeat_interleave(3, dim=0)
    for prompt, query in enumerate((4, 3)):
        for variant in range(3):
            for column in (query, 1, 0):
                expected[3 * prompt + variant, column] += vectors[0, variant, 1]
    assert zoo.off(found[name], expected) < 1e-5


def test_heads_are_replaced_at_each_further_column(backend):
    batch = zoo.batch(zoo.ROWS[:1])
    name = backend.z_hook(1)
    clean, _ = recorded(backend, [name], batch)
    edited, _ = recorded(backend, [name], batch, one_head(backend, 1, 2, 7.0).and_at((0, 3)))
    expected = clean[name].clone()
    expected[0, [4, 0, 3], 2] = 7.0
    assert torch.equal(edited[name], expected)


@torch.no_grad()
def by_own_hook(backend, tokens, layer, vector, columns):
    """Logits at the last token with the vector added at these columns, by a hook of our own."""

    def add(activation, hook):
        changed = activation.clone()
        changed[:, columns] += vector
        return changed

    with backend.model.hooks([(backend.residual_hook(layer), add)]):
        return backend.model(torch.tensor([tokens]))[0, -1]


def test_whole_passes_run_and_generate_with_edits_at_further_columns(backend):
    row, vector = zoo.ROWS[0], 2 * torch.linspace(-1, 1, backend.d_model)
    edit = add_at(backend, 1, vector).and_at((1, 2))
    engine = WholePassEngine(backend)
    reading = engine.read(zoo.batch([row]))
    expected = by_own_hook(backend, row, 1, vector, [4, 1, 2])
    assert zoo.off(engine.run(reading, edit)[0, 0], expected) < 1e-5
    assert zoo.off(engine.run_batch(reading.batch, edit)[0, 0], expected) < 1e-5
    assert zoo.off(engine.run(reading, replace(edit, also=()))[0, 0], expected) > 1e-3
    tokens = list(row)
    for _ in range(3):
        tokens.append(int(by_own_hook(backend, tokens, 1, vector, [4, 1, 2]).argmax()))
    assert engine.generate(reading, edit, 3)[0, 0].tolist() == tokens[len(row) :]


def test_replay_refuses_edits_at_further_columns(backend):
    engine = ReplayEngine(backend)
    reading = engine.read(zoo.batch())
    edit = add_at(backend, 1, torch.ones(backend.d_model)).and_at((1,))
    words = (
        r"replay runs z and resid_post of the query position alone, but this AddToResidual acts "
        r"elsewhere too; use Lens.engine_for\(edit\)"
    )
    with pytest.raises(ShapeError, match=words):
        engine.run(reading, edit)
    with pytest.raises(ShapeError, match=words):
        engine.generate(reading, edit, 1)


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (7, "acts at column 7, but the model was run on 7 columns; expected columns from 0 to 6"),
        (-1, "acts at column -1; expected columns counted from 0, padding included"),
    ],
)
def test_columns_outside_of_the_batch_are_refused(column, words):
    backend = zoo.backend("llama", "bridge")
    edit = one_head(backend, 1, 2, 7.0).and_at((2, column))
    with pytest.raises(ShapeError, match=f"ReplaceHeads {words}"):
        WholePassEngine(backend).run_batch(zoo.batch(), edit)
    engine = ReplayEngine(backend).anywhere
    with pytest.raises(ShapeError, match=f"ReplaceHeads {words}"):
        engine.run(engine.read(zoo.batch()), edit)
