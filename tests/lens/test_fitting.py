"""Training of what edits hold: variants do not meet, and the best of each is kept."""

import pytest
import torch

from helpers import zoo
from tvlens.errors import NumericalError
from tvlens.lens.edits import AddToResidual
from tvlens.lens.fitting import Posed, Schedule, fit_edit


def posed(lens):
    reading = lens.engine.read(zoo.batch())
    active = torch.tensor([[False, False, True]] * 2)

    def edit(values, _):
        vectors = torch.zeros(1, len(values), 3, lens.d_model)
        return AddToResidual(
            vectors.index_add(2, torch.tensor([2]), values[None, :, None]), active[: len(values)]
        )

    return Posed(reading, edit)


def losses(lens, at, values):
    with torch.no_grad():
        outputs = lens.engine.run(at.reading, at.edit(values, slice(None)))
    return lens.readout.loss(outputs, at.reading.batch).double().mean(dim=0)


def fit(lens, at, start, **options):
    schedule = Schedule(**{"steps": 12, "batch_size": 2, "evaluate_every": 3} | options)
    return fit_edit(lens, at, start, what="shifts", schedule=schedule, validation=at)


def test_training_lowers_the_loss_of_every_variant_by_itself(lens):
    at, start = posed(lens), torch.randn(2, lens.d_model, generator=torch.manual_seed(0))
    found = fit(lens, at, start)
    assert (found.loss < losses(lens, at, start) - 0.1).all()
    assert torch.allclose(found.loss, losses(lens, at, found.values), atol=1e-5)
    alone = fit(lens, at, start[:1])
    assert torch.allclose(alone.values, found.values[:1], atol=1e-5)
    assert found.history["step"].unique().tolist() == [0, 3, 6, 9, 12]
    least = found.history.groupby("variant")["validation_loss"].min()
    assert least.tolist() == pytest.approx(found.loss.tolist())


def test_few_rows_at_once_make_no_difference(lens):
    from dataclasses import replace

    at, start = posed(lens), torch.zeros(2, lens.d_model)
    expected = fit(lens, at, start, batch_size=4).values
    few = fit(replace(lens, max_rows=2), at, start, batch_size=4).values
    assert torch.allclose(few, expected, atol=1e-5)


def test_training_stops_when_nothing_improves(lens):
    at, start = posed(lens), torch.zeros(2, lens.d_model)
    found = fit(lens, at, start, learning_rate=0.0, steps=100, patience=2)
    assert found.history["step"].max() == 6
    assert torch.equal(found.values, start)


def test_what_is_not_finite_is_refused(lens):
    at, start = posed(lens), torch.zeros(2, lens.d_model)
    start[1, 0] = torch.nan
    with pytest.raises(NumericalError, match="logits are NaN or infinite in 4 of 8 rows"):
        fit(lens, at, start)


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="the model is a HookedTransformer")
def test_a_loss_that_ends_far_above_the_first_is_refused():
    # Its logits have no norm: what helps one answer hurts the other without limit.
    lens = zoo.linear_lens()
    prompts = zoo.prompts(zoo.one_shot("k"), zoo.one_shot("k", answer="c"))
    active = torch.tensor([[False, True]])

    def edit(values, _):
        return AddToResidual(torch.stack([torch.zeros_like(values), values], 1)[None], active)

    at = Posed(lens.engine.read(lens.encode(prompts)), edit)
    jump = Schedule(steps=2, batch_size=1, learning_rate=1e4)
    words = r"training of shifts diverged: loss \d.* after step 2, \d.* in the first; expected it "
    words += r"to fall; lower the learning rate \(now 10000.0\) or train for longer \(now 2 steps\)"
    with pytest.raises(NumericalError, match=words):
        fit_edit(lens, at, torch.zeros(1, lens.d_model), what="shifts", schedule=jump)
