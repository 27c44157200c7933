"""Every analysis has the same presets and options, and stands in the page that maps them."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from tvlens.cli import studies
from tvlens.errors import LONGEST, RunError, UnknownNameError
from tvlens.models.regression.training import PRESETS as TRAINED
from tvlens.tasks import names

ROOT = Path(__file__).parents[2]
ANALYSES = sorted(
    path.stem
    for path in (ROOT / "analyses").glob("*.py")
    if path.stem not in ("__init__", "presets")
)
READ_RUNS = ("modalities", "transfer")
OF_FUNCTIONS = ("error_ratio", "regression_study")


@pytest.fixture(autouse=True)
def anywhere(monkeypatch, tmp_path):
    """Analyses are found, and an empty folder is where they run."""
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def presets():
    return importlib.import_module("analyses.presets")


@pytest.fixture(params=ANALYSES)
def analysis(request):
    return importlib.import_module(f"analyses.{request.param}")


def name_of(analysis):
    return analysis.__name__.removeprefix("analyses.")


def test_there_are_eleven():
    assert len(ANALYSES) == 11


def test_every_analysis_has_the_three_presets(analysis, presets):
    assert list(analysis.PRESETS) == ["smoke", "small", "paper"]
    for size in analysis.PRESETS.values():
        assert isinstance(size, presets.Size)
        asked = [task for task in size.tasks.split(",") if task]
        assert {*asked} <= {*names()}
    asked = inspect.signature(analysis.main).parameters
    assert asked["preset"].default == "small"
    assert asked["out"].default is None
    assert f"python -m analyses.{name_of(analysis)}" in analysis.__doc__


def test_what_is_small_needs_no_gpu(analysis, presets):
    for name in ("smoke", "small"):
        size = presets.sized(analysis.PRESETS, name)
        assert (size.model, size.dtype, size.device) == ("smollm2-135m", None, None)
        assert not {*size.functions.split(",")} & {*presets.STANDARD}


def test_paper_names_the_models_and_sizes_of_the_papers(analysis, presets):
    size, of_text = analysis.PRESETS["paper"], name_of(analysis) not in OF_FUNCTIONS
    if name_of(analysis) != "modalities":
        assert size.device == "auto"
        assert (size.model == "EleutherAI/gpt-j-6b") is of_text
    if name_of(analysis) in (*OF_FUNCTIONS, "rivals", "ablation"):
        assert size.functions.split(",") == list(presets.STANDARD)
    assert "meta-llama/Llama-3.1-8B" in presets.LARGE
    for file, functions in presets.STANDARD.items():
        assert file == f"runs/standard/{functions}/model.safetensors"
    standard = TRAINED["standard"]
    assert (standard.sizes.n_layer, standard.sizes.n_head, standard.sizes.d_model) == (12, 8, 256)
    assert (standard.sizes.n_dims, standard.sizes.n_points, standard.train_points) == (20, 101, 41)


def test_paper_says_what_is_not_at_hand(analysis, presets, tmp_path):
    asked = {"functions": ["linear"]} if name_of(analysis) == "error_ratio" else {}
    if name_of(analysis) in READ_RUNS:
        with pytest.raises(RunError, match=r"run `python -m analyses\.\w+ --preset paper`"):
            analysis.main(preset="paper")
        return
    if analysis.PRESETS["paper"].functions:
        with pytest.raises(UnknownNameError) as error:
            analysis.main(preset="paper")
        message = str(error.value)
        assert "runs/standard/linear/model.safetensors is not there" in message
        train = "tvlens regression train --functions linear --preset standard --out runs/standard/"
        assert f"`{train}linear`" in message
        assert len(message) < LONGEST
        asked = {"regression": "linear-small"} if name_of(analysis) == "patching" else asked
        asked = asked or {"functions": "linear"}
    if name_of(analysis) not in OF_FUNCTIONS:
        with pytest.raises(UnknownNameError) as error:
            analysis.main(preset="paper", **asked)
        message = str(error.value)
        assert "preset paper asks 'EleutherAI/gpt-j-6b' (24 GB), which is not at hand" in message
        assert "--model" in message
        assert "meta-llama/Llama-3.1-8B" in message
        assert "take --preset small" in message
        assert len(message) < LONGEST
    assert not list(tmp_path.iterdir())


@pytest.fixture
def passed_on(presets, monkeypatch):
    """Calls a study at preset paper as if its models were there; what it asks tvlens for."""

    class Enough(Exception):
        pass

    def call(name):
        asked = {}

        def study(functions=None, out=None, **options):
            asked.update(options, functions=functions, out=out)
            raise Enough

        monkeypatch.setattr(presets, "_require_large", lambda model: None)
        monkeypatch.setattr(presets, "_require_files", lambda functions: None)
        monkeypatch.setattr(studies, f"study_{name}", study)
        with pytest.raises(Enough):
            importlib.import_module(f"analyses.{name}_study").main(preset="paper")
        return asked

    return call


def test_paper_text_study_passes_on_what_it_asks(passed_on):
    asked = passed_on("text")
    assert asked["model"] == "EleutherAI/gpt-j-6b"
    assert (asked["dtype"], asked["device"]) == ("bfloat16", "auto")
    assert (asked["shots"], asked["n_means"], asked["n_test"]) == (10, 100, None)
    assert len(asked["tasks"].split(",")) == 6
    assert asked["out"] == Path("runs/paper/text_study")


def test_paper_regression_study_passes_on_what_it_asks(passed_on, presets):
    asked = passed_on("regression")
    assert asked["functions"] == ",".join(presets.STANDARD)
    assert (asked["device"], asked["out"]) == ("auto", Path("runs/paper/regression_study"))


def test_what_is_given_goes_before_the_preset(presets):
    text = importlib.import_module("analyses.text_study")
    size = presets.sized(text.PRESETS, "smoke", tasks="antonym", steps=None, n_test=7)
    smoke = text.PRESETS["smoke"]
    assert (size.tasks, size.steps, size.n_test) == ("antonym", smoke.steps, 7)
    assert presets.folder(None, "smoke", "a") == Path("runs/smoke/a")
    assert presets.folder(Path("b"), "smoke", "a") == Path("b")


def test_the_page_maps_every_analysis(analysis):
    page = (ROOT / "analyses" / "README.md").read_text(encoding="utf-8")
    parts = dict(re.findall(r"^### (\w+)\n(.*?)(?=^##|\Z)", page, re.DOTALL | re.MULTILINE))
    assert sorted(parts) == ANALYSES
    part = parts[name_of(analysis)]
    assert f"```bash\npython -m analyses.{name_of(analysis)} --preset small\n```" in part
    for word in ("**Claim.**", "**Verdict.**"):
        assert part.count(word) == 1
    for picture in re.findall(r"\]\((figures/[^)]*)\)", part):
        assert (ROOT / "analyses" / picture).is_file()


def test_the_makefile_calls_all_of_them():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (listed,) = re.findall(r"^ANALYSES = (.*?[^\\])\n", makefile, re.DOTALL | re.MULTILINE)
    called = listed.replace("\\", "").split()
    assert sorted(called) == ANALYSES
    order = [called.index(name) for name in ("text_study", "regression_study", "modalities")]
    assert order == sorted(order)
    assert called.index("rivals") < called.index("transfer")
