"""`tvlens regression`: training ends in a file that is a model, resumes, and explains mistakes."""

import json
import shutil

import pandas as pd
import pytest
import torch

from helpers.commands import mistake, ok, run
from tvlens.errors import RunError, ShapeError, UnknownNameError
from tvlens.models.regression.training import preset, train
from tvlens.models.regression.transformer import (
    RegressionTransformer,
    load_regression,
    save_regression,
)

pytestmark = pytest.mark.usefixtures("wide")
TRAIN = ["regression", "train", "--preset", "tiny", "--steps", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder that training wrote, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "linear"
    return out, ok(*TRAIN, "--functions", "linear", "--out", out)


def test_training_writes_a_model_with_its_card(trained):
    out, said = trained
    model, card = load_regression(out / "model.safetensors")
    expected = train("linear", preset("tiny", steps=4))
    for found, right in zip(model.parameters(), expected.model.parameters(), strict=True):
        assert torch.equal(found, right)
    assert card["functions"] == "linear"
    assert card["train_points"] == 6
    assert card["error"] == pytest.approx(expected.history["error"].iloc[-1])
    assert card["settings"]["steps"] == 4
    assert {"seed", "machine", "torch", "least_squares", "start"} <= card.keys()
    assert "step 4: loss" in said
    assert str(out / "model.safetensors") in said.replace("\n", "")


def test_training_leaves_history_figure_and_manifest(trained):
    out, _ = trained
    history = pd.read_csv(out / "history.csv")
    assert history["step"].tolist() == [0, 4]
    assert (out / "figures" / "training.pdf").stat().st_size
    assert not (out / "checkpoints" / "training.safetensors").exists()
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["state"] == "finished"
    assert manifest["config"]["functions"] == "linear"


def everything_but_times(out):
    """Every file that is a result, by name."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.stem not in ("times", "manifest", ".tvlens-step", ".tvlens-lock")
    }


def test_the_same_command_writes_the_same_bytes_but_for_times(trained, tmp_path):
    ok(*TRAIN, "--functions", "linear", "--out", tmp_path / "again")
    assert everything_but_times(tmp_path / "again") == everything_but_times(trained[0])
    times = pd.read_csv(tmp_path / "again" / "times.csv")
    assert list(times.columns) == ["step", "seconds"]


def test_a_device_that_is_not_there_is_refused_and_claims_nothing(tmp_path):
    out = tmp_path / "run"
    words = [*TRAIN, "--functions", "linear", "--device", "cuda:9", "--out", out]
    assert "no device 'cuda:9'" in mistake(*words, kind=UnknownNameError)
    assert not out.exists()


def test_another_model_to_start_from_is_another_run(trained, tmp_path):
    start = tmp_path / "start.safetensors"
    shutil.copy(trained[0] / "model.safetensors", start)
    words = [*TRAIN, "--functions", "linear", "--start", start, "--out", tmp_path / "run"]
    ok(*words)
    model, card = load_regression(start)
    model.read_out.bias.data += 1
    save_regression(model, start, card, dtype=torch.float32)
    assert "start.safetensors, weights" in mistake(*words, kind=RunError)


def test_the_same_command_trains_nothing_twice_and_writes_what_was_deleted(trained):
    out, _ = trained
    before = everything_but_times(out)
    (out / "model.safetensors").unlink()
    said = ok(*TRAIN, "--functions", "linear", "--out", out)
    assert "step 4: loss" not in said
    assert everything_but_times(out) == before
    message = mistake(*TRAIN, "--functions", "tree", "--out", out, kind=RunError)
    assert "linear" in message


def test_options_of_the_class_and_a_model_to_start_from(trained, tmp_path):
    start = trained[0] / "model.safetensors"
    words = [*TRAIN, "--functions", "noisy-linear,noise_std=0.5", "--start", start]
    ok(*words, "--out", tmp_path / "run")
    _, card = load_regression(tmp_path / "run" / "model.safetensors")
    assert card["settings"]["options"] == {"noise_std": 0.5}
    assert card["start"] == str(start)
    first = pd.read_csv(tmp_path / "run" / "history.csv")["error"].iloc[0]
    assert first != pytest.approx(pd.read_csv(trained[0] / "history.csv")["error"].iloc[0])


def test_what_cannot_be_trained_is_refused_and_claims_no_folder(tmp_path):
    out = ["--out", tmp_path / "run"]
    message = mistake(*TRAIN, "--functions", "cubic", *out, kind=UnknownNameError)
    assert "unknown function class 'cubic'; expected one of linear, sparse-linear" in message
    message = mistake(*TRAIN, "--functions", "linear,tree", *out, kind=UnknownNameError)
    assert "expected CLASS or CLASS,key=number" in message
    message = mistake(*TRAIN, "--functions", "relu,depth=2", *out, kind=UnknownNameError)
    assert "function class 'relu' has no option 'depth'; it has n_hidden" in message
    message = mistake(*TRAIN, "--functions", "sparse-linear", *out, kind=ShapeError)
    assert "n_nonzero=3: expected between 1 and n_dims=1" in message
    words = ["regression", "train", "--functions", "linear", *out]
    assert "unknown preset 'huge'" in mistake(*words, "--preset", "huge", kind=UnknownNameError)
    words = [*TRAIN, "--functions", "linear", *out]
    message = mistake(*words, "--start", tmp_path / "no.safetensors", kind=UnknownNameError)
    assert "no shipped model has this name (linear-small" in message
    assert not (tmp_path / "run").exists()


def test_a_start_of_another_size_is_refused(tmp_path):
    other = RegressionTransformer(preset("small").sizes)
    save_regression(other, tmp_path / "other.safetensors", {}, dtype=torch.float32)
    words = [*TRAIN, "--functions", "linear", "--out", tmp_path / "run"]
    message = mistake(*words, "--start", tmp_path / "other.safetensors", kind=ShapeError)
    assert "the model to start from has RegressionSizes(n_dims=4" in message
    (tmp_path / "other.safetensors").write_bytes(b"no model")
    mistake(*words, "--start", tmp_path / "other.safetensors", kind=RunError)


def test_numbers_out_of_range_are_refused(tmp_path):
    words = ["regression", "train", "--functions", "linear", "--out", tmp_path / "run"]
    for option, value in (("--steps", "0"), ("--precision", "int8"), ("--seed", "-1")):
        assert run(*words, option, value).code == 2
