import csv
import errno
import json
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from pandas import DataFrame

from tvlens.errors import NumericalError, RunError, TaskError
from tvlens.runs import manifest as manifests
from tvlens.runs import run as runs
from tvlens.runs.manifest import peak_memory_gib
from tvlens.runs.run import Run
from tvlens.runs.storage import load_tensors, save_tensors

CONFIG: dict[str, Any] = {"tasks": ["present-past"], "ltv": {"steps": 60, "lr": 0.02}}


def manifest_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def files_in(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def never() -> dict[str, Any]:
    raise AssertionError("a saved step was computed again")


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Makes the system refuse to write past `size` bytes of a file, as a full disk would."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# --- the manifest ---------------------------------------------------------------------------------


def test_a_new_run_has_a_manifest_at_once(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    with Run.open(folder, "study text", CONFIG, data={"present-past": "ab12"}, seeds=[0, 1]) as run:
        manifest = manifest_of(folder)
        assert manifest["state"] == "running"
        assert manifest["finished"] is None
        assert run.manifest["earlier_sessions"] == []
    assert manifest["command"] == "study text"
    assert manifest["config"] == CONFIG
    assert manifest["data"] == {"present-past": "ab12"}
    assert manifest["seeds"] == [0, 1]
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["versions"]["pandas"] == pd.__version__
    assert {"tvlens", "python", "transformer-lens", "transformers", "numpy"} <= set(
        manifest["versions"]
    )
    assert manifest["cpu_count"] == os.cpu_count()


def test_how_a_run_ended_is_written_down(tmp_path: Path) -> None:
    with Run.open(tmp_path / "good", "bench", {}) as run:
        run.note_filter("prompts the model answers: 93 of 100")
        run.note_filter("prompts the model answers: 93 of 100")
        run.step("one", lambda: {"value": 1})
    manifest = manifest_of(tmp_path / "good")
    assert (manifest["state"], manifest["error"]) == ("finished", None)
    assert manifest["started"] <= manifest["finished"]
    assert manifest["filters"] == ["prompts the model answers: 93 of 100"]
    assert 0 <= manifest["timings"]["one"] < 5
    assert 0.01 < manifest["peak_memory_gib"] <= peak_memory_gib()

    for error, state in (
        (ValueError("no such head"), "failed"),
        (KeyboardInterrupt(), "interrupted"),
    ):
        with pytest.raises(type(error)), Run.open(tmp_path / state, "bench", {}):
            raise error
        manifest = manifest_of(tmp_path / state)
        assert manifest["state"] == state
        assert manifest["error"] == {"type": type(error).__name__, "message": str(error)}


def test_peak_memory_counts_what_was_held() -> None:
    before = peak_memory_gib()
    held = np.ones(2**27, dtype=np.uint8)  # an eighth of a GiB
    after = peak_memory_gib()
    assert before is not None
    assert after is not None
    assert after >= before
    assert after >= held.nbytes / 2**30


# --- resuming -------------------------------------------------------------------------------------


def test_the_same_run_resumes_and_computes_nothing_twice(tmp_path: Path) -> None:
    table = DataFrame({"layer": [0, 1], "aie": [0.1 + 0.2, np.nan], "task": ["a", None]})
    tensors = {"z": torch.arange(6.0).reshape(2, 3).T, "b": torch.ones(2, dtype=torch.bfloat16)}
    outputs = {"heads": table, "means": tensors, "note": {"k": [1, 2.5, None, "ω"]}, "empty": {}}
    with Run.open(tmp_path, "study", CONFIG, seeds={"prompts": 0}) as run:
        first = run.step("present-past/aie", lambda: outputs)
        run.note_filter("first session")
    with Run.open(str(tmp_path), "study", CONFIG, seeds={"prompts": 0}) as run:
        assert len(run.manifest["earlier_sessions"]) == 1
        second = run.step("present-past/aie", never)
    for result in (first, second):
        pd.testing.assert_frame_equal(result["heads"], table, check_dtype=False)
        assert torch.equal(result["means"]["z"], tensors["z"])
        assert result["means"]["b"].dtype == torch.bfloat16
        assert result["note"] == {"k": [1, 2.5, None, "ω"]}
        assert result["empty"] == {}
    manifest = manifest_of(tmp_path)
    assert manifest["filters"] == ["first session"]
    assert list(manifest["timings"]) == ["present-past/aie"]
    assert [session["state"] for session in manifest["earlier_sessions"]] == ["finished"]
    with safetensors.safe_open(tmp_path / "steps/present-past/aie/means.safetensors", "pt") as file:
        assert file.metadata() == {"step": "present-past/aie", "command": "study"}


def test_an_interrupted_run_ends_with_the_same_bytes(tmp_path: Path) -> None:
    def study(folder: Path, interrupt: bool) -> None:
        def draw(seed: int) -> Callable[[], dict[str, Any]]:
            rng = np.random.default_rng(seed)
            # float32 and an index with gaps: both must mean the same before and after a resumption
            scores = DataFrame({"score": rng.normal(size=50).astype(np.float32)})
            return lambda: {"scores": scores[scores["score"] > 0]}

        with Run.open(folder, "study", CONFIG, seeds=[0]) as run:
            parts = [run.step("one", draw(0))["scores"]]
            if interrupt:
                run.step("two", lambda: 1 / 0)
            parts.append(run.step("two", draw(1))["scores"])
            heads = pd.concat(parts)
            run.write_table("heads", heads)
            weights = {"omega": torch.tensor(heads["score"].to_numpy())}
            metadata = {name: name for name in ("model", "task", "seed")}
            save_tensors(run.folder / "omega.safetensors", weights, metadata)
            figure = Figure()
            figure.add_subplot().plot(heads["score"], label="ω")
            run.write_figure("scores", figure)

    study(tmp_path / "straight", interrupt=False)
    with pytest.raises(ZeroDivisionError):
        study(tmp_path / "broken", interrupt=True)
    assert manifest_of(tmp_path / "broken")["error"]["type"] == "ZeroDivisionError"
    study(tmp_path / "broken", interrupt=False)
    assert manifest_of(tmp_path / "broken")["state"] == "finished"
    straight, broken = files_in(tmp_path / "straight"), files_in(tmp_path / "broken")
    assert straight.keys() == broken.keys()
    results = [name for name in straight if not name.endswith(".json")]
    assert {"heads.csv", "heads.parquet", "omega.safetensors"} < set(results)
    assert {"figures/scores.pdf", "figures/scores.png"} < set(results)
    assert [name for name in results if straight[name] != broken[name]] == []


def test_a_killed_process_leaves_no_half_step(tmp_path: Path) -> None:
    script = f"""
        import os, signal
        from pathlib import Path
        from tvlens.runs import run as runs
        write = runs.write
        def killed_at_index(path, content):
            if path.name == runs._INDEX:
                os.kill(os.getpid(), signal.SIGKILL)
            write(path, content)
        with runs.Run.open({str(tmp_path)!r}, "study", {{}}) as run:
            run.step("done", lambda: {{"value": 1}})
            runs.write = killed_at_index
            run.step("half", lambda: {{"value": 2}})
    """
    process = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert process.returncode == -signal.SIGKILL
    assert manifest_of(tmp_path)["state"] == "running"
    assert (tmp_path / "steps/.tvlens-tmp-half/value.json").exists()
    assert not (tmp_path / "steps/half").exists()
    with Run.open(tmp_path, "study", {}) as run:
        assert not list(tmp_path.rglob(".tvlens-tmp-*"))
        assert run.step("done", never) == {"value": 1}
        assert run.step("half", lambda: {"value": 3}) == {"value": 3}
    assert manifest_of(tmp_path)["earlier_sessions"][0]["state"] == "interrupted"


# --- refusing -------------------------------------------------------------------------------------


def test_a_different_run_is_refused_key_by_key(tmp_path: Path, monkeypatch: Any) -> None:
    with Run.open(tmp_path, "study", CONFIG, data={"tense": "aa"}, seeds=[0]):
        pass
    before = files_in(tmp_path)
    config = {"tasks": ["present-past"], "ltv": {"steps": 90, "lr": 0.02}, "shots": 10}
    monkeypatch.setattr(manifests, "_version", lambda package: "7.3.1")
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path, "fit", config, data={"tense": "bb"}, seeds=[1])
    lines = str(caught.value).splitlines()
    assert lines[0] == f"run folder '{tmp_path}' belongs to a different run:"
    assert '  command: "study" there, "fit" now' in lines
    assert "  config.ltv.steps: 60 there, 90 now" in lines
    assert "  config.shots: absent there, 10 now" in lines
    assert '  data.tense: "aa" there, "bb" now' in lines
    assert "  seeds: [0] there, [1] now" in lines
    assert sum(line.startswith("  ") for line in lines) == 6
    assert lines[-2].endswith('"7.3" now')
    assert lines[-1] == "choose another --out, or delete the folder to start again"
    assert files_in(tmp_path) == before


def test_a_patch_release_still_resumes(tmp_path: Path, monkeypatch: Any) -> None:
    for release in ("1.2.3", "1.2.4"):
        monkeypatch.setattr(manifests, "_version", lambda package, release=release: release)
        with Run.open(tmp_path, "study", CONFIG) as run:
            run.step("one", lambda: {"value": 1})
    assert manifest_of(tmp_path)["versions"]["tvlens"] == "1.2.4"
    assert manifest_of(tmp_path)["earlier_sessions"][0]["versions"]["tvlens"] == "1.2.3"


def test_a_folder_that_holds_something_else_is_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("…")
    with pytest.raises(RunError, match=r"holds 'thesis.tex' but no manifest.json; choose another"):
        Run.open(tmp_path, "study", {})
    assert list(files_in(tmp_path)) == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", '{"command": "stu', '{"name": "a web app"}', "[]"])
def test_a_manifest_that_is_not_a_runs_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=r"manifest.json' is (damaged|not a run's).*another --out"):
        Run.open(tmp_path, "study", {})
    assert (tmp_path / "manifest.json").read_text() == text


