"""Entries of the interface, read from the shelves: the directive `shelf` lists what one offers."""

import importlib
import inspect
import pkgutil
import re
from functools import cache
from types import ModuleType
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.domains.python import PyObject
from sphinx.pycode import ModuleAnalyzer
from sphinx.transforms import SphinxTransform
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

import tvlens

LOGGER = logging.getLogger(__name__)
CALL = re.compile(r"\(.*\)$", re.DOTALL)
"""What stands behind the name of a function where it is called."""


@cache
def shelves() -> dict[str, ModuleType]:
    """Every package that lists what it offers, by name, the package itself first."""
    packages = (found for found in pkgutil.walk_packages(tvlens.__path__, "tvlens.") if found.ispkg)
    modules = [tvlens, *(importlib.import_module(found.name) for found in packages)]
    # Those that list nothing have no `__dir__` of their own.
    return {module.__name__: module for module in modules if "__dir__" in vars(module)}


def home(shelf: str, name: str) -> str:
    """The full name under which something has its whole entry: the shelf that made it."""
    value = getattr(shelves()[shelf], name)
    made_in = getattr(value, "__module__", None) or shelf
    holders = [
        other
        for other, module in shelves().items()
        if name in module.__all__ and getattr(module, name) is value
    ]
    inner = [other for other in holders if f"{made_in}.".startswith(f"{other}.")]
    return f"{max(inner, key=len, default=shelf)}.{name}"


@cache
def public() -> dict[str, str]:
    """The full name of the entry of everything public, by every name that it has."""
    found = {f"{shelf}.{name}": home(shelf, name) for shelf in shelves() for name in offers(shelf)}
    errors = inspect.getmembers(tvlens.errors, inspect.isclass)
    return found | {f"tvlens.errors.{name}": f"tvlens.errors.{name}" for name, _ in errors}


def offers(shelf: str) -> list[str]:
    """What a shelf lists, but for the shelves on it, which have pages of their own."""
    module = shelves()[shelf]
    return [name for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)]


def kind_of(value: Any) -> str:
    """Which sort of entry it has."""
    if inspect.isclass(value):
        return "class"
    return "function" if inspect.isroutine(value) else "data"


def takes(function: Any) -> list[str]:
    """The names of what a function takes; those behind a star are given by name."""
    given = inspect.signature(function).parameters.values()
    named = [one.name for one in given if one.kind is one.KEYWORD_ONLY]
    placed = [one.name for one in given if one.kind is one.POSITIONAL_OR_KEYWORD]
    return [*placed, *(["*", *named] if named else [])]


def words_of(shelf: str, name: str) -> list[str]:
    """The text behind a constant, which Python itself does not keep."""
    for module in pkgutil.walk_packages(shelves()[shelf].__path__, f"{shelf}."):
        if module.ispkg:
            continue
        docs = ModuleAnalyzer.for_module(module.name).find_attr_docs()
        if ("", name) in docs:
            return docs["", name]
    return []


def entry(shelf: str, name: str) -> list[str]:
    """What one name says, in reStructuredText."""
    value = getattr(shelves()[shelf], name)
    full, kind = f"{shelf}.{name}", kind_of(value)
    if home(shelf, name) != full:
        first = (inspect.getdoc(value) or "").split("\n\n")[0].replace("\n", " ")
        words = [first, "", f"Its entry: `{home(shelf, name)}`."]
        call = f"{name}({', '.join(takes(value))})" if kind == "function" else name
        return [f".. py:{kind}:: {call}", "", *(f"   {line}" for line in words), ""]
    if kind == "data":
        words = words_of(shelf, name)
        if not words:
            LOGGER.warning("%s has no text behind it that says what it is", full)
        return [f".. py:data:: {name}", "", *(f"   {line}" for line in words), ""]
    return [f".. auto{kind}:: {full}", ""]


class Shelf(SphinxDirective):
    """What a shelf is, and an entry for every name in its `__all__`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        shelf = self.arguments[0]
        lines = [f".. py:module:: {shelf}", ""]
        for name in offers(shelf):
            lines += entry(shelf, name)
        node = nodes.container()
        self.state.nested_parse(StringList(lines, source=f"shelf {shelf}"), 0, node)
        return node.children


@cache
def documented() -> dict[str, Any]:
    """Everything public, and the methods of public classes, by the full name of its entry."""
    found: dict[str, Any] = {}
    for name in sorted(set(public().values())):
        shelf, last = name.rsplit(".", 1)
        value = getattr(importlib.import_module(shelf), last)
        found[name] = value
        if inspect.isclass(value):
            own = {key: given for key, given in vars(value).items() if key[0] != "_"}
            found |= {f"{name}.{key}": given for key, given in own.items()}
    return found


class Raised(SphinxDirective):
    """What says in its docstring that it raises an error of `tvlens.errors`, with links."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        says = re.compile(rf"^ +{self.arguments[0]}: ", re.MULTILINE)
        who = [name for name, value in documented().items() if says.search(value.__doc__ or "")]
        links = ", ".join(f":py:obj:`{name.removeprefix('tvlens.')} <{name}>`" for name in who)
        node = nodes.container()
        line = f"Raised by {links}." if who else "Raised by commands."
        self.state.nested_parse(StringList([line], source="raised"), 0, node)
        return node.children


def named(text: str) -> str | None:
    """The full name of what code in a line names: in full, or a class by its last name alone."""
    name = CALL.sub("", text)
    if name in public():
        return public()[name]
    return name if name in documented() else short().get(name) if name[:1].isupper() else None


@cache
def short() -> dict[str, str]:
    """The full name of everything public whose last name is its alone."""
    ends: dict[str, set[str]] = {}
    for name, full in public().items():
        ends.setdefault(name.rsplit(".", 1)[-1], set()).add(full)
    return {last: found.pop() for last, found in ends.items() if len(found) == 1}


class LinkCode(SphinxTransform):
    """Code in a line of a page or a docstring that names something public links to its entry."""

    default_priority = 200

    def apply(self, **kwargs: Any) -> None:
        for code in list(self.document.findall(nodes.literal)):
            full = named(code.astext())
            if full is None or isinstance(code.parent, (nodes.reference, pending_xref)):
                continue
            link = pending_xref("", refdomain="py", reftype="obj", reftarget=full)
            code.replace_self(link)
            link += code


def resolve_short(app: Sphinx, env: Any, node: pending_xref, text: nodes.Element) -> Any:
    """The entry of something that a docstring or an annotation calls by its last name alone."""
    full = short().get(node.get("reftarget", "").rsplit(".", 1)[-1])
    if node.get("refdomain") != "py" or full is None:
        return None
    domain = env.get_domain("py")
    page = node.get("refdoc", env.docname)
    return domain.resolve_xref(env, page, app.builder, "obj", full, node, text)


def shorten(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Shapes as they are written, without the name of the package that checks them."""
    lines[:] = [line.replace("jaxtyping.", "") for line in lines]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("shelf", Shelf)
    app.add_directive("raised", Raised)
    app.add_transform(LinkCode)
    app.connect("missing-reference", resolve_short)
    # After what reads the sections of docstrings.
    app.connect("autodoc-process-docstring", shorten, priority=900)
    for field in PyObject.doc_field_types:
        if field.name == "variable":
            field.label = "Attributes"
    return {"parallel_read_safe": True, "parallel_write_safe": True}
