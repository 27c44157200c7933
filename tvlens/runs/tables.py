"""Tables as a paper needs them: numbers as CSV, the same as text in Markdown and LaTeX."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from tvlens.console import with_interval
from tvlens.errors import ShapeError, UnknownNameError
from tvlens.runs.storage import reading, write

_NAMES = ("task", "functions")
"""Columns of names that users give: one may be called NA."""

_LISTED = 10


def read_table(path: Path | str) -> pd.DataFrame:
    """A CSV table as it was written: an empty cell is no value, a task called NA a task.

    Raises:
        RunError: the file is not a table in CSV.
    """
    with reading(path, "a table in CSV, as commands write them to run folders"):
        table = pd.read_csv(path)
        names = [name for name in _NAMES if name in table]
        if names:
            table[names] = pd.read_csv(path, usecols=names, dtype=str, keep_default_na=False)[names]
        return table


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, numbers right-aligned."""
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]
    lines = [list(map(str, table.columns)), ["--:" if number else "---" for number in numeric]]
    lines += [
        [_shown(cell).replace("|", "\\|") for cell in row] for row in table.itertuples(index=False)
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_tables(folder: Path, name: str, values: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Writes `values` as name.csv and `shown` as name.md and name.tex; returns the Markdown."""
    write(folder / f"{name}.csv", values.to_csv(index=False, lineterminator="\n").encode())
    return write_texts(folder, name, shown)


def write_texts(folder: Path, name: str, shown: pd.DataFrame) -> str:
    """Writes `shown` as name.md and name.tex; returns the Markdown."""
    text = markdown(shown)
    write(folder / f"{name}.md", text.encode())
    write(folder / f"{name}.tex", latex(shown).encode())
    return text


def latex(table: pd.DataFrame) -> str:
    """The table in LaTeX, in the rules of the booktabs package."""
    return table.map(_shown).to_latex(index=False, escape=True)


def selected(table: pd.DataFrame, where: Mapping[str, str]) -> pd.DataFrame:
    """The rows that hold these values, without the columns that then say the same in each.

    Args:
        table: a tidy table.
        where: wanted value by column, as it is written in the file.

    Raises:
        UnknownNameError: a column is not there, or no row holds its value.
    """
    for column, value in where.items():
        require_columns(table, column)
        texts = table[column].map(str)
        rows = table[texts == value]
        if rows.empty:
            there = list(dict.fromkeys(texts))
            more = f" and {len(there) - _LISTED} more" if len(there) > _LISTED else ""
            raise UnknownNameError(
                f"no row has {column} {value!r}; there are {', '.join(there[:_LISTED])}{more}"
            )
        table = rows
    return table.drop(columns=list(where))


def with_intervals(table: pd.DataFrame, digits: int = 2) -> pd.DataFrame:
    """Each number and the ends of its interval as one text, such as `0.92 [0.85, 0.97]`.

    A number is a column that has another of its name and `_low`, or is `value` beside `ci_low`.

    Args:
        table: a tidy table.
        digits: decimals of numbers that are not whole.
    """
    ends = {"value": "ci"} | {name: name for name in table if f"{name}_low" in table}
    told = table.copy()
    for name, stem in ends.items():
        if name in table and {f"{stem}_low", f"{stem}_high"} <= set(table):
            low, high = f"{stem}_low", f"{stem}_high"
            told[name] = [
                _told(value, *interval, digits=digits)
                for value, *interval in table[[name, low, high]].itertuples(index=False)
            ]
            told = told.drop(columns=[low, high])
    others = told.select_dtypes("float")
    told[others.columns] = others.map(lambda x: "" if pd.isna(x) else f"{x:.{digits}f}")
    return told


def across(table: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """A column for each of a column's values, in the order in which they come.

    Args:
        table: a table of one row for each of them and everything else but `value`.
        column: whose values become columns.
        value: the column that the cells are taken from.

    Raises:
        UnknownNameError: a column is not there.
        ShapeError: two rows would be one cell.
    """
    require_columns(table, column, value)
    rows = [name for name in table if name not in (column, value)]
    doubled = table[table.duplicated([*rows, column])]
    if len(doubled):
        raise ShapeError(
            f"{len(table)} rows hold {column} {doubled[column].iloc[0]!r} twice; choose among them "
            f"by one of {', '.join(rows) or column}"
        )
    order = list(dict.fromkeys(table[column]))
    if not rows:
        return pd.DataFrame([dict(zip(table[column], table[value], strict=True))])
    # By their text, because cells that are empty are equal to nothing.
    keyed = table.assign(_key=list(map(repr, table[rows].itertuples(index=False, name=None))))
    wide = keyed.pivot(index="_key", columns=column, values=value)[order]
    first = keyed.drop_duplicates("_key").set_index("_key")[rows]
    return first.join(wide).reset_index(drop=True).astype(object).fillna("")


def require_columns(table: pd.DataFrame, *columns: str) -> None:
    """Refuse a table that lacks a column.

    Raises:
        UnknownNameError: a column is not there.
    """
    missing = [column for column in columns if column not in table]
    if missing:
        raise UnknownNameError(
            f"the table has no column {missing[0]!r}; it has {', '.join(map(str, table))}"
        )


def _told(value: float, low: float, high: float, *, digits: int) -> str:
    if pd.isna(value):
        return ""
    if pd.isna(low) or pd.isna(high):
        return f"{value:.{digits}f}"
    return with_interval(value, low, high, digits=digits)


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return "" if pd.isna(cell) else f"{cell:.4g}"
    return str(cell)
