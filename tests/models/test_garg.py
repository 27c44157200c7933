"""The published layout of Garg et al.: what is read, what is refused, and in which unit."""

import os
import pickle
import zipfile

import pytest
import torch
import yaml

import tvlens
from helpers import zoo
from helpers.tiny_regression import points
from tvlens.errors import ModelError, RunError, ShapeError
from tvlens.models.regression import load_garg, save_regression
from tvlens.models.regression.transformer import RegressionSizes, RegressionTransformer
from tvlens.studies.regression import RegressionSettings, regression_plans
from tvlens.tasks import FunctionTask, function_class

SIZES = RegressionSizes(n_dims=3, n_points=5, n_layer=2, n_head=2, d_model=16)
TRAINING = {
    "task": "linear_regression",
    "task_kwargs": {},
    "data": "gaussian",
    "curriculum": {"points": {"start": 3, "end": 4}},
}


def model(seed=0, sizes=SIZES):
    made = RegressionTransformer(sizes)
    zoo.randomise(made, seed)
    torch.nn.init.zeros_(made.backbone.wte.weight)
    return made.eval()


def garg(folder, made, family="gpt2", training=TRAINING, **changes):
    """A folder as Garg et al. publish them, with what older transformers kept beside weights."""
    state = {f"_{name}": tensor for name, tensor in made.state_dict().items()}
    state["_backbone.wte.weight"] = torch.zeros(50, made.sizes.d_model)
    for layer in range(made.sizes.n_layer):
        state[f"_backbone.h.{layer}.attn.bias"] = torch.ones(1, 1, 10, 10)
        state[f"_backbone.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    described = {
        "family": family,
        "n_dims": made.sizes.n_dims,
        "n_positions": made.sizes.n_points,
        "n_embd": made.sizes.d_model,
        "n_layer": made.sizes.n_layer,
        "n_head": made.sizes.n_head,
    }
    folder.mkdir(exist_ok=True)
    text = yaml.safe_dump({"model": described | changes, "training": training})
    (folder / "config.yaml").write_text(text)
    kept = {"model_state_dict": state, "optimizer_state_dict": {"state": {}}, "train_step": 5}
    torch.save(kept, folder / "state.pt")
    return folder


def test_the_published_layout_is_read(tmp_path):
    made, (xs, ys) = model(), points()
    read = load_garg(garg(tmp_path / "linear", made))
    assert read.sizes == SIZES
    assert torch.equal(read(xs, ys), made(xs, ys))


def test_published_layouts_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"family 'lstm'; expected 'gpt2'"):
        load_garg(garg(tmp_path / "a", model(), family="lstm"))
    with pytest.raises(ModelError, match=r"weights differ, the first is 'backbone\.h\.2\."):
        load_garg(garg(tmp_path / "b", model(), n_layer=3))
    folder = garg(tmp_path / "c", model())
    (folder / "config.yaml").write_text("model: {family: gpt2}")
    with pytest.raises(ModelError, match=r"lacks 'n_dims'; expected model: family, n_dims"):
        load_garg(folder)
    with pytest.raises(RunError, match=r"holds no model: expected config\.yaml and a state"):
        load_garg(tmp_path / "nowhere")


HARMLESS = "expected a file of torch.save .* that holds weights and no code"


class Harmful:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_never_run(tmp_path):
    folder = garg(tmp_path / "m", model())
    harm = tmp_path / "harm"
    torch.save({"model_state_dict": {"_read_in.weight": Harmful(harm)}}, folder / "state.pt")
    with pytest.raises(RunError, match=HARMLESS):
        load_garg(folder)
    (folder / "state.pt").write_bytes(pickle.dumps(Harmful(harm), protocol=2))
    with pytest.raises(RunError, match=HARMLESS):
        load_garg(folder)
    assert not harm.exists()


