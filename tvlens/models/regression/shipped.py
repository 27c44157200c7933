"""The regression transformers that tvlens ships, trained by `tvlens regression train`."""

from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from tvlens.errors import UnknownNameError
from tvlens.models.regression.transformer import RegressionTransformer, load_regression

_FOLDER = files("tvlens.models.regression") / "weights"
_SUFFIX = ".safetensors"


def list_shipped() -> list[str]:
    """Names of the shipped models: function class and preset."""
    if not _FOLDER.is_dir():
        return []
    names = [file.name for file in _FOLDER.iterdir() if file.name.endswith(_SUFFIX)]
    return sorted(name.removesuffix(_SUFFIX) for name in names)


def load_shipped(name: str) -> tuple[RegressionTransformer, dict[str, Any]]:
    """A shipped regression transformer and its model card.

    Raises:
        UnknownNameError: no shipped model has this name.
    """
    if name not in list_shipped():
        raise UnknownNameError(
            f"no shipped regression model {name!r}; expected one of {', '.join(list_shipped())}"
        )
    with as_file(_FOLDER / f"{name}{_SUFFIX}") as path:
        return load_regression(path)


def is_regression(model: object) -> bool:
    """Whether this is the name of a shipped regression transformer, or the file of another."""
    return str(model) in list_shipped() or str(model).endswith(_SUFFIX)


def read_regression(model: str | Path) -> tuple[RegressionTransformer, dict[str, Any]]:
    """A regression transformer by the name of a shipped one or by its file, and its model card.

    Raises:
        UnknownNameError: there is neither such a shipped model nor such a file.
        RunError: the file is truncated or not safetensors.
        ModelError: it holds another architecture, or weights that are not finite.
    """
    if str(model) in list_shipped():
        return load_shipped(str(model))
    if not Path(model).is_file():
        raise UnknownNameError(
            f"no regression model {str(model)!r}: no shipped model has this name "
            f"({', '.join(list_shipped())}) and there is no such file"
        )
    return load_regression(model)
