"""Regression transformers on both backends: the trained module's numbers, hooked and replayed."""

import pytest
import torch

from helpers import zoo
from tvlens.errors import ShapeError
from tvlens.lens.edits import AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.hooks import WholePassEngine, record_attention
from tvlens.lens.lens import Lens
from tvlens.lens.readout import SquaredError
from tvlens.lens.replay import ReplayEngine
from tvlens.lens.selfcheck import choose_engine
from tvlens.models.batch import Batch
from tvlens.models.regression.points import BridgePoints, HookedPoints
from tvlens.models.regression.transformer import RegressionSizes, RegressionTransformer, interleave
from tvlens.tasks.regression.functions import Linear
from tvlens.tasks.regression.task import FunctionTask

SIZES = RegressionSizes(n_dims=3, n_points=6, n_layer=3, n_head=4, d_model=16)
BACKENDS = [BridgePoints, HookedPoints] if zoo.HAS_HOOKED else [BridgePoints]
TOLERANCE = zoo.TOLERANCE[torch.float32]


@pytest.fixture(scope="module")
def trained():
    made = RegressionTransformer(SIZES)
    zoo.randomise(made)
    return made.eval().requires_grad_(False)


@pytest.fixture(params=BACKENDS, ids=[made.kind for made in BACKENDS])
def backend(request, trained):
    return request.param(trained, "points")


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(0)
    xs = torch.randn(4, 6, 3, generator=generator)
    return xs, torch.randn(4, 6, generator=generator)


@pytest.fixture
def batch(prompts):
    xs, ys = prompts
    return Batch.of_sequences(interleave(xs, ys)[:, :-1], ys[:, -1])


def test_predictions_are_those_of_the_trained_module(backend, trained, prompts):
    inputs = interleave(*prompts)
    found = backend.forward(inputs, torch.ones(inputs.shape[:2], dtype=torch.bool))
    assert found.shape == (4, 12, 1)
    assert zoo.off(found[:, ::2, 0], trained(*prompts)) < TOLERANCE


def test_sizes_are_those_of_the_trained_module(backend):
    sizes = backend.n_layer, backend.n_head, backend.d_model, backend.d_head, backend.n_ctx
    assert sizes == (3, 4, 16, 4, 12)
    assert backend.d_vocab == 1


def test_the_self_check_chooses_replay(backend):
    assert choose_engine(backend).name == "replay"


def test_replay_is_whole_passes_under_every_edit(backend, batch):
    generator = torch.Generator().manual_seed(1)
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    readings = fast.read(batch), slow.read(batch)
    assert zoo.off(readings[0].z, readings[1].z) < TOLERANCE
    z = torch.randn(3, 4, 4, generator=generator)
    vectors = torch.randn(4, 2, 3, 16, generator=generator)
    edits = [
        NoEdit(3),
        ReplaceHeads.each_head(z),
        AddToResidual(vectors, torch.tensor([[True, False, True], [False, True, False]])),
    ]
    for edit in edits:
        found, expected = (e.run(r, edit) for e, r in zip((fast, slow), readings, strict=True))
        assert zoo.off(found, expected) < TOLERANCE


def test_the_unedited_query_is_the_trained_modules_last_prediction(
    backend, trained, prompts, batch
):
    engine = ReplayEngine(backend)
    found = engine.run(engine.read(batch), NoEdit(3))[:, 0, 0]
    assert zoo.off(found, trained(*prompts)[:, -1]) < TOLERANCE


def test_heads_sum_to_the_attention_output(backend, batch):
    z = record_attention(backend, batch.inputs, batch.mask, batch.query).z
    summed = torch.einsum("blhd,lhdm->blm", z, backend.w_o) + backend.b_o
    found = []
    name = backend.added_hook(1)
    with backend.hooks([(name, lambda activation, hook: found.append(activation[:, -1]))]):
        backend.forward(batch.inputs, batch.mask)
    assert zoo.off(summed[:, 1], found[0]) < TOLERANCE


def test_padding_is_refused(backend, batch):
    mask = batch.mask.clone()
    mask[0, 0] = False
    with pytest.raises(ShapeError, match="prompts of points must all be of one length"):
        backend.forward(batch.inputs, mask)


def test_points_that_do_not_fit_are_refused(backend):
    mask = torch.ones(1, 14, dtype=torch.bool)
    with pytest.raises(ShapeError, match=r"7 points, the regression model has positions for 6"):
        backend.forward(torch.zeros(1, 14, 3), mask)
    with pytest.raises(ShapeError, match="points have 2 dimensions, the regression model reads 3"):
        backend.forward(torch.zeros(1, 4, 2), mask[:, :4])


@pytest.fixture
def curves():
    return FunctionTask("linear", Linear(3)).curves("test", points=(1, 2, 4, 6), n=5)


