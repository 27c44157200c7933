import hashlib
import json

import pytest

from tvlens.tasks import Pair, Prompt, Prompts, Template

DEMOS = (Pair("hot", "cold"), Pair("up", "down"))
QUERY = Pair("in", "out")


def prompt(kind="clean", demos=DEMOS, query=QUERY, template=None):
    return Prompt(demos, query, kind, template or Template())


def prompts(*items, kind="clean", task="t", split="test", shots=2, seed=0):
    return Prompts(task, split, kind, shots, seed, items)


def test_default_layout_is_that_of_todd_et_al():
    text = Template().render(DEMOS, "in")
    assert text == "Q: hot\nA: cold\n\nQ: up\nA: down\n\nQ: in\nA:"


def test_without_demonstrations_only_the_question_stands():
    assert Template().render((), "in") == "Q: in\nA:"


def test_every_field_of_a_template_is_used():
    template = Template("<", ">", "|", ";", "_", "Say it")
    assert template.render(DEMOS, "in") == "Say it;<hot|>_cold;<up|>_down;<in|>"
    assert prompt(template=template).continuations == ("_out",)


def test_text_and_continuation_make_one_more_demonstration():
    longer = Template().render((*DEMOS, QUERY), "x")
    assert longer == prompt().text + prompt().continuations[0] + "\n\nQ: x\nA:"


def test_prompt_answers():
    assert (prompt().answer, prompt().continuations) == ("out", (" out",))


def test_values_are_frozen():
    for value, field in ((QUERY, "input"), (Template(), "instruction"), (prompt(), "kind")):
        with pytest.raises(AttributeError):
            setattr(value, field, "x")


def test_indexing_gives_a_prompt_for_an_int_and_prompts_otherwise():
    items = [prompt(query=Pair(word, "y")) for word in "abcd"]
    some = prompts(*items)
    assert len(some) == 4
    assert list(some) == items
    assert some[1] is items[1]
    assert some[-1] is items[3]
    assert some[1:3] == prompts(*items[1:3])
    assert some[[3, 0]] == prompts(items[3], items[0])
    assert some[range(0, 4, 2)].items == (items[0], items[2])
    assert len(some[[]]) == 0


def test_lists_follow_the_order_of_items():
    some = prompts(prompt(query=Pair("a", "1")), prompt(query=Pair("b", "2")))
    assert some.answers == ["1", "2"]
    assert some.continuations == [(" 1",), (" 2",)]
    assert [text[-7:] for text in some.texts] == ["Q: a\nA:", "Q: b\nA:"]


def test_digest_is_that_of_the_content():
    content = [["clean", prompt().text, " out"]]
    expected = hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
    assert prompts(prompt()).digest == expected


@pytest.mark.parametrize(
    "other",
    [
        prompt("shuffled"),
        prompt(demos=DEMOS[::-1]),
        prompt(query=Pair("in", "inside")),
        prompt(template=Template(query_prefix="Input: ")),
    ],
    ids=["kind", "demos", "answer", "template"],
)
def test_digest_changes_with_what_is_asked_or_answered(other):
    assert prompts(prompt()).digest != prompts(other).digest


def test_digest_depends_on_order_but_not_on_names_or_seed():
    a, b = prompt(), prompt(query=Pair("a", "b"))
    assert prompts(a, b).digest != prompts(b, a).digest
    assert prompts(a, b).digest == prompts(a, b, task="other", seed=7).digest
