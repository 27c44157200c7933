"""Exact match: the whole answer, ended by the text, its line or the layout, and nothing else."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import tvlens
from helpers import zoo
from tvlens.evaluation.answers import first_tokens_tell
from tvlens.lens.engine import Engine
from tvlens.tasks import Pair, Prompts, Task, Template

TEMPLATES = {
    "default": Template(),
    "list": Template("", ":", "", ":A"),
    "bars": Template("", ":", "", "QQ"),
    "arrow": tvlens.tasks.TEMPLATES["arrow"],
    "turns": Template("<bos>Q", ":", "", "", " "),
}
ANSWERS = {
    "one word": ("lm", "no"),
    "two lines": ("k\nl", "m\nno"),
    "blanks inside": ("k  l", "m  n"),
    "a list inside": ("k:Al", "m:An"),
}


class Says(Engine):
    """A model that always goes on with the right answer and then with given tokens."""

    name = "says"

    def __init__(self, inner: Engine, after: list[int]) -> None:
        super().__init__(inner.backend)
        self.inner, self.after = inner, after

    @property
    def sites(self):
        return self.inner.sites

    def record(self, batch, sites):
        return self.inner.record(batch, sites)

    def read(self, batch: Any) -> Any:
        return self.inner.read(batch)

    def join(self, readings: Any) -> Any:
        return self.inner.join(readings)

    def run(self, reading: Any, edit: Any) -> torch.Tensor:
        logits = torch.zeros(len(reading), edit.n_variant, zoo.D_VOCAB)
        for row, target in enumerate(reading.batch.right[:, -1].tolist()):
            logits[row, :, target] = 30.0
        return logits

    def final(self, reading, edit):
        raise NotImplementedError

    def generate(self, reading: Any, edit: Any, n_tokens: int) -> torch.Tensor:
        rows = []
        for answer in reading.batch.answers:
            said = [*answer[-1], *self.after, *[zoo.WORDS.index("w")] * n_tokens]
            rows.append([said[:n_tokens]] * edit.n_variant)
        return torch.tensor(rows)


def share(template: Template, answers: tuple[str, ...], after: str | list[int]) -> float:
    """Share of answers found right, of a model that says them and then `after`."""
    pairs = tuple(Pair(f"a{letter}", answers[i % 2]) for i, letter in enumerate("abcdefghijkl"))
    task = Task("t", pairs, "made up", "made up", "CC0-1.0").with_template(template)
    tokens = after
    if isinstance(after, str):
        tokens = zoo.tokenizer()(after, add_special_tokens=False).input_ids
    lens = zoo.lens()
    lens = replace(lens, engine=Says(lens.engine, list(tokens)))
    table = tvlens.evaluate(lens, task, {}, shots=2, n=4, kinds=("clean",))
    rows = table[table["metric"] == "exact_match"]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_that_the_layout_ends_is_right(name, answers):
    template = TEMPLATES[name]
    assert share(template, answers, template.pair_separator + template.query_prefix + "a") == 1.0


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_the_text_or_the_line_ends_is_right(answers):
    eos = zoo.WORDS.index("<eos>")
    for after in (
        [eos],
        [zoo.WORDS.index("<bos>")],
        [eos, zoo.WORDS.index("k")],
        "\n",
        "\n\nQ",
        "\nA",
    ):
        assert share(Template(), answers, after) == 1.0


@pytest.mark.parametrize("answers", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("after", ["k", " k", ":A", "QQ", "kk\n\n", ":"])
def test_an_answer_that_goes_on_is_wrong(answers, after):
    assert share(Template(), answers, after) == 0.0


def test_what_ends_one_layout_does_not_end_another():
    assert share(TEMPLATES["bars"], ANSWERS["one word"], ":Aa") == 0.0
    assert share(TEMPLATES["list"], ANSWERS["one word"], "QQa") == 0.0


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
def test_without_a_tokenizer_tokens_are_compared():
    model = zoo.attention_only()
    model.tokenizer = None
    lens = tvlens.load(model, name="toy")

    class Tokens:
        name = digest = "tokens"

        def prompts(self, split: Any, **_: Any) -> Any:
            rows = [[5, 6, 7], [8, 9, 10]]
            batch = torch.tensor(rows)
            with torch.no_grad():
                first = model(batch)[:, -1].argmax(-1, keepdim=True)
                second = model(torch.cat([batch, first], 1))[:, -1].argmax(-1, keepdim=True)
            right = torch.cat([first, second], 1).tolist()
            return Prompts.of_tokens(rows, [right[0], [right[1][0], (right[1][1] + 1) % 54]])

    table = tvlens.evaluate(lens, Tokens(), {}, kinds=("clean",))
    rows = table.set_index("metric")["value"]
    assert (rows["accuracy"], rows["exact_match"]) == (1.0, 0.5)


def asked(outputs: list[tuple[str, ...]]) -> Task:
    """A task of so many pairs with these right answers in turn."""
    pairs = tuple(
        Pair(f"a{letter}", outputs[i % len(outputs)][0], outputs[i % len(outputs)][1:])
        for i, letter in enumerate("abcdefghijkl")
    )
    return Task("t", pairs, "made up", "made up", "CC0-1.0")


def test_any_of_several_right_answers_is_right():
    """The model says the last answer of every prompt, and the table how many there may be."""
    lens = zoo.lens()
    lens = replace(lens, engine=Says(lens.engine, [zoo.WORDS.index("<eos>")]))
    task = asked([("lm", "no", "k"), ("m", "km")])
    table = tvlens.evaluate(lens, task, {}, shots=2, n=6, kinds=("clean",))
    values = table.set_index("metric")["value"]
    assert (values["accuracy"], values["exact_match"]) == (1.0, 1.0)
    assert values["cross_entropy"] == pytest.approx(0.0, abs=1e-6)
    assert set(table["answers"]) == {3}
    only = tvlens.evaluate(lens, asked([("lm",), ("m",)]), {}, shots=2, n=6, kinds=("clean",))
    assert set(only["answers"]) == {1}


def test_an_answer_that_is_only_begun_is_not_whole_whichever_it_is():
    lens = zoo.lens()
    lens = replace(lens, engine=Says(lens.engine, [zoo.WORDS.index("k")]))
    table = tvlens.evaluate(lens, asked([("lm", "no")]), {}, shots=2, n=6, kinds=("clean",))
    assert table.set_index("metric")["value"]["exact_match"] == 0.0


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([[1, 2], [1, 3], [1, 4]], (1, False)),
        ([[1, 2], [1, 3], [4]], (2, False)),
        ([[1, 2], [1, 3], [4], [5]], (3, True)),
        ([[1], [2], [1], [2]], (2, True)),
        ([[1, 2], [1, 2]], (1, True)),
        ([[7]], (1, True)),
    ],
)
def test_first_tokens_tell_answers_apart_or_do_not(answers, expected):
    assert first_tokens_tell([[answer] for answer in answers]) == expected


def test_a_task_that_first_tokens_say_little_of_warns_once_and_puts_exact_match_first():
    lens = zoo.lens()
    task = asked([("kk",), ("kl",), ("km",)])
    with pytest.warns(UserWarning, match=r"task 't' under .* begin with only 1 different tok") as w:
        table = tvlens.evaluate(lens, task, {}, shots=2)
    assert len(w) == 1
    assert list(table["metric"])[:2] == ["exact_match", "accuracy"]
    with pytest.warns(UserWarning, match="look at exact_match"):
        short = tvlens.evaluate(lens, task, {}, shots=2, exact_match=False)
    assert "exact_match" not in set(short["metric"])
    shared = ["method", "prompt", "metric"]
    both = table.merge(short, on=shared, suffixes=("", "_short"))
    assert len(both) == len(short)
    assert (both["value"] == both["value_short"]).all()
