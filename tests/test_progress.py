import io
from typing import Any

import pytest
from rich.console import Console

from tvlens import progress
from tvlens.progress import progress_bar


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What bars draw, on a terminal 100 columns wide."""
    written = io.StringIO()

    def terminal(**options: Any) -> Console:
        assert options == {"stderr": True}, "bars must not mix with what a command prints"
        return Console(
            file=written, force_terminal=True, force_interactive=True, width=100, color_system=None
        )

    monkeypatch.setattr(progress, "Console", terminal)
    return written


def test_a_terminal_shows_title_and_count(stream):
    with progress_bar("mediation", 25) as advance:
        advance(10)
        advance(15)
    assert "mediation" in stream.getvalue()
    assert "25/25" in stream.getvalue()


def test_stopping_early_leaves_the_count_where_it_was(stream):
    with progress_bar("LTV", 80) as advance:
        advance(30)
    assert "30/80" in stream.getvalue()
    assert "80/80" not in stream.getvalue()


def test_brackets_in_a_title_are_no_markup(stream):
    with progress_bar("tense [past]", 1) as advance:
        advance(1)
    assert "tense [past]" in stream.getvalue()


def test_the_cursor_comes_back_after_an_exception(stream):
    def interrupted() -> None:
        with progress_bar("mediation", 25) as advance:
            advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    hide, appear = "\x1b[?25l", "\x1b[?25h"
    assert stream.getvalue().rindex(appear) > stream.getvalue().rindex(hide)
    # A bar left open would refuse the next one on a console that is shared.
    with progress_bar("again", 1) as advance:
        advance(1)
    assert "again" in stream.getvalue()


def test_nothing_is_written_where_there_is_no_terminal(capfd, monkeypatch):
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    with progress_bar("mediation", 25) as advance:
        advance(25)
    out, err = capfd.readouterr()
    assert out == err == ""
