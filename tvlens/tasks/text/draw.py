"""Seeded choices behind `Task.prompts`: which pairs are asked, shown, and with which labels.

Every choice has its own `random.Random`, seeded with a string that says what it is for, for example
`"tvlens/demos/seed=0/split=train/shots=10/prompt=3"`. Python hashes such strings with SHA-512, so a
choice is the same on every machine, does not depend on how many prompts were drawn before it, and
never shares its stream with another one.
"""

import random
from collections import Counter
from collections.abc import Sequence
from functools import partial

from tvlens.errors import TaskError
from tvlens.tasks.streams import stream
from tvlens.tasks.text.prompts import Pair

_TRIES = 20


def draw_queries(pool: Sequence[Pair], n: int | None, *, seed: int, split: str) -> list[Pair]:
    """The pairs to ask: all in order for `n=None`, else the first `n` of shuffled rounds.

    No pair is asked a second time before every pair has been asked once, and a smaller `n` gives a
    prefix of what a larger one gives.
    """
    if n is None:
        return list(pool)
    queries: list[Pair] = []
    for round_number in range(-(-n // len(pool))):
        order = list(pool)
        stream("queries", seed=seed, split=split, round=round_number).shuffle(order)
        queries += order
    return queries[:n]


def shuffle_labels(
    demos: Sequence[Pair], others: Sequence[Pair], rng: random.Random
) -> tuple[Pair, ...]:
    """The demonstrations with their outputs permuted; as few as possible keep their own.

    With `k` demonstrations of which at most `m` share one output, `max(0, 2m - k)` must keep it; no
    more do. In a list sorted by output, taking the label `m` places further on reaches that bound.
    The list is put in random order first, so that the permutation is random. Demonstrations that
    all have one output (always so with one shot) take the outputs of other pairs, since no
    permutation could change them. Where inputs have several right answers, a label may be right
    without being its own: the permutation with the fewest such labels of some is taken.

    Raises:
        TaskError: All demonstrations and all other pairs have the same output.
    """
    counts = Counter(demo.output for demo in demos)
    if len(counts) == 1:
        own = demos[0].output
        foreign = [pair.output for pair in others if pair.output != own]
        if not foreign:
            raise TaskError(
                f"labels cannot be shuffled: every train pair has the output {own!r}, and a "
                "shuffled label must differ from the true one; use a task with at least two "
                "different outputs, or kind='zero'"
            )
        wrong = [[text for text in foreign if text not in demo.also] or foreign for demo in demos]
        return tuple(
            Pair(demo.input, rng.choice(labels)) for demo, labels in zip(demos, wrong, strict=True)
        )
    best = _permuted(demos, rng)
    for _ in range(_TRIES if any(demo.also for demo in demos) else 0):
        best = min(best, _permuted(demos, rng), key=partial(_n_right, demos))
    return best


def _n_right(demos: Sequence[Pair], shown: Sequence[Pair]) -> int:
    return sum(label.output in demo.answers for demo, label in zip(demos, shown, strict=True))


def _permuted(demos: Sequence[Pair], rng: random.Random) -> tuple[Pair, ...]:
    counts = Counter(demo.output for demo in demos)
    groups = list(counts)
    rng.shuffle(groups)
    positions: list[int] = []
    for output in groups:
        members = [i for i, demo in enumerate(demos) if demo.output == output]
        rng.shuffle(members)
        positions += members
    shift = max(counts.values())
    shown = {
        position: demos[positions[(rank + shift) % len(positions)]].output
        for rank, position in enumerate(positions)
    }
    return tuple(Pair(demo.input, shown[i]) for i, demo in enumerate(demos))