def test_places_where_no_run_can_live_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/tvlens/run")):
        with pytest.raises(RunError, match=r"cannot be made or written: .*; choose another --out"):
            Run.open(folder, "study", {})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    with pytest.raises(RunError, match=r"cannot be made or written: Permission denied"):
        Run.open(tmp_path, "study", {})


def test_an_unwritable_folder_is_refused_even_when_testing_as_root(
    tmp_path: Path, monkeypatch: Any
) -> None:
    def deny(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(runs.FileLock, "acquire", deny)
    with pytest.raises(RunError, match=r"cannot be made or written: Permission denied; choose"):
        Run.open(tmp_path, "study", {})


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    script = f"from tvlens.runs import Run; Run.open({str(tmp_path)!r}, 'study', {{}})"
    with Run.open(tmp_path, "study", {}):
        process = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert process.returncode == 1
        assert f"RunError: run folder '{tmp_path}' is in use by another process" in process.stderr
        with pytest.raises(RunError, match="wait for it to end, or choose another --out"):
            Run.open(tmp_path, "study", {})
    with Run.open(tmp_path, "study", {}) as run:
        assert len(run.manifest["earlier_sessions"]) == 1


def test_a_refused_run_lets_go_of_the_folder(tmp_path: Path) -> None:
    for config in ({"a": 1}, {"a": 1}):
        with Run.open(tmp_path, "study", config):
            pass
        with pytest.raises(RunError, match="different run"):
            Run.open(tmp_path, "study", {"a": 2})


def test_a_closed_run_writes_nothing(tmp_path: Path) -> None:
    with Run.open(tmp_path, "study", {}) as run:
        pass
    with pytest.raises(RunError, match="is closed; open it again"):
        run.write_table("heads", DataFrame({"a": [1]}))
    with pytest.raises(RunError, match="is closed; open it again"):
        run.step("one", never)


def test_a_mistake_before_anything_is_kept_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (tmp_path / "new", empty):
        with pytest.raises(TaskError), Run.open(folder, "study", {"shots": 99}):
            raise TaskError("too many shots")
    assert not (tmp_path / "new").exists()
    assert [path.name for path in empty.iterdir() if path.name != ".tvlens-lock"] == []
    with Run.open(empty, "study", {"shots": 9}) as run:
        run.step("one", lambda: {"value": 1})


@pytest.mark.parametrize("kept", ["step", "table", "session", "checkpoint"])
def test_a_mistake_after_something_was_kept_leaves_the_run(tmp_path: Path, kept: str) -> None:
    if kept == "session":
        Run.open(tmp_path, "study", {}).__exit__(None, None, None)

    def mistaken() -> None:
        with Run.open(tmp_path, "study", {}) as run:
            if kept == "step":
                run.step("one", lambda: {"value": 1})
            if kept == "table":
                run.write_table("heads", DataFrame({"a": [1]}))
            if kept == "checkpoint":
                save_tensors(tmp_path / "checkpoints" / "c.safetensors", {"x": torch.ones(1)}, {})
            raise TaskError("a prompt is too long")

    with pytest.raises(TaskError):
        mistaken()
    assert manifest_of(tmp_path)["state"] == "failed"
    assert manifest_of(tmp_path)["error"]["message"] == "a prompt is too long"


INDEX: dict[str, Any] = {"seconds": 1, "outputs": {"value": ["value.json", "0" * 64]}}


@pytest.mark.parametrize(
    "index",
    [
        [],
        None,
        {},
        {**INDEX, "seconds": "1"},
        {**INDEX, "sha256": "0" * 64},
        {**INDEX, "sha256": None},
        {**INDEX, "outputs": ["value"]},
        {**INDEX, "outputs": {"value": "value.json"}},
        {**INDEX, "outputs": {"value": ["value.json"]}},
        {**INDEX, "outputs": {"value": ["value.json", 3]}},
        {**INDEX, "outputs": {"value": ["../../manifest.json", "0" * 64]}},
        {**INDEX, "outputs": {"value": ["other.json", "0" * 64]}},
    ],
)
def test_an_index_of_other_kinds_is_refused(tmp_path: Path, index: Any) -> None:
    with Run.open(tmp_path, "study", {}) as run:
        run.step("one", lambda: {"value": 1})
    if isinstance(index, dict) and isinstance(index.get("outputs"), dict):
        # Nothing else may be wrong with it.
        index = {"sha256": manifests.digest_of(index["outputs"]), **index}
    (tmp_path / "steps/one/.tvlens-step.json").write_text(json.dumps(index))
    with (
        Run.open(tmp_path, "study", {}) as run,
        pytest.raises(RunError, match=r"step.json' is no index of a step: .*delete '.*one'"),
    ):
        run.step("one", never)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("versions", []),
        ("versions", {"tvlens": 1}),
        ("config", "x"),
        ("data", None),
        ("timings", [1]),
        ("filters", {}),
        ("earlier_sessions", "none"),
    ],
)
def test_a_manifest_of_other_kinds_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with Run.open(tmp_path, "study", {}) as run:
        run.step("one", lambda: {"value": 1})
    text = json.dumps(manifest_of(tmp_path) | {key: value})
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(RunError, match=f"not a run's manifest: it has no sound '{key}'; choose"):
        Run.open(tmp_path, "study", {})
    assert (tmp_path / "manifest.json").read_text() == text


