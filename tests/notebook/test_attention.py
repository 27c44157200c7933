"""What heads attend to and tokens by numbers, in one call each."""

import json
import re

import numpy as np
import pytest
import torch

import tvlens
from helpers import browser, zoo
from tvlens.errors import ModelError, ShapeError, TaskError
from tvlens.figures.circuits import coloured_tokens, inline, program
from tvlens.lens.attention import attention_of, prompt_tokens
from tvlens.models.regression.training import preset
from tvlens.models.regression.transformer import RegressionTransformer
from tvlens.notebook import Shown
from tvlens.scores.score import Scores
from tvlens.tasks.regression.functions import function_class
from tvlens.tasks.regression.task import FunctionTask
from tvlens.tasks.text.prompts import Prompts

EVIL = "</script><img src=x onerror='window.hacked=1'>"
CALL = re.compile(r'^CircuitsVis\.render\("([\w-]+)", CircuitsVis\.(\w+), (.*)\);$', re.M)


def calls(shown: Shown) -> list[tuple[str, str, dict]]:
    """Where CircuitsVis draws, what, and of which numbers."""
    return [(place, kind, json.loads(given)) for place, kind, given in CALL.findall(shown.html)]


def points() -> tvlens.Lens:
    return tvlens.load(RegressionTransformer(preset("tiny").sizes), name="points")


def test_patterns_are_the_models_own(lens):
    prompts = zoo.TASK.prompts("train", shots=2, n=2)
    shown = tvlens.show_attention(lens, prompts, [(0, 1), (2, 3)])
    assert repr(shown) == "Shown('attention of (0, 1), (2, 3) on 2 prompts')"
    assert shown._repr_html_() == shown.html
    for i, (place, kind, given) in enumerate(calls(shown)):
        assert f'<div id="{place}"></div>' in shown.html
        assert kind == "AttentionHeads"
        assert given["attentionHeadNames"] == ["layer 0, head 1", "layer 2, head 3"]
        assert "".join(given["tokens"]) == prompts.texts[i].replace("\n", "↵")
        batch = lens.encode(prompts[i : i + 1])
        for (layer, head), found in zip([(0, 1), (2, 3)], given["attention"], strict=True):
            kept = {}
            hook = f"blocks.{layer}.attn.hook_pattern"
            with (
                torch.no_grad(),
                lens.backend.hooks(
                    [(hook, lambda pattern, hook, kept=kept: kept.update(x=pattern))]
                ),
            ):
                lens.backend.forward(batch.inputs, batch.mask)
            assert np.allclose(found, kept["x"][0, head].numpy(), atol=6e-4)
    first, second = (place for place, _, _ in calls(shown))
    assert first != second


def test_the_best_heads_of_scores_are_taken(lens):
    grid = torch.zeros(lens.n_layer, lens.n_head)
    grid[1, 2], grid[2, 0] = 2.0, 1.0
    shown = tvlens.show_attention(lens, "a b", Scores(grid, "mine", "x"), k=2)
    ((_, _, given),) = calls(shown)
    assert given["attentionHeadNames"] == ["layer 1, head 2", "layer 2, head 0"]


@pytest.mark.parametrize("several", [False, True])
def test_texts_are_read_as_they_are(lens, several):
    texts = ["Q: a b", "Q: c"] if several else "Q: a b"
    found = calls(tvlens.show_attention(lens, texts, [(0, 0)]))
    expected = texts if several else [texts]
    assert ["".join(given["tokens"]) for _, _, given in found] == expected


def test_a_prefix_and_one_prompt_of_a_task_are_shown():
    lens = zoo.lens(prefix=(2,))
    prompt = zoo.TASK.prompts("train", shots=1, n=1)[0]
    ((_, _, given),) = calls(tvlens.show_attention(lens, prompt, [(0, 0)]))
    assert given["tokens"][0] == "<bos>"
    assert prompt_tokens(lens, zoo.prompts(prompt))[0][1:] == tuple(
        token.replace("↵", "\n") for token in given["tokens"][1:]
    )


def test_points_are_named_by_their_roles():
    lens = points()
    task = FunctionTask("lines", function_class("linear", 1))
    ((_, _, given),) = calls(
        tvlens.show_attention(lens, task.prompts("test", shots=2, n=1), [(0, 0)])
    )
    assert given["tokens"] == ["x 1", "y 1", "x 2", "y 2", "query"]


def test_what_is_most_attended_to_stands_in_words(lens):
    shown = tvlens.show_attention(lens, "Q: a b", [(0, 0)])
    ((_, _, given),) = calls(shown)
    last = given["attention"][0][-1]
    most = int(np.argmax(last))
    said = re.search(r"<li>layer 0, head 0: “(.*?)” \((\d+)\) ([\d.]+)", shown.html)
    assert (int(said[2]), float(said[3])) == (most, pytest.approx(last[most], abs=6e-3))


