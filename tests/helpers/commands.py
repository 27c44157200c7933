"""Commands run in this process, as tests of the command line see them."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import typer.testing

from tvlens.cli import app as cli
from tvlens.errors import TvlensError


class Result(NamedTuple):
    code: int
    out: str
    err: str
    error: BaseException | None


def run(*words: object) -> Result:
    """A command in this process; a mistake is left as the exception that `main` prints."""
    # A line of progress, which comes after half a minute, would be one of the error stream.
    runner = typer.testing.CliRunner(env={"TQDM_DISABLE": "1"})
    result = runner.invoke(cli.app, [str(word) for word in words])
    error = None if isinstance(result.exception, SystemExit) else result.exception
    return Result(result.exit_code, result.stdout, result.stderr, error)


def ok(*words: object) -> str:
    """What a command that must succeed prints; no line of it is cut or wider than 100."""
    result = run(*words)
    if result.error is not None:
        raise result.error
    assert result.code == 0, result.err
    assert result.err == ""
    assert "…" not in result.out
    tables = [line for line in result.out.splitlines() if line[:1] in "┏┃┡│└"]
    assert all(len(line) <= 100 for line in tables)
    return result.out


def mistake(*words: object, kind: type[TvlensError]) -> str:
    """The message of a command that a user got wrong."""
    result = run(*words)
    assert isinstance(result.error, kind), result
    assert result.out.count("\n") <= 1, "nothing but the lens is said before the mistake"
    return str(result.error)


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def outcome(folder: Path) -> dict[str, bytes]:
    """All files that the user reads, by name."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in ("manifest.json", ".tvlens-lock")
        and "steps" not in path.parts
    }


def finish_killed(folder: Path, command: list[str], until: Path, env: dict[str, str]) -> None:
    """Runs a command until a file appears, then kills it as the system would."""
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 240
        while not until.exists():
            assert process.poll() is None, "the command ended before it could be killed"
            assert time.monotonic() < deadline, f"{until} never appeared"
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(timeout=60)
