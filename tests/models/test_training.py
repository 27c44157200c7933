"""Training of regression transformers: it learns, resumes to the same numbers, and refuses."""

from dataclasses import replace

import pytest
import torch

from tvlens.errors import NumericalError, RunError, ShapeError, UnknownNameError
from tvlens.models.regression.training import Curriculum, TrainSettings, _Trainer, preset, train
from tvlens.models.regression.transformer import RegressionSizes, RegressionTransformer
from tvlens.tasks.regression.functions import Linear, function_class
from tvlens.tasks.regression.inputs import draw_points

SHORT = preset(
    "tiny",
    sizes=RegressionSizes(n_dims=2, n_points=12, n_layer=2, n_head=2, d_model=32),
    steps=6,
    learning_rate=3e-3,
    evaluate_every=3,
    n_validation=20,
)


def trainer(settings, functions="linear", seed=0):
    drawn = function_class(functions, settings.sizes.n_dims, **settings.options)
    return _Trainer(drawn, settings, seed, None, torch.device("cpu"))


def test_a_tiny_model_learns_linear_functions():
    trained = train("linear", preset("tiny"))
    history = trained.history
    assert history["error"].iloc[0] > 0.8
    assert history["error"].iloc[-1] < 0.1
    assert history["least_squares"].iloc[0] < 1e-8
    assert not trained.model.training


def test_the_history_says_what_was_measured():
    lines = []
    trained = train("linear", SHORT, say=lines.append)
    assert trained.history["step"].tolist() == [0, 3, 6]
    assert len(lines) == 2
    assert lines[0].startswith("step 3: loss ")
    assert "least squares 0.0000" in lines[0]
    # The last row's error, by hand, on prompts drawn anew.
    xs, ys = trainer(SHORT).validation
    with torch.no_grad():
        error = (trained.model(xs, ys)[:, -1] - ys[:, -1]).square().mean() / 2
    assert float(error) == pytest.approx(trained.history["error"].iloc[-1], rel=1e-4)


def test_one_step_is_adamw_on_the_mean_squared_error_of_all_points():
    made = trainer(SHORT)
    reference = trainer(SHORT).model
    adam = torch.optim.AdamW(reference.parameters(), lr=made.learning_rate(), weight_decay=0.01)
    seen = []
    hook = made.model.register_forward_hook(lambda module, args, output: seen.append(args))
    loss = made.train_step()
    hook.remove()
    xs, ys = seen[0]
    expected = (reference(xs, ys) - ys).square().mean()
    expected.backward()
    adam.step()
    assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-5)
    for found, right in zip(made.model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(found, right, atol=1e-6)


def test_the_same_seed_gives_the_same_model_and_another_one_does_not():
    first, again = train("relu", SHORT, seed=3), train("relu", SHORT, seed=3)
    other = train("relu", SHORT, seed=4)
    same = first.history == again.history
    assert same.iloc[1:].all().all()
    for a, b, c in zip(*(m.model.parameters() for m in (first, again, other)), strict=True):
        assert torch.equal(a, b)
        if a.ndim > 1:
            assert not torch.equal(a, c)


def test_training_leaves_torchs_own_generator_alone():
    before = torch.get_rng_state()
    train("linear", SHORT)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_interrupted_training_ends_as_an_unbroken_one(tmp_path):
    path = tmp_path / "t.safetensors"

    class Stop(Exception):
        pass

    def stop_at_5(n):
        done.append(n)
        if sum(done) == 5:
            raise Stop

    done = []
    with pytest.raises(Stop):
        train("tree", SHORT, checkpoint=path, progress=stop_at_5)
    resumed = []
    found = train("tree", SHORT, checkpoint=path, progress=resumed.append)
    assert resumed == [3, 1, 1, 1]
    expected = train("tree", SHORT)
    for a, b in zip(found.model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert found.history["error"].tolist() == expected.history["error"].tolist()


def test_a_checkpoint_of_another_training_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    train("linear", SHORT, checkpoint=path)
    with pytest.raises(RunError, match="is of another training"):
        train("linear", SHORT, seed=1, checkpoint=path)
    with pytest.raises(RunError, match="is of another training"):
        train("tree", SHORT, checkpoint=path)


def test_training_goes_on_from_a_given_model():
    start = train("linear", SHORT).model
    before = [parameter.clone() for parameter in start.parameters()]
    went_on = train("sparse-linear", replace(SHORT, options={"n_nonzero": 1}), start=start)
    assert went_on.history["error"].iloc[0] > 0
    for a, b in zip(start.parameters(), before, strict=True):
        assert torch.equal(a, b)
    xs = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0))
    frozen = replace(SHORT, learning_rate=0.0, weight_decay=0.0)
    kept = train("linear", frozen, start=start).model
    assert torch.equal(kept(xs, xs[..., 0]), start(xs, xs[..., 0]))
    other = RegressionTransformer(RegressionSizes(2, 12, 1, 2, 32))
    with pytest.raises(ShapeError, match="the model to start from has RegressionSizes"):
        train("linear", SHORT, start=other)