@pytest.mark.parametrize(
    ("prompts", "heads", "error", "says"),
    [
        ("a", [], ShapeError, r"no head is given; expected one or more of 'llama'"),
        (
            "a",
            [(3, 0)],
            ShapeError,
            r"head \(3, 0\) was asked for.*layers 0 to 2 with heads 0 to 3",
        ),
        ("a", [(0, -1)], ShapeError, r"head \(0, -1\)"),
        ("a", Scores(torch.eye(2), "x", "x"), ShapeError, r"scores are of \(2, 2\).*has \(3, 4\)"),
        ("a", Scores(torch.ones(3, 4), "x", "x"), None, ""),
        ("", [(0, 0)], TaskError, "no prompt was given, or an empty one"),
        ([], [(0, 0)], TaskError, "no prompt was given"),
        (["a"] * 9, [(0, 0)], TaskError, r"9 prompts was asked for, of which 8.*prompts\[:8\]"),
    ],
)
def test_mistakes_are_said(prompts, heads, error, says):
    if error is None:
        assert len(calls(tvlens.show_attention(zoo.lens(), prompts, heads))) == 1
        return
    with pytest.raises(error, match=says):
        tvlens.show_attention(zoo.lens(), prompts, heads)


def test_heads_that_are_no_pairs_are_refused(unchecked):
    with pytest.raises(ShapeError, match=r"heads are \[20, 5\]; expected pairs of \(layer, head\)"):
        tvlens.show_attention(zoo.lens(), "a", [20, 5])


def test_text_is_refused_by_models_that_read_none():
    with pytest.raises(ModelError, match="'points', which answers with one number"):
        tvlens.show_attention(points(), "a", [(0, 0)])
    untold = zoo.new_backend("llama", "bridge")
    untold.tokenizer = None
    lens = tvlens.Lens(untold, zoo.lens().engine, zoo.lens().readout)
    with pytest.raises(ModelError, match=r"no tokenizer.*of_tokens"):
        tvlens.show_attention(lens, "a", [(0, 0)])
    seen = attention_of(zoo.lens(), Prompts.of_tokens([[5, 6]], [7]), [])
    assert seen[0].patterns == {}


def test_layers_without_heads_are_refused_by_name(monkeypatch):
    monkeypatch.setitem(vars(zoo.lens().backend), "attention_layers", (0, 2))
    with pytest.raises(ShapeError, match=r"layer 1 of 'llama' has no heads; layers that have are"):
        tvlens.show_attention(zoo.lens(), "a", [(1, 0)])


# --- tokens ---------------------------------------------------------------------------------------


def test_tokens_have_the_colours_of_their_numbers(lens):
    (tokens,) = prompt_tokens(lens, zoo.prompts(zoo.one_shot("k")))
    values = torch.linspace(-2, 1, len(tokens))
    shown = tvlens.show_tokens(lens, zoo.one_shot("k"), values, label="effect")
    ((_, kind, given),) = calls(shown)
    assert kind == "ColoredTokens"
    assert (given["minValue"], given["maxValue"]) == (-2.0, 2.0)
    assert given["values"] == pytest.approx(values.tolist(), abs=1e-5)
    assert f"effect: “{tokens[0].strip()}” (0) -2" in shown.html


def test_several_rows_share_a_scale_and_nan_has_no_colour():
    rows = {"a": [float("nan"), 3.0], "b": [-6, 0]}
    shown = tvlens.show_tokens(zoo.lens(), "a b", rows)
    first, second = calls(shown)
    assert first[2]["values"] == [0.0, 3.0]
    assert second[2]["values"] == [-6.0, 0.0]
    assert first[2]["maxValue"] == second[2]["maxValue"] == 6.0
    assert "1 tokens have none" in shown.html


@pytest.mark.parametrize(
    ("prompt", "values", "error", "says"),
    [
        (
            "a b",
            [1.0],
            ShapeError,
            r"values have shape \(1,\), the prompt has 2 tokens \('a', ' b'",
        ),
        ("a b", {"x": [1.0, 2.0, 3.0]}, ShapeError, r"values 'x' have shape \(3,\)"),
        ("a b", {}, ShapeError, "no row of numbers"),
        (["a", "b"], [1.0], TaskError, r"2 prompts.*prompts\[:1\]"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(prompt, values, error, says):
    with pytest.raises(error, match=says):
        tvlens.show_tokens(zoo.lens(), prompt, values)


# --- what a browser makes of it -------------------------------------------------------------------


def test_no_text_ends_the_script_and_nothing_is_asked_of_a_network():
    page = coloured_tokens([EVIL, "a"], {EVIL: np.array([1.0, 2.0])})
    assert page.count("</script") == 1
    own = page.replace(inline(program()), "")
    assert len(own) < 2000
    assert own.count("<script") == 1
    assert "<img" not in own
    assert "http" not in own


@pytest.mark.skipif(browser.find() is None and not browser.required(), reason=browser.NOT_RUN)
def test_displays_are_drawn_in_a_browser(tmp_path):
    lens = zoo.lens()
    shown = [
        tvlens.show_attention(lens, ["Q: a b", "c d"], [(0, 0), (1, 1)]),
        tvlens.show_tokens(lens, "a b", [1.0, -1.0]),
    ]
    file = tmp_path / "page.html"
    body = "".join(each.html for each in shown)
    file.write_text(f"<!DOCTYPE html><meta charset='utf-8'>{body}", encoding="utf-8")
    with browser.browser() as opened:
        page = opened.new_page()
        wrong: list[str] = []
        asked: list[str] = []
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        for each in shown:
            for place, _, _ in calls(each):
                page.wait_for_function(f"document.getElementById('{place}').children.length > 0")
        assert not wrong
        assert asked == [file.as_uri()]
