"""Pieces of HTML: everything that comes from files is escaped here."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import pandas as pd

from tvlens import console

_LARGE = 1e5


@dataclass(frozen=True)
class Cell:
    """A cell of a table: what is read, and the number that it is sorted by."""

    text: str
    value: float | None = None


def text(said: object) -> str:
    """Plain text as HTML; what stands between backticks is code."""
    parts = re.split(r"`([^`]*)`", escape(str(said)))
    return "".join(f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts))


def paragraph(said: object, kind: str = "") -> str:
    """A paragraph of plain text."""
    return f"<p{_class(kind)}>{text(said)}</p>"


def listed(lines: Sequence[str]) -> str:
    """Lines of plain text as a list."""
    return f"<ul>{''.join(f'<li>{text(line)}</li>' for line in lines)}</ul>"


def heading(said: object) -> str:
    """A heading inside a section."""
    return f"<h3>{text(said)}</h3>"


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], made: str) -> str:
    """A table that can be sorted by any column, where a reader's browser runs scripts.

    Args:
        caption: what it says, above it.
        columns: names of the columns; the first is that of the rows' names.
        rows: the cells of every row.
        made: the line under it.
    """
    heads = "".join(
        f'<th scope="col"><button type="button" data-sort="{i}">{text(name)}</button></th>'
        for i, name in enumerate(columns)
    )
    body = "".join(f"<tr>{_row(cells)}</tr>" for cells in rows)
    return (
        f'<div class="table" tabindex="0" role="region" aria-label="{escape(caption)}">'
        f"<table><caption><span>{text(caption)}</span></caption><thead><tr>{heads}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>{paragraph(made, 'made')}"
    )


def folded(summary: str, inside: str) -> str:
    """What is shown when it is asked for."""
    return f"<details><summary>{text(summary)}</summary>{inside}</details>"


def plain(name: object) -> Cell:
    """A cell of words."""
    return Cell(str(name))


def number(value: Any, low: Any = None, high: Any = None, *, digits: int = 2) -> Cell:
    """A cell of a number, with its interval where there is one; empty where there is none."""
    if value is None or pd.isna(value):
        return Cell("")
    return Cell(with_ends(value, low, high, digits=digits), float(value))


def with_ends(value: Any, low: Any = None, high: Any = None, *, digits: int = 2) -> str:
    """Such as 0.92 [0.85, 0.97]; numbers that would be rounded to nothing as 1.2e-05."""
    shown = short(value, digits)
    if low is None or high is None or pd.isna(low) or pd.isna(high):
        return shown
    return f"{shown} [{short(low, digits)}, {short(high, digits)}]"


def short(value: Any, digits: int = 2) -> str:
    """A number with so many decimals; those that are far from them as 1.2e-05 or 3.1e+07."""
    return f"{value:.2g}" if abs(value) >= _LARGE else console.short(value, digits)


def percent(share: float) -> str:
    """A share in percent."""
    return f"{100 * share:.0f}%"


def several(names: Sequence[object]) -> str:
    """Such as `a, b and c`."""
    shown = [str(name) for name in names]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _row(cells: Sequence[Cell]) -> str:
    first, *others = cells
    return f'<th scope="row">{text(first.text)}</th>' + "".join(
        f"<td>{text(cell.text)}</td>"
        if cell.value is None
        else f'<td class="number" data-value="{cell.value!r}">{text(cell.text)}</td>'
        for cell in others
    )


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
