"""One value at a glance: a map over layers and heads, bars over layers. Numbers that are not finite
are left blank, so that anything can be drawn.
"""

import textwrap
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import DataFrame
from torch import Tensor

from tvlens.errors import ShapeError
from tvlens.figures.grids import Top, colour_bar, draw, frame, label_columns, limit
from tvlens.figures.style import BLUE, STYLE, whole_numbers


@rc_context(STYLE)
def value_map(
    values: Float[Tensor, "_layer _column"] | Float[np.ndarray, "_layer _column"],
    *,
    columns: Sequence[str] = (),
    title: str = "",
    label: str = "",
    k: int = 10,
    top: Top = "high",
) -> Figure:
    """A map over layers and heads, or layers and named places: red above 0, blue below, 0 white.

    Args:
        values: a number for each; grey where it is not finite.
        columns: names of places; heads, which are numbered, where there are none.
        title: what it shows.
        label: what the numbers measure.
        k: how many of the best are framed, as many as there are if fewer.
        top: which are the best.

    Raises:
        ShapeError: there is nothing to draw, or not one name for each column.
    """
    shown = torch.as_tensor(values).detach().cpu().double()
    if not shown.numel() or len(columns) not in (0, shown.shape[1]):
        names = f" with {len(columns)} names" if columns else ""
        raise ShapeError(
            f"a map of shape {tuple(shown.shape)} (layer, column){names} was asked for; expected "
            "one number or more, and as many names as columns, or none"
        )
    grid = DataFrame(shown.where(torch.isfinite(shown), torch.nan).numpy())
    width = float(np.clip(0.24 * shown.shape[1], 1.6, 4.8))
    height = float(np.clip(0.14 * shown.shape[0], 0.9, 4.5))
    figure = Figure(figsize=(1.5 + width, 0.9 + height), layout="constrained")
    axes = figure.subplots()
    image = draw(axes, grid, limit([grid]))
    frame(axes, grid, k, top)
    axes.set_ylabel("layer")
    axes.set_title(_in_lines(title, 14 * (width + 1)), parse_math=False)
    if columns:
        label_columns(axes, grid, [_cut(name, 20) for name in columns], width)
    else:
        axes.set_xlabel("head")
    words = _in_lines(label, 14 * (height + 0.8))
    colour_bar(figure, image, [axes], words, location="right", size=(width, height))
    return figure


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _in_lines(text: str, width: float) -> str:
    """A text in two lines at most, or a long one would leave no room for the map."""
    return "\n".join(textwrap.wrap(_cut(text, round(2 * width)), round(width))[:2])


@rc_context(STYLE)
def layer_bars(values: Float[Tensor, " layer"], *, label: str, title: str = "") -> Figure:
    """A bar for each layer; none where the number is not finite.

    Args:
        values: a number for each layer.
        label: what they measure.
        title: what it shows.
    """
    numbers = values.detach().cpu().double()
    shown = numbers.where(torch.isfinite(numbers), 0.0).numpy()
    figure = Figure(figsize=(float(np.clip(0.12 * len(shown), 2.2, 5)), 1.5), layout="constrained")
    axes = figure.subplots()
    axes.bar(range(len(shown)), shown, color=BLUE)
    axes.set(xlabel="layer", ylabel=label)
    axes.set_title(title, parse_math=False)
    axes.xaxis.set_major_locator(whole_numbers())
    return figure
