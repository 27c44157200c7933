"""Contents made wrong in random ways: bytes of any, and what stands in JSON, YAML and CSV."""

import csv
import io
import json
from collections.abc import Callable
from random import Random
from typing import Any

Mutation = Callable[[bytes, Random], bytes]


class Raw(str):
    """JSON text that is put in as it is."""


class Pairs(list[list[Any]]):
    """An object of JSON, in which a key may occur twice."""


VALUES = [
    *("null", "true", "false", "0", "-1", "3", "1.5", "-0.0", "1e-400", "1e999", "-1e999"),
    *("NaN", "-Infinity", "1" + "0" * 20, "9" * 5000, "9223372036854775808", "1000000000000"),
    *('""', '" "', '"\\ud800"', '"\\u0000"', '"\\n"', '"a\\u2028b"', '"../../x"', '"nan"'),
    *("[]", "{}", "[null]", "[[1]]", '{"a": 1, "a": 2}', '"' + "x" * 100_000 + '"'),
    *("[" * 100_000 + "]" * 100_000, "[" * 900 + "]" * 900, '{"a":' * 5000 + "1" + "}" * 5000),
]
"""JSON that may stand where something else is expected."""

YAML_VALUES = [
    *("~", "yes", ".nan", ".inf", "0x1F", "1_000", "2001-01-01", "!!binary x", "&a [*a]", "*a"),
    *("!!python/object/apply:os.mkdir ['code-ran']", "!!set {x}", "{<<: x}", "!unknown x"),
    *("!!int x", "!!float [1]", "!!timestamp x", "? x", "[1, ", '"\\ud800"', "1e3", "4.0"),
]
CELLS = [
    *("", " ", "nan", "NaN", "inf", "-inf", "1e999", "-1", "0", "1", "0.5", "999999999999", "1e9"),
    *(
        "9" * 400,
        "x" * 100_000,
        '"',
        "a\nb",
        "a,b",
        "a\tb",
        "\x00",
        "true",
        "=1+1",
        "\ufeff",
        "None",
    ),
]
ACTIONS = ("value", "value", "value", "remove", "double", "rename", "swap", "nest")


def mutate_bytes(content: bytes, random: Random) -> bytes:
    """One to four changes of single bytes or pieces."""
    for _ in range(random.choice((1, 1, 2, 4))):
        content = random.choice(BYTE_CHANGES)(content, random)
    return content


def _piece(content: bytes, random: Random) -> tuple[int, int]:
    begin = random.randint(0, len(content))
    return begin, min(len(content), begin + random.choice((1, 2, 8, 100, 5000)))


def _flip(content: bytes, random: Random) -> bytes:
    if not content:
        return b"\x00"
    at = random.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]


def _cut(content: bytes, random: Random) -> bytes:
    return content[: random.randint(0, len(content))]


def _remove(content: bytes, random: Random) -> bytes:
    begin, end = _piece(content, random)
    return content[:begin] + content[end:]


def _repeat(content: bytes, random: Random) -> bytes:
    begin, end = _piece(content, random)
    return content[:end] + content[begin:end] * random.choice((1, 1, 50)) + content[end:]


def _insert(content: bytes, random: Random) -> bytes:
    at = random.randint(0, len(content))
    put = random.choice((b"\x00", b"\xff", b"\n", b'"', b"\xed\xa0\x80", b"{", b"]", b",", b"\r"))
    return content[:at] + put * random.choice((1, 1, 3)) + content[at:]


def _swap(content: bytes, random: Random) -> bytes:
    (a, b), (c, d) = sorted((_piece(content, random), _piece(content, random)))
    b = min(b, c)
    return content[:a] + content[c:d] + content[b:c] + content[a:b] + content[d:]


def _encode(content: bytes, random: Random) -> bytes:
    text = content.decode("latin-1")
    return text.encode(random.choice(("utf-16", "utf-8-sig", "utf-32", "utf-8")))


BYTE_CHANGES: list[Mutation] = [_flip, _flip, _cut, _remove, _repeat, _insert, _swap, _encode]


