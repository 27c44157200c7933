"""Which characters of a text, and which points, play which role in a prompt."""

import pytest
import torch

from helpers import tiny_regression
from tvlens.tasks import TEMPLATES, Pair, Prompt, Span, Template, load

DEMOS = (Pair("hot", "cold"), Pair("up", "down"))
EVERY = Template("<", ">", "|", ";", "_", "Say it", "!")


def prompt(template, demos=DEMOS, query="in"):
    return Prompt(demos, Pair(query, "out"), "clean", template)


def pieces(prompt):
    """Role and text of every span."""
    return [(span.role, prompt.text[span.start : span.stop]) for span in prompt.spans]


def test_every_field_of_a_template_has_its_role():
    assert pieces(prompt(EVERY)) == [
        ("start", "!Say it;"),
        ("separators", "<"),
        ("input 1", "hot"),
        ("separators", "|>"),
        ("answer 1", "_cold"),
        ("separators", ";<"),
        ("input 2", "up"),
        ("separators", "|>"),
        ("answer 2", "_down"),
        ("separators", ";<"),
        ("query", "in"),
        ("answer prefix", "|>"),
    ]


def test_the_default_layout():
    assert pieces(prompt(Template(), DEMOS[:1])) == [
        ("separators", "Q: "),
        ("input 1", "hot"),
        ("separators", "\nA:"),
        ("answer 1", " cold"),
        ("separators", "\n\nQ: "),
        ("query", "in"),
        ("answer prefix", "\nA:"),
    ]


def test_without_demonstrations_the_question_has_roles():
    assert [role for role, _ in pieces(prompt(Template(), ()))] == [
        "separators",
        "query",
        "answer prefix",
    ]
    assert prompt(Template(opening="!"), ()).spans[0] == Span("start", 0, 1)


@pytest.mark.parametrize("name", [*TEMPLATES, "every", "tight"])
@pytest.mark.parametrize("kind", ["clean", "shuffled", "zero"])
def test_spans_cover_the_text_in_order(name, kind):
    template = {"every": EVERY, "tight": Template("", "", "", "", "")} | TEMPLATES
    asked = load("antonym").prompts("test", shots=4, n=3, kind=kind, template=template[name])
    for each in asked:
        if name == "tight" and kind == "zero":
            assert each.spans == ()
            continue
        assert "".join(text for _, text in pieces(each)) == each.text
        bounds = [0, *(span.stop for span in each.spans)]
        assert [span.start for span in each.spans] == bounds[:-1]
        assert all(span.start < span.stop for span in each.spans)
        found = dict(pieces(each))
        space = each.template.answer_space
        assert found["query"] == each.query.input
        for i, demo in enumerate(each.demos, start=1):
            assert (found[f"input {i}"], found[f"answer {i}"]) == (demo.input, space + demo.output)


def test_a_text_as_it_is_has_no_roles():
    bare = Template("", "", "", "\n\n", "")
    assert prompt(bare, (), "When Mary and John went").spans == ()
    assert prompt(bare, DEMOS).spans[0] == Span("input 1", 0, 3)


def test_points_have_a_role_each():
    points = tiny_regression.TASK.prompts("test", shots=2, n=3)
    assert points.roles == ("x 1", "y 1", "x 2", "y 2", "query")
    alone = tiny_regression.TASK.prompts("test", shots=2, n=3, kind="zero")
    assert alone.roles == ("query",)


def test_dummies_are_points_like_others():
    points = tiny_regression.TASK.prompts("test", shots=2, n=3).with_dummies((0.5,))
    assert points.roles == ("x 1", "y 1", "x 2", "y 2", "x 3", "y 3", "query")
    assert [points.roles[column] for column in points.places] == ["x 2"]
    assert torch.equal(points.xs[:, 1], torch.zeros(3, 1))
