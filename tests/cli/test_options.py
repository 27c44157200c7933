"""What the command line says of itself agrees with what stands behind it; words are completed."""

import inspect
from dataclasses import fields
from typing import get_args

import pytest
import typer.testing

from helpers import trained
from helpers.commands import ok
from tvlens import tasks
from tvlens.cli import app as cli
from tvlens.cli import models, options, studies
from tvlens.lens import loading
from tvlens.models.catalogue import BUNDLED, list_shipped
from tvlens.models.regression import training
from tvlens.studies.regression import RegressionSettings
from tvlens.studies.text import TextSettings
from tvlens.tasks.regression.inputs import SHIFTS
from tvlens.vectors.ltv.settings import FitSettings

pytestmark = pytest.mark.usefixtures("wide")


def default(settings: type, name: str) -> object:
    return next(field.default for field in fields(settings) if field.name == name)


def test_words_of_the_command_line_are_those_of_the_library():
    assert options.BackendKind == loading.BackendKind
    assert options.BackendKind in get_args(options.BackendOption)
    assert models.Precision == training.Precision
    said = " ".join(ok("regression", "train", "-h").replace("│", " ").split())
    assert f"Sizes and schedule: {', '.join(training.PRESETS)}." in said


def test_defaults_of_studies_are_those_of_their_settings():
    said = " ".join(ok("study", "regression", "-h").replace("│", " ").split())
    for name, option in (("n_test", "--n-test"), ("ltv_seeds", "--ltv-seeds")):
        value = default(RegressionSettings, name)
        assert f"[default: ({value})]" in said.split(option)[1].split(" --")[0]
    # A list so long is broken where it is shown.
    assert f"[default:({','.join(SHIFTS)})]" in said.replace(" ", "")
    assert default(RegressionSettings, "shifts") == tuple(SHIFTS)
    asked = inspect.signature(studies.study_text).parameters
    for name in ("seed", "shots", "ltv_seeds", "n_means", "n_test", "control_draws"):
        assert asked[name].default == default(TextSettings, name), name
    assert asked["n_validation"].default == default(FitSettings, "n_validation")


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version(flag):
    assert ok(flag) == "tvlens 0.1.0\n"


@pytest.mark.parametrize(
    "command", ["", "models", "study", "study text", "regression", "regression train"]
)
def test_h_is_help(command):
    assert ok(*command.split(), "-h") == ok(*command.split(), "--help")


def completed(words: str) -> list[str]:
    """What the shell is told where Tab is pressed behind these words of `tvlens`."""
    env = {
        "_TVLENS_COMPLETE": "complete_bash",
        "COMP_WORDS": f"tvlens {words}",
        "COMP_CWORD": str(len(words.split(" "))),
    }
    runner = typer.testing.CliRunner(env=env)
    return runner.invoke(cli.app, [], prog_name="tvlens").stdout.split()


def test_names_of_tasks_are_completed():
    assert completed("fit --tasks present-") == ["present-past"]
    assert completed("bench --task present-p") == ["present-past"]
    assert completed("mediate --tasks ") == tasks.names()
    assert completed("study text --tasks present-past,past-p") == ["present-past,past-present"]
    assert completed("fit --tasks present-past,present-") == []


def test_names_of_tasks_in_a_folder_are_completed(tmp_path):
    data = trained.save_tasks(tmp_path / "data")
    assert completed(f"fit --data {data} --tasks seven-on,f") == (
        ["seven-on,fourteen-on", *(f"seven-on,{x}" for x in tasks.names() if x[0] == "f")]
    )
    assert completed(f"fit --data {tmp_path / 'nowhere'} --tasks present-") == ["present-past"]


def test_names_of_models_are_completed():
    assert completed("fit --model s") == list(BUNDLED)
    assert completed("regression train --start linear") == (
        [name for name in list_shipped() if name.startswith("linear")]
    )
    assert completed("study regression --functions linear,r") == ["linear,relu"]


def test_completion_can_be_installed(monkeypatch):
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    assert "_TVLENS_COMPLETE=complete_bash" in (
        typer.testing.CliRunner()
        .invoke(cli.app, ["--show-completion", "bash"], prog_name="tvlens")
        .stdout
    )
