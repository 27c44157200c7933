"""Ways to the same end, timed in turn, and whether the machine was idle meanwhile.

Timed one after the other, A A A B B B, a way looks slow when the machine became slow. In rounds,
A B A B A B, both are slowed down alike, and the ratio within a round stays what it was.
"""

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias

import torch

from tvlens.errors import TvlensError

Figures: TypeAlias = dict[str, float | int]
"""Finite numbers and booleans by name; a median `x` has its range in `x_low` and `x_high`."""

BUSY = 0.1
"""Share of the machine's cores that other processes may use before timings are in doubt."""

WIDE = 1.5
"""Largest over smallest value of a figure among the rounds beyond which it is in doubt."""

_PROC_STAT = Path("/proc/stat")


@dataclass(frozen=True)
class Timings:
    """How long several ways took.

    Attributes:
        seconds: of every way in every round, by name.
        results: what every way returned in its warm-up, by name.
        other_load: share of the machine's cores that other processes used during the rounds, 0 to
            1; None where the system does not tell.
    """

    seconds: Mapping[str, list[float]]
    results: Mapping[str, Any]
    other_load: float | None

    @property
    def conditions(self) -> Figures:
        """`rounds`, `threads` of torch and, where the system tells, `other_load` and `idle`."""
        n_rounds = len(next(iter(self.seconds.values())))
        found: Figures = {"rounds": n_rounds, "threads": torch.get_num_threads()}
        if self.other_load is not None:
            found |= {"other_load": self.other_load, "idle": self.other_load <= BUSY}
        return found


def time_in_turn(
    ways: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    say: Callable[[str], None] = lambda _: None,
) -> Timings:
    """Time several ways in rounds A B C A B C, after one warm-up of each that is not timed.

    Args:
        ways: what to time, by name.
        rounds: how often each is timed.
        say: called with a line of text when the warm-up or a round begins.

    Returns:
        Seconds of every way in every round.

    Raises:
        TvlensError: there is no way or no round.
    """
    if not ways or rounds < 1:
        raise TvlensError(f"{len(ways)} ways in {rounds} rounds; expected at least one of each")
    say("warm-up")
    results = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    before = _read_machine()
    for n in range(rounds):
        say(f"round {n + 1} of {rounds}")
        for name, way in ways.items():
            start = _clock()
            way()
            seconds[name].append(_clock() - start)
    return Timings(seconds, results, _other_load(before, _read_machine()))


def ratios(of: Sequence[float], to: Sequence[float]) -> list[float]:
    """Returns the first over the second, round by round."""
    return [a / b for a, b in zip(of, to, strict=True)]


def with_range(name: str, values: Sequence[float]) -> Figures:
    """Returns the median of the rounds as `name`, their range as `name_low` and `name_high`."""
    return {name: median(values), f"{name}_low": min(values), f"{name}_high": max(values)}


def doubts(figures: Figures) -> list[str]:
    """Why figures are not to be quoted.

    Args:
        figures: medians with their ranges, and the `conditions` of their timings.

    Returns:
        One line for each reason: other processes used more than `BUSY` of the machine, or nobody
        knows whether they did; a figure's range is wider than `WIDE`.
    """
    found = []
    if "idle" not in figures:
        found.append("this system does not tell whether other processes were busy")
    elif not figures["idle"]:
        found.append(
            f"the machine was busy: other processes used {figures['other_load']:.0%} of its cores "
            f"during the timings, more than {BUSY:.0%}"
        )
    for name in figures:
        low, high = (figures.get(f"{name}_{end}") for end in ("low", "high"))
        if low is not None and high is not None and high > WIDE * low:
            found.append(f"{name} ranges from {low:.3g} to {high:.3g} among the rounds")
    return found


def _clock() -> float:
    """Seconds, after everything that an accelerator was given to do is done."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class _Machine:
    """What the system has counted until now, all in seconds but the load.

    `own` is what this process and its ended children have used of the cores; `cores` what anything
    has used of all cores together, and what it could have, where the system counts that; `load` the
    number of processes that run or wait for a core, averaged over the last minute.
    """

    clock: float
    own: float
    cores: tuple[float, float] | None = None
    load: float | None = None


def _read_machine() -> _Machine:
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):  # Windows
        load = None
    return _Machine(time.perf_counter(), sum(os.times()[:4]), _core_seconds(), load)


def _core_seconds() -> tuple[float, float] | None:
    """Seconds that all cores together were busy, and that they were there; Linux counts them."""
    try:
        first = _PROC_STAT.read_text(encoding="ascii").splitlines()[0]
    except OSError:
        return None
    # user nice system idle iowait irq softirq steal; guests, behind them, are counted in user.
    ticks = [int(field) for field in first.split()[1:9]]
    waiting = sum(ticks[3:5])
    per_second = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - waiting) / per_second, sum(ticks) / per_second


def _other_load(before: _Machine, after: _Machine) -> float | None:
    """Share of the cores that other processes used between the two; None if it is not known."""
    own = after.own - before.own
    if before.cores is None or after.cores is None:
        share = _load_of_others(before, after, own)
    else:
        busy, total = (now - then for then, now in zip(before.cores, after.cores, strict=True))
        # Where they stand still, as in some sandboxes, they are not counted.
        share = (busy - own) / total if total > 0 else None
    return None if share is None else min(max(share, 0.0), 1.0)


def _load_of_others(before: _Machine, after: _Machine, own: float) -> float | None:
    """The same from the load average, roughly: it has seen no more of this process than it can."""
    seconds = after.clock - before.clock
    if after.load is None or seconds <= 0:
        return None
    seen = own / seconds * -math.expm1(-seconds / 60)
    return (after.load - seen) / (os.cpu_count() or 1)
