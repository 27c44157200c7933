"""What a report is made of: the tables of runs, and what heads attend to; nothing of how it looks.

A section of the report takes the runs and gives blocks of the page, none where the runs do not hold
its tables.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pandas import DataFrame

Head = tuple[int, int]


@dataclass(frozen=True)
class Example:
    """A prompt, and what some heads do on it.

    Attributes:
        tokens: the prompt's tokens as text; the last one is where it is asked.
        answer: the right answer.
        patterns: weights from every token (rows) to every token, in 255ths, of some heads.
        direct: what each of these heads adds to the answer by itself; nothing where the model does
            not tell.
        unit: what `direct` is measured in, in words.
    """

    tokens: tuple[str, ...]
    answer: str
    patterns: Mapping[Head, NDArray[np.uint8]]
    direct: Mapping[Head, float]
    unit: str


@dataclass(frozen=True)
class RunTables:
    """A run as the report reads it.

    Attributes:
        name: its folder, seen from the page.
        command: the command that made it, as one types it, without --out.
        manifest: what its manifest says.
        tables: its tables by name.
        missing: tables that it should hold and does not.
        finished: whether it ended as it should.
        tokens: tokens of the prompt that maps of positions are of, by task/site.
    """

    name: str
    command: str
    manifest: Mapping[str, Any]
    tables: Mapping[str, DataFrame]
    missing: tuple[str, ...] = ()
    finished: bool = True
    tokens: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def table(self, name: str, *columns: str) -> DataFrame | None:
        """The table of this name; None where there is none, or none with rows and these columns."""
        table = self.tables.get(name)
        if table is None or table.empty or not {*columns} <= {*table.columns}:
            return None
        return table

    def made(self, table: str) -> str:
        """The line under a picture: the command and the data file."""
        file = f"{table}.csv" if self.name == "." else f"{self.name}/{table}.csv"
        return f"Made by `{self.command}`; data in `{file}`."


@dataclass(frozen=True)
class Contents:
    """All that a report shows.

    Attributes:
        model: name of the model.
        runs: the runs, in the order in which they were named.
        examples: example prompts by task, as tables of heads call it.
        unseen: why there are no examples of a task, in a sentence.
    """

    model: str
    runs: Sequence[RunTables]
    examples: Mapping[str, Sequence[Example]]
    unseen: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Attributes:
        drawn: a figure of bokeh.
        title: what it shows, for those who do not see it and as its heading.
        caption: how it is to be read.
        made: command and data file.
    """

    drawn: Any
    title: str
    caption: str
    made: str


Block = str | Picture
"""HTML, all text in it escaped, or a picture."""
