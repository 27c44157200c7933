"""Every method of making a vector, by name: what it is called, what it belongs to, how it is made
and drawn.

Tables, legends, colours, summaries and the command line come from this list. A new method is a
module with its `make`, and one line here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from tvlens.errors import UnknownNameError
from tvlens.vectors import average, controls, free, fv, hendel, icv, mixing, sparse
from tvlens.vectors.ltv import fit, whole
from tvlens.vectors.materials import ByKind, Materials, Whose
from tvlens.vectors.vector import Vector

Family = Literal["function vector", "average", "state", "learned", "control"]
Modality = Literal["text", "regression"]
WHOSE: tuple[Whose, ...] = get_args(Whose)


@dataclass(frozen=True)
class Look:
    """How something is named and drawn in figures.

    Attributes:
        label: its words in legends and tables for people.
        colour: a name of the palette (`tvlens.figures.style`).
        marker: its marker where there are dots.
        dash: its line where there are lines.
    """

    label: str
    colour: str
    marker: str = "o"
    dash: str = "-"


@dataclass(frozen=True)
class Method:
    """One method of making a vector.

    Attributes:
        name: its name in tables.
        family: what kind of method it is; controls say what chance does.
        look: how it is named and drawn.
        make: makes what it adds on each kind of prompts; none where it has nothing to make it of.
        whose: whose head outputs it can be made of.
        modalities: the studies that it belongs to.
        dummies: whether regression also adds it at pairs of zeros put into the prompt, as the
            baselines of Saglam et al. (2025) do.
        standard: whether studies make it unless told otherwise; the others are rivals that take
            as long as all of these together.
    """

    name: str
    family: Family
    look: Look
    make: Callable[[Materials], ByKind]
    whose: tuple[Whose, ...] = WHOSE
    modalities: tuple[Modality, ...] = get_args(Modality)
    dummies: bool = False
    standard: bool = True


METHODS: tuple[Method, ...] = (
    Method(
        "fv_layer",
        "function vector",
        Look("FV, one layer", "orange", "^"),
        fv.make_chosen("one_layer"),
        dummies=True,
    ),
    Method(
        "fv_per_layer",
        "function vector",
        Look("FV, per layer", "red", "v"),
        fv.make_chosen("per_layer"),
    ),
    Method(
        "fv_published",
        "function vector",
        Look("FV, published", "brown", "<", "--"),
        fv.make_published,
        whose=("class",),
        modalities=("regression",),
        dummies=True,
    ),
    Method("average", "average", Look("layer average", "green", "P"), average.make),
    Method(
        "hendel",
        "state",
        Look("Hendel's task vector", "brown", "X", "--"),
        hendel.make,
        standard=False,
    ),
    Method(
        "icv",
        "state",
        Look("in-context vector", "pink", "p", "-."),
        icv.make(everywhere=False),
        whose=("class",),
        standard=False,
    ),
    Method(
        "icv_all",
        "state",
        Look("in-context vector, everywhere", "pink", "h", ":"),
        icv.make(everywhere=True),
        whose=("class",),
        modalities=("text",),
        standard=False,
    ),
    Method("ltv", "learned", Look("LTV", "blue", "o"), fit.make("ltv"), dummies=True),
    Method(
        "ltv_lengths",
        "learned",
        Look("LTV, several lengths", "sky", "h"),
        fit.make("ltv_lengths"),
        modalities=("regression",),
    ),
    Method(
        "ltv_whole",
        "learned",
        Look("LTV, whole answers", "sky", "H", "--"),
        whole.make,
        whose=("class",),
        modalities=("text",),
        standard=False,
    ),
    Method(
        "ltv_sparse",
        "learned",
        Look("LTV, few heads", "blue", "d", "-."),
        sparse.make,
        standard=False,
    ),
    Method(
        "mixing",
        "learned",
        Look("head mixing", "green", "*", "-."),
        mixing.make,
        standard=False,
    ),
    Method(
        "free_layer",
        "learned",
        Look("free vector, one layer", "dark", "<", "--"),
        free.make(one_layer=True),
        whose=("class",),
        standard=False,
    ),
    Method(
        "free",
        "learned",
        Look("free vectors, all layers", "dark", ">", "-."),
        free.make(one_layer=False),
        whose=("class",),
        standard=False,
    ),
    Method("random", "control", Look("random ω", "grey", "s", ":"), controls.make_random),
    Method("permuted", "control", Look("permuted ω", "pink", "D", ":"), controls.make_permuted),
)
"""Every method, in the order of tables and legends."""

BASELINES: dict[str, Look] = {
    "bare": Look("bare model", "black"),
    "none": Look("no vector", "dark", "X"),
    "icl": Look("ICL", "black", "|"),
    "truncation": Look("last points only", "blue"),
}
"""What is measured without a vector, by its name in tables."""


@dataclass(frozen=True)
class Variant:
    """A method as one row of a table: of the class or of each prompt, at dummy pairs or not.

    Attributes:
        name: its name in tables.
        method: the method.
        whose: whose head outputs it is made of.
        dummies: whether it acts at dummy pairs too.
    """

    name: str
    method: Method
    whose: Whose
    dummies: bool = False

    @property
    def label(self) -> str:
        """Its words in legends and tables for people."""
        per_prompt = ", per prompt" if self.whose == "prompt" else ""
        return self.method.look.label + per_prompt + (", dummies" if self.dummies else "")


STANDARD: tuple[str, ...] = tuple(each.name for each in METHODS if each.standard)
"""The methods that studies make unless told otherwise."""


def methods_for(
    modality: Modality, whose: Whose, names: Sequence[str] | None = None
) -> list[Method]:
    """The methods that the study of a modality makes of these head outputs.

    Args:
        modality: of the study.
        whose: whose head outputs.
        names: of the methods wanted; None for every one.
    """
    there = [m for m in METHODS if modality in m.modalities and whose in m.whose]
    return [m for m in there if names is None or m.name in names]


def methods_named(text: str) -> tuple[str, ...]:
    """The names of methods that a text asks for: "default", "all", or names between commas.

    Raises:
        UnknownNameError: there is no such method, or none is named.
    """
    if text == "default":
        return STANDARD
    if text == "all":
        return tuple(each.name for each in METHODS)
    wanted = {name.strip() for name in text.split(",") if name.strip()}
    for name in sorted(wanted):
        method(name)
    if not wanted:
        raise UnknownNameError("no method is named; expected names between commas, default or all")
    return tuple(each.name for each in METHODS if each.name in wanted)


def variant_name(method: Method, whose: Whose) -> str:
    """The name in tables that tell whose head outputs vectors are made of."""
    return f"{method.name}_{whose}"


def variants(modality: Modality = "regression") -> dict[str, Variant]:
    """Every name that such tables can hold, and what it stands for."""
    found: dict[str, Variant] = {}
    for whose in WHOSE:
        for method in methods_for(modality, whose):
            name = variant_name(method, whose)
            found[name] = Variant(name, method, whose)
            if method.dummies and whose == "class":
                found[f"{name}_dummies"] = Variant(f"{name}_dummies", method, whose, dummies=True)
    return found


def method(name: str) -> Method:
    """The method of this name.

    Raises:
        UnknownNameError: there is no such method.
    """
    for each in METHODS:
        if each.name == name:
            return each
    raise UnknownNameError(
        f"unknown method {name!r}; expected one of {', '.join(m.name for m in METHODS)}"
    )


def load_vector(path: Path | str) -> Vector:
    """The vector, of whatever kind, that a file holds.

    Raises:
        RunError: the file cannot be read or holds no vector.
    """
    return Vector.load(path)
