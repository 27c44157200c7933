"""Pictures that answer to a pointer: maps and lines drawn by bokeh, in the colours of all figures.

Nothing has a background of its own: in a dark theme the page turns lights into darks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    CustomJS,
    FixedTicker,
    HoverTool,
    Legend,
    LegendItem,
    LinearColorMapper,
    Range1d,
    Span,
    TapTool,
)
from bokeh.plotting import figure
from matplotlib import colormaps
from matplotlib.colors import to_hex
from numpy.typing import ArrayLike

from tvlens.figures.style import GREY, PALE, PALETTE, RED

Numbers = Sequence[float | int]

DASHES = {"-": "solid", "--": "dashed", ":": "dotted", "-.": "dashdot"}
"""Lines of bokeh by those of catalogues."""

CYCLE = ("blue", "red", "green", "orange", "pink", "sky", "brown", "dark")
"""Names of colours for what no catalogue has a colour for."""

_DIVERGING = [to_hex(colormaps["RdBu_r"](i / 254)) for i in range(255)]
_SMALL = "11px"
_TIP = '<div class="tip">{}</div>'


@dataclass(frozen=True)
class Line:
    """One line of a picture.

    Attributes:
        label: its words in the legend.
        x: where its points are.
        y: their values.
        low: lower ends of intervals, or nothing.
        high: upper ends.
        colour: a name of the palette.
        dash: its line.
        told: what is said of every point when it is pointed at; its numbers if nothing.
    """

    label: str
    x: Numbers
    y: Numbers
    low: Numbers = ()
    high: Numbers = ()
    colour: str = "blue"
    dash: str = "-"
    told: Sequence[str] = field(default=())


@dataclass(frozen=True)
class Band:
    """What lies behind the lines, such as chance."""

    label: str
    x: Numbers
    low: Numbers
    high: Numbers


def lines(
    shown: Sequence[Line],
    x: str,
    y: str,
    *,
    bands: Sequence[Band] = (),
    mark: float | int | None = None,
    logarithmic: bool = False,
    percent: bool = False,
) -> Any:
    """Lines with their intervals; the point that is pointed at says its numbers.

    Args:
        shown: the lines.
        x: words of the horizontal axis.
        y: words of the vertical axis.
        bands: what lies behind them.
        mark: where a vertical line stands.
        logarithmic: whether values are on a logarithmic scale.
        percent: whether the horizontal axis is a share.
    """
    plot = _plot(260, x, y, y_axis_type="log" if logarithmic else "linear")
    entries: list[LegendItem] = []
    for band in bands:
        area = plot.varea(
            list(band.x), list(band.low), list(band.high), fill_color=PALE, fill_alpha=1
        )
        entries.append(LegendItem(label=band.label, renderers=[area]))
    pointed = []
    for each in shown:
        data: dict[str, ArrayLike] = {"x": list(each.x), "y": list(each.y)}
        data["told"] = [escape(words).replace("\n", "<br>") for words in each.told]
        colour, dash = PALETTE[each.colour], DASHES[each.dash]
        drawn = []
        if len(each.low):
            data |= {"low": list(each.low), "high": list(each.high)}
        source = ColumnDataSource(data)
        if len(each.low) > 1:
            area = plot.varea("x", "low", "high", source=source, fill_color=colour, fill_alpha=0.12)
            drawn.append(area)
        line = plot.line("x", "y", source=source, line_color=colour, line_dash=dash, line_width=1.6)
        dots = plot.scatter("x", "y", source=source, size=5, color=colour)
        pointed.append(dots)
        entries.append(LegendItem(label=each.label, renderers=[line, dots, *drawn]))
    if mark is not None:
        plot.add_layout(
            Span(location=mark, dimension="height", line_color=GREY, line_dash="dotted")
        )
    if percent:
        plot.xaxis.formatter.update(use_scientific=False)
    hover = HoverTool(renderers=pointed, tooltips=_TIP.format("@told{safe}"), mode="mouse")
    plot.add_tools(hover)
    _legend(plot, entries)
    return plot


def _legend(plot: Any, entries: Sequence[LegendItem]) -> None:
    longest = max((len(entry.label["value"]) for entry in entries), default=0)
    legend = Legend(
        items=list(entries),
        ncols=1 if longest > 34 else 2 if longest > 18 else 3,
        border_line_color=None,
        background_fill_color=None,
        label_text_font_size=_SMALL,
        glyph_height=12,
        glyph_width=18,
        label_height=12,
        spacing=0,
        padding=0,
        margin=4,
        click_policy="hide",
    )
    plot.add_layout(legend, "below")


def source_of(columns: Mapping[str, Sequence[Any]]) -> Any:
    """Columns that several maps can share, so that what is chosen in one is marked in all."""
    return ColumnDataSource({name: list(values) for name, values in columns.items()})


def chosen(source: Any, calls: str) -> None:
    """Has the page call a function of its own with the row that is clicked.

    Args:
        source: the columns of the map.
        calls: JavaScript with `row`, which gives the value of a column in that row.
    """
    code = (
        "const [i] = source.selected.indices; if (i === undefined) return;"
        f" const row = (name) => source.data[name][i]; {calls}"
    )
    source.selected.js_on_change("indices", CustomJS(args={"source": source}, code=code))


def tile_map(
    source: Any,
    value: str,
    x: str,
    y: str,
    *,
    height: int,
    columns: Sequence[str] = (),
    edge: str | None = None,
    title: str = "",
    label: str = "",
) -> Any:
    """A map of columns `x` and `y`, red above 0 and blue below, and grey where there is nothing.

    What is said of a tile stands in the column `told`, in HTML. A tile can be clicked.

    Args:
        source: `source_of` its columns.
        value: the column that is drawn.
        x: the column that runs to the right.
        y: the column that runs up.
        height: height in pixels.
        columns: words of what runs to the right; numbers where there are none.
        edge: the column that says which tiles are framed, 1 or 0.
        title: above the map.
        label: words of its scale.
    """
    found = {name: np.asarray(source.data[name], dtype=float) for name in (x, y, value)}
    reach = float(np.nanmax(np.abs(found[value]), initial=0)) or 1.0
    colour = LinearColorMapper(palette=_DIVERGING, low=-reach, high=reach, nan_color=PALE)
    plot = _plot(height, "" if columns else x, y)
    plot.title.text = title
    plot.x_range = Range1d(found[x].min() - 0.5, found[x].max() + 0.5)
    plot.y_range = Range1d(found[y].min() - 0.5, found[y].max() + 0.5)
    plot.grid.grid_line_color = None
    fill = {"field": value, "transform": colour}
    tiles = plot.rect(
        x,
        y,
        # A little more than 1, or the ground shows through between tiles.
        1.02,
        1.02,
        source=source,
        fill_color=fill,
        line_color=None,
        nonselection_fill_alpha=1,
        hover_fill_color=fill,
        hover_line_color=GREY,
    )
    plot.rect(
        x,
        y,
        1,
        1,
        source=source,
        fill_color=None,
        line_color="black",
        line_width=1.4,
        line_alpha=edge or 0,
        nonselection_line_alpha=edge or 0,
        selection_line_color=RED,
        selection_line_width=3,
        selection_line_alpha=1,
    )
    plot.add_tools(HoverTool(renderers=[tiles], tooltips=_TIP.format("@told{safe}")))
    plot.add_tools(TapTool(renderers=[tiles]))
    if columns:
        plot.xaxis.ticker = FixedTicker(ticks=list(range(len(columns))))
        plot.xaxis.major_label_overrides = dict(enumerate(columns))
        plot.xaxis.major_label_orientation = "vertical"
    else:
        plot.xaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    plot.yaxis.ticker = BasicTicker(min_interval=1, num_minor_ticks=0)
    bar = ColorBar(
        color_mapper=colour,
        width=8,
        padding=4,
        title=label,
        title_text_font_size=_SMALL,
        title_text_font_style="normal",
        major_label_text_font_size=_SMALL,
        background_fill_color=None,
        ticker=BasicTicker(desired_num_ticks=5),
    )
    plot.add_layout(bar, "right")
    return plot


def _plot(height: int, x: str, y: str, **kinds: Any) -> Any:
    plot = figure(
        height=height,
        sizing_mode="stretch_width",
        toolbar_location=None,
        tools="",
        x_axis_label=x,
        y_axis_label=y,
        background_fill_color=None,
        border_fill_color=None,
        outline_line_color=None,
        min_border_right=12,
        **kinds,
    )
    plot.title.text_font_size = "12px"
    for axis in plot.axis:
        axis.axis_label_text_font_style = "normal"
        axis.axis_label_text_font_size = _SMALL
        axis.major_label_text_font_size = _SMALL
        axis.minor_tick_line_color = None
    plot.grid.grid_line_color = PALE
    return plot
