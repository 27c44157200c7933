"""Models in the published layout of Garg et al. (2022): a checkpoint beside its `config.yaml`."""

import re
from collections.abc import Mapping
from os.path import isdir, isfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tvlens.errors import ModelError, RunError, TvlensError
from tvlens.models.regression.transformer import (
    RegressionSizes,
    RegressionTransformer,
    filled,
)
from tvlens.runs.storage import load_weights, reading
from tvlens.tasks.regression.functions import function_class

_LONGEST_CONFIG = 1 << 20
_SIZES = {
    "n_dims": "n_dims",
    "n_positions": "n_points",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "d_model",
}
# Their classes by the names that commands know them by, and what their options are called here.
_CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "linear_regression": ("linear", {}),
    "sparse_linear_regression": ("sparse-linear", {"sparsity": "n_nonzero"}),
    "noisy_linear_regression": ("noisy-linear", {"noise_std": "noise_std"}),
    "quadratic_regression": ("quadratic", {}),
    "relu_2nn_regression": ("relu", {"hidden_layer_size": "n_hidden"}),
    "decision_tree": ("tree", {"depth": "depth"}),
}
# Wrappers of torch around a model that was saved.
_WRAPPERS = ("module.", "_orig_mod.")
# Older releases of transformers kept the causal mask among the weights; newer ones make it.
_MASKS = (".attn.bias", ".attn.masked_bias")


def is_garg(path: str | Path) -> bool:
    """Whether this is a folder of that layout, or a checkpoint in one."""
    path = Path(path)
    folder = path if isdir(path) else path.parent
    # Of names that no file can have, os.path says no; pathlib raises.
    if not isfile(folder / "config.yaml"):
        return False
    return path.suffix == ".pt" if isfile(path) else bool(_checkpoints(folder))


def load_garg(path: str | Path) -> RegressionTransformer:
    """A model in the published layout, in float32 and evaluation mode.

    Its `card` says what it was trained on, as far as `config.yaml` does: `functions`,
    `train_points` and `variance`, over which its errors are given. Weights that were saved while
    they were wrapped (`module.`, `_orig_mod.`) are read too.

    Args:
        path: folder with `config.yaml` and `state.pt` or, where there is none, the `model_STEP.pt`
            of most steps; or the one of them that is meant. Only weights are read.

    Raises:
        RunError: a file is missing, damaged, or holds more than weights.
        ModelError: it is another architecture.
    """
    path = Path(path)
    folder = path.parent if isfile(path) else path
    found = [path] if isfile(path) else _checkpoints(folder)
    if not found:
        raise RunError(
            f"{folder} holds no model: expected config.yaml and a state.pt or model_STEP.pt that "
            "holds weights and nothing else, as Garg et al. publish them"
        )
    described = _config(folder / "config.yaml")
    sizes = _sizes(folder / "config.yaml", described)
    state = load_weights(found[0])
    state = state.get("model_state_dict", state) if isinstance(state, dict) else state
    tensors = _weights(found[0], state)
    # There is no token to embed, so what was kept of an embedding is not used.
    tensors["backbone.wte.weight"] = torch.zeros(1, min(sizes.d_model, 1 << 20))
    model = filled(sizes, tensors, found[0])
    model.card = _card(described, sizes.n_dims)
    return model


def _checkpoints(folder: Path) -> list[Path]:
    """What weights can be read from, the best first."""
    if not isdir(folder):
        return []
    steps = {
        int(match[1]): file
        for file in folder.glob("model_*.pt")
        if (match := re.fullmatch(r"model_(\d{1,18})\.pt", file.name))
    }
    last = [folder / "state.pt"] if (folder / "state.pt").is_file() else []
    return [*last, *(steps[step] for step in sorted(steps, reverse=True))]


def _config(file: Path) -> Mapping[str, Any]:
    import yaml

    with reading(file, "a config.yaml as Garg et al. publish them"):
        if file.stat().st_size > _LONGEST_CONFIG:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        described = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(described, dict) or not isinstance(described.get("model"), dict):
        described = {"model": {}}
    return described


def _sizes(file: Path, described: Mapping[str, Any]) -> RegressionSizes:
    given = described["model"]
    missing = [key for key in ("family", *_SIZES) if key not in given]
    if missing:
        inherits = "; it inherits from other files, which are not read" * ("inherit" in described)
        raise ModelError(
            f"{file} lacks {missing[0]!r}{inherits}; expected model: family, {', '.join(_SIZES)}, "
            "as in the config.yaml that training writes beside its checkpoints"
        )
    if given["family"] != "gpt2":
        raise ModelError(
            f"{file} describes a model of family {ascii(given['family'])[:40]}; expected 'gpt2'"
        )
    numbers = {key: _number(given[key]) for key in _SIZES}
    wrong = [key for key, number in numbers.items() if number is None]
    if wrong:
        raise ModelError(
            f"{file}: {wrong[0]} is {ascii(given[wrong[0]])[:40]}; expected a whole number"
        )
    return RegressionSizes(**{ours: numbers[theirs] or 0 for theirs, ours in _SIZES.items()})


def _number(value: Any) -> int | None:
    if isinstance(value, str) and re.fullmatch(r"\s*\d{1,9}\s*", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _weights(file: Path, state: Any) -> dict[str, Tensor]:
    """The weights by the names that they have here."""
    sound = isinstance(state, dict) and all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    )
    if not sound:
        raise ModelError(f"{file} holds no weights by name; expected the state of a model")
    tensors: dict[str, Tensor] = {}
    for given, tensor in state.items():
        name = given
        while name.startswith(_WRAPPERS):
            name = name.split(".", 1)[1]
        if name.endswith(_MASKS):
            continue
        name = name.removeprefix("_")
        if name in tensors:
            raise ModelError(f"{file} holds {ascii(name)[:60]} twice, wrapped and not; keep one")
        tensors[name] = tensor
    return tensors


def _card(described: Mapping[str, Any], n_dims: int) -> dict[str, Any]:
    """What the model was trained on, as far as the config says it in words that are known here."""
    training = described.get("training")
    if not isinstance(training, dict):
        return {}
    theirs = training.get("task")
    name, options = _CLASSES.get(theirs, ("", {})) if isinstance(theirs, str) else ("", {})
    given = training.get("task_kwargs") or {}
    plain = {"scale": 1, "renormalize_ys": False}
    if not name or not isinstance(given, dict) or training.get("data", "gaussian") != "gaussian":
        return {}
    if any(key not in options and plain.get(key, ...) != value for key, value in given.items()):
        return {}
    settings = {options[key]: value for key, value in given.items() if key in options}
    try:
        drawn = function_class(name, n_dims, **settings)
    except (TvlensError, TypeError, ValueError):
        return {}
    card: dict[str, Any] = {"functions": name, "settings": {"options": settings}}
    card["variance"] = drawn.variance
    points = training.get("curriculum")
    for key in ("points", "end"):
        points = points.get(key) if isinstance(points, dict) else None
    if (end := _number(points)) is not None:
        card["train_points"] = end
    return card
