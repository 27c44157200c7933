"""Pieces of displays. What comes from users is escaped here, and nowhere else."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    # The display of a text task needs neither.
    from matplotlib.figure import Figure
    from pandas import DataFrame

MOST_ROWS = 40
"""Rows of a table that are shown, at most."""

_DPI = 100
_LEFT = 'style="text-align: left; vertical-align: top"'


class Shown:
    """HTML that a notebook shows.

    Attributes:
        html: the HTML.
        words: what it shows, in a line.
    """

    def __init__(self, html: str, words: str) -> None:
        self.html = html
        self.words = words

    def __repr__(self) -> str:
        return f"Shown({self.words!r})"

    def _repr_html_(self) -> str:
        return self.html


def card(title: str, *parts: str) -> str:
    """A display: what it is, and its parts."""
    return (
        f'<div class="tvlens" style="overflow-x: auto"><strong>{escape(title)}</strong>'
        f"{''.join(parts)}</div>"
    )


def facts(rows: Mapping[str, object]) -> str:
    """What is known of a value, a line for each; what is None or empty is left out."""
    lines = "".join(
        f'<tr><th scope="row" {_LEFT}>{escape(name)}</th><td {_LEFT}>{escape(str(said))}</td></tr>'
        for name, said in rows.items()
        if said is not None and said != ""
    )
    return f"<table><tbody>{lines}</tbody></table>"


def verbatim(text: str) -> str:
    """A text with its lines as they are."""
    return f'<pre style="white-space: pre-wrap">{escape(text)}</pre>'


def sentence(text: str) -> str:
    """A line below something."""
    return f"<p><small>{escape(text)}</small></p>"


def table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A table of what is written; the rows beyond `MOST_ROWS` are counted."""
    heads = "".join(f'<th scope="col" {_LEFT}>{escape(name)}</th>' for name in columns)
    body = "".join(
        "<tr>" + "".join(f"<td {_LEFT}>{escape(cell(each))}</td>" for each in row) + "</tr>"
        for row in rows[:MOST_ROWS]
    )
    left = len(rows) - MOST_ROWS
    rest = sentence(f"and {left} rows more") if left > 0 else ""
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>{rest}"


def frame(shown: "DataFrame") -> str:
    """A table of pandas, without its index."""
    return table([str(name) for name in shown.columns], shown.to_numpy(dtype=object).tolist())


def cell(value: Any, digits: int = 3) -> str:
    """A cell as it is written; empty where there is nothing."""
    if value is None or str(value) in ("<NA>", "nan"):
        return ""
    if isinstance(value, float):
        return number(value, digits)
    return str(value)


def number(value: float, digits: int = 3) -> str:
    """A number with so many decimals, such as 0.125, or 1.2e-05 where these would not say it."""
    from tvlens.figures.report.markup import short

    return short(value, digits) if math.isfinite(value) else "not finite"


def with_ends(value: float, low: float | None = None, high: float | None = None) -> str:
    """A number and its interval, where it has one."""
    ends = "" if low is None or high is None else f" [{number(low)}, {number(high)}]"
    return number(value) + ends


def layers(numbers: Sequence[int]) -> str:
    """Layers in words, such as `0-29` or `3, 7-9`."""
    if not numbers:
        return "none"
    runs: list[list[int]] = []
    for layer in sorted(numbers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def picture(figure: "Figure", words: str) -> str:
    """A figure of matplotlib as a picture.

    Args:
        figure: the figure.
        words: what it shows, for those who do not see it.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=2 * _DPI, facecolor="white")
    wide = round(figure.get_size_inches()[0] * _DPI)
    coded = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img alt="{escape(words)}" width="{wide}" src="data:image/png;base64,{coded}" '
        'style="max-width: 100%; display: inline-block">'
    )
