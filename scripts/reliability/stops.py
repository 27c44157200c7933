"""Commands killed or interrupted at random moments, and run again to the end."""

import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

from reliability.children import Ended, Stop, start, tvlens_command
from reliability.commands import Command, folders, left_over
from reliability.counts import FINE, Counts, Verdict, shortened

MOST_IN_A_ROW = 4
"""How often one run folder is stopped before it may end."""


def stops(
    command: Command, folder: Path, n: int, numbers: tuple[int, ...], seed: int
) -> Iterator[tuple[str, Verdict]]:
    """At least `n` stops of a command by these signals, each named, with what came of it."""
    random_ = random.Random(f"stops {command.name} {numbers} {seed}")
    done = 0
    for out in folders(folder, command.name):
        if done >= n:
            return
        sent: list[Stop] = []
        verdict, end = FINE, None
        for _ in range(random_.randint(1, MOST_IN_A_ROW)):
            stop = moment(command, random_.choice(numbers), random_)
            ended = start(tvlens_command(command.words, out, stop)).wait(stop)
            if ended.status == 0 and not ended.broken:
                end = ended  # it was done before
                break
            sent.append(stop)
            verdict = of_stop(ended, stop)
            if verdict == FINE and all(each.number == signal.SIGINT for each in sent):
                verdict = left_over(out) or FINE  # a kill may leave what the next run removes
            if verdict != FINE:
                break
        if verdict == FINE:
            verdict = command.judge_end(out, end)
        done += len(sent)
        yield from [(f"{command.name}, {stop}", FINE) for stop in sent[:-1]]
        if sent or verdict != FINE:
            name = f"{out.parent.name}, {' then '.join(map(str, sent))}"
            yield name, verdict
        if verdict == FINE:
            shutil.rmtree(out.parent)


def moment(command: Command, number: int, random_: random.Random) -> Stop:
    """A moment of the run: by the clock, or one time in three by what it does to files."""
    if random_.random() < 1 / 3:
        return Stop(number, operation=random_.randint(1, command.operations))
    return Stop(number, seconds=random_.uniform(0, command.seconds))


def of_stop(ended: Ended, stop: Stop) -> Verdict:
    """What came of one stop: a kill and SIGTERM may end it as they do; Ctrl-C has words."""
    if stop.number != signal.SIGKILL and ended.after_stop > 20:
        return Verdict("hangs", f"ended {ended.after_stop:.0f} s after {stop}")
    if ended.broken:
        return ended.broken
    if stop.number == signal.SIGINT:
        line = ended.err.strip("\n")
        kind = (ended.status, line.startswith("error: Stopped."), line.count("\n"))
        if kind != (130, True, 0) or "--out" not in line:
            return Verdict("raw", f"status {ended.status}: {shortened(ended.err)}")
        return FINE
    if ended.status not in (-stop.number, 128 + stop.number):
        return Verdict("raw", f"status {ended.status}: {shortened(ended.err)}")
    return FINE


def stopped(
    commands: list[Command], folder: Path, n: int, numbers: tuple[int, ...], seed: int
) -> list[Counts]:
    """Every command stopped, `n` times in all."""
    word = "killed" if numbers == (signal.SIGKILL,) else "interrupted"
    found = []
    for i, command in enumerate(commands):
        counts = Counts(f"{command.name} {word}")
        share = n // len(commands) + (i < n % len(commands))
        for name, verdict in stops(command, folder / word, share, numbers, seed):
            counts.add(name, verdict)
        found.append(counts)
    return found
