"""Figures laid out as saving them does, and those that a run has drawn before."""

from pathlib import Path

import pytest
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tvlens.runs.run import Run

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


def legend_of(figure: Figure) -> list[str]:
    """The labels of a figure's legend, read row by row."""
    figure.draw_without_rendering()
    texts = figure.legends[0].get_texts()
    at = [text.get_transform().transform(text.get_position()) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: (-round(at[i][1]), at[i][0]))
    return [texts[i].get_text() for i in order]


def leave_figures(patch: pytest.MonkeyPatch) -> None:
    """Lets runs keep the figures that they have drawn, which must be there.

    Drawing them anew, byte by byte the same, is tested of `tvlens study text`; it takes most of the
    time of a command that finds all its steps done.
    """

    def leave(self: Run, name: str, figure: Figure) -> Path:
        pyplot.close(figure)
        path = self.folder / "figures" / f"{name}.pdf"
        assert path.exists()
        return path

    patch.setattr(Run, "write_figure", leave)
