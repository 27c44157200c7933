"""Writes the shipped tasks, tvlens/tasks/text/data/*.json, or checks that they are what it writes.

    pip install -r scripts/requirements-tasks.txt
    python scripts/build_tasks.py            # writes the files
    python scripts/build_tasks.py --check    # exit status 1 if a committed file differs

The result depends only on this folder and on the pinned libraries, never on time, place or network.
"""

import argparse
import json
import os
import sys
from collections import Counter
from pathlib import Path

from task_relations import all_relations
from task_relations.core import Relation

DATA = Path(__file__).parents[1] / "tvlens" / "tasks" / "text" / "data"
FEWEST = 40


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0, or 1 if the committed files differ from a fresh build."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    parser.add_argument("--data", type=Path, default=DATA, help="folder of the task files")
    options = parser.parse_args(arguments)
    built = build()
    present = {path.name: path.read_text(encoding="utf-8") for path in options.data.glob("*.json")}
    if options.check:
        missing = [f"{name}: missing" for name in built.keys() - present.keys()]
        foreign = [f"{name}: not built by this script" for name in present.keys() - built.keys()]
        stale = [f"{n}: differs" for n in built.keys() & present.keys() if built[n] != present[n]]
        differing = sorted(missing + foreign + stale)
        print("\n".join(differing) or f"{len(built)} task files are up to date")
        return 1 if differing else 0
    options.data.mkdir(parents=True, exist_ok=True)
    for name in present.keys() - built.keys():
        (options.data / name).unlink()
    for name, text in built.items():
        partial = options.data / f".{name}.partial"
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, options.data / name)
    print(f"{len(built)} task files written to {options.data}")
    return 0


def build() -> dict[str, str]:
    """Content of every task file, by file name."""
    relations = all_relations()
    twice = [name for name, k in Counter(relation.name for relation in relations).items() if k > 1]
    if twice:
        raise ValueError(f"two relations have the name {twice[0]!r}")
    for relation in relations:
        verify(relation)
    return {f"{relation.name}.json": render(relation) for relation in relations}


def verify(relation: Relation) -> None:
    """Nothing.

    Raises:
        ValueError: Too few pairs, an empty string, an input that occurs twice, or equal sides.
    """
    problems = [f"{a!r} -> {b!r}" for a, b in relation.pairs if not a or not b or a == b]
    inputs = Counter(a for a, _ in relation.pairs)
    problems += [f"{a!r} occurs {count} times" for a, count in inputs.items() if count > 1]
    if len(relation.pairs) < FEWEST:
        problems.append(f"{len(relation.pairs)} pairs, at least {FEWEST} expected")
    if problems:
        raise ValueError(f"{relation.name}: {'; '.join(problems)}")


def render(relation: Relation) -> str:
    """The file: one JSON object, one pair a line."""
    header = {
        "name": relation.name,
        "description": relation.description,
        "source": relation.origin.source,
        "licence": relation.origin.licence,
    }
    lines = [f"  {_json(key)}: {_json(value)}," for key, value in header.items()]
    pairs = [f"    {_json({'input': a, 'output': b})}" for a, b in relation.pairs]
    return "\n".join(["{", *lines, '  "pairs": [', ",\n".join(pairs), "  ]", "}", ""])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


if __name__ == "__main__":
    sys.exit(main())
