"""The command: everything in turn, a table of counts, and status 1 if anything was wrong."""

import importlib
import logging
import os
import pkgutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}

import torch
import transformers
import typer

import tvlens
from reliability.commands import make_commands
from reliability.counts import Counts, report
from reliability.disks import pairs_at_once, small_disks
from reliability.fuzz import fuzzed
from reliability.stops import stopped
from tvlens.console import say


def import_all() -> None:
    """Import all that commands import, so that children need not; nothing may begin a thread."""
    for module in pkgutil.walk_packages(tvlens.__path__, "tvlens."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    torch.set_num_threads(1)
    if not sys.stdout.isatty():
        os.environ.setdefault("COLUMNS", "100")
    transformers.logging.set_verbosity_error()
    logging.disable()


def main(
    kills: Annotated[int, typer.Option(min=0, help="SIGKILLs in all.")] = 200,
    interrupts: Annotated[int, typer.Option(min=0, help="SIGINTs and SIGTERMs in all.")] = 40,
    disks: Annotated[int, typer.Option(min=0, help="Small disks for each command.")] = 5,
    pairs: Annotated[int, typer.Option(min=0, help="Pairs of processes for each command.")] = 4,
    inputs: Annotated[int, typer.Option(min=0, help="Damaged files in all.")] = 10_000,
    commands: Annotated[str, typer.Option(help="Which, of mediate, fit, train, study.")] = "",
    only: Annotated[str | None, typer.Option(help="Damaged files of KIND or KIND:NUMBER.")] = None,
    seed: int = 0,
) -> None:
    """Damaged files, kills, interrupts, small disks and two processes at once, counted."""
    import_all()
    with tempfile.TemporaryDirectory(prefix="tvr-") as made:
        folder = Path(made)
        parts = timed("damaged files", lambda: fuzzed(folder, inputs, seed, only)) if inputs else []
        if not only and kills + interrupts + disks + pairs:
            parts += stop_all(folder, kills, interrupts, disks, pairs, commands, seed)
        right = report(parts)
    raise typer.Exit(0 if right else 1)


def stop_all(
    folder: Path, kills: int, interrupts: int, disks: int, pairs: int, commands: str, seed: int
) -> list[Counts]:
    """All that is done to commands."""
    made = make_commands(folder, [name for name in commands.split(",") if name] or None)
    interrupting = (signal.SIGINT, signal.SIGINT, signal.SIGTERM)
    return [
        *timed("kills", lambda: stopped(made, folder, kills, (signal.SIGKILL,), seed)),
        *timed("interrupts", lambda: stopped(made, folder, interrupts, interrupting, seed)),
        *timed("small disks", lambda: small_disks(made, folder, disks, seed)),
        *timed("pairs", lambda: pairs_at_once(made, folder, pairs, seed)),
    ]


def timed(title: str, work: Callable[[], list[Counts]]) -> list[Counts]:
    """What was counted; says how long it took."""
    began = time.monotonic()
    found = work()
    say(f"{title}: {time.monotonic() - began:.0f} s")
    return found


if __name__ == "__main__":
    typer.run(main)
