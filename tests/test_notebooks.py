"""Notebooks run, are stored as they are written, with their outputs, and begin as README does."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest

ROOT = Path(__file__).parents[1]
NAMES = ("fidelity", "heads", "patching", "quickstart", "your-own")
NOTEBOOKS = [ROOT / "notebooks" / f"{name}.ipynb" for name in NAMES]


@pytest.fixture
def execute(monkeypatch):
    """The script that executes notebooks, as a module."""
    monkeypatch.syspath_prepend(str(ROOT / "notebooks"))
    yield importlib.import_module("execute")
    sys.modules.pop("execute")


@pytest.fixture(params=NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def stored(request):
    """A notebook as it is stored."""
    return request.param


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def data(notebook, kind):
    """What the cells of a notebook show in one format."""
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    return [output.data[kind] for output in outputs if kind in output.get("data", {})]


def test_every_text_has_its_notebook(execute):
    assert [path.with_suffix(".ipynb") for path in execute.texts()] == NOTEBOOKS
    assert sorted((ROOT / "notebooks").glob("*.ipynb")) == NOTEBOOKS


def test_text_and_notebook_hold_the_same_cells(stored):
    cells = [
        [(cell.cell_type, cell.source, cell.metadata) for cell in notebook.cells]
        for notebook in (jupytext.read(stored.with_suffix(".py")), nbformat.read(stored, 4))
    ]
    assert cells[0] == cells[1]


def test_stored_notebook_ran_from_top_to_bottom(stored):
    notebook = nbformat.read(stored, 4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {
        "stream",
        "execute_result",
        "display_data",
    }
    said = [output.text for output in outputs if output.get("name") == "stderr"]
    assert not said
    text = stored.read_text(encoding="utf-8")
    assert len(text) < 2_000_000
    assert "site-packages" not in text
    lines = [line for cell in code(notebook) for line in cell.source.splitlines() if line]
    assert 25 <= len(lines) <= 80


def test_quickstart_shows_a_head_map_and_an_attention_view_that_needs_no_network():
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", 4)
    assert data(notebook, "image/png")
    (view,) = [html for html in data(notebook, "text/html") if "CircuitsVis.render" in html]
    assert "AttentionHeads" in view
    assert not re.search(r"import .{0,200} from ['\"]http|<script[^>]* src=", view)


def test_readme_begins_with_the_first_cells_of_quickstart():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)\n```$", readme, re.DOTALL | re.MULTILINE)
    assert block is not None
    cells = code(jupytext.read(ROOT / "notebooks" / "quickstart.py"))
    marked = [bool(cell.metadata.get("readme")) for cell in cells]
    first = marked.index(False)
    assert first
    assert not any(marked[first:])
    assert block[1] == "\n".join(cell.source for cell in cells[:first])


@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md"])
def test_what_quickstart_prints_stands_in_its_pages(page):
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", 4)
    printed = [out["text"] for cell in code(notebook) for out in cell.outputs if "text" in out]
    assert printed
    assert f"```text\n{printed[0].rstrip()}\n```" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.pretrained
@pytest.mark.parametrize("name", [path.stem for path in NOTEBOOKS])
def test_small_notebook_runs(name, execute, tmp_path, monkeypatch):
    monkeypatch.setenv("TVLENS_FAST", "1")
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "notebooks").iterdir()}
    text = ROOT / "notebooks" / f"{name}.py"
    ran = execute.execute(execute.read(text), tmp_path)
    outputs = [output for cell in code(ran) for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert not [output.text for output in outputs if output.get("name") == "stderr"]
    assert [kind for kind in ("image/png", "text/html") if data(ran, kind)] == [
        "image/png",
        "text/html",
    ]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_small_version_replaces_what_cells_say(execute, tmp_path, monkeypatch):
    text = tmp_path / "two.py"
    text.write_text('# %% fast={"100": "3"}\nn = 100\n\n# %%\nn\n')
    monkeypatch.delenv("TVLENS_FAST", raising=False)
    assert [cell.source for cell in execute.read(text).cells] == ["n = 100", "n"]
    monkeypatch.setenv("TVLENS_FAST", "1")
    small = execute.read(text)
    assert [cell.source for cell in small.cells] == ["n = 3", "n"]
    assert [cell.id for cell in small.cells] == ["cell-0", "cell-1"]
    text.write_text('# %% fast={"10": "3"}\nn = 10 + 10\n')
    with pytest.raises(ValueError, match=r"two\.py, cell 0: '10' is there 2 times, not once"):
        execute.read(text)


def test_a_failing_cell_fails_the_script_and_stores_nothing(tmp_path):
    folder = tmp_path / "notebooks"
    folder.mkdir()
    script = folder / "execute.py"
    script.write_bytes((ROOT / "notebooks" / "execute.py").read_bytes())
    (folder / "broken.py").write_text("# %%\nimport sys\n\nsys.executable\n\n# %%\n1 / 0\n")
    command = [sys.executable, script, "broken"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "ZeroDivisionError" in done.stderr
    assert not (folder / "broken.ipynb").exists()
    (folder / "broken.py").write_text("# %%\nimport sys\n\nsys.executable\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "broken: executed\n"
    (python,) = data(nbformat.read(folder / "broken.ipynb", 4), "text/plain")
    assert python == repr(sys.executable)
