"""Timings in turn, with a clock and a machine that are made up: no test waits, or is timed."""

import math
from collections.abc import Callable

import pytest
import torch

from tvlens import timing
from tvlens.errors import TvlensError
from tvlens.timing import Timings, doubts, ratios, time_in_turn, with_range


class Machine:
    """A clock that work moves on, by its seconds times how slow the machine is at that moment."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowdown: Callable[[float], float] = lambda now: 1.0
        self.done: list[str] = []

    def work(self, name: str, seconds: float) -> Callable[[], str]:
        def way() -> str:
            self.now += seconds * self.slowdown(self.now)
            self.done.append(name)
            return name.upper()

        return way


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()
    monkeypatch.setattr(timing.time, "perf_counter", lambda: made.now)
    return made


def machine_says(monkeypatch: pytest.MonkeyPatch, *readings: timing._Machine) -> None:
    following = iter(readings)
    monkeypatch.setattr(timing, "_read_machine", lambda: next(following))


def counted(own: float, busy: float, total: float) -> timing._Machine:
    return timing._Machine(clock=total / 2, own=own, cores=(busy, total))


def averaged(clock: float, own: float, load: float | None) -> timing._Machine:
    return timing._Machine(clock=clock, own=own, load=load)


def test_ways_take_turns_after_a_warm_up(machine):
    said: list[str] = []
    ways = {"a": machine.work("a", 3.0), "b": machine.work("b", 1.0), "c": machine.work("c", 2.0)}
    timings = time_in_turn(ways, 2, say=lambda line: said.append(f"{line} ({machine.now})"))
    assert "".join(machine.done) == "abcabcabc"
    assert timings.seconds == {"a": [3.0, 3.0], "b": [1.0, 1.0], "c": [2.0, 2.0]}
    assert timings.results == {"a": "A", "b": "B", "c": "C"}
    assert said == ["warm-up (0.0)", "round 1 of 2 (6.0)", "round 2 of 2 (12.0)"]


def test_the_warm_up_is_not_timed(machine):
    machine.slowdown = lambda now: 100.0 if now < 1 else 1.0
    ways = {"a": machine.work("a", 1.0), "b": machine.work("b", 1.0)}
    assert time_in_turn(ways, 3).seconds == {"a": [1.0] * 3, "b": [1.0] * 3}


def test_a_machine_that_becomes_slow_halfway_leaves_the_ratio(machine):
    """Timed A A A A B B B B, the same ways look as fast as each other, or worse."""
    slow, fast = machine.work("slow", 10.0), machine.work("fast", 1.0)
    machine.slowdown = lambda now: 10.0 if now >= 11 + 2 * 11 else 1.0
    timings = time_in_turn({"slow": slow, "fast": fast}, 4)
    assert timings.seconds["slow"] == [10.0, 10.0, 100.0, 100.0]
    assert ratios(timings.seconds["slow"], timings.seconds["fast"]) == [10.0] * 4

    machine.now = 0.0
    machine.slowdown = lambda now: 10.0 if now >= 40 else 1.0
    blocks = []
    for way in (slow, fast):
        start = machine.now
        for _ in range(4):
            way()
        blocks.append(machine.now - start)
    assert blocks[0] / blocks[1] == 1.0


def test_one_bad_round_shows_in_the_range_and_not_in_the_median():
    found = with_range("speedup", ratios([10.0, 90.0, 12.0, 11.0, 8.0], [1.0, 1.0, 1.0, 1.0, 4.0]))
    assert found == {"speedup": 11.0, "speedup_low": 2.0, "speedup_high": 90.0}
    assert with_range("x", [4.0, 1.0]) == {"x": 2.5, "x_low": 1.0, "x_high": 4.0}


def test_the_ratio_is_taken_within_each_round():
    assert ratios([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
    with pytest.raises(ValueError):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(("names", "rounds"), [("", 3), ("ab", 0), ("ab", -1)])
def test_nothing_to_time_is_refused(names, rounds):
    with pytest.raises(TvlensError, match="expected at least one of each"):
        time_in_turn({name: lambda: None for name in names}, rounds)


# --- was the machine idle? ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "idle"), [(0.0, True), (1.9, True), (2.1, False), (10.0, False)]
)
def test_other_processes_are_what_this_one_has_not_used(monkeypatch, others, idle):
    """10 s on two cores, of which this process uses one throughout."""
    machine_says(monkeypatch, counted(5.0, 80.0, 100.0), counted(15.0, 90.0 + others, 120.0))
    timings = time_in_turn({"a": lambda: None}, 1)
    assert timings.other_load == pytest.approx(others / 20)
    assert timings.conditions["idle"] is idle
    assert bool(doubts(timings.conditions)) is not idle


def test_this_process_is_not_one_of_the_others(monkeypatch):
    """Ticks of the system are coarser than the seconds of a process."""
    machine_says(monkeypatch, counted(0.0, 0.0, 0.0), counted(20.0, 19.98, 20.0))
    assert time_in_turn({"a": lambda: None}, 1).other_load == 0.0


def test_a_busy_machine_is_said():
    (line,) = doubts(Timings({"a": [1.0]}, {}, 0.625).conditions)
    assert line == (
        "the machine was busy: other processes used 62% of its cores during the timings, more "
        "than 10%"
    )


def test_only_the_rounds_count(monkeypatch, machine):
    """The machine is read when the warm-up is done, and when the last round is."""
    when: list[int] = []

    def read() -> timing._Machine:
        when.append(len(machine.done))
        return counted(0.0, 0.0, float(len(when)))

    monkeypatch.setattr(timing, "_read_machine", read)
    time_in_turn({"a": machine.work("a", 1.0), "b": machine.work("b", 1.0)}, 3)
    assert when == [2, 8]


@pytest.mark.parametrize("seconds", [1.0, 60.0, 6000.0])
@pytest.mark.parametrize("others", [0.0, 2.0])
def test_the_load_average_stands_in_where_cores_are_not_counted(monkeypatch, seconds, others):
    """One thread of this process for `seconds`: the average has come that close to one."""
    grown = others + 1 - math.exp(-seconds / 60)
    monkeypatch.setattr(timing.os, "cpu_count", lambda: 4)
    machine_says(monkeypatch, averaged(0.0, 0.0, others), averaged(seconds, seconds, grown))
    timings = time_in_turn({"a": lambda: None}, 1)
    assert timings.other_load == pytest.approx(others / 4, abs=1e-6)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (averaged(0.0, 0.0, None), averaged(9.0, 9.0, None)),
        (averaged(0.0, 0.0, 0.5), averaged(0.0, 0.0, 0.5)),
        (counted(0.0, 0.0, 0.0), counted(9.0, 0.0, 0.0)),
    ],
    ids=["no load average", "no time", "counts that stand still"],
)
def test_what_the_system_does_not_tell_is_not_called_idle(monkeypatch, before, after):
    machine_says(monkeypatch, before, after)
    timings = time_in_turn({"a": lambda: None}, 1)
    assert timings.other_load is None
    assert timings.conditions == {"rounds": 1, "threads": torch.get_num_threads()}
    assert doubts(timings.conditions) == [
        "this system does not tell whether other processes were busy"
    ]


def test_seconds_of_cores_are_read_from_the_first_line(monkeypatch, tmp_path):
    file = tmp_path / "stat"
    file.write_text("cpu  100 20 30 4000 50 6 7 8 90 10\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 5\n")
    monkeypatch.setattr(timing, "_PROC_STAT", file)
    monkeypatch.setattr(timing.os, "sysconf", lambda name: {"SC_CLK_TCK": 10}[name])
    assert timing._core_seconds() == pytest.approx((17.1, 422.1)), "neither idle nor iowait is busy"
    monkeypatch.setattr(timing, "_PROC_STAT", tmp_path / "none")
    assert timing._core_seconds() is None


def test_a_system_without_a_load_average_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_PROC_STAT", tmp_path / "none")
    monkeypatch.delattr(timing.os, "getloadavg", raising=False)
    found = timing._read_machine()
    assert (found.cores, found.load) == (None, None)


def test_this_machine_can_be_read():
    load = time_in_turn({"a": lambda: None}, 1).other_load
    assert load is None or 0 <= load <= 1


# --- is the range wide? ---------------------------------------------------------------------------

IDLE = Timings({"a": [1.0] * 3}, {}, 0.0).conditions


def test_a_wide_range_is_said_and_a_narrow_one_is_not():
    narrow, wide = with_range("narrow", [10.0, 12.0, 14.9]), with_range("wide", [10.0, 12.0, 15.2])
    assert doubts(narrow | IDLE) == []
    assert doubts(narrow | wide | IDLE) == ["wide ranges from 10 to 15.2 among the rounds"]


def test_every_doubt_is_said():
    busy = Timings({"a": [1.0]}, {}, 1.0).conditions
    assert len(doubts(with_range("x", [1.0, 3.0]) | with_range("y", [1.0, 2.0]) | busy)) == 3
