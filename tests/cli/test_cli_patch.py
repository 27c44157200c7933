"""`tvlens patch` and `tvlens score`, as a user types them."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers import trained
from helpers.commands import mistake, ok, run
from tvlens.errors import RunError, ShapeError, TaskError, UnknownNameError
from tvlens.scores.agreement import spearman
from tvlens.scores.attribution import attribution_patch
from tvlens.scores.effects import COLUMNS, PatchEffects
from tvlens.scores.patching import patch
from tvlens.scores.score import Scores
from tvlens.tasks import load_pairs

pytestmark = pytest.mark.usefixtures("wide")

PAIRS = [
    {
        "clean": f"Q: ab\nA: h\n\nQ: {word}\nA:",
        "corrupted": f"Q: ab\nA: o\n\nQ: {word}\nA:",
        "answer": seven,
        "wrong": f" {fourteen}",
    }
    for word, seven, fourteen in (("bc", "i", "p"), ("ca", " j", "q"), ("dd", "k", "r"))
]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("user")
    trained.save_model(folder / "model")
    trained.save_tasks(folder / "data")
    (folder / "induction.json").write_text(json.dumps(PAIRS))
    return folder


@pytest.fixture
def model(here) -> list[object]:
    return ["--model", here / "model"]


@pytest.fixture
def task(here, model) -> list[object]:
    return [*model, "--data", here / "data", "--task", "seven-on", "--shots", trained.SHOTS]


def test_a_task_is_patched_at_roles_both_ways(task, tmp_path):
    words = [*task, "--site", "resid_post,z", "--positions", "roles", "--n", "5"]
    said = ok("patch", *words, "--method", "exact,attribution", "--out", tmp_path / "run")
    table = pd.read_csv(tmp_path / "run" / "patching.csv", keep_default_na=False, na_values=[""])
    assert tuple(table.columns) == COLUMNS
    assert set(table["method"]) == {"exact", "attribution"}
    assert set(table["site"]) == {"resid_post", "z"}
    assert table.loc[table["site"] == "resid_post", "head"].isna().all()
    assert sorted(table.loc[table["site"] == "z", "head"].unique()) == [0, 1, 2, 3]
    assert table["position"].isna().all()
    assert set(table["n"]) == {5}
    assert "attribution against exact effects of" in said
    lens = trained.lens()
    clean, shuffled = (
        trained.TASKS["seven-on"].prompts("train", shots=trained.SHOTS, n=5, kind=kind)
        for kind in ("clean", "shuffled")
    )
    for way, method in ((patch, "exact"), (attribution_patch, "attribution")):
        effects = way(lens, clean, shuffled, site="z", positions="roles")
        expected = effects.to_frame()["value"].tolist()
        rows = table[(table["site"] == "z") & (table["method"] == method)]
        assert rows["value"].tolist() == pytest.approx(expected, abs=1e-6)
    drawn = {path.stem for path in (tmp_path / "run" / "figures").glob("*.pdf")}
    assert {f"seven-on-z-{name}" for name in ("exact", "attribution", "approximation")} <= drawn
    assert "seven-on-resid_post-exact" in drawn


def test_a_stopped_command_goes_on(task, tmp_path, monkeypatch):
    from tvlens.studies import patching

    words = ["patch", *task, "--site", "z", "--n", "6", "--out", tmp_path / "run"]
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


def test_pairs_of_ones_own(model, here, tmp_path):
    words = ["patch", *model, "--prompts", here / "induction.json", "--positions", "all"]
    said = ok(*words, "--metric", "logit_difference", "--out", tmp_path / "run")
    assert "induction: resid_post, exact, largest effects" in said
    table = pd.read_csv(tmp_path / "run" / "patching.csv")
    assert set(table["task"]) == {"induction"}
    assert table["position"].max() == 16
    lens = trained.lens()
    pairs = load_pairs(here / "induction.json")
    ways = {"positions": "all", "metric": "logit_difference", "wrong": pairs.wrong}
    expected = patch(lens, pairs.clean, pairs.corrupted, **ways).to_frame()
    assert table["value"].tolist() == pytest.approx(expected["value"].tolist(), abs=1e-5)
    assert table.loc[table["position"] == 16, "normalised"].iloc[-1] == pytest.approx(1, abs=1e-4)
    noised = [*words, "--metric", "logit_difference", "--noising", "--out", tmp_path / "noised"]
    ok(*noised)
    back = pd.read_csv(tmp_path / "noised" / "patching.csv")
    ways = {"positions": "all", "metric": "logit_difference", "wrong": pairs.wrong}
    expected = patch(lens, pairs.corrupted, pairs.clean, **ways).to_frame()
    assert back["value"].tolist() == pytest.approx(expected["value"].tolist(), abs=1e-5)
    assert back.loc[back["position"] == 16, "normalised"].iloc[-1] == pytest.approx(0, abs=1e-4)
    assert (tmp_path / "run" / "figures" / "induction-resid_post.pdf").stat().st_size > 5_000


def test_positions_by_number_and_groups_of_roles(task, tmp_path):
    ok("patch", *task, "--positions", "-1,-2", "--n", "2", "--out", tmp_path / "numbers")
    table = pd.read_csv(tmp_path / "numbers" / "patching.csv")
    assert table["position"].tolist() == [-1, -2, -1, -2]
    words = ["--positions", "answers,query", "--n", "3", "--noising", "--out", tmp_path / "roles"]
    ok("patch", *task, *words)
    table = pd.read_csv(tmp_path / "roles" / "patching.csv")
    assert set(table["role"]) == {"answers", "query"}


BAD = {
    "an unknown site": (["--site", "hook_z"], UnknownNameError, "there is no site 'hook_z'"),
    "no site": (["--site", ","], UnknownNameError, "--site names nothing"),
    "a position beyond": (["--positions", "99"], TaskError, "position 99 lies beyond prompt 0"),
    "an unknown role": (["--positions", "answer 9"], TaskError, "the prompts have no role"),
    "an unknown method": (["--method", "quick"], UnknownNameError, "--method 'quick': expected"),
    "prompts too": (["--prompts", "x.json"], UnknownNameError, "--task and --prompts: expected"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_patched_leaves_no_folder(name, task, tmp_path):
    words, kind, said = BAD[name]
    assert said in mistake("patch", *task, *words, "--out", tmp_path / "run", kind=kind)
    assert not (tmp_path / "run").exists()


def test_broken_pairs_are_refused(model, tmp_path):
    file, out = tmp_path / "pairs.json", tmp_path / "run"
    for content, said in (
        ("[", "pairs"),
        ('[{"clean": "ab", "corrupted": "ab", "answer": "c"}]', "there is nothing to patch"),
        ('[{"clean": "ab", "answer": "c"}]', "the key 'corrupted' is missing"),
    ):
        file.write_text(content)
        words = ["patch", *model, "--prompts", file, "--out", out]
        assert said in mistake(*words, kind=TaskError)
    file.write_text(json.dumps([{"clean": "abc", "corrupted": "ab", "answer": "d"}]))
    words = ["patch", *model, "--prompts", file, "--positions", "all", "--out", out]
    assert "3 tokens as source and 2 as target" in mistake(*words, kind=ShapeError)
    assert "--task and --prompts" in mistake("patch", *model, "--out", out, kind=UnknownNameError)
    assert not out.exists()


def test_several_scores_and_their_agreement(here, model, tmp_path):
    words = ["--data", here / "data", "--task", "seven-on", "--shots", trained.SHOTS]
    words = ["score", *model, *words, "--steps", "10", "--out", tmp_path / "run"]
    said = ok(*words)
    table = pd.read_csv(tmp_path / "run" / "scores.csv")
    assert list(table.columns) == ["task", "score", "layer", "head", "value", "ci_low", "ci_high"]
    names = ["aie", "ltv", "attribution", "direct", "induction", "answers"]
    assert list(table["score"].unique()) == names
    assert table.groupby("score").size().eq(8).all()
    assert table.loc[table["score"] == "ltv", "ci_low"].isna().all()
    assert table.loc[table["score"] != "ltv", "ci_low"].notna().all()
    for name in names:
        assert f"seven-on: best heads by {name}" in said
    pairs = pd.read_csv(tmp_path / "run" / "agreement.csv")
    assert pairs["comparison"].nunique() == 15
    grids = {
        name: torch.tensor(rows["value"].tolist()).view(2, 4)
        for name, rows in table.groupby("score")
    }
    row = pairs[(pairs["comparison"] == "aie and direct") & (pairs["measure"] == "spearman")]
    expected = spearman(grids["aie"], grids["direct"]).value
    assert row["value"].item() == pytest.approx(expected)
    assert (tmp_path / "run" / "figures" / "scores-seven-on.pdf").exists()


def test_scores_that_are_asked_for_are_made_and_no_others(here, model, tmp_path, monkeypatch):
    words = ["--data", here / "data", "--task", "seven-on", "--shots", trained.SHOTS]
    words = ["score", *model, *words, "--by", "induction,direct", "--out", tmp_path / "run"]
    ok(*words)
    steps = {path.name for path in (tmp_path / "run" / "steps" / "seven-on").iterdir()}
    assert steps == {"means", "direct", "induction"}
    table = pd.read_csv(tmp_path / "run" / "scores.csv")
    assert list(table["score"].unique()) == ["direct", "induction"]
    kept = Scores.of_prompts
    monkeypatch.setattr(Scores, "of_prompts", lambda *a, **b: pytest.fail("reckoned again"))
    ok(*words)
    monkeypatch.setattr(Scores, "of_prompts", kept)
    said = mistake(*words[:-4], "--by", "aie,nope", "--out", tmp_path / "x", kind=UnknownNameError)
    assert said.startswith("there is no score 'nope'; expected some of aie, ltv, attribution,")
    assert not (tmp_path / "x").exists()


def test_effects_of_several_sets_are_joined():
    def effects(places, n, **changes):
        values = torch.arange(float(n * 2 * len(places))).view(n, 2, 1, len(places))
        given = {"by": "all", "metric": "kl", "unit": "nats"} | changes
        return PatchEffects(values, torch.zeros(n), torch.ones(n), "resid_post", places, **given)

    a, b = effects(("0", "1"), 2), effects(("0", "1", "2"), 1)
    joined = PatchEffects.joined([a, b])
    assert joined.places == ("0", "1", "2")
    assert torch.equal(joined.values[:2, ..., :2], a.values)
    assert joined.values[:2, ..., 2].isnan().all()
    assert torch.equal(joined.values[2:], b.values)
    with pytest.raises(ShapeError, match=r"effects of different metric cannot be joined: kl, nats"):
        PatchEffects.joined([a, effects(("0",), 1, metric="nats")])