def test_a_run_that_differs_in_much_says_so_in_few_words(tmp_path: Path) -> None:
    with Run.open(tmp_path, "study", {f"setting {i}": "x" * 500 for i in range(50)}):
        pass
    with pytest.raises(RunError) as caught:
        Run.open(tmp_path, "study", {f"setting {i}": "y" * 500 for i in range(50)})
    assert len(str(caught.value)) <= 600
    assert "setting 0: " in str(caught.value)
    assert re.search(r"and \d+ more\nchoose another --out", str(caught.value))


def test_numbers_that_are_none_are_not_written(tmp_path: Path) -> None:
    table = DataFrame({"method": ["a", "b"], "value": [1.0, np.nan]})
    with Run.open(tmp_path, "study", {}) as run:
        run.write_table("history", table)
        with pytest.raises(NumericalError, match=r"'results' .* value is nan in 1 of 2 .*method=b"):
            run.write_table("results", table, whole=True)
        with pytest.raises(NumericalError, match=r"'history' .* value is inf in 1 of 2 rows"):
            run.write_table("history", table.fillna(np.inf))
    assert not (tmp_path / "results.csv").exists()
    assert not (tmp_path / "results.parquet").exists()


def test_a_file_of_tensors_that_was_changed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"x": torch.ones(3), "none": torch.zeros(0, 2)}, {"task": "t", "n": 1.5})
    tensors, facts = load_tensors(path)
    assert (tensors["x"].tolist(), facts) == ([1, 1, 1], {"task": "t", "n": 1.5})
    content = path.read_bytes()
    for place in (content.index(b'"t'), len(content) - 1):
        path.write_bytes(content[:place] + b"\x07" + content[place + 1 :])
        with pytest.raises(RunError, match=r"cannot read .*x\.safetensors"):
            load_tensors(path)
    # Files of other programs, and older ones, have no digest.
    path.write_bytes(safetensors.torch.save({"x": torch.ones(1)}))
    assert load_tensors(path)[1] == {}


