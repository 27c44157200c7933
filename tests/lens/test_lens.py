from dataclasses import replace

import pytest
import torch

from helpers import zoo
from tvlens.errors import TaskError
from tvlens.lens.edits import NoEdit, ReplaceHeads
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.lens.suffix import SuffixEngine
from tvlens.models.encode import encode_text
from tvlens.tasks import Pair, Prompt, Prompts, Template


def each_head(lens, *prompts):
    shape = (lens.n_layer, lens.n_head, lens.backend.d_head)
    values = torch.randn(*prompts, 12, *shape, generator=torch.Generator().manual_seed(0))
    return ReplaceHeads(ReplaceHeads.each_head(values.flatten(0, -4)[0]).mask, values)


def by_product(outputs, batch):
    """Keeps every logit, and which prompt it is of."""
    return outputs * batch.target[:, None, None]


@pytest.mark.parametrize("limits", [{"max_rows": 3}, {"max_tokens": 14}, {"max_rows": 1}])
def test_small_limits_give_what_large_ones_give(lens, limits):
    batch = zoo.batch()
    edit = each_head(lens, len(batch))
    watched = zoo.Watched(lens.engine)
    small = replace(lens, engine=watched, **limits)
    expected = by_product(lens.engine.run(lens.engine.read(batch), edit), batch)
    found = small.outputs(batch, edit, by_product)
    assert found.shape == (4, 12, zoo.D_VOCAB)
    assert zoo.off(found, expected) < 1e-5
    assert len(watched.rows) > 1


def test_no_more_is_run_at_once_than_allowed(lens):
    watched = zoo.Watched(lens.engine)
    small = replace(lens, engine=watched, max_rows=7, max_tokens=15)
    small.outputs(zoo.batch(), each_head(lens, 4), by_product)
    # Seven columns: two prompts at once, and three variants of both.
    assert watched.tokens == [14, 14]
    assert watched.rows == [6, 6, 6, 6] * 2


def test_a_prompt_longer_than_the_limit_is_read_alone(lens):
    watched = zoo.Watched(lens.engine)
    small = replace(lens, engine=watched, max_rows=1, max_tokens=1)
    small.outputs(zoo.batch(), NoEdit(3), by_product)
    assert watched.tokens == [7, 7, 7, 7]
    assert watched.rows == [1, 1, 1, 1]


def test_outputs_take_prompts_and_say_how_far_they_are(lens, task):
    prompts = task.prompts("test", shots=2, n=5)
    done = []
    small = replace(lens, max_tokens=70)
    found = small.outputs(prompts, NoEdit(3), by_product, advance=done.append)
    assert len(found) == sum(done) == 5
    assert len(done) > 1
    assert zoo.off(found, lens.outputs(lens.encode(prompts), NoEdit(3), by_product)) < 1e-5


def test_outputs_take_no_gradients(lens):
    watched = zoo.Watched(lens.engine)
    small = replace(lens, engine=watched)
    edit = each_head(lens, 4)
    edit.values.requires_grad_()
    assert not small.outputs(zoo.batch(), edit, by_product).requires_grad
    assert watched.grads == [False]
    assert torch.is_grad_enabled()


def state(backend):
    modules = [*backend.model.modules()]
    original = getattr(backend.model, "original_model", None)
    modules += [] if original is None else [original]
    return [m.training for m in modules], [p.requires_grad for p in backend.parameters()]


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_freezing_is_undone_also_after_an_exception(kind):
    backend = zoo.new_backend("gpt2", kind)
    lens = Lens(backend, zoo.lens().engine, FirstToken())
    backend.model.train()
    backend.model.blocks[1].eval()
    backend.parameters()[0].requires_grad_(False)
    before = state(backend)
    assert len({*before[0]}) == len({*before[1]}) == 2
    with lens.frozen():
        assert not any(state(backend)[0])
        assert not any(state(backend)[1])
    assert state(backend) == before
    with pytest.raises(KeyError), lens.frozen():
        raise KeyError
    assert state(backend) == before


def test_readings_cover_every_prompt_once_in_order(lens):
    batch = zoo.batch([[8 + i] for i in range(11)])
    for limits, sizes in ((4, None), [4, 4, 3]), ((100, 5), [5, 5, 1]), ((2, 5), [2] * 5 + [1]):
        readings = [*replace(lens, max_tokens=limits[0]).readings(batch, max_prompts=limits[1])]
        assert [len(reading) for reading in readings] == sizes
        assert torch.equal(torch.cat([r.batch.inputs for r in readings]), batch.inputs)