def edits(n_rows):
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(n_rows, 2, 3, 16, generator=generator)
    return [
        NoEdit(3),
        ReplaceHeads.each_head(torch.randn(3, 4, 4, generator=generator)),
        AddToResidual(vectors, torch.tensor([[True, False, True], [False, True, False]])),
    ]


def test_one_reading_gives_the_whole_curve(backend, curves):
    """The loop over numbers of points: every prompt cut short, read by itself."""
    engine = ReplayEngine(backend)
    batch = backend.encode(curves)
    assert (len(batch), batch.shared) == (20, 4)
    reading = engine.read(batch)
    assert reading.keys[0].shape[0] == 5
    for edit in edits(20):
        found = engine.run(reading, edit).unflatten(0, (5, 4))
        for column, points in enumerate(curves.points):
            own = edit
            if isinstance(edit, AddToResidual):
                own = AddToResidual(edit.vectors.unflatten(0, (5, 4))[:, column], edit.active)
            alone = engine.read(backend.encode(curves.at(points)))
            assert zoo.off(found[:, column], engine.run(alone, own)) < TOLERANCE
            assert torch.equal(alone.batch.target, batch.target.unflatten(0, (5, 4))[:, column])


def test_curves_by_replay_are_those_of_whole_passes(backend, curves):
    fast, slow = ReplayEngine(backend), WholePassEngine(backend)
    readings = [engine.read(backend.encode(curves)) for engine in (fast, slow)]
    assert zoo.off(readings[0].z, readings[1].z) < TOLERANCE
    for edit in edits(20):
        found, expected = (e.run(r, edit) for e, r in zip((fast, slow), readings, strict=True))
        assert zoo.off(found, expected) < TOLERANCE


def test_rows_of_a_curve_stay_together_or_are_taken_apart(backend, curves):
    engine = ReplayEngine(backend)
    reading = engine.read(backend.encode(curves))
    whole = engine.run(reading, NoEdit(3))
    together = reading.rows(slice(4, 12))
    assert (together.batch.shared, together.keys[0].shape[0]) == (4, 2)
    cut, chosen = reading.rows(slice(3, 9)), torch.tensor([19, 0, 7])
    assert (cut.batch.shared, cut.keys[0].shape[0]) == (1, 6)
    for part, index in (
        (together, slice(4, 12)),
        (cut, slice(3, 9)),
        (reading.rows(chosen), chosen),
    ):
        assert zoo.off(engine.run(part, NoEdit(3)), whole[index]) < TOLERANCE
    joined = engine.join([together, reading.rows(slice(0, 4))])
    assert (joined.batch.shared, joined.keys[0].shape[0]) == (4, 3)
    expected = torch.cat([whole[4:12], whole[:4]])
    assert zoo.off(engine.run(joined, NoEdit(3)), expected) < TOLERANCE
    mixed = engine.join([together, cut])
    assert mixed.batch.shared == 1
    expected = torch.cat([whole[4:12], whole[3:9]])
    assert zoo.off(engine.run(mixed, NoEdit(3)), expected) < TOLERANCE


def test_curves_are_not_continued(backend, curves):
    words = "some query positions lie before it; ask every prompt at its last input, curves at one"
    for engine in (ReplayEngine(backend), WholePassEngine(backend)):
        with pytest.raises(ShapeError, match=words):
            engine.generate(engine.read(backend.encode(curves)), NoEdit(3), 1)


def test_a_lens_reads_curves_prompt_by_prompt(backend, curves):
    engine = zoo.Watched(ReplayEngine(backend))
    lens = Lens(backend, engine, SquaredError(), max_tokens=22, max_rows=3)
    error = lens.outputs(curves, NoEdit(3), lens.readout.measure)[:, 0, 0]
    reading = engine.inner.read(backend.encode(curves))
    expected = (engine.inner.run(reading, NoEdit(3))[:, 0, 0] - curves.target).square()
    assert zoo.off(error, expected) < TOLERANCE
    # Two prompts of eleven positions at a time, each asked four times.
    assert engine.tokens == [2 * 4 * 33, 2 * 4 * 33, 4 * 33]


def test_joined_sequences_keep_their_points(batch):
    joined = Batch.join([batch[:1], batch[1:]])
    assert torch.equal(joined.inputs, batch.inputs)
    assert torch.equal(joined.query, batch.query)
    assert torch.equal(joined.target, batch.target)


@pytest.mark.skipif(zoo.HAS_HOOKED, reason="HookedTransformer is there")
def test_hooked_needs_transformer_lens_3(trained):
    from tvlens.errors import ModelError

    with pytest.raises(ModelError, match="which transformer-lens 4 removed"):
        HookedPoints(trained, "points")