@pytest.mark.parametrize("value", [float("nan"), Path("data"), np.int64(3)])
def test_a_configuration_must_be_json(tmp_path: Path, value: Any) -> None:
    with pytest.raises(RunError, match="the configuration of 'study' cannot be stored as JSON"):
        Run.open(tmp_path / "run", "study", {"nested": {"value": value}})
    assert not (tmp_path / "run").exists()


# --- steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["heads.parquet", "z.safetensors", "n.json", ".tvlens-step.json"])
def test_a_damaged_step_file_is_named(tmp_path: Path, file: str) -> None:
    outputs = {"heads": DataFrame({"a": [1.0]}), "z": {"z": torch.ones(2)}, "n": [1, 2, 3]}
    with Run.open(tmp_path, "study", {}) as run:
        run.step("task/aie", lambda: outputs)
    path = tmp_path / "steps" / "task" / "aie" / file
    path.write_bytes(path.read_bytes()[:-3])
    with Run.open(tmp_path, "study", {}) as run, pytest.raises(RunError) as caught:
        run.step("task/aie", never)
    assert str(caught.value).startswith(f"'{path}' is damaged: ")
    assert f"; delete '{path.parent}' and run the same command again" in str(caught.value)


def test_a_missing_step_file_is_named(tmp_path: Path) -> None:
    with Run.open(tmp_path, "study", {}) as run:
        run.step("one", lambda: {"value": 1})
    (tmp_path / "steps/one/value.json").unlink()
    with (
        Run.open(tmp_path, "study", {}) as run,
        pytest.raises(
            RunError, match=r"one/value.json' is damaged: .*No such file.*delete '.*one'"
        ),
    ):
        run.step("one", never)


