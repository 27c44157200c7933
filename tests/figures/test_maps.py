"""Maps and bars of one value, whatever its numbers."""

import numpy as np
import pytest
import torch
from matplotlib.patches import Rectangle

from helpers.drawn import draw
from tvlens import figures
from tvlens.errors import ShapeError


def map_of(figure):
    """The drawn numbers, the framed cells as (layer, column), and both."""
    axes = figure.axes[0]
    (image,) = axes.images
    frames = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    draw(figure)
    return image, {(round(f.get_y() + 0.5), round(f.get_x() + 0.5)) for f in frames}


def test_colours_are_centred_at_0():
    image, _ = map_of(figures.value_map(torch.tensor([[0.1, 3.0], [-0.5, 0.2]])))
    assert image.get_clim() == (-3.0, 3.0)
    assert np.allclose(image.get_array(), [[0.1, 3.0], [-0.5, 0.2]])


def test_the_best_are_framed_on_the_side_that_is_asked_for():
    grid = torch.tensor([[0.1, 3.0], [-5.0, 0.2]])
    assert map_of(figures.value_map(grid, k=1))[1] == {(0, 1)}
    assert map_of(figures.value_map(grid, k=1, top="low"))[1] == {(1, 0)}
    assert len(map_of(figures.value_map(grid, k=9))[1]) == 4


def test_what_is_not_finite_is_blank_and_never_framed():
    grid = torch.tensor([[float("nan"), float("inf")], [-float("inf"), 2.0]])
    image, framed = map_of(figures.value_map(grid))
    assert np.ma.getmaskarray(image.get_array()).sum() == 3
    assert framed == {(1, 1)}
    assert image.get_clim() == (-2.0, 2.0)
    assert map_of(figures.value_map(grid[:1]))[1] == set()


def test_places_have_names_as_they_are():
    figure = figures.value_map(torch.ones(2, 3), columns=("$x", "a_b", "<b>"), title="$y_")
    draw(figure)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["$x", "a_b", "<b>"]


@pytest.mark.parametrize(("shape", "columns"), [((0, 4), ()), ((2, 3), ("a",))])
def test_what_cannot_be_drawn_is_refused(shape, columns):
    with pytest.raises(ShapeError, match="expected one number or more, and as many names"):
        figures.value_map(torch.zeros(shape), columns=columns)


def test_bars_stand_at_layers():
    figure = figures.layer_bars(torch.tensor([1.0, float("nan"), 2.0]), label="norm")
    draw(figure)
    assert [bar.get_height() for bar in figure.axes[0].patches] == [1.0, 0.0, 2.0]
