import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

from helpers import trained, zoo
from helpers.commands import finish_killed, manifest, mistake, ok, outcome, run
from tvlens import bench, tasks
from tvlens.cli import app as cli
from tvlens.cli.options import fit_settings
from tvlens.errors import (
    ModelError,
    RunError,
    ShapeError,
    TaskError,
    TvlensError,
    UnknownNameError,
)
from tvlens.evaluation.methods import evaluate
from tvlens.lens.loading import load
from tvlens.models import catalogue
from tvlens.runs.storage import save_tensors
from tvlens.scores.agreement import compare_head_sets
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.vector import TaskVector

pytestmark = pytest.mark.usefixtures("wide")

SMALL = ["--shots", str(trained.SHOTS)]
STUDY = [*SMALL, "--steps", "10", "--ltv-seeds", "2"]
COLUMNS = ["task", "method", "prompt", "metric", "value", "ci_low", "ci_high", "n", "answers"]


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Path:
    """A folder with `model` and `data`, all that the commands of a user need."""
    folder = tmp_path_factory.mktemp("user")
    trained.save_model(folder / "model")
    trained.save_tasks(folder / "data")
    return folder


@pytest.fixture
def source(here) -> list[object]:
    """The options that name the tiny model and one of its tasks."""
    return ["--model", here / "model", "--data", here / "data", "--tasks", "seven-on"]


@pytest.fixture(scope="module")
def both(here) -> list[object]:
    """The study's options for both tasks."""
    names = ",".join(trained.TASKS)
    return ["--model", here / "model", "--data", here / "data", "--tasks", names, *STUDY]


class Study(NamedTuple):
    folder: Path
    out: str


@pytest.fixture(scope="module")
def study(here, both) -> Study:
    """`tvlens study text` on both tasks, run once."""
    folder = here / "study"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "100")
        return Study(folder, ok("study", "text", *both, "--out", folder, "--seed", 0))


