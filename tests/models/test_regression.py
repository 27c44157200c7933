"""The regression transformer: its sequence, what it may see, and the files it is kept in."""

import pytest
import torch

from helpers import zoo
from helpers.tiny_regression import points
from tvlens.errors import ModelError, RunError, ShapeError
from tvlens.models.regression.transformer import (
    RegressionSizes,
    RegressionTransformer,
    interleave,
    load_regression,
    save_regression,
)
from tvlens.runs.storage import save_tensors

SIZES = RegressionSizes(n_dims=3, n_points=5, n_layer=2, n_head=2, d_model=16)


def model(seed=0, sizes=SIZES):
    made = RegressionTransformer(sizes)
    zoo.randomise(made, seed)
    return made.eval()


def test_x_and_y_take_turns_and_y_stands_in_coordinate_0():
    xs = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
    found = interleave(xs, torch.tensor([[5.0, 6.0]]))
    assert found.tolist() == [[[1, 2], [5, 0], [3, 4], [6, 0]]]


def test_a_prediction_sees_the_points_before_it_and_its_own_x_alone():
    made, (xs, ys) = model(), points()
    whole = made(xs, ys)
    assert whole.shape == (4, 5)
    later, own, before = ys.clone(), ys.clone(), ys.clone()
    later[:, 3:] += 1
    own[:, 2] += 1
    before[:, 1] += 1
    assert torch.equal(made(xs, later)[:, :3], whole[:, :3])
    assert torch.equal(made(xs, own)[:, :3], whole[:, :3])
    assert (made(xs, before)[:, 2] != whole[:, 2]).all()
    moved = xs.clone()
    moved[:, 2] += 1
    assert (made(moved, ys)[:, 2] != whole[:, 2]).all()


def test_short_prompts_are_the_beginning_of_long_ones():
    made, (xs, ys) = model(), points()
    short = made(xs[:, :2], ys[:, :2])
    assert zoo.off(short, made(xs, ys)[:, :2]) < zoo.TOLERANCE[torch.float32]


def test_points_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match=r"points have 2 dimensions, the regression model reads 3"):
        model()(*points(n_dims=2))
    with pytest.raises(ShapeError, match=r"prompts have 6 points, .* has positions for 5"):
        model()(*points(n_points=6))
    with pytest.raises(ShapeError, match="at least 1, and d_model divisible"):
        RegressionSizes(3, 5, 2, 3, 16)


def test_a_saved_model_comes_back_with_its_card(tmp_path):
    made, (xs, ys) = model(), points()
    save_regression(made, tmp_path / "m.safetensors", {"steps": 7}, dtype=torch.float32)
    read, card = load_regression(tmp_path / "m.safetensors")
    assert card == {"steps": 7}
    assert read.sizes == SIZES
    assert not read.training
    assert torch.equal(read(xs, ys), made(xs, ys))


def test_half_precision_files_are_half_as_large_and_read_as_float32(tmp_path):
    made, (xs, ys) = model(), points()
    for name, dtype in (("whole", torch.float32), ("half", torch.float16)):
        save_regression(made, tmp_path / name, {}, dtype=dtype)
    whole, half = ((tmp_path / name).stat().st_size for name in ("whole", "half"))
    assert half < 0.6 * whole
    read, _ = load_regression(tmp_path / "half")
    assert read.read_in.weight.dtype == torch.float32
    assert zoo.off(read(xs, ys), made(xs, ys)) < 0.05


def test_damaged_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "m.safetensors"
    save_regression(model(), path, {}, dtype=torch.float32)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(RunError, match=r"cannot read .*m\.safetensors"):
        load_regression(path)
    save_tensors(path, {"x": torch.zeros(1)}, {"model": "m"})
    with pytest.raises(ModelError, match=r"holds no regression transformer: its metadata \['model"):
        load_regression(path)
    tensors = model().state_dict()
    sizes = {"n_dims": 3, "n_points": 5, "n_layer": 2, "n_head": 2, "d_model": 32}
    save_tensors(path, tensors, {"sizes": sizes, "card": {}})
    with pytest.raises(
        ModelError, match=r"another architecture than .*: \d+ weights differ, the f"
    ):
        load_regression(path)
    broken = model()
    broken.read_out.weight.data[0, 0] = float("nan")
    save_regression(broken, path, {}, dtype=torch.float32)
    with pytest.raises(ModelError, match=r"'read_out\.weight' holds NaN or infinite numbers"):
        load_regression(path)


def test_the_digest_changes_with_every_weight(tmp_path):
    made = model()
    digests = {made.digest}
    assert model().digest == made.digest
    for parameter in made.parameters():
        parameter.data.flatten()[-1] += 1e-3
        digests.add(made.digest)
    assert len(digests) == 1 + len(list(made.parameters()))
    path = tmp_path / "m.safetensors"
    save_regression(made, path, {}, dtype=torch.float32)
    assert load_regression(path)[0].digest == made.digest
