"""Figures laid out as saving them does."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_SLACK = 0.02
"""Inches."""


def draw(figure: Figure) -> Figure:
    """The figure, laid out: nothing may be cut at its edges, and a layout that collapses is a
    warning, so an error."""
    figure.draw_without_rendering()
    box = figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer())
    width, height = figure.get_size_inches()
    beyond = max(-box.x0, -box.y0, box.x1 - width, box.y1 - height)
    assert beyond < _SLACK, f"{beyond:.2f} inches are cut off: {box} of {width} x {height}"
    return figure