def pairs(n: int, output: Callable[[int], str] = lambda i: "kl"[i % 2]) -> list[dict[str, str]]:
    letters = zoo.LETTERS
    words = [letters[i // 20] + letters[i % 20] for i in range(n)]
    return [{"input": word, "output": output(i)} for i, word in enumerate(words)]


# --- study text -----------------------------------------------------------------------------------


def test_results_follow_the_contract(study):
    results = pd.read_csv(study.folder / "results.csv")
    assert list(results.columns) == COLUMNS
    assert set(results["task"]) == set(trained.TASKS)
    assert set(results["method"]) == (
        {"none", "icl", "fv_layer", "fv_per_layer", "average", "ltv", "random", "permuted"}
    )
    assert set(results["prompt"]) == {"zero", "shuffled", "clean"}
    assert set(results["metric"]) == {"accuracy", "cross_entropy", "perplexity", "exact_match"}
    assert not results.isna().any().any()
    assert not results.duplicated(["task", "method", "prompt", "metric"]).any()


def test_heads_follow_the_contract(study):
    heads = pd.read_csv(study.folder / "heads.csv")
    assert list(heads.columns) == (
        ["task", "layer", "head", "aie", "aie_low", "aie_high", "omega", "contribution"]
    )
    assert len(heads) == 2 * 2 * 4
    assert not heads.isna().any().any()


def test_every_table_stands_as_csv_and_parquet(study):
    tables = sorted(path.stem for path in study.folder.glob("*.csv"))
    assert {"results", "heads", "headsets"} <= set(tables)
    assert tables == sorted(path.stem for path in study.folder.glob("*.parquet"))
    for name in tables:
        csv = pd.read_csv(study.folder / f"{name}.csv")
        parquet = pd.read_parquet(study.folder / f"{name}.parquet")
        assert_frame_equal(parquet.convert_dtypes(), csv.convert_dtypes())


def test_figures_and_vectors_are_there(study):
    figures = {path.name for path in (study.folder / "figures").iterdir()}
    assert {"methods.pdf", "methods.png", "heads-seven-on.pdf", "overlap.png"} <= figures
    assert {name.removesuffix(".pdf") for name in figures if name.endswith(".pdf")} == (
        {name.removesuffix(".png") for name in figures if name.endswith(".png")}
    )
    vectors = {path.name for path in (study.folder / "vectors").iterdir()}
    assert vectors == {
        f"{task}-{kind}.safetensors"
        for task in trained.TASKS
        for kind in (
            "average",
            "ltv",
            "ltv-seed1",
            "fv_layer-zero",
            "fv_layer-shuffled",
            "fv_per_layer-zero",
            "fv_per_layer-shuffled",
        )
    }


def test_the_manifest_says_how_the_run_was_made(study, here):
    said = manifest(study.folder)
    assert said["command"] == "study text"
    assert said["state"] == "finished"
    assert said["config"]["model"] == str(here / "model")
    assert said["config"]["backend"] == "bridge"
    assert said["config"]["settings"]["shots"] == trained.SHOTS
    assert said["config"]["settings"]["ltv"]["steps"] == 10
    assert said["seeds"] == {"seed": 0}
    assert said["config"]["dtype"] == "float32"
    assert said["data"] == {
        name: tasks.load_file(here / "data" / f"{name}.json").digest for name in trained.TASKS
    } | {"weights and tokenizer": load(str(here / "model")).backend.digest}
    assert {"python", "torch", "transformer-lens", "tvlens"} <= said["versions"].keys()
    assert "bridge, 2 layers x 4 heads, d_model 32, replay" in said["lens"]
    assert len(said["filters"]) == 2
    assert said["timings"].keys() >= {"seven-on/mediation-class-uninformative", "fourteen-on/ltv-0"}
    assert 0 < said["peak_memory_gib"] < 64


def test_what_the_study_prints_reads_well(study):
    lines = study.out.splitlines()
    assert re.fullmatch(r"Lens\(.*, bridge, 2 layers x 4 heads, d_model 32, replay\)", lines[0])
    assert lines[1:3] == ["seven-on: 42 pairs (1 of 2)", "fourteen-on: 42 pairs (2 of 2)"]
    assert "seven-on: first-token accuracy [95% interval], n = 9" in lines
    assert re.search(r"┃ method +┃ zero +┃ shuffled +┃ clean +┃", study.out)
    assert re.search(r"│ icl +│ +│ +│ 1.00 \[0.70, 1.00\] │", study.out)
    assert "fourteen-on: head sets" in lines
    assert re.search(r"│ aie and ltv │ overlap +│ 5 │ +\d\.\d{3} │ +0\.625 │", study.out)
    assert lines[-2:] == [
        f"Tables, vectors, figures and manifest are in {study.folder}",
        f"Open {study.folder}/report.html in a browser",
    ]


def test_the_same_command_resumes_and_changes_no_byte(study, both):
    before = outcome(study.folder)
    steps = {path: path.stat().st_mtime_ns for path in (study.folder / "steps").rglob("*.*")}
    again = ok("study", "text", *both, "--out", study.folder, "--seed", 0)
    assert outcome(study.folder) == before
    assert {path: path.stat().st_mtime_ns for path in steps} == steps, "no step was saved again"
    assert again == study.out
    assert manifest(study.folder)["earlier_sessions"][-1]["state"] == "finished"


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ("--seed", "seed: 0 there, 1 now"),
        ("--n-means", "n_means: 100 there, 1 now"),
        ("--n-validation", "ltv.n_validation: null there, 1 now"),
        ("--n-test", "n_test: null there, 1 now"),
    ],
)
def test_another_option_into_the_same_folder_is_refused(option, changed, study, both):
    before = outcome(study.folder)
    message = mistake("study", "text", *both, "--out", study.folder, option, 1, kind=RunError)
    assert "belongs to a different run" in message
    assert f"config.settings.{changed}" in message
    assert "choose another --out" in message
    assert outcome(study.folder) == before


def test_another_precision_into_the_same_folder_is_refused(study, both):
    words = ["study", "text", *both, "--out", study.folder, "--dtype", "bfloat16"]
    message = mistake(*words, kind=RunError)
    assert 'config.dtype: "float32" there, "bfloat16" now' in message


def test_weights_that_were_changed_between_two_calls_are_refused(here, tmp_path):
    model = shutil.copytree(here / "model", tmp_path / "model")
    words = ["mediate", "--model", model, "--data", here / "data", "--tasks", "seven-on"]
    words += ["--shots", trained.SHOTS, "--out", tmp_path / "run"]
    ok(*words)
    file = model / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    message = mistake(*words, kind=RunError)
    assert "data.weights and tokenizer: " in message


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--dtype", "int8", "unknown dtype 'int8'; expected 'float32', 'bfloat16', 'float16'"),
        ("--device", "gpu", "there is no device 'gpu' here; expected one of 'cpu'"),
    ],
)
def test_precisions_and_devices_that_are_not_there_are_refused(
    option, value, words, source, tmp_path
):
    message = mistake(
        "mediate", *source, option, value, "--out", tmp_path / "run", kind=UnknownNameError
    )
    assert words in message
    assert not (tmp_path / "run").exists()