def mutate_json(
    content: bytes, random: Random, values: list[str] = VALUES, least: int = 1
) -> bytes:
    """Some values replaced, removed, doubled, renamed, moved or put into others."""
    try:
        tree: list[Any] = [json.loads(content, object_pairs_hook=_pairs)]
    except ValueError:
        return mutate_bytes(content, random)
    for _ in range(least - 1 + random.choice((1, 1, 1, 2, 4))):
        places = _places(tree)
        if places:
            _change(*random.choice(places), random, values)
    return dumped(tree[0] if tree else Raw("")).encode()


def _pairs(found: list[tuple[str, Any]]) -> Pairs:
    return Pairs([list(pair) for pair in found])


def _places(tree: list[Any]) -> list[tuple[list[Any], int]]:
    """Every value as a list and the place in it; a value of an object stands behind its key."""
    found = []
    open_ = [tree]
    while open_:
        holder = open_.pop()
        for i, item in enumerate(holder):
            found.append((holder, i))
            value = item[1] if isinstance(holder, Pairs) else item
            if isinstance(value, list):
                open_.append(value)
    return found


def _change(holder: list[Any], i: int, random: Random, values: list[str]) -> None:
    action = random.choice(ACTIONS)
    in_object = isinstance(holder, Pairs)
    old = holder[i][1] if in_object else holder[i]
    new: Any = None
    if action == "value":
        new = Raw(random.choice(values))
    elif action == "nest":
        new = random.choice(([old], Pairs([["input", old]]), Raw(json.dumps(dumped(old)))))
    if new is not None:
        holder[i] = [holder[i][0], new] if in_object else new
    elif action == "remove":
        del holder[i]
    elif action == "double":
        holder.insert(random.randint(0, len(holder)), holder[i])
    elif action == "rename" and in_object:
        name = random.choice(("", "x", "input", "\ud800", holder[i][0].upper(), "pairs", "a/b"))
        holder[i] = [name, old]
    else:
        j = random.randrange(len(holder))
        holder[i], holder[j] = holder[j], holder[i]


def dumped(value: Any) -> str:
    """JSON text."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(key)}: {dumped(x)}" for key, x in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumped, value)) + "]"
    return json.dumps(value)


def mutate_yaml(content: bytes, random: Random) -> bytes:
    """As JSON, which is YAML too, with values that only YAML has."""
    import yaml

    as_json = json.dumps(yaml.safe_load(content)).encode()
    values = YAML_VALUES if random.random() < 0.6 else [x for x in VALUES if len(x) < 10_000]
    return mutate_json(as_json, random, values)


def mutate_lines(content: bytes, random: Random) -> bytes:
    """One line of JSON lines changed, removed or doubled."""
    lines = content.splitlines(keepends=True)
    i = random.randrange(len(lines))
    put = random.choice(([mutate_json(lines[i], random) + b"\n"], [], [lines[i]] * 2, [b"\n"]))
    return b"".join([*lines[:i], *put, *lines[i + 1 :]])


def mutate_table(content: bytes, random: Random) -> bytes:
    """Cells, rows, columns or the header of a table changed."""
    mark = "\t" if b"\t" in content else ","
    rows = list(csv.reader(io.StringIO(content.decode()), delimiter=mark))
    for _ in range(random.choice((1, 1, 2, 5))):
        _change_table(rows, random)
    if random.random() < 0.1:
        mark = random.choice(",;\t|")
    kept = io.StringIO()
    csv.writer(kept, delimiter=mark, lineterminator=random.choice(("\n", "\r\n"))).writerows(rows)
    return kept.getvalue().encode()


def _change_table(rows: list[list[str]], random: Random) -> None:
    action = random.choice(("cell", "cell", "cell", "row", "drop", "column", "header", "longer"))
    if not rows:
        rows.append(["x"])
    i = random.randrange(len(rows))
    row = rows[i] or [""]
    if action == "cell":
        row[random.randrange(len(row))] = random.choice(CELLS)
    elif action == "row":
        rows.insert(random.randint(0, len(rows)), list(row))
    elif action == "drop":
        del rows[i:]
    elif action == "column":
        j = random.randrange(len(row))
        for other in rows:
            del other[j : j + 1]
    elif action == "header" and rows[0]:
        names = [*rows[0], "", "x", "input"]
        rows[0][random.randrange(len(rows[0]))] = random.choice(names)
    else:
        row.extend(["x"] * random.choice((1, 2, 2000)))
