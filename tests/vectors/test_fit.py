from dataclasses import asdict, replace

import pandas as pd
import pytest
import torch

from helpers import zoo
from helpers.prompt_table import stacked
from tvlens.errors import NumericalError, RunError, ShapeError, TaskError
from tvlens.lens.edits import AddToResidual, NoEdit
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.readout import FirstToken
from tvlens.vectors.ltv.attribution import attribute
from tvlens.vectors.ltv.fit import fit_ltv
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.sample import training_prompts, validation_prompts
from tvlens.vectors.ltv.settings import FitSettings

SETTINGS = FitSettings(
    steps=20, batch_size=16, n_prompts=24, evaluate_every=5, shots=2, learning_rate=0.1
)


@pytest.fixture(scope="module", params=zoo.KINDS)
def setting(request):
    """A lens and mean head outputs, of the first backend unless a test takes both."""
    lens = zoo.lens("llama", request.param)
    prompts = zoo.TASK.prompts("train", shots=2, n=8)
    return lens, mean_head_outputs(lens, prompts, answered_only=False)


@pytest.fixture(scope="module")
def lens():
    return zoo.lens()


@pytest.fixture(scope="module")
def means(lens):
    return mean_head_outputs(lens, zoo.TASK.prompts("train", shots=2, n=8), answered_only=False)


def fit(lens, means, settings=SETTINGS, **options):
    return fit_ltv(lens, zoo.TASK, means, settings=settings, **options)


def validation_loss(lens, vector, settings=SETTINGS, seed=0):
    edit = stacked([vector], lens)
    prompts = validation_prompts(zoo.TASK, settings, seed)
    return float(torch.cat([lens.outputs(p, edit, lens.readout.loss) for p in prompts]).mean())


class Stop(Exception):
    """Raised where a user would press Ctrl-C."""


def stopping_after(n):
    done = []

    def progress(steps):
        done.append(steps)
        if sum(done) == n:
            raise Stop

    return progress


def test_training_lowers_the_validation_loss(setting):
    lens, means = setting
    ltv = fit(lens, means)
    history = ltv.history
    assert list(history.columns) == ["step", "train_loss", "validation_loss", "travel", "norm"]
    assert history["step"].tolist() == [0, 5, 10, 15, 20]
    assert history["validation_loss"].iloc[-1] < history["validation_loss"].iloc[0] - 0.5
    found = validation_loss(lens, ltv.task_vector)
    assert found == pytest.approx(history["validation_loss"].min(), abs=1e-5)
    assert history["train_loss"].isna().tolist() == [True] + [False] * 4
    assert history["travel"].tolist() == sorted(history["travel"])
    assert ltv.travel == pytest.approx(history["travel"].iloc[-1])
    assert (ltv.model, ltv.task, ltv.granularity) == ("llama", "kind-of-word", "head")


def test_the_first_row_is_the_model_without_a_vector(lens, means):
    ltv = fit(lens, means, replace(SETTINGS, steps=1))
    zero = LearnableTaskVector(means.outputs, model="llama").task_vector
    expected = validation_loss(lens, zero)
    assert ltv.history["validation_loss"].iloc[0] == pytest.approx(expected, abs=1e-5)


def test_both_engines_train_alike(lens, means):
    slow = replace(lens, engine=WholePassEngine(lens.backend))
    settings = replace(SETTINGS, steps=5)
    assert zoo.off(fit(slow, means, settings).omega, fit(lens, means, settings).omega) < 1e-3


def training_loss(lens, means, omega, settings):
    """Mean loss over every training prompt, differentiable in the weights."""
    vectors = torch.einsum("lh,lhd->ld", omega, means.outputs)[None, None]
    edit = AddToResidual(vectors, torch.ones(1, 3, dtype=torch.bool))
    losses = []
    for prompts in training_prompts(zoo.TASK, settings, 0):
        reading = lens.engine.read(lens.encode(prompts))
        losses.append(lens.readout.loss(lens.engine.run(reading, edit), reading.batch))
    return torch.cat(losses).mean()


def gradient(lens, means, omega, settings):
    omega = omega.detach().clone().requires_grad_()
    training_loss(lens, means, omega, settings).backward()
    return omega.grad


def test_one_step_is_one_step_of_adam(lens, means):
    """Adam's first step goes by the learning rate against the sign of every gradient."""
    settings = replace(SETTINGS, steps=1, batch_size=48, learning_rate=0.03)
    ltv = fit(lens, means, settings)
    zero = torch.zeros(3, 4)
    expected = -0.03 * gradient(lens, means, zero, settings).sign()
    assert torch.allclose(ltv.omega.detach(), expected, atol=1e-5)
    expected = float(training_loss(lens, means, zero, settings))
    assert ltv.history["train_loss"].iloc[-1] == pytest.approx(expected, abs=1e-5)