def test_edits_at_the_query_alone_run_on_the_lens_own_engine(lens):
    edit = each_head(lens, 4)
    watched = replace(lens, engine=zoo.Watched(lens.engine))
    assert watched.engine_for(edit) is watched.engine_for(NoEdit(3)) is watched.engine
    for other in (edit.and_at((1,)), NoEdit(3, also=(1,))):
        assert watched.engine_for(other) is lens.engine.anywhere
        assert isinstance(watched.engine_for(other), SuffixEngine)
    whole = replace(lens, engine=WholePassEngine(lens.backend))
    assert whole.engine_for(edit) is whole.engine_for(edit.and_at((1,))) is whole.engine


def test_every_edit_has_the_readings_of_its_own_engine(lens):
    edit = each_head(lens, 4)
    small = replace(lens, engine=zoo.Watched(lens.engine), max_tokens=10)
    batch = zoo.batch([[8 + i] for i in range(11)])
    edits = [edit, edit.and_at((1,)), NoEdit(3)]
    found = list(small.readings_for(batch, edits))
    rows = [row for piece, _ in found for row in range(piece.start, piece.stop)]
    assert rows == list(range(11))
    assert len(found) > 1
    for piece, read in found:
        assert [engine for engine, _ in read] == [
            small.engine,
            lens.engine.anywhere,
            small.engine,
        ]
        assert read[0][1] is read[2][1]
        for _, reading in read:
            assert torch.equal(reading.batch.inputs, batch.inputs[piece])


def test_outputs_of_edits_at_further_columns_are_those_of_whole_passes(lens):
    batch, edit = zoo.batch(), each_head(lens, 4).and_at((2, 5))
    watched = zoo.Watched(lens.engine)
    small = replace(lens, engine=watched, max_rows=5, max_tokens=15)
    found = small.outputs(batch, edit, by_product)
    assert watched.tokens == watched.rows == []
    expected = by_product(WholePassEngine(lens.backend).run_batch(batch, edit), batch)
    assert zoo.off(found, expected) < 1e-5
    assert zoo.off(lens.outputs(batch, replace(edit, also=()), by_product), expected) > 1e-2


def test_readings_are_those_of_the_engine_asked_for(lens):
    batch, asked = zoo.batch(), zoo.Watched(lens.engine)
    readings = [*replace(lens, max_tokens=14).readings(batch, engine=asked)]
    assert asked.tokens == [14, 14]
    assert torch.equal(torch.cat([r.batch.inputs for r in readings]), batch.inputs)


def test_variants_cover_every_variant_once_in_order(lens):
    reading, edit = lens.engine.read(zoo.batch()), each_head(lens, 4)
    pieces = [*replace(lens, max_rows=20).variants(reading, edit)]
    assert [piece.n_variant for piece in pieces] == [5, 5, 2]
    assert torch.equal(torch.cat([piece.mask for piece in pieces]), edit.mask)


def test_prompts_are_encoded_behind_the_lens_prefix(lens, task):
    prompts = task.prompts("test", shots=1, n=3)
    plain, marked = lens.encode(prompts), replace(lens, prefix=(2, 3)).encode(prompts)
    for inputs, mask, whole, whole_mask in zip(
        plain.inputs, plain.mask, marked.inputs, marked.mask, strict=True
    ):
        assert whole[whole_mask].tolist() == [2, 3, *inputs[mask].tolist()]
    assert torch.equal(marked.query, plain.query + 2)


def test_a_prompt_beyond_the_context_is_refused_by_the_lens(lens):
    demos = tuple(Pair("a", "k") for _ in range(14))
    prompt = Prompt(demos, Pair("b", "k"), "clean", Template())
    prompts = Prompts("long", "test", "clean", 14, 0, (prompt,))
    with pytest.raises(TaskError, match=r"has \d+ tokens with its answer, .* context holds \d+"):
        replace(lens, prefix=(2,) * 3000).encode(prompts)


def test_a_lens_says_what_it_looks_at(lens):
    assert repr(lens) == (
        f"Lens('llama', {lens.backend.kind}, 3 layers x 4 heads, d_model 32, replay)"
    )
    assert (lens.n_layer, lens.n_head, lens.d_model) == (3, 4, 32)
    assert lens.w_o.shape == (3, 4, 6, 32)


def test_encode_text_is_what_a_lens_uses(lens, task):
    prompts = task.prompts("test", shots=1, n=3)
    direct = encode_text(
        zoo.tokenizer(),
        prompts.texts,
        prompts.continuations,
        prefix=(),
        n_ctx=zoo.N_CTX,
        d_vocab=zoo.D_VOCAB,
    )
    assert torch.equal(lens.encode(prompts).inputs, direct.inputs)
    assert lens.encode(prompts).answers == direct.answers
