"""Tables as a paper needs them: numbers as CSV, the same as text in Markdown and LaTeX."""

from pathlib import Path

import pandas as pd

from tvlens.runs.storage import write


def read_table(path: Path | str) -> pd.DataFrame:
    """A table in CSV, names of tasks as they stand there: one called NA is a task."""
    table = pd.read_csv(path)
    if "task" in table:
        names = pd.read_csv(path, usecols=["task"], dtype=str, keep_default_na=False)
        table["task"] = names["task"]
    return table


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, numbers right-aligned."""
    numeric = [pd.api.types.is_numeric_dtype(dtype) for dtype in table.dtypes]
    lines = [list(map(str, table.columns)), ["--:" if number else "---" for number in numeric]]
    lines += [[_shown(cell) for cell in row] for row in table.itertuples(index=False)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_tables(folder: Path, name: str, values: pd.DataFrame, shown: pd.DataFrame) -> str:
    """Writes `values` as name.csv and `shown` as name.md and name.tex; returns the Markdown."""
    write(folder / f"{name}.csv", values.to_csv(index=False, lineterminator="\n").encode())
    return write_texts(folder, name, shown)


def write_texts(folder: Path, name: str, shown: pd.DataFrame) -> str:
    """Writes `shown` as name.md and name.tex; returns the Markdown."""
    text = markdown(shown)
    latex = shown.map(_shown).to_latex(index=False, escape=True)
    write(folder / f"{name}.md", text.encode())
    write(folder / f"{name}.tex", latex.encode())
    return text


def _shown(cell: object) -> str:
    if isinstance(cell, float):
        return "" if pd.isna(cell) else f"{cell:.4g}"
    return str(cell)
