import pytest
import torch

from tvlens.errors import ShapeError
from tvlens.lens.edits import AddHeads, AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.sites import Site

L, H, D = 3, 2, 2


def at_z(edit, layer, z):
    """What stands at the query's heads after the change."""
    return edit.change(Site("z", layer), z[:, :, None])[:, :, 0]


def at_residual(edit, layer, residual):
    return edit.change(Site("resid_post", layer), residual[:, :, None])[:, :, 0]


def coded(*shape):
    """Every element different, so that a swapped axis shows."""
    return torch.arange(1.0, 1 + torch.tensor(shape).prod()).reshape(shape)


def test_no_edit_is_one_variant_that_begins_behind_the_last_layer():
    edit = NoEdit(L)
    assert (edit.n_variant, edit.n_layer, edit.first_layer.tolist()) == (1, L, [L])
    assert edit.sites == frozenset()
    assert edit.of_variants(torch.tensor([0])) == edit.of_prompts(1, 3) == edit


def test_each_head_has_one_variant_per_head_in_layer_head_order():
    values = coded(L, H, D)
    edit = ReplaceHeads.each_head(values)
    assert (edit.n_variant, edit.n_layer) == (L * H, L)
    assert edit.first_layer.tolist() == [0, 0, 1, 1, 2, 2]
    assert edit.sites == {Site("z", 0), Site("z", 1), Site("z", 2)}
    z = torch.zeros(1, L * H, H, D)
    for layer in range(L):
        changed = at_z(edit, layer, z)[0]
        expected = torch.zeros(L * H, H, D)
        for head in range(H):
            expected[layer * H + head, head] = values[layer, head]
        assert torch.equal(changed, expected)


def test_values_may_differ_by_prompt_and_by_variant():
    mask = torch.tensor([[[True, False]], [[False, True]]])
    values = coded(3, 2, 1, 2, D)
    z = torch.zeros(3, 2, 2, D)
    changed = at_z(ReplaceHeads(mask, values), 0, z)
    for prompt in range(3):
        assert torch.equal(changed[prompt, 0, 0], values[prompt, 0, 0, 0])
        assert torch.equal(changed[prompt, 1, 1], values[prompt, 1, 0, 1])
        assert not changed[prompt, 0, 1].any()
        assert not changed[prompt, 1, 0].any()


def test_edits_accept_rows_of_the_first_variants_only():
    edit = ReplaceHeads.each_head(coded(L, H, D))
    z = coded(2, L * H, H, D)
    assert torch.equal(at_z(edit, 1, z)[:, :3], at_z(edit, 1, z[:, :3]))
    add = AddToResidual(coded(1, 4, L, 5), torch.ones(4, L, dtype=torch.bool))
    x = coded(2, 4, 5)
    assert torch.equal(at_residual(add, 1, x)[:, :3], at_residual(add, 1, x[:, :3]))


def test_inputs_are_left_as_they_are():
    z, x = torch.zeros(1, L * H, H, D), torch.zeros(1, 1, 5)
    at_z(ReplaceHeads.each_head(coded(L, H, D)), 0, z)
    at_residual(AddToResidual(coded(1, 1, L, 5), torch.ones(1, L, dtype=torch.bool)), 0, x)
    assert not z.any()
    assert not x.any()


def test_added_vectors_act_where_they_are_active():
    active = torch.tensor([[True, False, True], [False, False, True]])
    edit = AddToResidual(coded(1, 2, L, 4), active)
    assert edit.first_layer.tolist() == [0, 2]
    assert edit.sites == {Site("resid_post", 0), Site("resid_post", 2)}
    x = torch.full((3, 2, 4), 10.0)
    assert torch.equal(at_residual(edit, 0, x)[1], torch.stack([x[1, 0] + coded(4), x[1, 1]]))
    assert torch.equal(at_residual(edit, 1, x), x)
    assert torch.equal(at_residual(edit, 2, x), x + edit.vectors[:, :, 2])


def test_vectors_of_inactive_layers_are_not_read():
    vectors = torch.full((1, 2, L, 4), torch.nan)
    vectors[0, 0, 1] = 2.0
    edit = AddToResidual(vectors, torch.tensor([[False, True, False], [False, False, False]]))
    expected = torch.tensor([2.0, 0.0]).view(1, 2, 1).expand(1, 2, 4)
    assert torch.equal(at_residual(edit, 1, torch.zeros(1, 2, 4)), expected)
    assert edit.first_layer.tolist() == [1, L]


