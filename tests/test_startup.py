"""What starts quickly: the package, its tasks, and what the command line says without a model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tvlens
from tvlens.cli import options
from tvlens.errors import LONGEST, TvlensError
from tvlens.runs.run import Run

HEAVY = ("torch", "transformers", "transformer_lens", "pandas", "matplotlib", "scipy", "bokeh")
LOADED = f"import sys; print('loaded:', *(name for name in {HEAVY} if name in sys.modules))"


def run(code: str, **env: str) -> list[str]:
    """What a Python of its own prints, line by line."""
    command = [sys.executable, "-c", f"{code}\n{LOADED}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=os.environ | env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    "code",
    [
        "import tvlens; tvlens.errors.TaskError; tvlens.__version__; dir(tvlens)",
        "import tvlens; tvlens.tasks.load('present-past').prompts('test', shots=5)",
        "from tvlens import errors, figures, lens, models, runs, scores, studies, tasks, vectors",
        "import tvlens; tvlens.progress_bar('nothing', 1)",
    ],
)
def test_what_needs_no_model_loads_nothing_heavy(code):
    assert run(code) == ["loaded:"]


NAME = "x" * 5000


@pytest.mark.parametrize(
    "read",
    [
        lambda: tvlens.load(NAME),
        lambda: tvlens.load(f"{NAME}.safetensors"),
        lambda: tvlens.tasks.load(NAME),
        lambda: tvlens.tasks.load_file(NAME),
        lambda: tvlens.tasks.load_folder(NAME),
        lambda: tvlens.tasks.load_pairs(NAME),
        lambda: tvlens.tasks.read_template(NAME),
        lambda: tvlens.vectors.load_vector(NAME),
        lambda: tvlens.models.regression.load_garg(NAME),
        lambda: Run.open(NAME, "study", {}),
        lambda: options.named_files([f"a={NAME}"]),
        lambda: options.score_file(f"aie@{NAME}"),
        lambda: options.read_tasks("a", Path(NAME), "error"),
    ],
)
def test_names_that_no_file_can_have_are_refused_in_few_words(read):
    with pytest.raises(TvlensError) as caught:
        read()
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "-h",
        "study regression -h",
        "--version",
        "tasks",
        "models",
        "--show-completion bash",
    ],
)
def test_commands_without_a_model_load_nothing_heavy(words, tmp_path):
    code = f"""
import sys
from tvlens.cli import main
sys.argv = ["tvlens", *{words.split()}]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
    # A shell is looked for among the parents of the process where this is not set.
    lines = run(code, TVLENS_CACHE=str(tmp_path), _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert lines[-1] == "loaded:"


@pytest.mark.parametrize(
    "words",
    [
        "mediate --tasks nonsense --out run",
        "patch --task nonsense --out run",
        "patch --task antonym --site nonsense --out run",
        "patch --task antonym --method nonsense --out run",
        "patch --prompts nonsense.json --out run",
        "score --task nonsense --out run",
        "score --task antonym --by nonsense --out run",
        "report nonsense --out run.html",
    ],
)
def test_names_that_are_not_there_are_found_before_anything_heavy_is_loaded(words):
    code = f"""
import sys
from tvlens.cli import main
sys.argv = ["tvlens", *{words.split()}]
try:
    main()
except SystemExit as end:
    assert end.code == 2, end.code
"""
    assert run(code) == ["loaded:"]


def test_completion_loads_nothing_heavy():
    words = "tvlens fit --tasks present-past,verb-g"
    asked = {"_TVLENS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": "3"}
    code = "import sys; from tvlens.cli import main; sys.argv = ['tvlens']\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code"
    assert run(code, **asked) == ["present-past,verb-gerund", "loaded:"]


def test_all_that_is_listed_is_there():
    loaded = run("import tvlens", EAGER_IMPORT="1")[-1].split()
    assert {"torch", "transformers", "pandas", "matplotlib", "scipy"} <= set(loaded)


def test_a_name_that_is_not_listed_is_refused():
    with pytest.raises(AttributeError, match="tvlens attribute nonsense"):
        _ = tvlens.nonsense
    with pytest.raises(ImportError, match="nonsense"):
        exec("from tvlens.scores import nonsense")
