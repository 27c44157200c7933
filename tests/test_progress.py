import io
from contextlib import contextmanager, redirect_stderr

import nbformat
import pytest
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient

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


def test_nothing_is_written_where_there_is_no_terminal(capfd):
    with progress_bar("mediation", 25) as advance:
        advance(25)
    out, err = capfd.readouterr()
    assert out == err == ""


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
