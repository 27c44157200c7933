"""Tables of runs as a paper needs them."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from tvlens.errors import RunError, UnknownNameError

Format = Literal["markdown", "latex"]


def table(
    file: Annotated[Path, typer.Argument(help="A CSV table of a run.", show_default=False)],
    where: Annotated[
        list[str] | None,
        typer.Option("--where", help="COLUMN=VALUE of the rows that are wanted; may be repeated."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option("--columns", help="Columns that are wanted, by commas.")
    ] = None,
    across: Annotated[
        str | None, typer.Option("--across", help="A column whose values become columns.")
    ] = None,
    digits: Annotated[int, typer.Option("--digits", min=0, max=12, help="Decimals.")] = 2,
    format: Annotated[Format, typer.Option("--format", help="What it is written in.")] = "markdown",
    out: Annotated[
        Path | None, typer.Option("--out", help="A file, instead of the terminal.")
    ] = None,
) -> None:
    """A table as text for a paper: each number with its interval in one cell.

    tvlens table runs/study/results.csv --where metric=accuracy --where prompt=zero
    --columns task,method,value --across method --format latex
    """
    wanted = dict(_pair(words) for words in where or [])
    if not file.is_file():
        raise RunError(
            f"cannot read {file}: there is no such file; expected a CSV table of a run folder, "
            "such as RUN/results.csv"
        )

    from tvlens.runs import tables
    from tvlens.runs.storage import write

    made = tables.with_intervals(tables.selected(tables.read_table(file), wanted), digits)
    if columns:
        names = columns.split(",")
        tables.require_columns(made, *names)
        made = made[names]
    if across:
        made = tables.across(made, across, "value" if "value" in made else str(made.columns[-1]))
    text = {"markdown": tables.markdown, "latex": tables.latex}[format](made)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write(out, text.encode())


def _pair(words: str) -> tuple[str, str]:
    column, sign, value = words.partition("=")
    if not sign or not column:
        raise UnknownNameError(f"--where {words!r}: expected COLUMN=VALUE, such as metric=accuracy")
    return column, value
