"""`tvlens patch`, as a user calls it."""

import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from helpers import trained, zoo
from helpers.commands import finish_killed, manifest, mistake, ok, outcome, run
from tvlens import tasks
from tvlens.cli import app as cli
from tvlens.errors import RunError
from tvlens.lens.loading import load
from tvlens.scores.attribution import attribution_patch
from tvlens.scores.effects import COLUMNS
from tvlens.scores.patching import patch
from tvlens.studies import patching
from tvlens.tasks import load_pairs

pytestmark = pytest.mark.usefixtures("wide")

PAIRS = [
    {
        "clean": f"Q: {a}b\nA: {right}\n\nQ: {b}c\nA:",
        "corrupted": f"Q: {a}b\nA: {other}\n\nQ: {b}c\nA:",
        "answer": f" {answer}",
        "wrong": f" {wrong}",
    }
    for a, b, right, other, answer, wrong in ("abhoip", "cdjqkr", "bchoip")
]
SMALL = ["--shots", str(trained.SHOTS), "--n", "6"]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with `model`, `data` and `pairs.json`, all that the command of a user needs."""
    folder = tmp_path_factory.mktemp("user")
    trained.save_model(folder / "model")
    trained.save_tasks(folder / "data")
    (folder / "pairs.json").write_text(json.dumps(PAIRS))
    return folder


@pytest.fixture(scope="module")
def source(here) -> list[object]:
    """The command on one task with the tiny model."""
    return ["patch", "--model", here / "model", "--data", here / "data", "--task", "seven-on"]


@pytest.fixture
def pairs(here) -> list[object]:
    """The command on pairs of one's own."""
    return ["patch", "--model", here / "model", "--prompts", here / "pairs.json"]


def read(folder: Path) -> pd.DataFrame:
    table = pd.read_csv(folder / "patching.csv", dtype={"role": str})
    return table.fillna({"role": ""})


def library(function, here, **options):
    """What a function of the library finds of the prompts that the command draws."""
    lens = load(str(here / "model"))
    task = tasks.load_file(here / "data" / "seven-on.json")
    both = (
        task.prompts("train", shots=trained.SHOTS, n=6, seed=0, kind=kind)
        for kind in ("clean", "shuffled")
    )
    return function(lens, *both, **options).to_frame()


def same(mine: pd.DataFrame, theirs: pd.DataFrame) -> None:
    """Equal but for rounding, of which shares show more: they are divided by a small difference."""
    mine = mine.reset_index(drop=True).astype(theirs.dtypes)
    shares = [each["normalised"].to_numpy() for each in (mine, theirs)]
    assert shares[0] == pytest.approx(shares[1], abs=1e-3)
    rest = [each.drop(columns="normalised") for each in (mine, theirs)]
    assert_frame_equal(*rest, check_exact=False, rtol=1e-4, atol=5e-6)


@pytest.mark.parametrize("positions", ["query", "roles", "all"])
def test_effects_are_those_of_the_library(positions, source, here, tmp_path):
    """Of all prompts at once; the command takes a few at a time."""
    words = [*source, *SMALL, "--positions", positions, "--site", "resid_post,z"]
    out = ok(*words, "--metric", "log_probability", "--out", tmp_path)
    table = read(tmp_path)
    assert tuple(table.columns) == COLUMNS
    for site in ("resid_post", "z"):
        expected = library(patch, here, site=site, positions=positions, metric="log_probability")
        same(table[table["site"] == site], expected)
        assert (tmp_path / "figures" / f"seven-on-{site}.pdf").exists()
    assert set(table["task"]) == {"seven-on"}
    assert out.splitlines()[-1] == f"Wrote {tmp_path / 'patching.csv'}"


def test_tables_say_what_a_place_is(source, tmp_path):
    ok(*source, *SMALL, "--positions", "roles", "--site", "resid_post", "--out", tmp_path / "a")
    roles = read(tmp_path / "a")
    assert roles["head"].isna().all()
    assert roles["position"].isna().all()
    assert {"input 1", "answer 4", "separators", "query", "answer prefix"} <= {*roles["role"]}
    ok(*source, *SMALL, "--positions", "0,8", "--site", "k", "--out", tmp_path / "b")
    numbers = read(tmp_path / "b")
    assert set(numbers["position"]) == {0, 8}
    assert set(numbers["role"]) == {""}
    assert set(numbers["head"]) == {0, 1}, "key/value heads"
    assert set(numbers["n"]) == {6}
    parquet = pd.read_parquet(tmp_path / "b" / "patching.parquet")
    assert_frame_equal(parquet.convert_dtypes(), numbers.convert_dtypes(), check_dtype=False)
    some = ["--positions", "query,answer 4"]
    ok(*source, *SMALL, *some, "--out", tmp_path / "c")
    assert {*read(tmp_path / "c")["role"]} == {"query", "answer 4"}


