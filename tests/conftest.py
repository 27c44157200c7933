"""Fixtures that several test files share. No test may ask a model hub for anything."""

import os
from collections import Counter

os.environ["HF_HUB_OFFLINE"] = "1"

import jaxtyping
import pytest
import torch

from helpers import browser, drawn, zoo
from tvlens.runs import run

TYPES_CHECKED = pytest.StashKey[bool]()

# Operations on tiny tensors take longer on several threads than on one.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """Says in a line that nothing was looked at in a browser, which dots would not."""
    skipped = terminalreporter.stats.get("skipped", [])
    if any(browser.NOT_RUN in str(report.longrepr) for report in skipped):
        terminalreporter.write_line(f"{browser.NOT_RUN}; {browser.REMEDY}")


def pytest_collection_modifyitems(items):
    """Types are checked in the first cases of a test: the rest is there for its numbers."""
    cases = Counter()
    for item in items:
        test = item.nodeid.split("[")[0]
        cases[test] += 1
        item.stash[TYPES_CHECKED] = cases[test] <= 4


@pytest.fixture(autouse=True)
def types(request):
    """On or off, as the case says; after a test as before."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", not request.node.stash[TYPES_CHECKED])
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session", autouse=True)
def fonts():
    """Fonts of PDF files that are quicker to embed than those of users, which are handed out."""
    with pytest.MonkeyPatch.context() as patch:
        of_users = dict(run._PDF)
        patch.setitem(run._PDF, "pdf.fonttype", 3)
        yield of_users


@pytest.fixture(params=zoo.CASES, ids=["-".join(case) for case in zoo.CASES])
def backend(request):
    """Every architecture on every backend, float32."""
    return zoo.backend(*request.param)


@pytest.fixture(params=zoo.CASES, ids=["-".join(case) for case in zoo.CASES])
def half(request):
    """Every architecture on every backend, bfloat16."""
    return zoo.backend(*request.param, torch.bfloat16)


@pytest.fixture(params=zoo.KINDS)
def lens(request):
    """A lens on the tiny llama, on every backend."""
    return zoo.lens("llama", request.param)


@pytest.fixture
def undrawn(monkeypatch):
    """Figures that a run has drawn before are left as they are."""
    drawn.leave_figures(monkeypatch)


@pytest.fixture
def unchecked(types):
    """Lets wrong types through, as in a user's Python, so that tvlens' own words are seen."""
    jaxtyping.config.update("jaxtyping_disable", True)


@pytest.fixture
def task():
    """A made-up relation whose answers have one or two tokens."""
    return zoo.TASK


@pytest.fixture
def wide(monkeypatch):
    """A terminal of 100 columns, in the words of every command."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