def test_a_variant_without_heads_changes_nothing():
    edit = ReplaceHeads(torch.zeros(1, L, H, dtype=torch.bool), coded(1, 1, L, H, D))
    assert edit.first_layer.tolist() == [L]
    assert edit.sites == frozenset()
    assert torch.equal(at_z(edit, 0, coded(1, 1, H, D)), coded(1, 1, H, D))


def test_of_variants_keeps_order_and_repeats():
    edit = ReplaceHeads.each_head(coded(L, H, D))
    some = edit.of_variants(torch.tensor([5, 0, 5]))
    assert some.first_layer.tolist() == [2, 0, 2]
    assert some.values.shape[1] == 1
    own = ReplaceHeads(edit.mask, coded(1, L * H, L, H, D))
    assert torch.equal(own.of_variants(torch.tensor([5, 0])).values, own.values[:, [5, 0]])
    add = AddToResidual(coded(1, 3, L, 4), torch.eye(L, dtype=torch.bool))
    some = add.of_variants(torch.tensor([2, 0]))
    assert torch.equal(some.vectors, add.vectors[:, [2, 0]])
    assert some.first_layer.tolist() == [2, 0]


def test_of_prompts_cuts_values_of_prompts_and_shares_common_ones():
    mask = torch.ones(1, L, H, dtype=torch.bool)
    shared, own = ReplaceHeads(mask, coded(1, 1, L, H, D)), ReplaceHeads(mask, coded(4, 1, L, H, D))
    assert shared.of_prompts(1, 3) is shared
    assert torch.equal(own.of_prompts(1, 3).values, own.values[1:3])
    active = torch.ones(1, L, dtype=torch.bool)
    shared, own = AddToResidual(coded(1, 1, L, 4), active), AddToResidual(coded(4, 1, L, 4), active)
    assert shared.of_prompts(1, 3) is shared
    assert torch.equal(own.of_prompts(1, 3).vectors, own.vectors[1:3])


def test_edits_take_the_precision_of_the_model():
    z = torch.zeros(1, L * H, H, D, dtype=torch.bfloat16)
    assert at_z(ReplaceHeads.each_head(coded(L, H, D)), 0, z).dtype == torch.bfloat16
    edit = AddToResidual(coded(1, 1, L, 4), torch.ones(1, L, dtype=torch.bool))
    added = at_residual(edit, 0, torch.zeros(1, 1, 4, dtype=torch.bfloat16))
    assert added.dtype == torch.bfloat16


def test_gradients_reach_active_vectors_alone():
    vectors = torch.zeros(1, 1, L, 4, requires_grad=True)
    edit = AddToResidual(vectors, torch.tensor([[False, True, False]]))
    at_residual(edit, 1, torch.zeros(2, 1, 4)).sum().backward()
    assert vectors.grad[0, 0].sum(dim=1).tolist() == [0, 8, 0]


def test_values_of_single_prompts_replace_each_head_of_theirs():
    values = coded(4, L, H, D)
    edit = ReplaceHeads.each_head(values)
    assert (edit.n_variant, edit.values.shape) == (L * H, (4, 1, L, H, D))
    for layer in range(L):
        changed = at_z(edit, layer, torch.zeros(4, L * H, H, D))
        for prompt in range(4):
            alone = ReplaceHeads.each_head(values[prompt])
            expected = at_z(alone, layer, torch.zeros(1, L * H, H, D))[0]
            assert torch.equal(changed[prompt], expected)
    assert torch.equal(edit.of_prompts(1, 3).values, edit.values[1:3])


ACTIVE = torch.tensor([[True, False, True], [False, False, True]])


def add_heads(n_batch):
    return AddHeads(coded(n_batch, L, H, 5), coded(2, L, L, H) % 7 - 3, ACTIVE)


def as_vectors(edit):
    """The same edit with its vectors summed head by head."""
    n_batch = edit.outputs.shape[0]
    vectors = torch.zeros(n_batch, 2, L, 5)
    for layer in range(L):
        for head in range(H):
            weight = edit.mix[None, :, :, layer, head, None]
            vectors += weight * edit.outputs[:, None, None, layer, head]
    return AddToResidual(vectors, edit.active)


@pytest.mark.parametrize("n_batch", [1, 3])
def test_added_heads_are_the_vectors_that_they_sum_to(n_batch):
    edit = add_heads(n_batch)
    expected = as_vectors(edit)
    assert (edit.n_variant, edit.n_layer) == (2, L)
    assert edit.first_layer.tolist() == expected.first_layer.tolist() == [0, 2]
    assert edit.sites == expected.sites == {Site("resid_post", 0), Site("resid_post", 2)}
    x = coded(3, 2, 5)
    for layer in range(L):
        found = at_residual(edit, layer, x)
        assert torch.allclose(found, at_residual(expected, layer, x))
        assert torch.allclose(at_residual(edit, layer, x[:, :1]), found[:, :1])
    assert torch.equal(x, coded(3, 2, 5))


