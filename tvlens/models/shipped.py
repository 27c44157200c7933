"""The regression transformers that tvlens ships, trained by `tvlens regression train`."""

from importlib.resources import as_file, files
from typing import Any

from tvlens.errors import UnknownNameError
from tvlens.models.regression import RegressionTransformer, load_regression

_FOLDER = files("tvlens.models") / "weights"
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