def test_training_and_validation_prompts_never_meet(task):
    training = training_prompts(task, SETTINGS, seed=0)
    validation = validation_prompts(task, SETTINGS, seed=0)
    assert [p.kind for p in training] == [p.kind for p in validation] == ["zero", "shuffled"]
    assert [len(p) for p in training] == [24, 24]
    asked = {prompt.query for prompts in training for prompt in prompts}
    held_out = {prompt.query for prompts in validation for prompt in prompts}
    assert asked <= set(task.split("train"))
    assert held_out == set(task.split("validation"))
    assert not asked & held_out


def test_every_step_sees_all_kinds_and_every_round_all_prompts(lens, means):
    seen = []

    class Reads(FirstToken):
        def loss(self, outputs, batch):
            if torch.is_grad_enabled() and outputs.shape[1] == 1:
                seen.append([row[mask].tolist() for row, mask in zip(batch.inputs, batch.mask)])  # noqa: B905
            return super().loss(outputs, batch)

    fit(replace(lens, readout=Reads()), means, replace(SETTINGS, steps=6))
    encoded = [
        [zoo.tokenizer()(text).input_ids for text in prompts.texts]
        for prompts in training_prompts(zoo.TASK, SETTINGS, 0)
    ]
    assert [len(batch) for batch in seen] == [16] * 6
    for batch in seen:
        assert sum(row in encoded[0] for row in batch) == 8
        assert sum(row in encoded[1] for row in batch) == 8
    for rounds in (seen[:3], seen[3:]):
        rows = [row for batch in rounds for row in batch]
        assert sorted(rows) == sorted(encoded[0] + encoded[1])


def test_the_best_weights_by_validation_are_returned_not_the_last(lens, means):
    """A readout that turns against the vector makes every step worse on validation alone."""

    class Spoiled(FirstToken):
        def loss(self, outputs, batch):
            loss = super().loss(outputs, batch)
            return loss if torch.is_grad_enabled() else -loss

    settings = replace(SETTINGS, patience=None)
    ltv = fit(replace(lens, readout=Spoiled()), means, settings)
    assert ltv.history["travel"].iloc[-1] > 1
    assert ltv.history["validation_loss"].idxmin() == 0
    assert not ltv.omega.any()
    assert ltv.travel == 0


def test_the_best_weights_may_lie_in_the_middle(lens, means):
    class Late(FirstToken):
        """The third validation is the best there is."""

        calls = 0

        def loss(self, outputs, batch):
            loss = super().loss(outputs, batch)
            if torch.is_grad_enabled():
                return loss
            self.calls += 1
            return loss * (0.1 if self.calls == 3 else 1.0)

    ltv = fit(replace(lens, readout=Late()), means, replace(SETTINGS, patience=None))
    early = fit(lens, means, replace(SETTINGS, steps=10))
    assert ltv.history["step"].tolist() == [0, 5, 10, 15, 20]
    assert torch.equal(ltv.omega, early.omega)


def test_early_stopping_stops(lens, means):
    class Flat(FirstToken):
        """Better at the second validation, then never again."""

        calls = 0

        def loss(self, outputs, batch):
            loss = super().loss(outputs, batch)
            if torch.is_grad_enabled():
                return loss
            self.calls += 1
            return loss * 0 + (1.0 if self.calls == 1 else 0.5)

    steps = []
    settings = replace(SETTINGS, steps=200, patience=3)
    ltv = fit(replace(lens, readout=Flat()), means, settings, progress=steps.append)
    # The best is at step 5; three validations without improvement are those at 10, 15 and 20.
    assert ltv.history["step"].tolist() == [0, 5, 10, 15, 20]
    assert sum(steps) == 20
    endless = fit(replace(lens, readout=Flat()), means, replace(settings, steps=35, patience=None))
    assert endless.history["step"].iloc[-1] == 35


def test_the_counter_of_early_stopping_starts_anew_at_each_improvement(lens, means):
    class Sometimes(FirstToken):
        """Every second validation is an improvement."""

        calls = 0

        def loss(self, outputs, batch):
            loss = super().loss(outputs, batch)
            if torch.is_grad_enabled():
                return loss
            self.calls += 1
            return loss * 0 + (2.0 if self.calls % 2 else 1.0 - 0.01 * self.calls)

    settings = replace(SETTINGS, steps=60, patience=2)
    ltv = fit(replace(lens, readout=Sometimes()), means, settings)
    assert ltv.history["step"].iloc[-1] == 60


