"""What is public: the names that every shelf lists, each there, each explained."""

import ast
import importlib
import inspect
from pathlib import Path
from types import ModuleType

import pytest

import tvlens

ROOT = Path(tvlens.__file__).parent
SHELVES = sorted(
    ".".join(("tvlens", *stub.parent.relative_to(ROOT).parts)) for stub in ROOT.rglob("*.pyi")
)
PROMISED = """
Ablation AddToResidual Edit FitSettings HeadMeans HeadSet IndirectEffects LearnableTaskVector Lens
NoEdit PatchEffects ReplaceHeads TaskVector ablate attribute attribution_patch
choose_function_vectors compare_head_sets evaluate fit_ltv function_vector
function_vector_per_layer generate indirect_effects intervene load mean_head_outputs
mediation_prompts patch permuted_controls progress_bar random_controls show_attention show_tokens
study
"""


def listed(shelf: str) -> list[str]:
    """The names that the stub of a shelf gives to type checkers."""
    tree = ast.parse(Path(importlib.import_module(shelf).__file__ + "i").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    aliases = [alias for node in imports for alias in node.names]
    assert all(alias.asname == alias.name for alias in aliases), "an import without `as` is private"
    return [alias.name for alias in aliases]


def test_the_package_lists_what_it_promises():
    names = [name for name in tvlens.__all__ if not isinstance(getattr(tvlens, name), ModuleType)]
    assert sorted(names) == PROMISED.split()
    assert tvlens.__version__ == "0.1.0"


def test_the_package_has_these_shelves():
    assert [
        "tvlens",
        *(f"tvlens.{name}" for name in ("bench", "evaluation", "figures", "lens", "models")),
        "tvlens.models.regression",
        *(
            f"tvlens.{name}"
            for name in ("notebook", "runs", "scores", "studies", "tasks", "vectors")
        ),
    ] == SHELVES
    assert {"errors", *(shelf.split(".")[1] for shelf in SHELVES[1:])} == {
        name for name in tvlens.__all__ if isinstance(getattr(tvlens, name), ModuleType)
    }


@pytest.mark.parametrize("shelf", SHELVES)
def test_a_shelf_lists_every_name_once_in_order(shelf):
    module = importlib.import_module(shelf)
    assert list(module.__all__) == sorted(set(module.__all__))
    assert sorted(listed(shelf)) == list(module.__all__)


@pytest.mark.parametrize("shelf", SHELVES)
def test_a_shelf_has_what_it_lists_and_nothing_else(shelf):
    module = importlib.import_module(shelf)
    for name in module.__all__:
        assert getattr(module, name) is not None
    others = {*dir(module), *vars(module)} - set(module.__all__)
    assert not [
        name
        for name in others
        if not name.startswith("_") and not isinstance(getattr(module, name), ModuleType)
    ]


@pytest.mark.parametrize("shelf", SHELVES)
def test_all_that_a_shelf_lists_is_explained(shelf):
    module = importlib.import_module(shelf)
    assert module.__doc__
    for name in module.__all__:
        value = getattr(module, name)
        if isinstance(value, ModuleType):
            assert value.__doc__, name
        elif inspect.isroutine(value) or inspect.isclass(value):
            assert value.__module__.startswith("tvlens"), name
            assert inspect.getdoc(value), name
