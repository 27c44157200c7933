"""Facts of a saved value, each of the kind that it must be: what JSON holds may be anything."""

from collections.abc import Mapping
from typing import Any

from tvlens.errors import RunError


def text_of(facts: Mapping[str, Any], key: str, default: str | None = None) -> str:
    """The text under `key`, or the default where there is none.

    Raises:
        KeyError: there is nothing under `key`, and no default.
        RunError: it is no text.
    """
    value = facts[key] if default is None else facts.get(key, default)
    if not isinstance(value, str) or not _is_unicode(value):
        raise wrong(key, value, "a text")
    return value


def integer_of(facts: Mapping[str, Any], key: str) -> int:
    """The whole number under `key`, which is not negative.

    Raises:
        KeyError: there is nothing under `key`.
        RunError: it is no such number.
    """
    if not _is_count(facts[key]):
        raise wrong(key, facts[key], "a whole number, 0 or more")
    return int(facts[key])


def integers_of(facts: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """The whole numbers under `key`, none negative.

    Raises:
        KeyError: there is nothing under `key`.
        RunError: it is no list of such numbers.
    """
    value = facts[key]
    if not isinstance(value, list | tuple) or not all(map(_is_count, value)):
        raise wrong(key, value, "a list of whole numbers, 0 or more")
    return tuple(value)


def wrong(key: str, value: Any, expected: str) -> RunError:
    """The error that says that a saved fact is of another kind."""
    return RunError(f"{key!r} is {ascii(value)[:60]}, expected {expected}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_unicode(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