def test_a_truncated_checkpoint_is_refused(tmp_path):
    folder = garg(tmp_path / "m", model())
    content = (folder / "state.pt").read_bytes()
    (folder / "state.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(RunError, match=r"state\.pt: File is not a zip file; expected"):
        load_garg(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("bare", [True, False])
def test_weights_saved_in_a_wrapper_are_read(tmp_path, prefix, bare):
    folder, made = garg(tmp_path / "m", model()), model()
    state = torch.load(folder / "state.pt", weights_only=True)["model_state_dict"]
    state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    torch.save(state if bare else {"model_state_dict": state}, folder / "state.pt")
    assert load_garg(folder).digest == made.digest
    state["_read_in.bias"] = torch.zeros(16)
    torch.save(state, folder / "state.pt")
    with pytest.raises(ModelError, match=r"holds .read_in\.bias. twice, wrapped and not"):
        load_garg(folder)


def test_steps_that_were_kept_are_read_the_last_of_them_first(tmp_path):
    folder = garg(tmp_path / "m", model(0))
    for step, seed in ((500, 1), (1000, 2), (90, 3)):
        other = garg(tmp_path / "other", model(seed))
        (other / "state.pt").rename(folder / f"model_{step}.pt")
    assert load_garg(folder).digest == model(0).digest
    assert load_garg(folder / "model_90.pt").digest == model(3).digest
    (folder / "state.pt").unlink()
    assert load_garg(folder).digest == model(2).digest
    assert tvlens.load(folder, name="g").readout.variance == 3.0
    assert tvlens.load(str(folder / "model_500.pt")).name == "model_500.pt"


def test_sizes_may_be_texts(tmp_path):
    sizes = {"n_dims": "3", "n_positions": " 5 ", "n_embd": "16", "n_layer": "2", "n_head": "2"}
    assert load_garg(garg(tmp_path / "m", model(), **sizes)).sizes == SIZES


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 10**9}, "too few for"),
        ({"n_layer": "1000000000"}, "n_layer is '1000000000'; expected a whole number"),
        ({"n_positions": 10**12}, "too few for"),
        ({"n_embd": 10**6, "n_head": 10**6}, "too few for|weights differ"),
        ({"n_head": 5}, "d_model divisible by n_head"),
        ({"n_layer": True}, "n_layer is True; expected a whole number"),
        ({"n_layer": 2.0}, r"n_layer is 2\.0; expected a whole number"),
        ({"n_dims": None}, "n_dims is None; expected"),
        ({"n_dims": [3]}, r"n_dims is \[3\]; expected"),
        ({"n_dims": 0}, "at least 1"),
        ({"n_dims": -3}, "at least 1"),
    ],
)
def test_sizes_that_the_file_cannot_fill_are_refused(tmp_path, changes, message):
    with pytest.raises((ModelError, ShapeError), match=message):
        load_garg(garg(tmp_path / "m", model(), **changes))


def test_configs_that_say_nothing_of_use_are_refused(tmp_path):
    folder = garg(tmp_path / "m", model())
    config = folder / "config.yaml"
    config.write_text("inherit: [models/standard.yaml]\nmodel: {n_dims: 3}")
    with pytest.raises(ModelError, match="lacks 'family'; it inherits from other files, which are"):
        load_garg(folder)
    for text in ("", "[1, 2]", "model: 3"):
        config.write_text(text)
        with pytest.raises(ModelError, match="lacks 'family'; expected model: family"):
            load_garg(folder)
    for content in (
        b"\xff\xfe\x00",
        b"model: {",
        b"a: &x [*x]",
        b"- " * 300_000,
        b"x: " + b"[" * 9999,
    ):
        config.write_bytes(content)
        with pytest.raises((RunError, ModelError), match=r"config\.yaml"):
            load_garg(folder)
    config.write_text("x" * (2 << 20))
    with pytest.raises(RunError, match="it has 2097152 bytes"):
        load_garg(folder)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (torch.zeros(3), "holds no weights by name"),
        ({"model_state_dict": 3}, "holds no weights by name"),
        ({3: torch.zeros(1)}, "holds no weights by name"),
        ({"_read_in.weight": "x"}, "holds no weights by name"),
        ({}, "too few for"),
        ({"a": torch.zeros(1).expand(10**6, 10**6)}, "its weights share their numbers"),
        ({"a": torch.zeros(3, dtype=torch.long)}, "expected real numbers in full"),
        ({"a": torch.eye(3).to_sparse()}, "expected real numbers in full"),
    ],
)
def test_checkpoints_of_something_else_are_refused(tmp_path, state, message):
    folder = garg(tmp_path / "m", model())
    torch.save(state, folder / "state.pt")
    with pytest.raises(ModelError, match=message):
        load_garg(folder)


