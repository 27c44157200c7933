"""Every score of heads, by name: its words, how it is made and drawn.

Columns of `heads.csv`, comparisons of head sets, legends and colours come from this list. A new
score is a module that makes `Scores`, and one line here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tvlens.errors import UnknownNameError

if TYPE_CHECKING:
    # Names of scores are looked up before torch is imported.
    from tvlens.scores.score import Scores


@runtime_checkable
class Weighs(Protocol):
    """A trained vector of heads, such as a Learnable Task Vector."""

    def head_scores(self, name: Any) -> "Scores":
        """The score of this name."""
        ...


@runtime_checkable
class Gates(Protocol):
    """Trained gates of all heads."""

    @property
    def facilitating(self) -> "Scores":
        """Gates that stay open under pressure to close."""
        ...

    @property
    def interfering(self) -> "Scores":
        """Gates that stay closed under pressure to open."""
        ...


@runtime_checkable
class Findings(Protocol):
    """What a study has found of one task before its heads are scored."""

    @property
    def effects(self) -> "Scores":
        """Indirect effects."""
        ...

    @property
    def ltv(self) -> Weighs:
        """The vector that was trained."""
        ...


@runtime_checkable
class FurtherFindings(Findings, Protocol):
    """What can be found of a task besides; each is reckoned when it is asked for."""

    @property
    def attributed(self) -> "Scores":
        """Indirect effects to first order."""
        ...

    @property
    def direct(self) -> "Scores":
        """Direct logit attribution on clean prompts that the model answers."""
        ...

    @property
    def induction(self) -> "Scores":
        """Attention to what came after the same token before."""
        ...

    @property
    def answers(self) -> "Scores":
        """Attention of the query position to the answers that clean prompts show."""
        ...

    @property
    def gates(self) -> Gates:
        """Gates of heads at the query position, trained on clean prompts."""
        ...


@dataclass(frozen=True)
class HeadScore:
    """One score of heads.

    Attributes:
        name: its column in tables.
        of: makes it of what was found.
        label: its words in legends.
        title: the title of its map of heads.
        measured: what its map shows; the unit of the score is added.
        heads: what the best heads by it are called in comparisons and on the command line; scores
            without it are columns only.
        studied: whether every study makes it; `tvlens score` makes the others too.
        colour: a name of the palette (`tvlens.figures.style`).
        dash: its line.
    """

    name: str
    of: "Callable[[Any], Scores]"
    label: str
    title: str = ""
    measured: str = ""
    heads: str | None = None
    studied: bool = True
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
        colour="red",
    ),
    HeadScore("omega", lambda found: found.ltv.head_scores("omega"), "LTV weight"),
    HeadScore(
        "contribution",
        lambda found: found.ltv.head_scores("contribution"),
        "LTV contribution",
        "Learnable Task Vector (LTV)",
        "LTV contribution, signed norm",
        "ltv",
        colour="blue",
        dash="--",
    ),
    HeadScore(
        "attribution",
        lambda found: found.attributed,
        "attribution",
        "Attribution patching",
        "indirect effect to first order",
        "attribution",
        studied=False,
        colour="orange",
        dash=":",
    ),
    HeadScore(
        "direct",
        lambda found: found.direct,
        "direct",
        "Direct logit attribution",
        "part of the logit difference",
        "direct",
        studied=False,
        colour="green",
        dash="-.",
    ),
    HeadScore(
        "induction",
        lambda found: found.induction,
        "induction",
        "Induction",
        "attention to what came after",
        "induction",
        studied=False,
        colour="pink",
        dash="-",
    ),
    HeadScore(
        "answer_attention",
        lambda found: found.answers,
        "attention to answers",
        "Attention to answers",
        "attention from the query",
        "answers",
        studied=False,
        colour="sky",
        dash="--",
    ),
    HeadScore(
        "facilitating",
        lambda found: found.gates.facilitating,
        "gates",
        "Causal head gating",
        "gate that stays open under pressure to close",
        "gates",
        studied=False,
        colour="brown",
        dash="-.",
    ),
    HeadScore(
        "interfering",
        lambda found: found.gates.interfering,
        "gates, interfering",
        "Interfering heads",
        "gate that stays closed under pressure to open",
        "interfering",
        studied=False,
        colour="grey",
        dash=":",
    ),
)
"""Every score, in the order of columns and legends; heads of the others are compared with those of
the first.
"""

STUDIED = tuple(score for score in SCORES if score.studied)
"""The scores that every study makes."""

RANKED = tuple(score for score in STUDIED if score.heads is not None)
"""The scores of every study that heads are ranked by, compared and drawn."""


def scores_named(names: Sequence[str]) -> list[HeadScore]:
    """The scores of these names, in the order of the catalogue; "all" names every one.

    Raises:
        UnknownNameError: there is none of a name.
    """
    known = {str(score.heads): score for score in SCORES if score.heads is not None}
    unknown = [name for name in names if name not in known and name != "all"]
    if unknown or not names:
        raise UnknownNameError(
            f"there is no score {unknown[0] if unknown else ''!r}; expected some of "
            f"{', '.join(known)}, or all"
        )
    return [score for name, score in known.items() if name in names or "all" in names]
