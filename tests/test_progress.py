import io
import re
import threading
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import datetime

import nbformat
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

from tvlens import console
from tvlens.console import progress_bar


class Terminal(io.StringIO):
    """What is written to a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@contextmanager
def on_a_terminal():
    """A terminal in place of the error stream; a fixture could not, pytest puts its own back."""
    with redirect_stderr(Terminal()) as terminal:
        yield terminal


def test_a_terminal_shows_title_and_count(capsys):
    with on_a_terminal() as terminal, progress_bar("mediation", 25) as advance:
        advance(10)
        assert "mediation" in terminal.getvalue()
        assert "0/25" in terminal.getvalue()
        advance(15)
    assert not capsys.readouterr().out


def test_a_finished_bar_is_wiped():
    with on_a_terminal() as terminal, progress_bar("mediation", 2) as advance:
        advance(2)
    assert terminal.getvalue().endswith("\r")
    assert not terminal.getvalue().split("\r")[-2].strip()


def test_the_line_is_free_again_after_an_exception():
    def interrupted() -> None:
        with progress_bar("mediation", 25) as advance:
            advance(1)
            raise KeyboardInterrupt

    with on_a_terminal() as terminal:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert not terminal.getvalue().split("\r")[-2].strip()
        with progress_bar("again", 1) as advance:
            advance(1)
    # Below a bar left open, the next one would move to a line of its own.
    assert "again" in terminal.getvalue()
    assert "\n" not in terminal.getvalue()


def test_a_line_said_beside_a_bar_stands_by_itself():
    screen = Terminal()
    with redirect_stderr(screen), redirect_stdout(screen), progress_bar("study", 2) as advance:
        advance(1)
        console.say("present-past: 358 pairs")
        before, after = screen.getvalue().split("present-past: 358 pairs\n")
    assert not before.split("\r")[-1].strip()
    assert not before.split("\r")[-2].strip()
    assert "study" in after


def test_a_short_block_says_nothing_where_there_is_no_terminal(capfd):
    with progress_bar("mediation", 25) as advance:
        advance(25)
    out, err = capfd.readouterr()
    assert out == err == ""
    assert not reporters()


def reporters() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("progress of")]


class Said(io.StringIO):
    """An error stream that is no terminal; waits for lines rather than for time to pass."""

    def lines(self, at_least: int) -> list[str]:
        deadline = time.monotonic() + 10
        while len(found := self.getvalue().splitlines()) < at_least:
            assert time.monotonic() < deadline, f"only {found}"
            time.sleep(0.005)
        return found


@pytest.fixture
def often(monkeypatch):
    """Lines of progress every few milliseconds."""
    monkeypatch.setattr(console, "REPORT_EVERY", 0.02)
    monkeypatch.delenv("TQDM_DISABLE", raising=False)


def test_lines_say_what_is_done_and_when_it_ends_without_a_call(often):
    with redirect_stderr(Said()) as said, progress_bar("a task, evaluation", 300) as advance:
        assert re.fullmatch(r"a task, evaluation: 0 of 300, 0 s so far", said.lines(1)[0])
        advance(100)
        advance(20)
        before = len(said.lines(1))
        pattern = r"a task, evaluation: 120 of 300 \(40%\), \d+ s left, until about \d\d:\d\d.*"
        later = said.lines(before + 3)[before + 1 :]
    assert all(re.fullmatch(pattern, line) for line in later)
    assert not reporters()


def test_no_line_comes_after_an_exception(often):
    def interrupted() -> None:
        with progress_bar("mediation", 25):
            said.lines(1)
            raise KeyboardInterrupt

    with redirect_stderr(Said()) as said:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert not reporters()
        before = said.getvalue()
        time.sleep(0.1)
        assert said.getvalue() == before


def test_one_bar_in_another_is_told_apart(often):
    with (
        redirect_stderr(Said()) as said,
        progress_bar("tasks", 2),
        progress_bar("steps [of 5]", 5),
    ):
        said.lines(6)
    assert {line.rsplit(":", 1)[0] for line in said.getvalue().splitlines()} == (
        {"tasks", "steps [of 5]"}
    )


def test_lines_can_be_turned_off(often, monkeypatch):
    monkeypatch.setenv("TQDM_DISABLE", "1")
    with redirect_stderr(Said()) as said, progress_bar("mediation", 25) as advance:
        advance(5)
        assert not reporters()
    assert said.getvalue() == ""


def test_an_error_stream_that_is_closed_stops_no_work(often):
    with redirect_stderr(Said()) as said, progress_bar("mediation", 25) as advance:
        said.lines(1)
        said.close()
        time.sleep(0.1)
        advance(25)


@pytest.mark.parametrize(
    ("done", "seconds", "line"),
    [
        (0, 90, "t: 0 of 300, 1 min 30 s so far"),
        (120, 43.4, "t: 120 of 300 (40%), 1 min 05 s left, until about 14:32"),
        (270, 45, "t: 270 of 300 (90%), 5 s left, until about 14:31"),
        (100, 3750, "t: 100 of 300 (33%), 2 h 05 min left, until about 16:35"),
        (1, 144, "t: 1 of 300 (0%), 11 h 57 min left, until about 02:28 on 02 March"),
        (300, 10, "t: 300 of 300 (100%), 0 s left, until about 14:30"),
        (301, 10, "t: 301 of 300, 10 s so far"),
    ],
)
def test_a_line_of_progress(done, seconds, line):
    now = datetime(2024, 3, 1, 14, 30, 55)
    assert console._progress_line("t", done, 300, float(seconds), now) == line


def test_a_notebook_without_widgets_shows_a_line_of_text():
    # As where ipywidgets is not installed, also on machines where it is.
    source = (
        "import sys, time\n"
        "sys.modules['ipywidgets'] = None\n"
        "from tvlens.console import progress_bar\n"
        "with progress_bar('mediation', 25) as advance:\n"
        "    time.sleep(0.2)\n"
        "    advance(25)\n"
    )
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
    own = KernelSpecManager(kernel_dirs=[])
    kernel = KernelManager(kernel_name="python3", kernel_spec_manager=own)
    NotebookClient(notebook, km=kernel, timeout=300).execute(cleanup_kc=True)
    written = "".join(o.text for o in notebook.cells[0].outputs if o.get("name") == "stderr")
    assert "mediation" in written
    assert "25/25" in written
