"""The shipped data: well-formed, licensed, and right by rules that do not use the builder."""

import json
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tvlens import tasks

NAMES = tasks.names()
ROOT = Path(__file__).parents[2]
DATA = ROOT / "tvlens" / "tasks" / "text" / "data"
INVERSES = [
    ("present-past", "past-present"),
    ("verb-gerund", "gerund-verb"),
    ("verb-third-person", "third-person-verb"),
    ("singular-plural", "plural-singular"),
    ("adjective-comparative", "comparative-adjective"),
    ("adjective-superlative", "superlative-adjective"),
    ("capitalize-word", "uncapitalize-word"),
    ("uppercase-word", "lowercase-word"),
    ("country-capital", "capital-country"),
    ("country-nationality", "nationality-country"),
    ("number-word", "word-number"),
    ("number-ordinal", "ordinal-number"),
    ("next-number-word", "previous-number-word"),
    ("next-item", "previous-item"),
    ("element-symbol", "symbol-element"),
    ("masculine-feminine", "feminine-masculine"),
    *(
        (f"english-{language}-{what}", f"{language}-english-{what}")
        for language in ("french", "spanish")
        for what in ("word", "number", "territory", "language")
    ),
]
PINS = dict(
    line.split("==")
    for line in (ROOT / "scripts" / "requirements-tasks.txt").read_text().splitlines()
    if "==" in line
)


def pairs(name):
    return [(pair.input, pair.output) for pair in tasks.load(name).pairs]


def lookup(name):
    return dict(pairs(name))


def test_there_are_enough_tasks():
    assert len(NAMES) >= 24
    assert sorted(NAMES) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_task_is_complete_and_usable(name):
    content = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    assert list(content) == ["name", "description", "source", "licence", "pairs"]
    assert content["name"] == name
    assert re.fullmatch("[a-z0-9]+(-[a-z0-9]+)*", name)
    assert " -> " in content["description"]
    spdx, holder = content["licence"].split("; ", 1)
    known = {"MIT", "Unicode-3.0", "CC-BY-4.0", "LicenseRef-Public-Domain"}
    assert set(spdx.split(" AND ")) <= known
    assert holder
    assert "tvlens" in content["source"] or re.search(r" \d+\.\d+", content["source"])
    task = tasks.load(name)
    assert len(task) == len(content["pairs"]) >= 40
    assert all(pair.input != pair.output for pair in task.pairs)
    for kind in ("clean", "shuffled", "zero"):
        assert len(task.prompts("validation", shots=10, kind=kind)) == len(task.split("validation"))


@pytest.mark.parametrize(("name", "inverse"), INVERSES)
def test_inverses_hold_the_same_pairs_in_the_same_order(name, inverse):
    assert pairs(inverse) == [(b, a) for a, b in pairs(name)]


def test_pairs_known_by_heart():
    expected = {
        "present-past": {"go": "went", "buy": "bought", "stop": "stopped", "carry": "carried"},
        "verb-gerund": {"die": "dying", "run": "running", "make": "making"},
        "verb-third-person": {"do": "does", "have": "has", "try": "tries", "play": "plays"},
        "singular-plural": {"child": "children", "thief": "thieves", "photo": "photos"},
        "adjective-comparative": {"good": "better", "big": "bigger", "happy": "happier"},
        "adjective-superlative": {"bad": "worst", "dry": "driest", "nice": "nicest"},
        "country-capital": {"France": "Paris", "Australia": "Canberra", "Turkey": "Ankara"},
        "country-currency": {"Japan": "yen", "Spain": "euro", "India": "rupee"},
        "country-continent": {"Kenya": "Africa", "Peru": "South America"},
        "country-language": {"Brazil": "Portuguese", "Egypt": "Arabic"},
        "country-nationality": {"Netherlands": "Dutch", "Peru": "Peruvian"},
        "english-french-territory": {"Germany": "Allemagne", "Netherlands": "Pays-Bas"},
        "english-spanish-language": {"German": "alemán"},
        "foreign-english-month": {"août": "August", "enero": "January"},
        "foreign-english-weekday": {"Montag": "Monday", "jeudi": "Thursday"},
        "english-french-number": {"seventy-one": "soixante et onze", "eighty": "quatre-vingts"},
        "english-spanish-number": {"twenty-two": "veintidós", "forty-one": "cuarenta y uno"},
        "number-word": {"0": "zero", "42": "forty-two", "115": "one hundred fifteen"},
        "number-ordinal": {"12": "twelfth", "21": "twenty-first"},
        "next-number-word": {"nine": "ten", "ninety-nine": "one hundred"},
        "next-item": {"Sunday": "Monday", "December": "January", "y": "z", "third": "fourth"},
        "element-symbol": {"iron": "Fe", "oxygen": "O"},
        "antonym": {"hot": None, "cold": "hot", "big": "small"},
        "word-category": {"dog": "animal", "red": "color", "knee": "body part"},
        "masculine-feminine": {"king": "queen"},
        "english-french-word": {"dog": "chien"},
        "english-spanish-word": {"water": "agua"},
    }
    for name, known in expected.items():
        found = lookup(name)
        assert {word: found.get(word) for word in known} == known


