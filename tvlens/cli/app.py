"""The `tvlens` command: the words it knows. What they do stands in the module of their shelf.

Nothing here imports torch. Commands do when they run, once the names that they were given are
found, so that help, lists and most mistakes come at once.
"""

import signal
import sys
import threading
import warnings
from types import FrameType
from typing import Annotated, Any

import typer

from tvlens import __version__
from tvlens.cli import (
    ablation,
    bench,
    models,
    patching,
    report,
    scores,
    studies,
    tables,
    vectors,
)
from tvlens.console import complain, say
from tvlens.errors import TvlensError

app = typer.Typer(
    help="Which attention heads carry a task, and does a learned answer agree with a causal one?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
study_app = typer.Typer(help="The whole study of several tasks.", no_args_is_help=True)
regression_app = typer.Typer(
    help="Transformers that learn functions in context.", no_args_is_help=True
)
bench_app = typer.Typer()
app.add_typer(study_app, name="study")
app.add_typer(bench_app, name="bench")
app.add_typer(regression_app, name="regression")

app.command("models")(models.list_models)
app.command("tasks")(models.list_tasks)
app.command("mediate")(scores.mediate)
app.command("patch")(patching.patch)
app.command("score")(scores.score)
app.command("ablate")(ablation.ablate)
app.command("fit")(vectors.fit)
app.command("evaluate")(vectors.evaluate)
app.command("compare")(scores.compare)
app.command("report")(report.report)
app.command("table")(tables.table)
bench_app.callback(invoke_without_command=True)(bench.bench_text)
bench_app.command("patching")(bench.bench_patching)
bench_app.command("ablation")(bench.bench_ablation)
study_app.command("text")(studies.study_text)
study_app.command("regression")(studies.study_regression)
regression_app.command("train")(models.train_regression)
regression_app.command("bench")(bench.bench_regression)
regression_app.command("models")(models.list_regression_models)


def _say_version(asked: bool) -> bool:
    if asked:
        say(f"tvlens {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", "-V", callback=_say_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """What can be asked of the program as a whole."""


class Stopped(BaseException):
    """Ctrl-C."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped


def _interrupt_main() -> None:
    if sys.platform == "win32":
        signal.raise_signal(signal.SIGINT)
    else:
        # To that thread, so that it wakes from whatever it waits for.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _stop_again(missed: Any) -> None:
    """Ctrl-C that came while Python let go of an object, where it swallows what is raised."""
    if isinstance(missed.exc_value, Stopped):
        threading.Timer(0.01, _interrupt_main).start()
    else:
        sys.__unraisablehook__(missed)


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    complain(str(message), "warning")


def main() -> None:
    """Run the command line; mistakes and Ctrl-C end in one line, not in a traceback."""
    # Click turns a KeyboardInterrupt into a word that does not say how to go on.
    before = signal.getsignal(signal.SIGINT)
    if callable(before):
        signal.signal(signal.SIGINT, _stop)
    hook, sys.unraisablehook = sys.unraisablehook, _stop_again
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            app()
    except TvlensError as error:
        complain(str(error))
        sys.exit(2)
    except Stopped:
        kept = any(word.split("=")[0] == "--out" for word in sys.argv)
        more = " What is finished is kept in --out: the same command goes on from there."
        complain(f"Stopped.{more if kept else ''}")
        sys.exit(130)
    finally:
        sys.unraisablehook = hook
        if callable(before):
            signal.signal(signal.SIGINT, before)