def test_the_same_seed_gives_the_same_result(lens, means):
    settings = replace(SETTINGS, start="normal")
    first, again, other = (fit(lens, means, settings, seed=s) for s in (0, 0, 1))
    for name, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    pd.testing.assert_frame_equal(first.history, again.history)
    assert not torch.equal(other.omega, first.omega)
    assert not torch.equal(other.start, first.start)


def test_training_leaves_torchs_own_generator_and_gradients_alone(lens, means):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    fit(lens, means, replace(SETTINGS, start="normal", steps=5))
    assert torch.rand(1) == expected
    assert all(p.grad is None for p in lens.backend.parameters())


@pytest.mark.parametrize("changes", [{}, {"top_k": 4}, {"l1": 0.05, "start": "normal"}])
def test_an_interrupted_run_goes_on_as_if_nothing_had_been(lens, means, tmp_path, changes):
    settings = replace(SETTINGS, **changes)
    whole = fit(lens, means, settings)
    for stop in (7, 10, 16):
        path = tmp_path / f"{stop}" / "checkpoint.safetensors"
        path.parent.mkdir()
        with pytest.raises(Stop):
            fit(lens, means, settings, checkpoint=path, progress=stopping_after(stop))
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        steps = []
        resumed = fit(lens, means, settings, checkpoint=path, progress=steps.append)
        # Validations, and with them checkpoints, are five steps apart; that at `stop` never came.
        assert sum(steps) == 20 - 5 * ((stop - 1) // 5)
        for name, tensor in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], tensor), name
        pd.testing.assert_frame_equal(resumed.history, whole.history)