def test_heads_are_not_added_at_layers_that_are_not_active():
    edit = add_heads(3)
    assert edit.mix[:, 1].any(dim=(1, 2)).all()
    assert edit.mix[1, 0].any()
    x = coded(3, 2, 5)
    assert torch.equal(at_residual(edit, 1, x), x)
    changed = at_residual(edit, 0, x)
    assert torch.equal(changed[:, 1], x[:, 1])
    assert not torch.equal(changed[:, 0], x[:, 0])


def test_some_variants_and_some_prompts_of_added_heads():
    edit = add_heads(4)
    some = edit.of_variants(torch.tensor([1, 0, 1]))
    assert some.first_layer.tolist() == [2, 0, 2]
    assert torch.equal(some.mix, edit.mix[[1, 0, 1]])
    x = coded(4, 2, 5)
    whole = at_residual(edit, 2, x)
    assert torch.allclose(at_residual(some, 2, x[:, [1, 0, 1]]), whole[:, [1, 0, 1]])
    assert torch.allclose(at_residual(edit.of_prompts(1, 3), 2, x[1:3]), whole[1:3])
    shared = add_heads(1)
    assert shared.of_prompts(1, 3) is shared


def test_added_heads_take_the_precision_of_the_model():
    x = torch.zeros(1, 2, 5, dtype=torch.bfloat16)
    assert at_residual(add_heads(1), 0, x).dtype == torch.bfloat16


EVERY = {
    "none": NoEdit(L),
    "heads": ReplaceHeads.each_head(coded(4, L, H, D)),
    "vectors": AddToResidual(coded(4, 2, L, 5), ACTIVE),
    "added heads": add_heads(4),
}


@pytest.mark.parametrize("name", EVERY)
def test_an_edit_says_where_it_acts(name):
    edit, query = EVERY[name], torch.tensor([4, 2, 3])
    assert edit.at_query_only
    assert edit.also == ()
    assert edit.columns(query).tolist() == [[[4]], [[2]], [[3]]]
    further = edit.and_at((1, 0))
    assert type(further) is type(edit)
    assert not further.at_query_only
    assert further.columns(query).tolist() == [[[4, 1, 0]], [[2, 1, 0]], [[3, 1, 0]]]
    assert further.and_at([6]).also == (1, 0, 6)
    assert edit.and_at(()).at_query_only
    assert edit.at_query_only


@pytest.mark.parametrize("name", EVERY)
def test_parts_of_an_edit_act_where_the_whole_does(name):
    further = EVERY[name].and_at((5,))
    assert further.of_variants(torch.tensor([0])).also == (5,)
    assert further.of_prompts(1, 3).also == (5,)


def test_where_an_edit_acts_is_given_by_name_only():
    assert NoEdit(L, also=(2,)) == NoEdit(L).and_at((2,)) != NoEdit(L)
    with pytest.raises(TypeError):
        NoEdit(L, (2,))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda: ReplaceHeads(torch.ones(1, L, H, dtype=torch.bool), coded(1, 1, H, L, D)),
            r"mask is for \(3, 2\) \(layer, head\), values for \(2, 3\).*same model",
        ),
        (
            lambda: ReplaceHeads(torch.ones(4, L, H, dtype=torch.bool), coded(1, 2, L, H, D)),
            "4 variants in the mask, 2 in the values; give one value per variant or a single one",
        ),
        (
            lambda: AddHeads(coded(1, L, H, 4), coded(2, L, H, L), torch.ones(2, L).bool()),
            r"mix has shape \(2, 3, 2, 3\), expected \(2, 3, 3, 2\) \(variant, to_layer, layer",
        ),
        (
            lambda: AddHeads(coded(1, L, H, 4), coded(2, L, L, H), torch.ones(1, L).bool()),
            r"AddHeads: mix has shape \(2, 3, 3, 2\), expected \(1, 3, 3, 2\)",
        ),
        (
            lambda: AddToResidual(coded(1, 2, L, 4), torch.ones(1, L, dtype=torch.bool)),
            r"vectors are for \(2, 3\) \(variant, layer\), active for \(1, 3\)",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(make, words):
    with pytest.raises(ShapeError, match=words):
        make()