def test_step_names_are_unique_and_do_not_nest(tmp_path: Path) -> None:
    with Run.open(tmp_path, "study", {}) as run:
        run.step("a/b", lambda: {"value": 1})
        with pytest.raises(RunError, match="'a/b' has already run in this session"):
            run.step("a/b", never)
        with pytest.raises(RunError, match=r"'a/b/c'.* inside another step"):
            run.step("a/b/c", never)
        with pytest.raises(RunError, match=r"step 'a'.* holds other things"):
            run.step("a", never)


@pytest.mark.parametrize("name", ["", "../a", "a//b", "/etc", ".hidden", "a\nb", "a/", "a:b"])
def test_names_that_could_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    with Run.open(tmp_path / "run", "study", {}) as run:
        with pytest.raises(RunError, match="cannot name a file of a run"):
            run.step(name, never)
        with pytest.raises(RunError, match="cannot name a file of a run"):
            run.step("good", lambda: {name: 1})
        with pytest.raises(RunError, match="cannot name a file of a run"):
            run.write_figure(name, Figure())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (tmp_path / "run/steps/good").exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x": float("inf")}, "output 'v' of step 'one' cannot be stored as JSON"),
        ({"x": torch.ones(1), "y": 1}, "output 'v' of step 'one' cannot be stored as JSON"),
        (DataFrame({1: [object()]}), "output 'v' of step 'one' cannot be stored as Parquet"),
        (DataFrame({"a": [1]}).set_index("a"), "'v' of step 'one' has a named index"),
    ],
)
def test_outputs_that_cannot_be_saved_are_named(tmp_path: Path, value: Any, message: str) -> None:
    with Run.open(tmp_path, "study", {}) as run, pytest.raises(RunError, match=message):
        run.step("one", lambda: {"fine": 1, "v": value})
    assert list((tmp_path / "steps").iterdir()) == []


