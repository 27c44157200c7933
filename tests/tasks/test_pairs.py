"""Pairs of prompts of one's own: read as they are, or refused by entry."""

import json

import pytest

from helpers import zoo
from tvlens.errors import TaskError
from tvlens.tasks import PromptPairs, load_pairs

ENTRY = {"clean": "a b", "corrupted": "c b", "answer": " k", "wrong": " m"}
PLAIN = {key: text for key, text in ENTRY.items() if key != "wrong"}


def write(folder, content):
    path = folder / "names.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_texts_are_read_as_they_are(tmp_path):
    texts = [" When Mary\nand John — ", "Q: x\nA:"]
    entries = [ENTRY | {"clean": texts[0]}, ENTRY | {"clean": texts[1], "answer": "äb c "}]
    found = load_pairs(write(tmp_path, entries))
    assert found.clean.texts == texts
    assert found.corrupted.texts == ["c b", "c b"]
    assert found.clean.continuations == found.corrupted.continuations == [(" k",), (" äb c ",)]
    assert found.wrong is not None
    assert (found.wrong.texts, found.wrong.continuations) == (texts, [(" m",), (" m",)])
    assert (len(found), found.name, found.clean.task) == (2, "names", "names")
    assert found == PromptPairs.of(entries, name="names")


def test_an_answer_has_white_space_before_it():
    answers = {"k": " k", " k": " k", "\nk": "\nk", "  k l": "  k l", "\t\u2003k": "\t\u2003k"}
    found = PromptPairs.of([PLAIN | {"answer": answer} for answer in answers])
    assert found.clean.continuations == [(each,) for each in answers.values()]
    assert found.clean.answers == [each.strip() for each in answers]


def test_prompts_of_one_layout_have_one_template():
    found = PromptPairs.of([ENTRY, ENTRY | {"answer": "k"}])
    assert found.clean.template == found.corrupted.template
    assert (found.clean.shots, found.clean.kind) == (0, "zero")


def test_pairs_need_no_wrong_answer():
    assert PromptPairs.of([PLAIN, PLAIN]).wrong is None


def test_numbers_are_texts_as_they_are_written(tmp_path):
    text = '[{"clean": "2 + 2 =", "corrupted": "2 + 3 =", "answer": 4.0}]'
    assert load_pairs(write(tmp_path, text)).clean.continuations == [(" 4.0",)]


def test_a_lens_reads_them(lens):
    found = PromptPairs.of([ENTRY, ENTRY | {"clean": "a b c", "corrupted": "d"}])
    batch = lens.encode(found.clean)
    assert batch.mask.sum(1).tolist() == [2, 3]
    assert [zoo.WORDS[token] for token in batch.target] == [" k", " k"]
    with pytest.raises(TaskError, match=r"prompts of 'pairs' have no roles .* prompt 0 is a text"):
        lens.backend.roles(found.clean, prefix=())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[{", r"pairs file .*names.json is not JSON: .*; expected a list of \{'clean': "),
        ("[1] [2]", r"names.json is not JSON: Extra data: .*\d\); expected a list"),
        ('[{"clean": "a", "clean": "b"}]', "the key 'clean' comes twice in one object"),
        (ENTRY, r"names.json: expected a list .*, found an object with the keys 'clean', 'corr"),
        ("null", r"names.json: expected a list .*, found null"),
        ([], "pairs 'names' are empty: expected at least one entry; expected a list of"),
        ([ENTRY, "a"], "pairs 'names', entry 2: found a string; expected a list of"),
        ([{"clean": "a"}], "entry 1: the key 'corrupted' is missing, found an object with the key"),
        ([ENTRY, {}], r"entry 2: the key 'clean' is missing, found an object .* \(none\); every"),
        (
            [ENTRY | {"answers": "a"}],
            "entry 1: unknown key 'answers'; expected clean, corrupted, a",
        ),
        ([ENTRY | {"answer": ""}], "entry 1: 'answer' is empty; write a text or remove"),
        ([ENTRY | {"wrong": " \n"}], "entry 1: 'wrong' is empty; write a text or remove"),
        ([ENTRY | {"clean": " "}], "entry 1: 'clean' is empty; write a text or remove"),
        ([ENTRY | {"answer": ["k"]}], "entry 1: 'answer' is a list, expected a text; write it in"),
        ([ENTRY | {"wrong": None}], "entry 1: 'wrong' is null, expected a text; write it in"),
        ([ENTRY | {"answer": "\ud800"}], r"entry 1: 'answer' holds half a surrogate pair"),
        (
            [ENTRY, ENTRY | {"corrupted": "a b"}],
            "entry 2: clean and corrupted prompt are both 'a b', so there is nothing to patch",
        ),
        ([ENTRY, PLAIN, ENTRY], r"entry 2: the key 'wrong' is missing, .*\(2 of 3\); give it in a"),
        (
            [ENTRY | {"wrong": "k"}],
            "entry 1: 'answer' and 'wrong' are both ' k'; expected two diff",
        ),
    ],
)
def test_what_is_no_pair_is_refused(tmp_path, content, words):
    with pytest.raises(TaskError, match=words):
        load_pairs(write(tmp_path, content))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(
        TaskError, match=r"pairs file .*none.json cannot be read: No such file.*; c"
    ):
        load_pairs(tmp_path / "none.json")
    (tmp_path / "b.json").write_bytes(b"[\xff]")
    with pytest.raises(TaskError, match=r"pairs file .*b.json is not UTF-8 text: byte 1 cannot be"):
        load_pairs(tmp_path / "b.json")


@pytest.mark.parametrize(
    ("value", "words"),
    [(4, "the number 4"), (float("nan"), "a number that is not finite"), ((), "of type tuple")],
)
def test_values_of_python_are_texts(value, words, unchecked):
    with pytest.raises(TaskError, match=f"pairs 'pairs', entry 1: 'answer' is {words}, expected a"):
        PromptPairs.of([ENTRY | {"answer": value}])


def test_there_are_as_many_of_each():
    one, two = PromptPairs.of([ENTRY]), PromptPairs.of([ENTRY, ENTRY])
    words = r"pairs 'n': \[1, 2, 1\] clean, corrupted and \(if any\) wrong prompts; expected one or"
    with pytest.raises(TaskError, match=words):
        PromptPairs(one.clean, two.corrupted, one.wrong, "n")
    with pytest.raises(TaskError, match=r"pairs 'n': \[0, 0\] clean"):
        PromptPairs(one.clean[:0], one.corrupted[:0], None, "n")
