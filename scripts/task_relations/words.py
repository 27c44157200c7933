"""Relations between words: forms, letters, picking one of three, opposites, kinds, translations."""

import random
from collections.abc import Callable, Iterator
from importlib.metadata import version

import inflect
import lemminflect

from task_relations.core import OURS, Origin, Pairs, Relation, both, function, table, word_list

LEMMINFLECT = Origin(
    f"word list of tvlens, forms by lemminflect {version('lemminflect')}",
    "MIT; list by the tvlens authors, forms by LemmInflect, Copyright (C) 2019 Brad Jascob",
)
INFLECT = Origin(
    f"word list of tvlens, forms by inflect {version('inflect')}",
    "MIT; list by the tvlens authors, forms by inflect, Paul Dyson, Jason R. Coombs and others",
)
# Where inflect is wrong.
PLURALS = {"thief": "thieves", "grandchild": "grandchildren"}


def morphology() -> Iterator[Relation]:
    """Forms of common verbs, adjectives and nouns."""
    for words, tag, base, form, base_text, form_text in (
        ("verbs", "VBD", "present", "past", "verb", "simple past"),
        ("verbs", "VBG", "verb", "gerund", "verb", "form in -ing"),
        ("verbs", "VBZ", "verb", "third-person", "verb", "third person singular of the present"),
        ("adjectives", "JJR", "adjective", "comparative", "adjective", "comparative"),
        ("adjectives", "JJS", "adjective", "superlative", "adjective", "superlative"),
    ):
        yield from both(
            (f"{base}-{form}", f"{base_text} -> its {form_text}"),
            (f"{form}-{base}", f"{form_text} -> the {base_text}"),
            LEMMINFLECT,
            [(word, lemminflect.getInflection(word, tag)[0]) for word in word_list(words)],
        )
    plural = inflect.engine().plural_noun
    yield from both(
        ("singular-plural", "noun -> its plural"),
        ("plural-singular", "noun in the plural -> its singular"),
        INFLECT,
        [(noun, PLURALS.get(noun) or str(plural(noun))) for noun in word_list("nouns")],
    )


def common_words() -> list[str]:
    """Our nouns, verbs and adjectives of 3 to 8 letters, sorted."""
    words = {word for name in ("nouns", "verbs", "adjectives") for word in word_list(name)}
    return sorted(word for word in words if 3 <= len(word) <= 8)


def letters() -> Iterator[Relation]:
    """Letters and case of 300 common words; the same words in the same order in every task."""
    words = random.Random("letters").sample(common_words(), 300)
    yield from (
        Relation(name, description, OURS, [(change[0](word), change[1](word)) for word in words])
        for name, description, change in LETTER_TASKS
    )


def _same(word: str) -> str:
    return word


LETTER_TASKS: tuple[tuple[str, str, tuple[Callable[[str], str], Callable[[str], str]]], ...] = (
    ("capitalize-word", "word -> the word with a capital first letter", (_same, str.capitalize)),
    (
        "uncapitalize-word",
        "capitalized word -> in lower case",
        (str.capitalize, _same),
    ),
    ("uppercase-word", "word -> the word in capitals", (_same, str.upper)),
    ("lowercase-word", "word in capitals -> the word in lower case", (str.upper, _same)),
    ("first-letter", "word -> its first letter", (_same, lambda word: word[0])),
    ("last-letter", "word -> its last letter", (_same, lambda word: word[-1])),
    (
        "capitalize-first-letter",
        "word -> its first letter as a capital",
        (_same, lambda word: word[0].upper()),
    ),
)


def picking() -> Iterator[Relation]:
    """One of three words, by place, alphabet or kind; the three have different initials."""
    lists = _triples(random.Random("triples"), 250)
    for name, description, pick in (
        ("choose-first-of-3", "three words -> the first one", lambda words: words[0]),
        ("choose-middle-of-3", "three words -> the one in the middle", lambda words: words[1]),
        ("choose-last-of-3", "three words -> the last one", lambda words: words[2]),
        ("alphabetically-first-of-3", "three words -> the first one by alphabet", min),
        ("alphabetically-last-of-3", "three words -> the last one by alphabet", max),
    ):
        pairs = [(", ".join(words), pick(words)) for words in lists]
        yield Relation(name, description, OURS, pairs)
    kinds = _kinds()
    for kind in ("animal", "fruit", "color", "job"):
        yield Relation(
            f"choose-{kind}-of-3",
            f"three words of different kinds -> the {kind}",
            OURS,
            _kind_triples(kind, kinds, random.Random(f"choose-{kind}"), 200),
        )


def _triples(rng: random.Random, n: int) -> list[list[str]]:
    words = common_words()
    found: dict[tuple[str, ...], None] = {}
    while len(found) < n:
        triple = rng.sample(words, 3)
        if len({word[0] for word in triple}) == 3:
            found[tuple(triple)] = None
    return [list(triple) for triple in found]


def _kinds() -> dict[str, list[str]]:
    return {kind: words.split() for kind, words in table("categories")}


def _kind_triples(kind: str, kinds: dict[str, list[str]], rng: random.Random, n: int) -> Pairs:
    found: dict[str, str] = {}
    while len(found) < n:
        others = rng.sample([name for name in kinds if name != kind], 2)
        wanted = rng.choice(kinds[kind])
        triple = [wanted, *(rng.choice(kinds[name]) for name in others)]
        if len({word[0] for word in triple}) == 3:
            # The place of the wanted word goes round, so that no place is favoured.
            place = len(found) % 3
            triple[0], triple[place] = triple[place], triple[0]
            found[", ".join(triple)] = wanted
    return list(found.items())


def meaning() -> Iterator[Relation]:
    """Opposites, kinds of things, masculine and feminine words."""
    yield Relation(
        "antonym",
        "word -> its opposite; each pair in one direction only, and no word in two pairs",
        OURS,
        [(a, b) if number % 2 else (b, a) for number, (a, b) in enumerate(table("antonyms"))],
    )
    yield Relation(
        "word-category",
        "word -> the kind of thing it is",
        OURS,
        [
            (word, "body part" if kind == "body" else kind)
            for kind, words in _kinds().items()
            for word in words
        ],
    )
    yield from both(
        ("masculine-feminine", "masculine word -> its feminine counterpart"),
        ("feminine-masculine", "feminine word -> its masculine counterpart"),
        OURS,
        [(masculine, feminine) for masculine, feminine in table("genders")],
    )


def translations() -> Iterator[Relation]:
    """Common words in English, French and Spanish."""
    rows = table("translations")
    for column, language in ((1, "french"), (2, "spanish")):
        shown = language.capitalize()
        yield from both(
            (f"english-{language}-word", f"English word -> {shown} word"),
            (f"{language}-english-word", f"{shown} word -> English word"),
            OURS,
            function([(row[0], row[column]) for row in rows]),
        )
