"""The order of the house: imports point one way, and every module is small and says what it is.

A task is asked of a model through a lens; scores say which parts matter, vectors are what is added,
evaluation says what they do; studies do it all, the cli types it; runs keep it, figures show it.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import tvlens

ROOT = Path(tvlens.__file__).parent
MOST_LINES = 400
MOST_MODULES_IN_ROOT = 8
NAMES_THAT_SAY_NOTHING = {"common", "helper", "helpers", "misc", "util", "utils"}

BELOW = ["errors", "console", "display"]
"""What everything may import."""

LATE = {("display", "notebook")}
"""Imports up, from what to what, inside a function: a value is displayed by what stands above it,
once a notebook asks. Such an import neither has an order nor makes a circle.
"""

MAY_IMPORT: dict[str, list[str]] = {
    "errors": [],
    "console": [],
    "display": [],
    "stats": [],
    "timing": [],
    "runs": [],
    "tasks": [],
    "models": ["tasks", "runs"],
    "lens": ["models", "tasks", "runs", "stats"],
    "scores": ["lens", "tasks", "runs", "stats", "models.batch", "models.gradients"],
    "vectors": ["scores", "lens", "tasks", "runs", "models.gradients"],
    "evaluation": [
        *("vectors", "scores.ablation", "lens", "tasks", "runs", "stats"),
        "models.batch",
    ],
    "figures": [
        "scores.ranking",
        "scores.catalogue",
        "vectors.catalogue",
        "tasks.regression.functions",
        "tasks.regression.oracles",
    ],
}
"""Shelves, or single modules of them, by what imports them. What is above has them all."""

_LIBRARY = list(MAY_IMPORT)
MAY_IMPORT["studies"] = _LIBRARY
MAY_IMPORT["notebook"] = [*_LIBRARY, "studies"]
MAY_IMPORT["bench"] = [*_LIBRARY, "studies"]
MAY_IMPORT["cli"] = [*_LIBRARY, "studies", "bench", ""]
# The package itself lists what is public; "" is the package.
MAY_IMPORT[""] = [*_LIBRARY, "studies", "notebook", "bench"]


def module_name(file: Path) -> str:
    """The dotted name inside the package; "" is the package itself."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted([*ROOT.rglob("*.py"), *ROOT.rglob("*.pyi")])
MODULES = {module_name(file) for file in FILES}


def imported(file: Path) -> set[str]:
    """The modules of the package that a file names in imports, wherever in it they stand."""
    package = module_name(file.parent / "__init__.py")
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = ["tvlens", *filter(None, package.split("."))]
                base = ".".join([*above[: len(above) - node.level + 1], *filter(None, [base])])
            names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] != "tvlens":
                continue
            inside = ".".join(parts[1:])
            # The last part is a module, or a name in the module that the others are.
            found.add(inside if inside in MODULES else ".".join(parts[1:-1]))
    return found


def imports_of(module: str) -> set[str]:
    return {name for file in FILES if module_name(file) == module for name in imported(file)}


IMPORTS = {
    module: imports_of(module) - {name for above, name in LATE if above == module}
    for module in sorted(MODULES)
}


def shelf_of(module: str) -> str:
    return module.split(".")[0]


def test_every_shelf_has_its_place():
    assert {shelf_of(module) for module in MODULES} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", sorted(MODULES), ids=lambda name: name or "tvlens")
def test_imports_point_down(module):
    unknown = sorted(name for name in IMPORTS[module] if name not in MODULES)
    assert not unknown, "no such modules"
    shelf = shelf_of(module)
    may = {shelf, *BELOW, *MAY_IMPORT[shelf]}
    up = sorted(name for name in IMPORTS[module] if not may & {name, shelf_of(name)})
    assert not up, f"{module} may import {', '.join(sorted(may))}"


def test_no_module_imports_itself_through_others():
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(("module", "name"), sorted(LATE))
def test_a_late_import_is_there_and_stands_in_a_function(module, name):
    (file,) = [file for file in FILES if module_name(file) == module]
    assert name in imported(file)
    top = ast.parse(file.read_text(encoding="utf-8")).body
    outside = [node for node in top if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    assert not [node for node in outside if "import tvlens" in ast.unparse(node)]
    assert not [node for node in outside if "from tvlens" in ast.unparse(node)]


def test_modules_are_short():
    lines = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    long = {str(file.relative_to(ROOT)): n for file, n in lines.items() if n > MOST_LINES}
    assert not long, f"at most {MOST_LINES} lines; split what answers two questions"


def test_names_say_what_is_inside():
    parts = {part for module in MODULES for part in module.split(".")}
    assert not parts & NAMES_THAT_SAY_NOTHING


def test_the_root_holds_shelves_and_few_modules():
    assert len(list(ROOT.glob("*.py"))) <= MOST_MODULES_IN_ROOT