def test_positions_by_number_and_groups_of_roles(source, tmp_path):
    ok(*source, *SMALL, "--positions", "-1,-2", "--out", tmp_path / "numbers")
    table = pd.read_csv(tmp_path / "numbers" / "patching.csv")
    assert table["position"].tolist() == [-1, -2, -1, -2]
    words = ["--positions", "answers,query", "--noising", "--out", tmp_path / "roles"]
    ok(*source, *SMALL, *words)
    table = pd.read_csv(tmp_path / "roles" / "patching.csv")
    assert set(table["role"]) == {"answers", "query"}


def test_both_methods_are_held_against_each_other(source, here, tmp_path):
    words = ["--method", "exact,attribution", "--site", "z", "--positions", "roles"]
    out = ok(*source, *SMALL, *words, "--steps", 3, "--out", tmp_path)
    table = read(tmp_path)
    expected = library(attribution_patch, here, site="z", positions="roles", steps=3)
    same(table[table["method"] == "attribution"], expected)
    same(table[table["method"] == "exact"], library(patch, here, site="z", positions="roles"))
    agreed = r"seven-on: z, attribution against exact effects of \d+ places: Spearman -?\d\.\d\d"
    assert re.search(agreed, out)
    names = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert names == {"seven-on-z-exact", "seven-on-z-attribution", "seven-on-z-approximation"}


def test_a_fixed_softmax_is_that_of_the_library(source, here, tmp_path):
    words = ["--method", "attribution", "--site", "q", "--positions", "all", "--fix-softmax"]
    ok(*source, *SMALL, *words, "--out", tmp_path)
    options = {"site": "q", "positions": "all", "fix_softmax": True}
    same(read(tmp_path), library(attribution_patch, here, **options))


def test_several_tasks_and_noising(source, here, tmp_path):
    words = [*source[:-1], "seven-on,fourteen-on", *SMALL, "--noising", "--out", tmp_path]
    out = ok(*words)
    table = read(tmp_path)
    assert list(table["task"].unique()) == ["seven-on", "fourteen-on"]
    lens, task = load(str(here / "model")), tasks.load_file(here / "data" / "seven-on.json")
    clean, shuffled = (
        task.prompts("train", shots=trained.SHOTS, n=6, kind=kind) for kind in ("clean", "shuffled")
    )
    expected = patch(lens, shuffled, clean, direction="noising").to_frame()
    same(table[table["task"] == "seven-on"], expected)
    assert "seven-on: resid_post, exact, largest effects (probability" in out
    assert manifest(tmp_path)["config"]["settings"]["noising"] is True


def test_pairs_of_ones_own_are_patched_clean_into_corrupted(pairs, here, tmp_path):
    ok(*pairs, "--positions", "all", "--metric", "logit_difference", "--out", tmp_path / "a")
    own, lens = load_pairs(here / "pairs.json"), load(str(here / "model"))
    options = {"positions": "all", "metric": "logit_difference", "wrong": own.wrong}
    expected = patch(lens, own.clean, own.corrupted, **options)
    found = read(tmp_path / "a")
    same(found, expected.to_frame())
    assert set(found["task"]) == {"pairs"}
    assert set(found["n"]) == {len(PAIRS)}, "all of them"
    last = found[found["position"] == found["position"].max()]
    assert last.nlargest(1, "layer")["normalised"].iloc[0] == pytest.approx(1, abs=1e-4)
    said = manifest(tmp_path / "a")
    assert said["config"]["prompts"] == str(here / "pairs.json")
    assert said["data"].keys() == {"weights and tokenizer", str(here / "pairs.json")}

    ok(*pairs, "--n", 1, "--noising", "--out", tmp_path / "b")
    expected = patch(lens, own.corrupted[:1], own.clean[:1], direction="noising")
    same(read(tmp_path / "b"), expected.to_frame())


def test_the_best_are_those_that_bring_the_source_over(pairs, tmp_path):
    """Of a KL, the lowest effects: all of it goes where the whole source run is put in."""
    words = ["--metric", "kl", "--positions", "all", "--method", "exact,attribution"]
    out = ok(*pairs, *words, "--out", tmp_path)
    assert re.search(r"kl \d\.\d+ as it is, 0 in the source run", out)
    table = read(tmp_path)
    best = table[table["method"] == "exact"].nsmallest(2, "value")
    assert set(best["position"]) == {table["position"].max()}
    assert best["normalised"].to_numpy() == pytest.approx(1, abs=1e-3)
    assert "recall of the best 10 " in out