def test_a_file_that_unpacks_to_more_than_it_is_is_refused(tmp_path):
    folder = garg(tmp_path / "m", model())
    with (
        zipfile.ZipFile(folder / "state.pt") as plain,
        zipfile.ZipFile(folder / "model_1.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
        packed.writestr("archive/data/99", bytes(1 << 22))
    with pytest.raises(RunError, match=r"its \d+ bytes unpack to \d+"):
        load_garg(folder / "model_1.pt")


@pytest.mark.parametrize(
    ("task", "options", "name", "variance"),
    [
        ("linear_regression", {"scale": 1}, "linear", 3.0),
        ("sparse_linear_regression", {"sparsity": 2}, "sparse-linear", 2.0),
        ("noisy_linear_regression", {"noise_std": 0.5}, "noisy-linear", 3.0),
        ("quadratic_regression", {}, "quadratic", 3.0),
        ("relu_2nn_regression", {"hidden_layer_size": 7}, "relu", 3.0),
        ("decision_tree", {"depth": 2}, "tree", 1.0),
    ],
)
def test_the_card_says_what_the_model_was_trained_on(tmp_path, task, options, name, variance):
    training = TRAINING | {"task": task, "task_kwargs": options}
    made = load_garg(garg(tmp_path / "m", model(), training=training))
    assert made.card["functions"] == name
    assert (made.card["train_points"], made.variance) == (4, variance)
    found = FunctionTask.of_card("t", made.card, 3)
    assert found.functions.variance == variance
    assert list(made.card["settings"]["options"].values()) == [
        value for key, value in options.items() if key != "scale"
    ]


@pytest.mark.parametrize(
    "training",
    [
        None,
        {},
        TRAINING | {"task": "linear_classification"},
        TRAINING | {"task": ["linear_regression"]},
        TRAINING | {"task_kwargs": {"scale": 2}},
        TRAINING | {"task_kwargs": [1]},
        TRAINING | {"data": "sparse_gaussian"},
        TRAINING | {"task": "sparse_linear_regression", "task_kwargs": {"sparsity": 99}},
        TRAINING | {"task": "decision_tree", "task_kwargs": {"depth": "x"}},
    ],
)
def test_a_training_that_is_not_known_here_leaves_the_card_empty(tmp_path, training):
    made = load_garg(garg(tmp_path / "m", model(), training=training))
    assert (made.card, made.variance) == ({}, 1.0)


def test_errors_are_over_the_variance_of_f_from_the_folder_and_from_the_model(tmp_path):
    folder = garg(tmp_path / "m", model())
    task = FunctionTask("t", function_class("linear", 3))
    asked = task.prompts("test", shots=3, n=8)
    with torch.no_grad():
        predicted = load_garg(folder)(asked.xs, asked.ys)[:, -1]
    expected = float((predicted - asked.target).square().mean()) / 3
    for given in (load_garg(folder), folder, str(folder)):
        lens = tvlens.load(given, name="g")
        table = tvlens.evaluate(lens, task, {}, kinds=("clean",), shots=3, n=8)
        assert table["value"].tolist() == pytest.approx([expected], rel=1e-5)


def test_it_goes_straight_into_the_regression_study(tmp_path):
    made = load_garg(garg(tmp_path / "m", model()))
    task = FunctionTask.of_card("published", made.card, made.sizes.n_dims)
    lens = tvlens.load(made, name="published")
    (plan,) = regression_plans({"published": (lens, task)}, RegressionSettings()).values()
    assert (plan.trained, plan.longest, plan.lens.readout.variance) == (4, 5, 3.0)


def test_a_card_without_a_sound_variance_is_refused(tmp_path):
    for wrong in (0, -1.0, float("inf"), "3", None):
        save_regression(
            model(), tmp_path / "m.safetensors", {"variance": wrong}, dtype=torch.float32
        )
        with pytest.raises(ModelError, match=r"gives the variance .*; expected a positive number"):
            tvlens.load(tmp_path / "m.safetensors")
