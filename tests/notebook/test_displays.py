"""What notebooks show of values: facts, pictures and tables, whatever the numbers and names."""

import base64
import io
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import image

import tvlens
from helpers import tiny_regression, zoo
from tvlens import notebook
from tvlens.evaluation.ablation import Ablation
from tvlens.lens.heads import HeadMeans
from tvlens.lens.hooks import WholePassEngine
from tvlens.scores.ablation import HeadSet
from tvlens.scores.direct import DirectAttribution
from tvlens.scores.effects import PatchEffects
from tvlens.scores.gating import HeadGates
from tvlens.scores.mediation import IndirectEffects
from tvlens.scores.score import Scores
from tvlens.studies.study import Study
from tvlens.tasks import Pair, Task, Template
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.task import FunctionTask
from tvlens.vectors.fv import FunctionVectorChoice
from tvlens.vectors.hendel import DonorState, StateVector
from tvlens.vectors.icv import InContextVector
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.mixing import HeadBlend
from tvlens.vectors.vector import HeadMixture, TaskVector

EVIL = '<img src=x onerror="hacked()">'
NAN = float("nan")


class Reader(HTMLParser):
    """What HTML holds: names of elements, texts, cells of tables and pictures."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.opened: list[str] = []
        self.texts: list[str] = []
        self.pictures: list[dict[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.opened, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        if tag == "img":
            self.pictures.append(dict(attrs))
        else:
            self.opened.append(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def said(self) -> str:
        return " ".join(self.texts)

    @property
    def facts(self) -> dict[str, str]:
        return dict(zip(self.texts[1::2], self.texts[2::2], strict=False))


def shown(value: object) -> Reader:
    """A display, read as a notebook does."""
    return Reader(value._repr_html_())


def pixels(picture: dict[str, str]) -> np.ndarray:
    kind, coded = picture["src"].split(",")
    assert kind == "data:image/png;base64"
    return image.imread(io.BytesIO(base64.b64decode(coded)))


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# --- scores ---------------------------------------------------------------------------------------


def test_effects_are_shown_with_facts_and_a_map():
    values = numbers(6, 3, 4) / 10
    values[:, 1, 2] = 5
    found = shown(IndirectEffects.of(values, numbers(6), task="t", model="m", unit="probability"))
    assert found.texts[0] == "Causal mediation (AIE)"
    assert found.facts["score"] == "aie (probability)"
    assert found.facts["heads"] == "12, in 3 layers of 4"
    assert found.facts["prompts"] == "6"
    assert found.facts["best heads"].startswith("(1, 2) 5.000 [5.000, 5.000], ")
    (picture,) = found.pictures
    assert "aie of every head by layer, t; best: (1, 2) 5.0" in picture["alt"]
    assert pixels(picture).std() > 0.01


@pytest.mark.parametrize(
    "grid",
    [
        torch.zeros(2, 2),
        torch.ones(1, 1),
        torch.full((2, 3), NAN),
        torch.tensor([[NAN, 1.0], [float("inf"), -float("inf")]]),
        torch.zeros(0, 4),
        torch.zeros(2, 2, dtype=torch.bfloat16),
        numbers(80, 64),
    ],
    ids=["zeros", "one-head", "nan", "infinite", "no-layer", "bfloat16", "large"],
)
def test_any_numbers_can_be_shown(grid):
    of_prompts = Scores.of_prompts(grid[None].expand(3, -1, -1), name="aie", unit="p")
    for value in (Scores(grid, "mine", "x"), of_prompts):
        assert len(shown(value).pictures) == (grid.numel() > 0)


def test_layers_without_heads_and_numbers_that_are_none_are_told_apart():
    grid = numbers(4, 3)
    grid[1] = NAN
    grid[2, 0] = NAN
    found = shown(Scores(grid, "mine", "x"))
    assert found.facts["layers without heads"] == "1"
    assert found.facts["not finite"] == "1 heads"


def test_screened_effects_say_what_is_exact():
    exact = torch.tensor([[True, False], [True, False]])
    effects = IndirectEffects.of(
        numbers(3, 2, 2), numbers(3), task="t", model="m", unit="p", exact=exact
    )
    assert "Exact effects of 2 heads" in shown(effects).said


def test_other_scores_are_shown_as_scores():
    gates = HeadGates(torch.rand(2, 2, 3), torch.rand(2, 2, 3), torch.rand(2), "m", "t")
    assert len(shown(gates).pictures) == 2
    parts = numbers(3), numbers(3, 2, 4), numbers(3, 2), numbers(3, 2), numbers(3), numbers(3)
    assert "Direct logit attribution" in shown(DirectAttribution(*parts)).said


# --- effects of patches ---------------------------------------------------------------------------


def patched(heads=1, site="resid_post", places=("0", "1", "query"), values=None, **changes):
    values = numbers(4, 3, heads, len(places)) if values is None else values
    before = numbers(len(values))
    words = site, places, "roles", "probability", "p"
    return replace(PatchEffects(values, before, before + 5, *words), **changes)


def test_patches_of_streams_are_a_map_of_layers_and_places():
    values = numbers(4, 3, 1, 3) / 10
    values[:, 2, 0, 1] = 4
    found = shown(patched(values=values, task="t", model="m"))
    assert found.facts["patched"] == "residual stream after the layer"
    assert found.facts["strongest"].startswith("layer 2 at 1: 4.000 [4.000, 4.000]")
    assert len(found.pictures) == 1


def test_patches_of_heads_are_a_map_of_heads():
    values = numbers(4, 3, 2, 3) / 10
    values[:, 2, 1, 2] = -4
    found = shown(patched(values=values, site="z", direction="noising"))
    assert "head 1 at query" in found.facts["strongest"] or "at 0" in found.said
    assert len(found.pictures) == 1


@pytest.mark.parametrize("heads", [1, 2])
def test_patches_that_are_nan_are_shown(heads):
    site = "z" if heads == 2 else "resid_mid"
    some = numbers(2, 3, heads, 3)
    some[:, 0] = NAN
    some[0, :, :, 1] = NAN
    assert len(shown(patched(heads, site, values=some)).pictures) == 1
    none = torch.full((2, 3, heads, 3), NAN)
    assert not shown(patched(heads, site, values=none)).pictures
    no_prompt = numbers(0, 3, heads, 3)
    assert not shown(patched(heads, site, values=no_prompt)).pictures


# --- vectors --------------------------------------------------------------------------------------


def test_task_vectors_say_where_they_act():
    found = shown(TaskVector(numbers(4, 8), (1, 2), "m", "made"))
    assert found.facts["layers"] == "1-2 of 4"
    assert found.facts["acts"] == "at the query position"
    assert found.facts["norm"] == f"{float(numbers(4, 8)[1:3].norm()):.3f}"
    assert len(found.pictures) == 1
    nothing = shown(TaskVector(torch.full((4, 8), NAN), (), "m", "none"))
    assert nothing.texts[0] == "Task vector that adds nothing"


def test_ltvs_show_contributions_signed_as_soon_as_they_have_a_sign():
    ltv = LearnableTaskVector(numbers(3, 4, 8), start="normal", task="t", model="m")
    before = shown(ltv)
    assert before.facts["heads"] == "12 of 12 take part, in 3 layers"
    assert "no sign yet" in before.said
    assert "norm of contribution of every head" in before.pictures[0]["alt"]
    ltv.attribution.copy_(numbers(3, 4))
    ltv.keep_top(2)
    after = shown(ltv)
    assert after.facts["heads"] == "2 of 12 take part, in 3 layers"
    assert "signed norm" in after.pictures[0]["alt"]
    holes = LearnableTaskVector(numbers(3, 4, 8), layers=(0, 2))
    assert len(shown(holes).pictures) == 1


@pytest.mark.parametrize(
    ("vector", "says"),
    [
        (StateVector(numbers(3, 8), (1,), "m", "o"), "in place of residual streams"),
        (InContextVector(numbers(3, 8), (1,), "m", "o"), "turned towards"),
        (HeadMixture(numbers(3, 3, 4), (0, 1), "m", "o"), "0-1"),
        (HeadMixture(numbers(1, 1, 1), (), "m", "o"), "none"),
        (HeadBlend(torch.rand(3, 4), None, "m", "o"), "each prompt's donor"),
        (DonorState(torch.eye(3)[1], "m", "o"), "donor"),
        (
            FunctionVectorChoice(
                {"zero": TaskVector(numbers(3, 8), (1,), "m", "o")}, {}, pd.DataFrame()
            ),
            "one layer, zero prompts",
        ),
    ],
)
def test_every_kind_of_vector_is_shown(vector, says):
    assert says in shown(vector).said


# --- lens, means, tasks ---------------------------------------------------------------------------


def test_a_lens_says_what_it_is(lens):
    found = shown(lens)
    names = {"bridge": "TransformerBridge", "hooked": "HookedTransformer"}
    assert found.facts["backend"] == names[lens.backend.kind]
    assert found.facts["heads"] == "3 layers x 4 heads of size 6"
    assert found.facts["key/value heads"] == "2"
    assert found.facts["d_model"] == "32"
    assert "exact replay" in found.facts["edited prompts run"]


def test_a_lens_without_replay_says_so():
    lens = replace(zoo.lens(), engine=WholePassEngine(zoo.lens().backend))
    assert "whole forward passes" in shown(lens).said


def test_a_lens_on_points_says_so():
    assert "points" in shown(tvlens.load(tiny_points(), name="points")).facts["reads"]


def tiny_points():
    from tvlens.models.regression.training import preset
    from tvlens.models.regression.transformer import RegressionTransformer

    return RegressionTransformer(preset("tiny").sizes)


def test_means_say_what_they_are_over():
    found = shown(HeadMeans(numbers(2, 4, 6), numbers(2, 4, 8), (0, 2), 3, "m", layers=(1,)))
    assert found.facts["mean over"] == "2 of 3 prompts offered"
    assert found.facts["layers without heads"] == "0"
    assert len(found.pictures) == 1


def test_a_text_task_shows_a_prompt_and_its_sizes(task):
    found = shown(task)
    n = len(task)
    assert found.facts["pairs"].startswith(f"{n}: {len(task.split('train'))} train, ")
    assert found.facts["layout"] == "question-answer"
    prompt = task.prompts("test", shots=3, n=1)[0]
    assert prompt.text + prompt.continuations[0] in found.texts


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_small_tasks_are_shown(n):
    pairs = tuple(Pair(f"w{i}", f"v{i}") for i in range(n))
    found = shown(Task("small", pairs, "d", "s", "l", Template(instruction="Do.")))
    assert found.facts["pairs"].startswith(f"{n}: ")
    assert found.facts["layout"] == "question-answer, with an instruction"


def test_a_function_task_shows_points():
    found = shown(tiny_regression.TASK)
    assert found.facts["model trained on"] == "up to 6 points"
    assert "? (f(x) = " in found.said
    tree = FunctionTask("trees", function_class("tree", 2), shift="skewed")
    assert shown(tree).facts["shift of prompts"] == "skewed"


def test_a_text_task_is_shown_without_torch():
    code = (
        "import sys, tvlens; tvlens.tasks.load('present-past')._repr_html_();"
        "print([n for n in ('torch', 'pandas', 'matplotlib', 'bokeh') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


# --- tables ---------------------------------------------------------------------------------------


def ablated(values=None):
    sets = (
        HeadSet("aie", ((0, 1), (1, 1)), "top", 0.25),
        HeadSet("aie", ((1, 1), (0, 0)), "random", 0.25, 3),
    )
    values = torch.rand(5, 2, 2) if values is None else values
    return Ablation(sets, values, values[:, 0], ("accuracy", "loss"), "mean", "query", "t", "m")


def test_an_ablation_is_a_table_of_its_sets():
    values = torch.tensor([1.0, 0.0]).expand(5, 2, 2)
    found = shown(ablated(values))
    assert found.facts["accuracy, nothing ablated"] == "1.000"
    cells = found.texts[found.texts.index("score") :]
    columns = ["score", "rule", "share", "draw", "k", "accuracy", "loss"]
    assert cells[:7] == columns
    assert cells[7:11] == ["aie", "top", "0.250", "2"]
    assert cells[11:13] == ["1.000 [0.566, 1.000]", "0.000 [0.000, 0.000]"]


def test_an_ablation_with_nan_is_shown():
    values = torch.rand(5, 2, 2)
    values[0, 1, 1] = NAN
    assert "not finite" in shown(ablated(values)).said
    assert "aie" in shown(ablated(torch.rand(0, 2, 2))).said


def test_long_tables_are_cut():
    found = Reader(notebook.pieces.table(["a"], [[i] for i in range(45)]))
    assert found.elements.count("tr") == 41
    assert "and 5 rows more" in found.said


def test_a_study_of_two_views_shows_both():
    heads = pd.DataFrame(
        {
            "task": ["a", "a", "b", "b"],
            "layer": [0, 1, 0, 1],
            "head": [0, 0, 0, 0],
            "aie": [1.0, 2.0, NAN, 3.0],
            "contribution": [1.0, -2.0, 0.0, 3.0],
        }
    )
    rows = [
        ("linear", method, "none", prompt, points, "squared_error", 1.0 + points, 0.5, 12.0)
        for method in ("bare", "ltv_class", EVIL)
        for prompt in ("clean", "zero")
        for points in (1, 3)
    ]
    keys = ["functions", "method", "shift", "prompt", "points", "metric"]
    results = pd.DataFrame(rows, columns=[*keys, "value", "ci_low", "ci_high"])
    agreed = [("a", "aie and ltv", name, k, 0.4, 0) for name, k in (("overlap", 5), ("kendall", 3))]
    columns = ["task", "comparison", "measure", "k", "value", "chance"]
    headsets = pd.DataFrame(agreed, columns=columns)
    empty = pd.DataFrame()
    found = shown(Study(results, heads, headsets, empty, empty, empty, empty, {}, {}))
    assert len(found.pictures) == 4
    assert "clean, 3 points" in found.texts
    assert "4.000 [0.500, 12.000]" in found.texts
    assert "bare model" in found.texts
    assert EVIL in found.texts


# --- names that are no names ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        Scores(torch.eye(2), EVIL, EVIL, EVIL, EVIL),
        patched(task=EVIL, model=EVIL, metric=EVIL, unit=EVIL, places=(EVIL, "$x", "_")),
        TaskVector(torch.eye(2), (0,), EVIL, EVIL),
        LearnableTaskVector(numbers(2, 2, 4), task=EVIL, model=EVIL),
        HeadMixture(torch.ones(1, 1, 2), (0,), EVIL, EVIL),
        HeadMeans(numbers(2, 4, 6), numbers(2, 4, 8), (0, 2), 3, EVIL),
        replace(ablated(), task=EVIL, set_to=EVIL, measures=(EVIL, "$")),
        Task(EVIL, tuple(Pair(f"{EVIL}{i}", EVIL) for i in range(9)), EVIL, EVIL, EVIL),
        FunctionTask(EVIL, function_class("linear", 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_names_are_text_whatever_they_hold(value):
    found = shown(value)
    assert EVIL in found.said
    assert all(each["src"].startswith("data:") for each in found.pictures)


def test_anything_else_is_what_repr_says():
    found = Reader(notebook.html({"a": EVIL}))
    assert found.texts[0] == "dict"
    assert EVIL in found.said


def test_notebooks_find_the_display():
    formatters = pytest.importorskip("IPython.core.formatters")
    data, _ = formatters.DisplayFormatter().format(Scores(torch.eye(2), "mine", "x"))
    assert data["text/html"].startswith('<div class="tvlens"')