def test_twins_of_other_length_are_left_out_and_said(here, tmp_path):
    """With one shot a label is that of another pair, which may have more tokens."""
    outputs = ["k", "kk"] * 21
    for i, output in ((3, "l"), (8, "l"), (4, "ll"), (7, "ll")):
        outputs[i] = output
    inputs = [pair.input for pair in trained.TASKS["seven-on"].pairs]
    content = [{"input": a, "output": b} for a, b in zip(inputs, outputs, strict=True)]
    (tmp_path / "mine.json").write_text(json.dumps(content))
    words = ["patch", "--model", here / "model", "--data", tmp_path, "--task", "mine"]
    out = ok(*words, "--shots", 1, "--n", 3, "--positions", "all", "--out", tmp_path / "run")
    (note,) = [line for line in out.splitlines() if "are left out" in line]
    assert re.fullmatch(
        r"mine: \d+ prompts are left out, whose label-shuffled twins differ from them in length; "
        r"\d remain",
        note,
    )
    assert manifest(tmp_path / "run")["filters"] == [note]


# --- resuming -------------------------------------------------------------------------------------

LONG = ["--site", "resid_post,z", "--method", "exact,attribution", "--positions", "all"]


@pytest.fixture(scope="module")
def whole(source, here) -> Path:
    """A run that nothing stopped."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", "100")
        ok(*source, *SMALL, *LONG, "--out", here / "whole")
    return here / "whole"


def test_the_same_command_reckons_nothing_again(source, whole, undrawn, monkeypatch):
    before = outcome(whole)
    for name in patching.WAYS:
        monkeypatch.setitem(patching.WAYS, name, None)
    ok(*source, *SMALL, *LONG, "--out", whole)
    assert outcome(whole) == before
    assert manifest(whole)["earlier_sessions"][-1]["state"] == "finished"


def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(source, whole, tmp_path):
    folder = tmp_path / "run"
    words = [*source, *SMALL, *LONG, "--out", folder]
    command = [sys.executable, "-m", "tvlens.cli", *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    finish_killed(folder, command, folder / "steps" / "seven-on" / "z" / "exact" / "2", env)
    assert not (folder / "patching.csv").exists()
    ok(*words)
    assert outcome(folder) == outcome(whole)
    assert manifest(folder)["earlier_sessions"][0]["state"] == "interrupted"


def test_a_stopped_command_goes_on(source, tmp_path, monkeypatch):
    words = [*source, *SMALL, "--site", "z", "--out", tmp_path / "run"]
    calls, whole = [], patching.WAYS["exact"]

    def stops(*args, **more):
        calls.append(len(args[1]))
        if len(calls) == 2:
            raise RunError("the machine is switched off")
        return whole(*args, **more)

    monkeypatch.setitem(patching.WAYS, "exact", stops)
    assert isinstance(run(*words).error, RunError)
    assert calls == [4, 2]
    ok(*words)
    assert calls == [4, 2, 2]
    first = (tmp_path / "run" / "patching.csv").read_bytes()
    ok(*words)
    assert calls == [4, 2, 2]
    assert (tmp_path / "run" / "patching.csv").read_bytes() == first
    monkeypatch.undo()
    ok(*words[:-1], tmp_path / "again")
    assert (tmp_path / "again" / "patching.csv").read_bytes() == first


def test_other_settings_into_the_same_folder_are_refused(source, whole):
    message = mistake(*source, *SMALL, *LONG, "--noising", "--out", whole, kind=RunError)
    assert "config.settings.noising: false there, true now" in message


def test_pairs_that_have_changed_are_refused(here, pairs, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(PAIRS))
    words = [*pairs[:-1], file, "--out", tmp_path / "run"]
    ok(*words)
    file.write_text(json.dumps(PAIRS[:2]))
    assert f"data.{file}: " in mistake(*words, kind=RunError)


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--site", "residual"], "there is no site 'residual'; sites are resid_pre, resid_mid"),
        (["--site", " , "], "--site names nothing; expected names separated by commas"),
        (["--positions", ","], "--positions names nothing"),
        (["--positions", "0,99"], "position 99 lies beyond prompt 0, which has 47 tokens"),
        (["--positions", "answer 5"], "the prompts have no role 'answer 5'; expected one of"),
        (["--positions", "1,query"], "the prompts have no role '1'"),
        (
            ["--method", "both"],
            "--method 'both': expected exact, attribution, or exact,attribution for both",
        ),
        (["--steps", "4"], "--steps and --fix-softmax are of attribution, and --method is exact"),
        (
            ["--method", "exact,attribution", "--site", "q,z", "--fix-softmax"],
            "attribution at z with steps=0, fix_softmax=True: expected",
        ),
        (["--prompts", "mine.json"], "--task and --prompts: expected one of the two"),
        (["--shots", "20"], "the model's context holds 128; use fewer shots or shorter pairs"),
        (["--task", "seven"], "unknown task 'seven': did you mean 'seven-on'"),
    ],
)
def test_a_mistake_ends_in_one_line_and_claims_no_folder(
    words, said, source, tmp_path, monkeypatch, capsys
):
    refused([*source, *SMALL, *words], said, tmp_path, monkeypatch, capsys)


def refused(words, said, tmp_path, monkeypatch, capsys) -> None:
    """A command that a user got wrong, from the words on the command line to what is printed."""
    words = [*map(str, words), "--out", str(tmp_path / "run")]
    monkeypatch.setattr(sys, "argv", ["tvlens", *words])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out.count("\n") <= 1, "nothing but the lens"
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert said in err
    assert not (tmp_path / "run").exists()


def test_one_of_tasks_and_pairs_must_be_named(here, tmp_path, monkeypatch, capsys):
    said = "--task and --prompts: expected one of the two"
    refused(["patch", "--model", here / "model"], said, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{", "is not JSON"),
        ("[]", "pairs 'mine' are empty"),
        ([{"clean": "a", "answer": "b"}], "the key 'corrupted' is missing"),
        (
            [PAIRS[0] | {"corrupted": PAIRS[0]["clean"]}],
            "entry 1: clean and corrupted prompt are both",
        ),
        (
            [PAIRS[0] | {"corrupted": "Q: abc\nA: o\n\nQ: bc\nA:"}],
            "prompt 0 has 17 tokens as source and 18 as target",
        ),
        # Characters that the tokenizer does not know are one token.
        (
            [*PAIRS, {"clean": "Q: X", "corrupted": "Q: Y", "answer": "a", "wrong": "b"}],
            "are the same, so there is nothing to patch",
        ),
        (None, "cannot be read: No such file or directory"),
    ],
)
def test_pairs_that_cannot_be_patched_are_refused(
    content, said, here, tmp_path, monkeypatch, capsys
):
    file = tmp_path / "mine.json"
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    words = ["patch", "--model", here / "model", "--prompts", file, "--positions", "all"]
    refused(words, said, tmp_path, monkeypatch, capsys)


def test_a_site_that_the_model_lacks_is_refused(tmp_path, monkeypatch, capsys):
    zoo.huggingface("gpt-neox").save_pretrained(tmp_path / "model")
    zoo.tokenizer().save_pretrained(tmp_path / "model")
    words = ["patch", "--model", tmp_path / "model", "--task", "present-past", "--shots", 1]
    said = "has no site 'resid_mid' at which anything could be changed; it has resid_pre"
    refused([*words, "--site", "resid_mid"], said, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("option", "value"), [("--metric", "accuracy"), ("--n", "0"), ("--shots", "0"), ("--steps", -1)]
)
def test_words_and_numbers_out_of_range_are_refused(option, value, source, tmp_path):
    result = run(*source, option, value, "--out", tmp_path / "run")
    assert result.code == 2
    assert f"Invalid value for '{option}'" in result.err
    assert not (tmp_path / "run").exists()


def test_shares_that_are_not_defined_are_said_once(here, tmp_path, monkeypatch):
    entry = {"clean": "Q: ab\nA:", "corrupted": "Q: ac\nA:", "answer": " h"}
    (tmp_path / "mine.json").write_text(json.dumps([entry]))
    constant = patching.WAYS["exact"]

    def equal(*words, **options):
        found = constant(*words, **options)
        return replace(found, source=found.before)

    monkeypatch.setitem(patching.WAYS, "exact", equal)
    words = ["patch", "--model", here / "model", "--prompts", tmp_path / "mine.json"]
    result = run(*words, "--site", "resid_post,z", "--out", tmp_path / "run")
    assert result.error is None
    assert result.err.count("column normalised is empty") == 1
    assert "of clean and corrupted prompts does not differ" in result.err
    assert read(tmp_path / "run")["normalised"].isna().all()