# --- results --------------------------------------------------------------------------------------


def test_tables_read_back_as_they_were(tmp_path: Path) -> None:
    values = [0.1 + 0.2, 1e-300, -1 / 3, np.nan, 5.0]
    table = DataFrame({"task": list("abc,é"), "value": values, "n": range(5)})
    with Run.open(tmp_path, "study", {}) as run:
        path = run.write_table("results", table)
        assert path == tmp_path / "results.csv"
        run.write_table("k0.5", table)
    assert (tmp_path / "k0.5.parquet").exists()
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["task"] for row in rows] == list("abc,é")
    assert [float(row["value"] or "nan") for row in rows] == pytest.approx(
        values, rel=0, abs=0, nan_ok=True
    )
    parquet = pd.read_parquet(tmp_path / "results.parquet")
    pd.testing.assert_frame_equal(parquet, table, check_exact=True)
    assert b"\r" not in path.read_bytes()


def test_tensors_keep_values_and_metadata_and_equal_bytes(tmp_path: Path) -> None:
    shared = torch.arange(12.0).reshape(3, 4).requires_grad_()
    tensors = {"whole": shared, "part": shared[:, 1:], "turned": shared.T}
    metadata = {name: f"{name} ω" for name in ("model", "task", "seed", "sites", "version")}
    path, contents = tmp_path / "a/b.safetensors", set()
    for _ in range(8):
        save_tensors(path, tensors, metadata)
        contents.add(path.read_bytes())
    assert len(contents) == 1
    found, found_metadata = load_tensors(path)
    assert found_metadata == metadata
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)


def test_figures_are_written_twice_without_a_date_and_closed(tmp_path: Path) -> None:
    figure = pyplot.figure(figsize=(3, 2))
    figure.add_subplot().plot([1, 2])
    with Run.open(tmp_path, "study", {}) as run:
        path = run.write_figure("maps/aie", figure)
    assert path == tmp_path / "figures/maps/aie.pdf"
    assert path.read_bytes().startswith(b"%PDF")
    assert b"CreationDate" not in path.read_bytes()
    image = path.with_suffix(".png").read_bytes()
    assert image.startswith(b"\x89PNG")
    assert int.from_bytes(image[16:20], "big") == pytest.approx(600, abs=80)  # 3 in at 200 dpi
    assert not pyplot.fignum_exists(figure.number)


def test_a_figure_that_is_laid_out_keeps_its_width_and_its_letters(
    tmp_path: Path, fonts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tvlens.runs.run._PDF", fonts)
    figure = Figure(figsize=(3, 2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="number of heads", ylabel="accuracy")
    with Run.open(tmp_path, "study", {}) as run:
        path = run.write_figure("curve", figure)
    left, bottom, right, top = axes.get_tightbbox().extents
    assert 0 < left < 20
    assert 580 < right < 600
    assert 0 < bottom < 20
    assert 380 < top < 400
    image = path.with_suffix(".png").read_bytes()
    assert int.from_bytes(image[16:20], "big") == 600
    document = path.read_bytes()
    assert b"/MediaBox [ 0 0 216 144 ]" in document
    assert b"/FontFile2" in document


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    table = DataFrame({"value": np.random.default_rng(0).normal(size=50_000)})
    with Run.open(tmp_path, "study", {}) as run:
        run.write_table("results", table[:10])
        before = files_in(tmp_path)
        for write in (
            lambda: run.write_table("results", table),
            lambda: save_tensors(tmp_path / "omega.safetensors", {"w": torch.ones(50_000)}, {}),
            lambda: run.step("one", lambda: {"note": 1, "scores": table}),
        ):
            with (
                file_size_limit(20_000),
                pytest.raises(RunError, match=r"' cannot be written: File too large; make room"),
            ):
                write()
            after = files_in(tmp_path)
            assert {name: after[name] for name in before} == before
            assert after.keys() == before.keys()
            assert list((tmp_path / "steps").glob("*")) == []
