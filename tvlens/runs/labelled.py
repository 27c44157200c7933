"""Tensors with names on their axes, for those who go on in xarray."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import xarray
    from torch import Tensor

COUNTED = ("prompt", "layer", "head")
"""Axes whose places are numbered from 0 where nothing else is said of them."""


def labelled(
    tensor: "Tensor",
    dims: Sequence[str],
    name: str,
    *,
    coords: Mapping[str, Any] | None = None,
    facts: Mapping[str, str] | None = None,
) -> "xarray.DataArray":
    """A tensor as an array with names on its axes; half precisions become float32.

    Args:
        tensor: the numbers.
        dims: names of its axes.
        name: what they are called.
        coords: what stands along axes, besides the numbers of `COUNTED`.
        facts: what they are of, such as a unit, a task and a model.

    Raises:
        ImportError: xarray is not installed.
    """
    try:
        import xarray
    except ImportError as error:
        raise ImportError(
            "to_xarray() needs xarray, which is not installed; expected it beside tvlens: pip "
            "install xarray, or use to_frame()"
        ) from error
    values = tensor.detach().cpu()
    if values.is_floating_point() and values.element_size() < 4:
        values = values.float()
    numbers = {
        dim: range(size) for dim, size in zip(dims, values.shape, strict=True) if dim in COUNTED
    }
    return xarray.DataArray(
        values.numpy(),
        dims=tuple(dims),
        coords={**numbers, **(coords or {})},
        name=name,
        attrs=dict(facts or {}),
    )