def test_prompts_grow_with_the_curriculum():
    settings = replace(SHORT, curriculum=Curriculum(dims=1, points=2, every=2), steps=20)
    made = trainer(settings)
    seen = []
    made.model.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    for _ in range(7):
        made.train_step()
    assert [xs.shape[1] for xs in seen] == [2, 2, 4, 4, 6, 6, 6]
    assert [int((xs != 0).any(dim=(0, 1)).sum()) for xs in seen] == [1, 1, 2, 2, 2, 2, 2]


def test_the_step_size_warms_up_and_falls():
    made = trainer(replace(SHORT, steps=110, warmup=10, learning_rate=1.0))
    rates = []
    for made.step in (0, 4, 9, 10, 60, 109):
        rates.append(made.learning_rate())
    assert rates[:4] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert rates[4] == pytest.approx(0.5)
    assert 0 < rates[5] < 0.001
    constant = trainer(replace(SHORT, schedule="constant", warmup=0, learning_rate=1.0))
    constant.step = 5
    assert constant.learning_rate() == 1.0


def test_low_precision_trains_too():
    found = train("linear", replace(SHORT, precision="bfloat16"))
    assert found.model.read_in.weight.dtype == torch.float32
    exact = train("linear", SHORT)
    assert found.history["error"].iloc[-1] == pytest.approx(
        exact.history["error"].iloc[-1], rel=0.1
    )


def test_noise_is_on_every_y_that_a_prompt_shows():
    drawn = function_class("noisy-linear", 2, noise_std=0.5)
    generator = torch.Generator().manual_seed(0)
    noisy = draw_points(drawn, 2000, 3, generator)
    generator = torch.Generator().manual_seed(0)
    clean = draw_points(Linear(2), 2000, 3, generator)
    assert torch.equal(noisy.xs, clean.xs)
    assert torch.equal(noisy.values, clean.values)
    assert torch.equal(clean.ys, clean.values)
    assert float((noisy.ys - noisy.values).std()) == pytest.approx(0.5, rel=0.05)


def test_a_loss_that_is_not_finite_is_caught():
    with pytest.raises(NumericalError, match=r"training is not finite at step \d+ .* lower learn"):
        train("linear", replace(SHORT, learning_rate=float("inf"), warmup=0))


def test_what_cannot_be_is_refused():
    with pytest.raises(
        UnknownNameError, match="unknown preset 'huge'; expected one of tiny, small"
    ):
        preset("huge")
    with pytest.raises(UnknownNameError, match="unknown function class 'cubic'"):
        train("cubic", SHORT)
    with pytest.raises(ShapeError, match=r"train_points=13: expected between 1 and .* n_points=12"):
        TrainSettings(SHORT.sizes, train_points=13)


def test_the_presets_are_of_the_sizes_they_promise():
    small, standard = preset("small"), preset("standard")
    assert small.sizes.n_layer * small.sizes.n_head >= 24
    assert small.sizes.n_points >= 2.5 * small.train_points
    assert standard.sizes == RegressionSizes(20, 101, 12, 8, 256)
    assert (standard.train_points, standard.batch_size, standard.steps) == (41, 64, 500_000)
