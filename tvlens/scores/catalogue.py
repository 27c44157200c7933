"""Every score of heads, by name: its words, how it is made and drawn.

Columns of `heads.csv`, comparisons of head sets, legends and colours come from this list. A new
score is a module that makes `Scores`, and one line here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from tvlens.scores.score import Scores


@runtime_checkable
class Weighs(Protocol):
    """A trained vector of heads, such as a Learnable Task Vector."""

    def head_scores(self, name: Any) -> Scores:
        """The score of this name."""
        ...


@runtime_checkable
class Findings(Protocol):
    """What a study has found of one task before its heads are scored."""

    @property
    def effects(self) -> Scores:
        """Indirect effects."""
        ...

    @property
    def ltv(self) -> Weighs:
        """The vector that was trained."""
        ...


@dataclass(frozen=True)
class HeadScore:
    """One score of heads.

    Attributes:
        name: its column in tables.
        of: makes it of what a study has found.
        label: its words in legends.
        title: the title of its map of heads.
        measured: what its map shows; the unit of the score is added.
        heads: what the best heads by it are called in comparisons; scores without it are columns
            only.
        colour: a name of the palette (`tvlens.figures.style`).
        dash: its line.
    """

    name: str
    of: Callable[[Findings], Scores]
    label: str
    title: str = ""
    measured: str = ""
    heads: str | None = None
    colour: str = "grey"
    dash: str = "-"


SCORES: tuple[HeadScore, ...] = (
    HeadScore(
        "aie",
        lambda found: found.effects,
        "AIE",
        "Causal mediation (AIE)",
        "average indirect effect",
        "aie",
        "red",
    ),
    HeadScore("omega", lambda found: found.ltv.head_scores("omega"), "LTV weight"),
    HeadScore(
        "contribution",
        lambda found: found.ltv.head_scores("contribution"),
        "LTV contribution",
        "Learnable Task Vector (LTV)",
        "LTV contribution, signed norm",
        "ltv",
        "blue",
        "--",
    ),
)
"""Every score, in the order of columns and legends; heads of the others are compared with those of
the first.
"""

RANKED = tuple(score for score in SCORES if score.heads is not None)
"""The scores that heads are ranked by, compared and drawn."""
