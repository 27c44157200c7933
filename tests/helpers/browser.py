"""A real browser without a window, where one is installed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NOT_RUN = "the browser tests were not run: no Chromium is installed"
REMEDY = "on Debian, apt-get install chromium"
REQUIRED = "TVLENS_BROWSER"
"""Where this variable of the environment is set, tests that need a browser fail without one."""


def find() -> str | None:
    """The program, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def browser() -> Iterator[Any]:
    """The browser, which is closed at the end."""
    from playwright.sync_api import sync_playwright

    assert find() is not None, f"{NOT_RUN}; {REMEDY}, or unset {REQUIRED}"
    with sync_playwright() as started:
        # A sandbox of its own is refused where tests run as root.
        opened = started.chromium.launch(executable_path=find(), args=["--no-sandbox"])
        try:
            yield opened
        finally:
            opened.close()


def required() -> bool:
    """Whether a browser must be there."""
    return bool(os.environ.get(REQUIRED))
