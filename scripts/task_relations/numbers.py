"""Relations between numbers and words, and the next or previous member of a series."""

from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from string import ascii_lowercase, ascii_uppercase

import inflect

from task_relations.core import OURS, Origin, Pairs, Relation, both, spaced

INFLECT = Origin(
    f"inflect {version('inflect')}",
    "MIT; inflect, Paul Dyson, Jason R. Coombs and others",
)
LAST = 150


def english(number: int) -> str:
    """A number in English words, without "and": 121 is "one hundred twenty-one"."""
    return str(inflect.engine().number_to_words(str(number), andword=""))


def numbers() -> Iterator[Relation]:
    """Numerals, number words and ordinals in English; number words in French and Spanish."""
    engine = inflect.engine()
    words = {number: english(number) for number in range(LAST + 1)}
    yield from both(
        ("number-word", "number in digits -> in words"),
        ("word-number", "number in words -> in digits"),
        INFLECT,
        [(str(number), word) for number, word in words.items()],
    )
    ordinals = {n: str(engine.ordinal(words[n])) for n in range(1, 101)}
    yield from both(
        ("number-ordinal", "number in digits -> ordinal word"),
        ("ordinal-number", "ordinal word -> number in digits"),
        INFLECT,
        [(str(number), ordinal) for number, ordinal in ordinals.items()],
    )
    yield from both(
        ("next-number-word", "number in words -> the next number"),
        ("previous-number-word", "number in words -> the number before it"),
        INFLECT,
        [(words[number], words[number + 1]) for number in range(LAST)],
    )
    for language, spell in (("french", french), ("spanish", spanish)):
        shown = language.capitalize()
        yield from both(
            (f"english-{language}-number", f"number in English words -> in {shown} words"),
            (f"{language}-english-number", f"number in {shown} words -> in English words"),
            Origin(f"English by inflect {version('inflect')}, {shown} by tvlens", INFLECT.licence),
            [(words[number], spell(number)) for number in range(101)],
        )


FRENCH = spaced(
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze "
    "seize dix-sept dix-huit dix-neuf"
)
FRENCH_TENS = {2: "vingt", 3: "trente", 4: "quarante", 5: "cinquante", 6: "soixante"}


def french(number: int) -> str:
    """A number from 0 to 100 in French words, as spelled in France before 1990."""
    if number < 20:
        return FRENCH[number]
    if number == 100:
        return "cent"
    if number >= 80:
        return f"quatre-vingt-{FRENCH[number - 80]}" if number > 80 else "quatre-vingts"
    tens, units = divmod(number, 10)
    if tens == 7:
        tens, units = 6, units + 10
    if units == 0:
        return FRENCH_TENS[tens]
    return f"{FRENCH_TENS[tens]}{' et ' if units in (1, 11) else '-'}{FRENCH[units]}"


SPANISH = spaced(
    "cero uno dos tres cuatro cinco seis siete ocho nueve diez once doce trece catorce quince "
    "dieciséis diecisiete dieciocho diecinueve veinte veintiuno veintidós veintitrés "
    "veinticuatro veinticinco veintiséis veintisiete veintiocho veintinueve"
)
SPANISH_TENS = spaced("treinta cuarenta cincuenta sesenta setenta ochenta noventa")


def spanish(number: int) -> str:
    """A number from 0 to 100 in Spanish words."""
    if number < 30:
        return SPANISH[number]
    if number == 100:
        return "cien"
    tens, units = divmod(number, 10)
    return SPANISH_TENS[tens - 3] + (f" y {SPANISH[units]}" if units else "")


DAYS = spaced("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = spaced(
    "January February March April May June July August September October November December"
)


def series() -> Iterator[Relation]:
    """The next and the previous member of well-known series, mixed."""
    engine = inflect.engine()
    cyclic = [DAYS, MONTHS, [day[:3] for day in DAYS]]
    open_ended = [
        list(ascii_lowercase),
        list(ascii_uppercase),
        [str(number) for number in range(31)],
        [english(number) for number in range(21)],
        [str(engine.ordinal(english(number))) for number in range(1, 21)],
    ]
    pairs: Pairs = [
        (items[i], items[(i + 1) % len(items)]) for items in cyclic for i in range(len(items))
    ]
    pairs += [pair for items in open_ended for pair in pairwise(items)]
    yield from both(
        ("next-item", "member of a series (days, months, letters, numbers) -> the next one"),
        ("previous-item", "member of a series (days, months, letters, numbers) -> the one before"),
        Origin(f"lists of tvlens, number words by inflect {version('inflect')}", OURS.licence),
        pairs,
    )