def test_other_data_under_the_same_name_is_refused(study, both, here, tmp_path):
    copied = trained.save_tasks(tmp_path / "data")
    (copied / "seven-on.json").write_text(json.dumps(pairs(40)))
    options = [copied if word == here / "data" else word for word in both]
    message = mistake("study", "text", *options, "--out", study.folder, kind=RunError)
    assert "data.seven-on: " in message


def test_a_killed_study_resumes_and_ends_with_the_same_bytes(study, both, tmp_path):
    """In a process of its own, in another folder, killed in the second half."""
    folder = tmp_path / "run"
    words = ["study", "text", *both, "--out", folder, "--seed", 0]
    command = [sys.executable, "-m", "tvlens.cli", *map(str, words)]
    env = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    finish_killed(folder, command, folder / "steps" / "fourteen-on" / "means", env)
    assert not (folder / "results.csv").exists()
    assert manifest(folder)["state"] == "running"
    ok(*words)
    assert outcome(folder) == outcome(study.folder)
    assert manifest(folder)["earlier_sessions"][0]["state"] == "interrupted"
    assert not list(folder.rglob(".tvlens-tmp-*"))


def test_a_task_goes_by_the_name_it_was_asked_for_by(here, source, tmp_path):
    """Whatever its file calls it: results are looked up by the name on the command line."""
    data = tmp_path / "data"
    data.mkdir()
    content = {"name": "something else", "pairs": pairs(42, lambda i: zoo.LETTERS[7 + i // 20])}
    (data / "mine.json").write_text(json.dumps(content))
    words = ["--model", here / "model", "--data", data, "--tasks", " mine ,"]
    ok("mediate", *words, *SMALL, "--out", tmp_path / "run")
    assert set(pd.read_csv(tmp_path / "run" / "heads.csv")["task"]) == {"mine"}


# --- the single steps -----------------------------------------------------------------------------


def test_mediate_writes_heads_with_the_studys_effects(study, source, tmp_path):
    out = ok("mediate", *source, *SMALL, "--out", tmp_path / "run")
    heads = pd.read_csv(tmp_path / "run" / "heads.csv")
    assert list(heads.columns) == ["task", "layer", "head", "aie", "aie_low", "aie_high"]
    there = pd.read_csv(study.folder / "heads.csv").query("task == 'seven-on'")
    assert_frame_equal(heads, there[heads.columns])
    assert "seven-on: heads of largest AIE (probability, 95% interval over 25 prompts)" in out
    best = heads.nlargest(1, "aie").iloc[0]
    assert re.search(rf"│ +{best['layer']} │ +{best['head']} │ +{best['aie']:.4f} │", out)
    assert out.splitlines()[-1] == f"Wrote {tmp_path / 'run' / 'heads.csv'}"


def test_fit_writes_a_vector_that_evaluate_reads(study, here, source, tmp_path):
    fitted = tmp_path / "fit"
    out = ok("fit", *source, *SMALL, "--steps", 10, "--out", fitted)
    assert "seven-on: start, lowest validation loss (which is kept) and end" in out
    file = fitted / "vectors" / "seven-on-ltv.safetensors"
    ltv = LearnableTaskVector.load(file)
    steps = ltv.history["step"].tolist()
    assert (steps[0], steps[-1]) == (0, 10)
    heads = pd.read_csv(fitted / "heads.csv")
    assert list(heads.columns) == ["task", "layer", "head", "omega", "contribution"]
    assert heads["omega"].to_numpy() == pytest.approx(ltv.omega.detach().flatten().numpy())
    assert list(pd.read_csv(fitted / "history.csv")["step"]) == steps
    assert file.read_bytes() == (study.folder / "vectors" / file.name).read_bytes()

    out = ok("evaluate", *source, *SMALL, "--vector", f"mine={file}", "--out", tmp_path / "test")
    results = pd.read_csv(tmp_path / "test" / "results.csv")
    assert list(results.columns) == COLUMNS
    assert set(results["method"]) == {"none", "icl", "mine"}
    task = tasks.load_file(here / "data" / "seven-on.json")
    lens = load(str(here / "model"))
    expected = evaluate(lens, task, {"mine": ltv}, shots=trained.SHOTS)
    assert_frame_equal(results, expected)
    assert re.search(r"│ mine +│ \d", out)


def test_evaluate_takes_ltvs_and_task_vectors_side_by_side(study, source, tmp_path):
    vectors = study.folder / "vectors"
    words = ["--vector", f"a={vectors / 'seven-on-ltv.safetensors'}"]
    words += ["--vector", f"b={vectors / 'seven-on-fv_layer-zero.safetensors'}"]
    ok("evaluate", *source, *SMALL, *words, "--out", tmp_path)
    mine = pd.read_csv(tmp_path / "results.csv").set_index(["method", "prompt", "metric"])["value"]
    there = pd.read_csv(study.folder / "results.csv").query("task == 'seven-on'")
    theirs = there.set_index(["method", "prompt", "metric"])["value"]
    for metric in ("accuracy", "cross_entropy", "exact_match"):
        for name, method in (("a", "ltv"), ("b", "fv_layer")):
            mine_here, there_here = mine[name, "zero", metric], theirs[method, "zero", metric]
            assert mine_here == pytest.approx(there_here, rel=1e-4, abs=1e-6)
    files = [vectors / f"seven-on-{kind}.safetensors" for kind in ("ltv", "fv_layer-zero")]
    said = manifest(tmp_path)
    assert said["config"]["vectors"] == dict(zip("ab", map(str, files), strict=True))
    assert said["data"].keys() == {"seven-on", "weights and tokenizer", *map(str, files)}


def test_evaluate_refuses_to_resume_with_a_vector_that_has_changed(source, tmp_path):
    lens = trained.lens()
    file = tmp_path / "v.safetensors"
    words = ["evaluate", *source, *SMALL, "--vector", f"v={file}", "--out", tmp_path / "run"]
    TaskVector(torch.zeros(lens.n_layer, lens.d_model), (0,), "m", "zeros").save(file)
    ok(*words)
    TaskVector(torch.ones(lens.n_layer, lens.d_model), (0,), "m", "ones").save(file)
    assert f"data.{file}: " in mistake(*words, kind=RunError)


def test_compare_of_two_columns_is_that_of_the_library(study, tmp_path):
    heads = study.folder / "heads.csv"
    out = ok("compare", f"aie@{heads}", f"contribution@{heads}", "--out", tmp_path)
    headsets = pd.read_csv(tmp_path / "headsets.csv")
    assert list(headsets.columns) == ["task", "measure", "k", "value", "chance", "p_value"]
    assert list(headsets["task"].unique()) == ["seven-on", "fourteen-on"]
    rows = pd.read_csv(heads).query("task == 'fourteen-on'")
    grids = [
        torch.tensor(rows.pivot(index="layer", columns="head", values=column).to_numpy())
        for column in ("aie", "contribution")
    ]
    expected = compare_head_sets(*grids, ks=[5], names=("aie", "contribution"))
    mine = headsets.query("task == 'fourteen-on'").drop(columns="task").reset_index(drop=True)
    assert_frame_equal(mine.convert_dtypes(), expected.convert_dtypes())
    curves = pd.read_csv(tmp_path / "overlap_curves.csv")
    assert list(curves.query("task == 'seven-on'")["k"]) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert re.search(r"│ overlap +│ 5 │ +\d\.\d{3} │ +0\.625 │ +\d\.\d{3} │", out)
    assert "gini_contribution" in out
    assert out.splitlines()[-1] == f"Wrote {tmp_path / 'headsets.csv'}"


def test_compare_of_a_column_with_itself_agrees_fully(study, tmp_path):
    heads = f"aie@{study.folder / 'heads.csv'}"
    out = ok("compare", heads, heads, "--out", tmp_path)
    rows = pd.read_csv(tmp_path / "headsets.csv")
    assert set(rows[rows["measure"].isin(["overlap", "jaccard", "spearman"])]["value"]) == {1.0}
    assert "gini_first" in out
    assert "gini_second" in out


def test_models_says_what_is_bundled_and_where_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TVLENS_CACHE", str(tmp_path / ("long" * 30)))
    out = ok("models")
    assert re.search(r"│ smollm2-135m │ +134515008 │ +30 │ +9 │ Apache-2.0 │ +no │", out)
    kept = tmp_path / ("long" * 30) / "models" / "smollm2-135m"
    assert f"will be fetched into {kept}\n" in out, "a path is not broken, however long"
    assert "Any local folder or Hugging Face name" in out


def test_tasks_lists_all_that_are_shipped(unchecked, monkeypatch):
    out = ok("tasks")
    for name in tasks.names():
        assert re.search(rf"^│ {name} +│ +{len(tasks.load(name).pairs)} │ ", out, re.MULTILINE)
    assert "become → became" in out
    monkeypatch.setenv("COLUMNS", "60")
    narrow = run("tasks").out
    assert all(f"│ {name} " in narrow for name in tasks.names()), "names are whole"


def test_tasks_lists_a_folder(here):
    out = ok("tasks", "--data", here / "data")
    assert re.search(r"│ seven-on +│ +42 │ aa → h +│", out)
    assert re.search(r"│ fourteen-on +│ +42 │ aa → o +│", out)
    assert "present-past" not in out


def test_bench_writes_the_promised_keys(here, tmp_path):
    file = tmp_path / "bench.json"
    words = ["--model", here / "model", "--data", here / "data", "--task", "seven-on"]
    out = ok("bench", *words, "--json", file, "--out", tmp_path / "run")
    figures = json.loads(file.read_text())
    assert figures.keys() >= {
        "aie_speedup_vs_transformer_lens",
        "aie_speedup_vs_last_logits_loop",
        "aie_max_abs_diff",
        "ltv_step_speedup_vs_published",
        "flops_fraction_of_matmul",
        "peak_memory_gib",
    }
    assert all(math.isfinite(value) for value in figures.values())
    assert figures["aie_max_abs_diff"] < 1e-5
    ends = {f"{name}_{end}" for name in figures for end in ("low", "high")}
    assert "aie_speedup_vs_transformer_lens_low" in figures.keys() & ends
    assert re.search(r"┃ figure +┃ +value ┃ +low ┃ +high ┃", out)
    assert all((f"│ {name} " in out) != (name in ends) for name in figures), "ranges are columns"
    row = pd.read_csv(tmp_path / "run" / "bench.csv").iloc[0]
    assert row.to_dict() == pytest.approx(figures)


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
def test_both_backends_give_the_same_effects(here, source, tmp_path):
    for backend in ("bridge", "hooked"):
        out = tmp_path / backend
        ok("mediate", *source, *SMALL, "--backend", backend, "--out", out)
        assert manifest(out)["config"]["backend"] == backend
    first, second = (pd.read_csv(tmp_path / kind / "heads.csv") for kind in ("bridge", "hooked"))
    assert second["aie"].to_numpy() == pytest.approx(first["aie"].to_numpy(), abs=1e-4)


def test_ltvs_train_on_no_more_examples_than_asked_for(source, tmp_path):
    ok("fit", *source, "--shots", 2, "--steps", 5, "--out", tmp_path / "two")
    assert manifest(tmp_path / "two")["config"]["settings"]["ltv"]["shots"] == 2
    default = FitSettings().shots
    assert fit_settings("default", None, default + 1).shots == default


def test_the_paper_preset_is_the_released_codes(source, tmp_path):
    ok("fit", *source, *SMALL, "--preset", "paper", "--steps", 3, "--out", tmp_path)
    settings = manifest(tmp_path)["config"]["settings"]["ltv"]
    assert settings["start"] == "normal"
    assert settings["learning_rate"] == 5e-5
    assert settings["steps"] == 3


# --- help -----------------------------------------------------------------------------------------

COMMANDS = ["models", "tasks", "mediate", "patch", "score", "ablate", "fit", "evaluate", "compare"]
COMMANDS += ["report", "table", "study", "bench", "regression"]
GROUP = ["train", "bench", "models"]


def test_help_names_every_command():
    out = ok("--help")
    assert [line.split()[1] for line in out.splitlines() if re.match(r"│ [a-z]", line)] == COMMANDS


@pytest.mark.parametrize(
    "command",
    [*COMMANDS, "study text", "study regression", *(f"regression {x}" for x in GROUP)],
)
def test_help_of_every_command_fits_and_explains_every_option(command):
    out = ok(*command.split(), "--help")
    assert all(len(line) <= 100 for line in out.splitlines())
    options = re.findall(r"^│ [ *] +(--[a-z-]+) +(.*?) *│$", out, re.MULTILINE)
    without = [name for name, rest in options if not re.search(r"[A-Z][a-z]", rest)]
    assert not without, "options without a sentence of help"


# --- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["mediate", "fit", "study text"])
def test_an_unknown_task_is_refused_with_near_names(command, here, tmp_path):
    words = [*command.split(), "--model", here / "model", "--out", tmp_path / "run"]
    message = mistake(*words, "--tasks", "presentpast", kind=UnknownNameError)
    assert "unknown task 'presentpast': did you mean 'present-past'" in message
    words += ["--data", here / "data"]
    message = mistake(*words, "--tasks", "sevenon", kind=UnknownNameError)
    assert "unknown task 'sevenon': did you mean 'seven-on'" in message
    assert f"`tvlens tasks --data {here / 'data'}` lists" in message
    assert not (tmp_path / "run").exists()


def test_a_data_folder_that_is_not_there_is_not_passed_over(here, tmp_path):
    """Otherwise a shipped task of the same name would be taken in its place."""
    words = ["--model", here / "model", "--out", tmp_path / "run", "--tasks", "present-past"]
    message = mistake("mediate", *words, "--data", tmp_path / "dat", kind=TaskError)
    assert message == f"--data {tmp_path / 'dat'}: no such folder; expected one that holds " + (
        "task files"
    )


def test_no_task_at_all_is_refused(source, tmp_path):
    message = mistake("mediate", *source[:-1], " , ", "--out", tmp_path / "r", kind=TvlensError)
    assert message == "--tasks names no task; expected names separated by commas"


def test_an_unknown_model_is_refused_and_claims_no_folder(source, tmp_path):
    words = [*source[2:], "--model", "smollm3-135m", "--out", tmp_path / "run"]
    message = mistake("mediate", *words, kind=UnknownNameError)
    assert "model 'smollm3-135m' cannot be loaded" in message
    assert "smollm2-135m" in message
    assert not (tmp_path / "run").exists(), "the corrected command may use the folder"


def test_an_unknown_backend_is_refused(source, tmp_path):
    result = run("mediate", *source, "--backend", "nnsight", "--out", tmp_path / "run")
    assert result.code == 2
    assert "'nnsight' is not one of 'bridge', 'hooked'" in result.err


@pytest.mark.skipif(zoo.HAS_HOOKED, reason="transformer-lens 3 has HookedTransformer")
def test_hooked_on_transformer_lens_4_is_refused(source, tmp_path):
    words = [*source, "--backend", "hooked", "--out", tmp_path / "run"]
    message = mistake("mediate", *words, kind=ModelError)
    assert "HookedTransformer, which transformer-lens 4 removed" in message


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--shots", "0"),
        ("--seed", "-1"),
        ("--n-means", "0"),
        ("--n-validation", "0"),
        ("--n-test", "0"),
        ("--steps", "0"),
        ("--ltv-seeds", "0"),
    ],
)
def test_numbers_out_of_range_are_refused(option, value, source, tmp_path):
    result = run("study", "text", *source, option, value, "--out", tmp_path / "run")
    assert result.code == 2
    assert f"Invalid value for '{option}'" in result.err
    assert not (tmp_path / "run").exists()


def task_file(folder: Path, content: object) -> list[object]:
    (folder / "mine.json").write_text(json.dumps(content))
    return ["--data", folder, "--tasks", "mine", "--out", folder / "run"]


def test_an_empty_task_file_is_refused(here, tmp_path):
    words = task_file(tmp_path, [])
    message = mistake("mediate", "--model", here / "model", *words, kind=TaskError)
    assert f"task file {tmp_path / 'mine.json'} is empty" in message


def test_fewer_pairs_than_examples_are_refused(here, tmp_path):
    words = task_file(tmp_path, pairs(12))
    message = mistake("mediate", "--model", here / "model", *words, kind=TaskError)
    assert "task 'mine'" in message
    assert "use at most 7 shots or add pairs" in message


def test_duplicates_are_refused_or_dropped_on_demand(here, tmp_path):
    content = pairs(40, lambda i: zoo.LETTERS[7 + i // 20])
    content.append({"input": content[0]["input"], "output": "w"})
    words = ["mediate", "--model", here / "model", *task_file(tmp_path, content), *SMALL]
    message = mistake(*words, kind=TaskError)
    first = content[0]["input"]
    assert f"the input {first!r} has different outputs, 'h' and 'w'" in message
    ok(*words, "--duplicates", "drop")
    assert len(tasks.load_file(tmp_path / "mine.json", duplicates="drop")) == 39


def test_answers_that_first_tokens_do_not_tell_apart_are_shown_by_exact_match(
    here, study, tmp_path
):
    content = pairs(40, lambda i: "k" + zoo.LETTERS[i % 3])
    vector = f"LTV={study.folder / 'vectors' / 'seven-on-ltv.safetensors'}"
    words = ["evaluate", "--model", here / "model", *task_file(tmp_path, content), *SMALL]
    with pytest.warns(UserWarning, match="answers begin with only 1 different tokens"):
        out = ok(*words, "--vector", vector)
    assert "mine: exact match [95% interval], n = 8" in out


def test_prompts_longer_than_the_context_are_refused(source, tmp_path):
    message = mistake("mediate", *source, "--shots", 20, "--out", tmp_path, kind=TaskError)
    assert "the model's context holds 128; use fewer shots or shorter pairs" in message
    # The folder was not claimed: the command put right may have it.
    assert list(tmp_path.iterdir()) == []
    ok("mediate", *source, "--shots", 2, "--out", tmp_path)


def test_a_model_that_answers_nothing_is_refused(here, tmp_path):
    words = task_file(tmp_path, pairs(40))
    message = mistake("mediate", "--model", here / "model", *words, *SMALL, kind=TaskError)
    assert "answers none of 100 clean 4-shot prompts" in message


def test_a_used_folder_is_refused(source, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    message = mistake("mediate", *source, *SMALL, "--out", tmp_path, kind=RunError)
    assert "holds 'thesis.tex' but no manifest.json; choose another --out" in message
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_that_cannot_be_made_is_refused(source, tmp_path):
    (tmp_path / "file").write_text("")
    message = mistake("mediate", *source, *SMALL, "--out", tmp_path / "file" / "run", kind=RunError)
    assert "cannot be made or written: Not a directory; choose another --out" in message


def test_a_vector_of_another_model_is_refused(source, tmp_path):
    file = tmp_path / "v.safetensors"
    TaskVector(torch.zeros(5, 48), (0,), "larger", "test").save(file)
    words = [*source, *SMALL, "--vector", f"v={file}", "--out", tmp_path / "run"]
    message = mistake("evaluate", *words, kind=ShapeError)
    assert "task vector of 'larger' has 5 layers and d_model 48" in message
    assert "has 2 and 32; make the vector on the model it is used on" in message


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (["v"], "--vector 'v': expected NAME=FILE"),
        (["=v.safetensors"], "expected NAME=FILE"),
        (["v=none.safetensors"], "there is no file none.safetensors"),
        (["v=cli.py", "v=cli.py"], "--vector names 'v' twice; give every vector its own name"),
        (["v=cli.py"], "cannot read cli.py: "),
        (["none=there.safetensors"], "method name 'none' is taken by the baseline"),
        (["v=other.safetensors"], "other.safetensors holds no Vector: it lacks 'layers'"),
    ],
)
def test_what_is_no_vector_is_refused(vectors, words, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("cli.py").write_text("print()")
    save_tensors("other.safetensors", {"vectors": torch.zeros(2, 32)}, {"origin": "elsewhere"})
    TaskVector(torch.zeros(2, 32), (0,), "m", "test").save("there.safetensors")
    options = [word for vector in vectors for word in ("--vector", vector)]
    message = mistake("evaluate", *source, *SMALL, *options, "--out", "run", kind=TvlensError)
    assert words in message


def test_a_study_needs_a_vector_to_evaluate(source, tmp_path):
    result = run("evaluate", *source, "--out", tmp_path)
    assert result.code == 2
    assert "Missing option '--vector'" in result.err


@pytest.mark.parametrize(
    ("first", "words"),
    [
        ("heads.csv", "expected COLUMN@FILE, such as aie@RUN/heads.csv"),
        ("aie@none.csv", "there is no file none.csv"),
        (
            "effect@heads.csv",
            "heads.csv: the table of heads has no column effect; it has task, layer, head, aie",
        ),
        ("task@heads.csv", "column 'task' holds no numbers; name a score of heads"),
        (
            "aie@twice.csv",
            "the table of heads has several rows for layer 0, head 0; expected one for each head",
        ),
        ("aie@empty.csv", "cannot read empty.csv"),
        ("aie@binary.csv", "cannot read binary.csv"),
        ("aie@other.csv", "no task is in both aie@other.csv (b) and aie@heads.csv (a)"),
        ("aie@wide.csv", "head maps of shape [1, 3] and [1, 2]"),
        (
            "aie@holes.csv",
            "and 1 heads below have none (first: layer 1, head 0); expected one row for every head",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(first, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    head = "task,layer,head,aie\n"
    tables = {
        "heads": f"{head}a,0,0,.1\na,0,1,.2\n",
        "twice": f"{head}a,0,0,.1\na,0,0,.2\n",
        "empty": "",
        "other": f"{head}b,0,0,.1\nb,0,1,.2\n",
        "wide": f"{head}a,0,0,.1\na,0,1,.2\na,0,2,.3\n",
        "holes": f"{head}a,0,0,.1\na,0,1,.2\na,1,1,.3\n",
    }
    for name, text in tables.items():
        Path(f"{name}.csv").write_text(text)
    Path("binary.csv").write_bytes(b"PAR1\x80\x81")
    message = mistake("compare", first, "aie@heads.csv", "--out", "run", kind=TvlensError)
    assert words in message


@pytest.mark.parametrize(("other_load", "said"), [(0.0, False), (0.3, True)])
def test_bench_says_when_the_machine_was_busy(here, tmp_path, monkeypatch, other_load, said):
    monkeypatch.setattr("tvlens.timing._other_load", lambda *_: other_load)
    small = bench.BenchSettings(
        n_prompts=1, n_loop_heads=2, n_step_prompts=2, n_clean=4, n_loop_prompts=1, repeats=1
    )
    monkeypatch.setattr(bench, "BenchSettings", lambda: small)
    words = ["--model", here / "model", "--data", here / "data", "--task", "seven-on"]
    out = ok("bench", *words, "--out", tmp_path)
    line = "not to be quoted: the machine was busy: other processes used 30% of its cores"
    assert (line in out) == said
    assert bool(re.search(r"│ idle +│ +no │", out)) == said
    assert (tmp_path / "bench.csv").exists()


def test_regression_bench_shows_ranges(tmp_path, monkeypatch):
    monkeypatch.setattr("tvlens.timing._other_load", lambda *_: 0.3)
    small = bench.CurveBenchSettings(preset="tiny", n_points=3, n_prompts=1, n_vectors=1, repeats=1)
    monkeypatch.setattr(bench, "CurveBenchSettings", lambda seed: replace(small, seed=seed))
    out = ok("regression", "bench", "--out", tmp_path)
    assert re.search(r"│ ratio_bare +│ +[\d.]+ │ +[\d.]+ │ +[\d.]+ │", out)
    assert "not to be quoted: the machine was busy" in out
    row = pd.read_csv(tmp_path / "bench.csv").iloc[0]
    assert row["ratio_bare_low"] == row["ratio_bare"] == row["ratio_bare_high"]


def test_bench_takes_one_task(here, tmp_path):
    words = ["--model", here / "model", "--task", "present-past,antonym", "--out", tmp_path]
    message = mistake("bench", *words, kind=UnknownNameError)
    assert message == "--task 'present-past,antonym': expected one task, got 2"


# --- the command as users call it -----------------------------------------------------------------


def test_main_ends_a_mistake_in_one_line(monkeypatch, capsys, tmp_path):
    missing = tmp_path / ("a folder [with] brackets " * 8)
    monkeypatch.setattr(sys, "argv", ["tvlens", "tasks", "--data", str(missing)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == (
        f"error: task folder {missing}: no such folder; pass one that holds task files\n"
    )


def test_main_prints_a_warning_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(cli, "app", lambda: warnings.warn("a file is odd", stacklevel=1))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.main()
    assert capsys.readouterr().err == "warning: a file is odd\n"


class Stopping:
    """An object during whose end Ctrl-C comes."""

    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        _ = "python looks for signals between two instructions"


def test_ctrl_c_that_python_swallowed_comes_again(monkeypatch, capsys):
    def work() -> None:
        Stopping()
        time.sleep(20)
        raise AssertionError("it went on")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cli, "app", work)
    monkeypatch.setattr(sys, "argv", ["tvlens", "mediate", "--out", "x"])
    try:
        with pytest.raises(SystemExit) as stop:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.code == 130
    assert capsys.readouterr().err == (
        "error: Stopped. What is finished is kept in --out: the same command goes on from there.\n"
    )


def test_main_lets_mistakes_of_the_program_show(monkeypatch):
    def broken() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(catalogue, "list_bundled", broken)
    monkeypatch.setattr(sys, "argv", ["tvlens", "models"])
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main()


def test_the_command_in_a_process_of_its_own():
    words = [sys.executable, "-m", "tvlens.cli", "tasks", "--data", "nowhere"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: task folder nowhere: no such folder; pass one that holds task files\n"
    )