def test_forms_follow_the_spelling_rules():
    assert all(form.endswith("ing") for _, form in pairs("verb-gerund"))
    assert all(form.endswith("s") for _, form in pairs("verb-third-person"))
    irregular = {"good", "bad"}
    for name, ending in (("adjective-comparative", "er"), ("adjective-superlative", "est")):
        for word, form in pairs(name):
            stem = {"y": word[:-1] + "i", "e": word[:-1]}.get(word[-1], word)
            allowed = {stem + ending, stem + word[-1] + ending}
            assert word in irregular or form in allowed
    for word, form in pairs("present-past"):
        stem = {"y": word[:-1] + "i", "e": word[:-1]}.get(word[-1], word)
        if form.endswith("ed") and word not in {"bleed", "breed", "feed", "lead"}:
            assert form in {stem + "ed", word + "ed", word + word[-1] + "ed"}
    for word, form in pairs("singular-plural"):
        if form.endswith("s") and not form.endswith("ves"):
            assert form in {word + "s", word + "es", word[:-1] + "ies"}


def test_letters_are_those_of_the_word():
    changes = {
        "capitalize-word": str.capitalize,
        "uppercase-word": str.upper,
        "lowercase-word": str.lower,
        "first-letter": lambda word: word[0],
        "last-letter": lambda word: word[-1],
        "capitalize-first-letter": lambda word: word[0].upper(),
    }
    for name, change in changes.items():
        assert all(output == change(text) for text, output in pairs(name))


def test_the_right_word_of_three_is_picked():
    picks = {
        "choose-first-of-3": lambda words: words[0],
        "choose-middle-of-3": lambda words: words[1],
        "choose-last-of-3": lambda words: words[2],
        "alphabetically-first-of-3": lambda words: sorted(words)[0],
        "alphabetically-last-of-3": lambda words: sorted(words)[2],
    }
    for name, pick in picks.items():
        for text, output in pairs(name):
            words = text.split(", ")
            assert len(set(words)) == len({word[0] for word in words}) == 3
            assert output == pick(words)


@pytest.mark.parametrize("kind", ["animal", "fruit", "color", "job"])
def test_only_the_picked_word_is_of_the_kind(kind):
    kinds = lookup("word-category")
    places = [0, 0, 0]
    for text, output in pairs(f"choose-{kind}-of-3"):
        words = text.split(", ")
        assert [word for word in words if kinds[word] == kind] == [output]
        places[words.index(output)] += 1
    assert max(places) - min(places) <= 1


def test_no_opposite_gives_another_one_away():
    words = [word for pair in pairs("antonym") for word in pair]
    assert len(words) == len(set(words))


def test_notice_names_every_licence():
    notice = (DATA / "NOTICE.md").read_text(encoding="utf-8")
    for words in ("UNICODE LICENSE V3", "CC BY 4.0", "GeoNames", "LemmInflect", "inflect"):
        assert words in notice


def libraries_present():
    try:
        return all(version(name) == pin for name, pin in PINS.items())
    except PackageNotFoundError:
        return False


@pytest.mark.skipif(not libraries_present(), reason="needs scripts/requirements-tasks.txt")
def test_committed_files_are_what_the_script_builds(tmp_path):
    script = [sys.executable, str(ROOT / "scripts" / "build_tasks.py")]
    check = subprocess.run([*script, "--check"], capture_output=True, text=True, check=False)
    assert (check.returncode, check.stdout) == (0, f"{len(NAMES)} task files are up to date\n")
    subprocess.run([*script, "--data", str(tmp_path)], capture_output=True, check=True)
    (tmp_path / "antonym.json").write_text("[]")
    (tmp_path / "first-letter.json").unlink()
    (tmp_path / "mine.json").write_text("[]")
    check = subprocess.run(
        [*script, "--check", "--data", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert check.returncode == 1
    assert check.stdout.splitlines() == [
        "antonym.json: differs",
        "first-letter.json: missing",
        "mine.json: not built by this script",
    ]
