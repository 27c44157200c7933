"""Executes notebooks from their text and stores them with their outputs.

    python notebooks/execute.py                  # every notebook, in place
    python notebooks/execute.py quickstart       # one

A notebook NAME is written in NAME.py; NAME.ipynb holds the same cells with their outputs. The
kernel is the Python that runs this script. With TVLENS_FAST=1 in the environment a small version
runs instead, as in the tests, and nothing is stored: each cell's `fast` entry says what it replaces
in the cell.
"""

import os
import sys
from pathlib import Path

import jupytext
import nbformat
from jupyter_client import KernelManager
from jupyter_client.kernelspec import KernelSpecManager
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).parent
# A stored notebook needs no bars, nor advice to install widgets that would show them.
QUIET = {"TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}


def texts() -> list[Path]:
    """The texts of all notebooks."""
    return sorted(path for path in HERE.glob("*.py") if path.name != Path(__file__).name)


def is_fast() -> bool:
    """Whether the small version is asked for."""
    return bool(os.environ.get("TVLENS_FAST"))


def read(text: Path) -> NotebookNode:
    """The notebook that a text describes, without outputs; the small version where asked for."""
    notebook = jupytext.read(text)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"  # not random, so that only what changed is different
        for found, small in cell.metadata.get("fast", {}).items() if is_fast() else ():
            if (times := cell.source.count(found)) != 1:
                raise ValueError(
                    f"{text.name}, cell {number}: {found!r} is there {times} times, not once"
                )
            cell.source = cell.source.replace(found, small)
    return notebook


def execute(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """The notebook with its outputs, by a kernel of this Python that runs in `folder`."""
    # Only the kernel that ipykernel itself describes is this Python for certain.
    own = KernelSpecManager(kernel_dirs=[])
    kernel = KernelManager(kernel_name="python3", kernel_spec_manager=own)
    client = NotebookClient(notebook, km=kernel, timeout=None, record_timing=False)
    return client.execute(cwd=str(folder), env=os.environ | QUIET, cleanup_kc=True)


def main(names: list[str]) -> None:
    """Executes the named notebooks, or all of them."""
    for text in [HERE / f"{name}.py" for name in names] or texts():
        notebook = execute(read(text), HERE)
        if not is_fast():
            nbformat.write(notebook, text.with_suffix(".ipynb"))
        print(f"{text.stem}: executed{' (small, not stored)' if is_fast() else ''}")


if __name__ == "__main__":
    main(sys.argv[1:])