def test_a_finished_run_is_not_run_again(lens, means, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    steps = []
    first = fit(lens, means, checkpoint=path)
    again = fit(lens, means, checkpoint=str(path), progress=steps.append)
    assert not steps
    assert torch.equal(again.omega, first.omega)
    assert torch.equal(again.attribution, first.attribution)
    pd.testing.assert_frame_equal(again.history, first.history)


def test_a_checkpoint_of_anything_else_is_refused(lens, means, tmp_path):
    path = tmp_path / "checkpoint.safetensors"
    short = replace(SETTINGS, steps=5)
    fit(lens, means, short, checkpoint=path)
    other_task = replace(zoo.TASK, pairs=zoo.TASK.pairs[::-1])
    other_means = replace(means, outputs=means.outputs + 1)
    attempts = [
        lambda: fit(lens, means, replace(short, l1=0.1), checkpoint=path),
        lambda: fit(lens, means, short, checkpoint=path, seed=1),
        lambda: fit(lens, means, short, checkpoint=path, start=torch.ones(3, 4)),
        lambda: fit(lens, other_means, short, checkpoint=path),
        lambda: fit_ltv(lens, other_task, means, settings=short, checkpoint=path),
        lambda: fit(zoo.lens("qwen3"), means, short, checkpoint=path),
    ]
    words = "checkpoint.safetensors was made with other settings, seed, task, model, means or start"
    for attempt in attempts:
        with pytest.raises(RunError, match=words):
            attempt()
    path.write_bytes(b"broken")
    with pytest.raises(RunError, match=r"cannot read .*checkpoint.safetensors"):
        fit(lens, means, short, checkpoint=path)


def test_a_checkpoint_that_cannot_be_written_is_said(lens, means, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        fit(lens, means, checkpoint=tmp_path / "file" / "checkpoint.safetensors")


ALL_AT_ONCE = replace(SETTINGS, batch_size=48, patience=None)


def test_l1_makes_weights_exactly_zero(lens, means):
    """At the optimum no gradient exceeds the penalty, and those of weights that are left equal it.

    These are the conditions of Karush, Kuhn and Tucker.
    """
    settings = replace(ALL_AT_ONCE, l1=0.1, steps=200, evaluate_every=200)
    omega = fit(lens, means, settings).omega.detach()
    found = gradient(lens, means, omega, settings)
    left = omega.abs() > 0.1
    assert 3 <= left.sum() < 6
    assert (omega == 0).sum() > 5
    assert torch.allclose(found[left], -0.1 * omega[left].sign(), atol=0.015)
    assert (found[omega == 0].abs() <= 0.1).all()


def test_a_penalty_above_every_gradient_keeps_all_weights_at_zero(lens, means):
    largest = float(gradient(lens, means, torch.zeros(3, 4), ALL_AT_ONCE).abs().max())
    assert not fit(lens, means, replace(ALL_AT_ONCE, l1=1.05 * largest)).omega.any()
    assert fit(lens, means, replace(ALL_AT_ONCE, l1=0.95 * largest)).omega.any()


def test_one_step_of_l1_is_soft_thresholding(lens, means):
    class Keeps(FirstToken):
        """Lets the last weights win, so that they are the ones returned."""

        calls = 0

        def loss(self, outputs, batch):
            loss = super().loss(outputs, batch)
            if torch.is_grad_enabled():
                return loss
            self.calls += 1
            return loss * 0 - self.calls

    start = torch.linspace(-0.3, 0.3, 12).view(3, 4)
    slope = gradient(lens, means, start, ALL_AT_ONCE)
    settings = replace(ALL_AT_ONCE, steps=1, l1=0.1)
    found = fit(replace(lens, readout=Keeps()), means, settings, start=start).omega.detach()
    # Adam's first step divides by the size of the gradient, and so does the threshold.
    stepped = start - 0.1 * slope.sign()
    expected = stepped.sign() * (stepped.abs() - 0.1 * 0.1 / slope.abs()).clamp(min=0)
    assert 0 < (expected == 0).sum() < 12
    assert torch.allclose(found, expected, atol=1e-5)


def test_top_k_leaves_k_heads(lens, means):
    ltv = fit(lens, means, replace(SETTINGS, top_k=3, steps=40))
    assert int(ltv.mask.sum()) == int((ltv.weights != 0).sum()) == 3
    # Chosen at half time, by what a run without a mask has then.
    half = fit(lens, means, replace(SETTINGS, steps=20, patience=None))
    norms = half.contributions(signed=False)
    assert torch.equal(ltv.mask, norms >= norms.flatten().topk(3).values[-1])
    after = ltv.history[ltv.history["step"] > 20]
    found = validation_loss(lens, ltv.task_vector)
    assert found == pytest.approx(after["validation_loss"].min(), abs=1e-5)
    with pytest.raises(ShapeError, match="top 13 heads asked for, but there are 12 heads"):
        fit(lens, means, replace(SETTINGS, top_k=13))


def test_early_stopping_waits_for_the_mask(lens, means):
    class Flat(FirstToken):
        def loss(self, outputs, batch):
            loss = super().loss(outputs, batch)
            return loss if torch.is_grad_enabled() else loss * 0

    settings = replace(SETTINGS, steps=60, patience=1, top_k=2)
    ltv = fit(replace(lens, readout=Flat()), means, settings)
    assert int(ltv.mask.sum()) == 2
    assert ltv.history["step"].iloc[-1] == 40
    # A mask that keeps every head keeps no run from stopping.
    ltv = fit(replace(lens, readout=Flat()), means, replace(settings, top_k=12))
    assert ltv.history["step"].iloc[-1] == 40


def test_weights_can_be_given_to_start_from(lens, means):
    start = torch.full((3, 4), 0.5)
    ltv = fit(lens, means, replace(SETTINGS, steps=1, learning_rate=1e-3), start=start)
    assert torch.equal(ltv.start, start)
    assert (ltv.omega - start).abs().max() <= 1.1e-3
    with pytest.raises(ShapeError, match=r"start weights have shape \(2, 4\)"):
        fit(lens, means, start=torch.zeros(2, 4))


def test_the_papers_preset(lens, means):
    paper = FitSettings.paper()
    expected = asdict(FitSettings()) | {
        "start": "normal",
        "learning_rate": 5e-5,
        "steps": 2000,
        "patience": None,
        "batch_size": 8,
        "evaluate_every": 50,
    }
    assert asdict(paper) == expected
    assert FitSettings.paper(evaluate_every=7, shots=1).evaluate_every == 7
    few = FitSettings.paper(steps=10, n_prompts=8, shots=2)
    ltv = fit(lens, means, few)
    # No weight can travel further than steps x learning rate.
    assert 0 < (ltv.omega - ltv.start).abs().max() <= 10 * 5e-5 * 1.01
    start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ltv.start, start)


def test_blocks_are_trained_as_such(lens, means):
    ltv = fit(lens, means, replace(SETTINGS, granularity="block"))
    assert ltv.granularity == "block"
    together = means.outputs.sum(dim=1)
    expected = (ltv.omega.detach()[..., None] * together.view(3, 4, 8)).flatten(1)
    assert torch.allclose(ltv().detach(), expected, atol=1e-5)


def test_a_loss_that_is_not_a_number_is_caught(lens, means):
    class Broken(FirstToken):
        def loss(self, outputs, batch):
            return super().loss(outputs, batch) * torch.nan

    words = (
        r"LTV training on 'kind-of-word': loss or weights are not finite at step 0 \(loss nan\); "
        r"expected finite numbers; lower learning_rate \(now 0.1\)"
    )
    with pytest.raises(NumericalError, match=words):
        fit(replace(lens, readout=Broken()), means)


class Own(FirstToken):
    """Right is what the model says by itself, so a vector can only do harm."""

    def __init__(self, lens):
        self.lens = lens

    def loss(self, outputs, batch):
        with torch.no_grad():
            reading = self.lens.engine.read(batch)
            said = self.lens.engine.run(reading, NoEdit(3)).argmax(dim=-1)
        index = said[..., None].expand(-1, outputs.shape[1], 1)
        return -(5 * outputs).log_softmax(dim=-1).gather(-1, index)[..., 0]


def test_divergence_is_caught(lens, means):
    own = replace(lens, readout=Own(lens))
    fine = fit(own, means, replace(SETTINGS, learning_rate=1e-3, steps=5))
    assert fine.history["validation_loss"].iloc[0] < 1
    words = (
        r"LTV training on 'kind-of-word' diverged: validation loss \d.* after step 5, 0\..* at the "
        r"start; expected it to fall; lower learning_rate \(now 10000.0\)"
    )
    with pytest.raises(NumericalError, match=words):
        fit(own, means, replace(SETTINGS, learning_rate=1e4))


def test_means_that_are_not_numbers_are_caught(lens, means):
    outputs = means.outputs.clone()
    outputs[1, 1, 1] = torch.nan
    with pytest.raises(NumericalError, match="means of 'llama': outputs are no real, finite numb"):
        replace(means, outputs=outputs)


def test_means_of_another_model_are_refused(means):
    words = r"means of 'llama' have sizes \(3, 4, 6, 32\) .* model 'gpt2' has \(3, 4, 8, 32\)"
    with pytest.raises(ShapeError, match=words):
        fit(zoo.lens("gpt2"), means)


def test_training_without_prompts_is_refused(lens, means):
    with pytest.raises(TaskError, match="got no prompts of some kind; expected at least one of"):
        fit(lens, means, replace(SETTINGS, kinds=()))


def test_attributions_sum_to_the_gain(setting):
    lens, means = setting
    ltv = fit(lens, means)
    prompts = validation_prompts(zoo.TASK, SETTINGS, 0)
    zero = LearnableTaskVector(means.outputs, model="llama").task_vector
    gain = validation_loss(lens, zero) - validation_loss(lens, ltv.task_vector)
    assert gain > 0.5
    rough = float(attribute(lens, ltv, prompts).sum())
    fine = float(attribute(lens, ltv, prompts, steps=256).sum())
    assert fine == pytest.approx(gain, rel=0.005)
    assert rough == pytest.approx(gain, rel=0.1)


def test_attributions_do_not_depend_on_pieces(lens, means):
    ltv = fit(lens, means)
    prompts = validation_prompts(zoo.TASK, SETTINGS, 0)
    whole = attribute(lens, ltv, prompts).clone()
    parts = attribute(replace(lens, max_tokens=40, max_rows=9), ltv, prompts)
    assert zoo.off(parts, whole) < 1e-4
    assert torch.equal(ltv.attribution, parts)


def test_a_fitted_vector_knows_the_effect_of_every_head(lens, means):
    ltv = fit(lens, means)
    expected = ltv.attribution.clone()
    assert expected.isfinite().all()
    assert torch.equal(ltv.contributions().sign(), expected.sign())
    attribute(lens, ltv, validation_prompts(zoo.TASK, SETTINGS, 0))
    assert zoo.off(ltv.attribution, expected) < 1e-5


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
def test_attributions_on_a_linear_model_are_exact():
    """Where everything is linear, a head's attribution is what its term alone adds."""

    class Logit(FirstToken):
        def loss(self, outputs, batch):
            index = batch.target[:, None, None].expand(-1, outputs.shape[1], 1)
            return -outputs.gather(-1, index)[..., 0]

    lens = zoo.linear_lens(Logit())
    prompts = [zoo.prompts(*[zoo.one_shot("l", query) for query in "bcd"])]
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 2, zoo.D_VOCAB, generator=generator)
    ltv = LearnableTaskVector(outputs, start="normal", model="linear")
    found = attribute(lens, ltv, prompts, steps=1)
    k = zoo.WORDS.index(" k")
    for layer in range(2):
        for head in range(2):
            added = ltv.omega.detach()[layer, head] * outputs[layer, head]
            expected = added[k]
            if layer == 0:
                # Head (1, 0) sees what was added before it: a fifteenth of it, 30-fold.
                expected = expected + 30 / 15 * added[k]
            assert float(found[layer, head]) == pytest.approx(float(expected), rel=1e-4)
