import json
import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal
from transformers import LlamaConfig, LlamaForCausalLM

import tvlens
from helpers import trained, zoo
from tvlens.evaluation.methods import evaluate
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.runs.run import Run
from tvlens.scores.agreement import overlap_at_k
from tvlens.studies import stages
from tvlens.studies import study as whole
from tvlens.studies import text as module
from tvlens.studies.text import TextPlan, TextSettings, text_plans
from tvlens.tasks import Task
from tvlens.vectors import fv
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.materials import fitting_ks
from tvlens.vectors.vector import TaskVector

SETTINGS = TextSettings(
    shots=trained.SHOTS,
    n_means=20,
    n_mediation=8,
    ltv=FitSettings(steps=20, n_prompts=32, shots=trained.SHOTS),
    ltv_seeds=2,
    ks=(2, 4),
    scales=(1.0, 2.0),
    compare_ks=(2, 4),
)
WITH_VECTOR = ["fv_layer", "fv_per_layer", "average", "ltv", "random", "permuted"]
TABLES = [
    "results",
    "heads",
    "headsets",
    "overlap_curves",
    "fv_sweep",
    "ltv_history",
    "layer_profiles",
]


def study(
    folder: Path,
    lens: Lens | None = None,
    tasks: dict[str, Task] = trained.TASKS,
    settings: TextSettings = SETTINGS,
    say: Callable[[str], None] = lambda _: None,
) -> dict[str, whole.Study]:
    with Run.open(folder, "study", {}) as run:
        plans = text_plans(lens or trained.lens(), tasks, settings)
        return whole.study_all(plans, run, say=say)


def study_one(
    folder: Path, lens: Lens | None = None, settings: TextSettings = SETTINGS
) -> whole.Study:
    """A study of one task without its tables and figures."""
    with Run.open(folder, "study", {}) as run:
        plan = TextPlan(lens or trained.lens(), trained.TASKS["seven-on"], settings)
        return whole.study_task(plan, run)


class Done(NamedTuple):
    folder: Path
    found: dict[str, whole.Study]
    said: list[str]


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Done:
    """A study of both tasks, from start to end."""
    path, said = tmp_path_factory.mktemp("study") / "run", []
    return Done(path, study(path, say=said.append), said)


@pytest.fixture(scope="module")
def folder(done) -> Path:
    """Its run folder."""
    return done.folder


def table(folder: Path, name: str, **only: str) -> pd.DataFrame:
    frame = pd.read_csv(folder / f"{name}.csv")
    for column, value in only.items():
        frame = frame[frame[column] == value]
    return frame.reset_index(drop=True)


def value(folder: Path, task: str, method: str, prompt: str, metric: str) -> float:
    rows = table(folder, "results", task=task, method=method, prompt=prompt, metric=metric)
    assert len(rows) == 1
    return float(rows["value"][0])


def outcome(folder: Path) -> dict[str, bytes]:
    """All that a study leaves behind but the manifest and the steps, whose seconds differ."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name not in ("manifest.json", ".tvlens-lock")
        and "steps" not in path.parts
    }


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


# --- the tables -----------------------------------------------------------------------------------


def test_every_method_has_every_metric_on_every_kind_of_prompt(folder):
    results = table(folder, "results")
    assert list(results.columns) == (
        ["task", "method", "prompt", "metric", "value", "ci_low", "ci_high", "n", "answers"]
    )
    kinds = [("none", "zero"), ("none", "shuffled"), ("icl", "clean")]
    kinds += [(m, prompt) for m in WITH_VECTOR for prompt in ("zero", "shuffled", "clean")]
    metrics = ["accuracy", "cross_entropy", "perplexity", "exact_match"]
    expected = [(t, *kind, metric) for t in trained.TASKS for kind in kinds for metric in metrics]
    rows = list(results[["task", "method", "prompt", "metric"]].itertuples(index=False, name=None))
    assert sorted(rows) == sorted(expected)


def test_intervals_enclose_values_over_every_test_pair(folder):
    results = table(folder, "results")
    assert (results["ci_low"] <= results["value"]).all()
    assert (results["value"] <= results["ci_high"]).all()
    assert (results["ci_low"] < results["ci_high"]).any()
    assert set(results["n"]) == {len(trained.TASKS["seven-on"].split("test"))}
    shares = results[results["metric"].isin(["accuracy", "exact_match"])]
    assert shares[["value", "ci_low", "ci_high"]].stack().between(0, 1).all()
    wide = results.pivot(index=["task", "method", "prompt"], columns="metric", values="value")
    expected = wide["cross_entropy"].map(math.exp)
    assert wide["perplexity"].to_numpy() == pytest.approx(expected.to_numpy())


def test_the_trained_model_answers_in_context_and_its_ltv_without(folder):
    for task in trained.TASKS:
        assert value(folder, task, "icl", "clean", "accuracy") == 1.0
        assert value(folder, task, "icl", "clean", "exact_match") == 1.0
        bare = value(folder, task, "none", "zero", "cross_entropy")
        assert bare > 0.3, "a query alone does not say which task is asked"
        learned = value(folder, task, "ltv", "zero", "cross_entropy")
        assert learned < bare / 2
        for control in ("random", "permuted"):
            assert value(folder, task, control, "zero", "cross_entropy") > 2 * learned


def test_results_are_those_of_the_saved_vectors(folder):
    """The vectors in the folder, evaluated anew, give the table's rows."""
    vectors = folder / "vectors"
    for name, task in trained.TASKS.items():
        methods = {
            "ltv": LearnableTaskVector.load(vectors / f"{name}-ltv.safetensors"),
            "fv_layer": {
                kind: TaskVector.load(vectors / f"{name}-fv_layer-{kind}.safetensors")
                for kind in ("zero", "shuffled")
            },
        }
        again = evaluate(trained.lens(), task, methods, shots=SETTINGS.shots, seed=SETTINGS.seed)
        keys = ["task", "method", "prompt", "metric"]
        both = again.merge(table(folder, "results"), on=keys, suffixes=("", "_there"))
        assert len(both) == len(again)
        for column in ("value", "ci_low", "ci_high", "n"):
            there = both[f"{column}_there"].to_numpy()
            assert both[column].to_numpy() == pytest.approx(there, rel=1e-4, abs=1e-6)


def test_clean_prompts_get_the_function_vector_chosen_on_shuffled_ones(done):
    for each in done.found.values():
        for method in ("fv_layer", "fv_per_layer"):
            chosen = each.methods[method]
            assert chosen["clean"][0] is chosen["shuffled"][0]


def test_heads_has_one_row_for_every_head_of_every_task(folder):
    heads = table(folder, "heads")
    assert list(heads.columns) == (
        ["task", "layer", "head", "aie", "aie_low", "aie_high", "omega", "contribution"]
    )
    lens = trained.lens()
    layers, each = range(lens.n_layer), range(lens.n_head)
    grid = [(task, layer, head) for task in trained.TASKS for layer in layers for head in each]
    assert list(heads[["task", "layer", "head"]].itertuples(index=False, name=None)) == grid
    assert (heads["aie_low"] <= heads["aie"]).all()
    assert (heads["aie"] <= heads["aie_high"]).all()


def test_omega_and_contribution_are_those_of_the_saved_ltv(folder):
    for name in trained.TASKS:
        ltv = LearnableTaskVector.load(folder / "vectors" / f"{name}-ltv.safetensors")
        heads = table(folder, "heads", task=name)
        assert heads["omega"].to_numpy() == pytest.approx(ltv.omega.detach().flatten().numpy())
        sizes = (ltv.omega.detach().abs() * ltv.outputs.norm(dim=-1)).flatten()
        assert heads["contribution"].abs().to_numpy() == pytest.approx(sizes.numpy(), rel=1e-5)
        assert heads["contribution"].to_numpy() == pytest.approx(ltv.scores.flatten().numpy())


def test_omega_is_what_fit_ltv_learns(folder):
    lens, task = trained.lens(), trained.TASKS["seven-on"]
    clean = task.prompts("train", shots=SETTINGS.shots, n=SETTINGS.n_means, seed=0)
    means = tvlens.mean_head_outputs(lens, clean)
    for seed, suffix in ((0, ""), (1, "-seed1")):
        ltv = tvlens.fit_ltv(lens, task, means, settings=SETTINGS.ltv, seed=seed)
        saved = LearnableTaskVector.load(folder / "vectors" / f"seven-on-ltv{suffix}.safetensors")
        assert zoo.off(saved.omega.detach(), ltv.omega.detach()) < 1e-4
        assert zoo.off(saved.attribution, ltv.attribution) < 1e-4


def test_aie_is_that_of_whole_forward_passes(folder):
    """The whole chain of draws, means and effects again, without replay."""
    lens = replace(trained.lens(), engine=WholePassEngine(trained.lens().backend))
    task = trained.TASKS["seven-on"]
    clean = task.prompts("train", shots=SETTINGS.shots, n=SETTINGS.n_means, seed=0)
    means = tvlens.mean_head_outputs(lens, clean)
    prompts = tvlens.mediation_prompts(task, clean, means, n=SETTINGS.n_mediation, seed=0)
    slow = tvlens.indirect_effects(lens, prompts, means).scores.flatten()
    there = torch.tensor(table(folder, "heads", task="seven-on")["aie"].to_numpy())
    assert slow.abs().max() > 1e-3
    assert zoo.off(there, slow) < 1e-3


def test_headsets_agree_with_heads(folder):
    headsets = table(folder, "headsets")
    assert set(headsets["comparison"]) == {"aie and ltv", "aie halves", "ltv seeds"}
    text = pd.read_csv(folder / "headsets.csv", dtype=str, keep_default_na=False)
    assert set(text["k"]) == {"", "2", "4"}, "sizes of sets are whole numbers"
    assert not headsets.duplicated(["task", "comparison", "measure", "k"]).any()
    for name in trained.TASKS:
        heads = table(folder, "heads", task=name)
        grids = [
            torch.tensor(heads.pivot(index="layer", columns="head", values=score).to_numpy())
            for score in ("aie", "contribution")
        ]
        for k in (2, 4):
            expected = overlap_at_k(*grids, k)
            rows = table(folder, "headsets", task=name, comparison="aie and ltv", measure="overlap")
            row = rows[rows["k"] == k].iloc[0]
            assert row["value"] == expected.overlap
            assert row["chance"] == k / 8
            assert row["p_value"] == pytest.approx(expected.p_value)


def test_agreement_of_ltv_seeds_is_that_of_their_saved_vectors(folder):
    pair = [
        LearnableTaskVector.load(folder / "vectors" / f"seven-on-ltv{suffix}.safetensors")
        for suffix in ("", "-seed1")
    ]
    assert not torch.equal(pair[0].omega, pair[1].omega)
    rows = table(
        folder, "headsets", task="seven-on", comparison="ltv seeds", measure="overlap"
    ).set_index("k")
    assert rows["value"][2] == overlap_at_k(*pair, 2).overlap


def test_training_history_begins_at_the_start_of_every_seed(folder):
    for _, history in table(folder, "ltv_history").groupby(["task", "seed"]):
        assert history["step"].iloc[0] == 0
        assert history["travel"].iloc[0] == 0
        assert math.isnan(history["train_loss"].iloc[0])
        assert history["step"].iloc[-1] <= 20
        assert history["validation_loss"].min() < history["validation_loss"].iloc[0]
    assert set(table(folder, "ltv_history")["seed"]) == {0, 1}


def test_layer_profiles_are_shares(folder):
    profiles = table(folder, "layer_profiles")
    sums = profiles.groupby(["task", "score"])["share"].sum()
    assert len(sums) == 4
    assert sums.to_numpy() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", TABLES)
def test_parquet_beside_csv_says_the_same(folder, name):
    parquet = pd.read_parquet(folder / f"{name}.parquet")
    csv = table(folder, name)
    assert list(parquet.columns) == list(csv.columns)
    assert_frame_equal(parquet.convert_dtypes(), csv.convert_dtypes(), check_exact=True)


def test_figures_come_as_pdf_and_png(folder):
    each = [f"{figure}-{task}" for figure in ("heads", "ltv-training") for task in trained.TASKS]
    for name in [*each, "layer-profiles", "methods", "overlap"]:
        assert (folder / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")
        assert (folder / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((folder / "figures").iterdir())) == 2 * (len(each) + 3)


def test_tasks_and_filters_are_said(folder, done):
    assert done.said == ["seven-on: 42 pairs (1 of 2)", "fourteen-on: 42 pairs (2 of 2)"]
    filters = manifest(folder)["filters"]
    assert len(filters) == 2
    assert filters[0].startswith("seven-on: head means over the ")
    assert "of 20 clean 4-shot train prompts that trained answers (first token)" in filters[0]


# --- protocol -------------------------------------------------------------------------------------


def test_function_vectors_are_chosen_on_the_validation_split(tmp_path, monkeypatch):
    seen = []
    choose = fv.choose_function_vectors

    def spying(lens, means, effects, validation, **options):
        seen.append(validation)
        return choose(lens, means, effects, validation, **options)

    monkeypatch.setattr(fv, "choose_function_vectors", spying)
    study_one(tmp_path)
    task = trained.TASKS["seven-on"]
    assert {kind: prompts.split for kind, prompts in seen[0].items()} == {
        "zero": "validation",
        "shuffled": "validation",
    }
    asked = {prompt.query for prompts in seen[0].values() for prompt in prompts}
    assert asked == set(task.split("validation"))
    assert not asked & set(task.split("test"))


def test_fewer_validation_prompts_are_those_of_both_choices():
    few = replace(SETTINGS, ltv=replace(SETTINGS.ltv, n_validation=3))
    plan = TextPlan(trained.lens(), trained.TASKS["seven-on"], few)
    chosen_on = {kind: len(prompts) for kind, prompts in plan.validation().items()}
    assert chosen_on == {"zero": 3, "shuffled": 3}
    assert all(fit.n_validation == 3 for fit in plan.fits.values())


def test_progress_counts_every_stage_of_every_task(folder, monkeypatch, tmp_path):
    told: list[tuple[str, int]] = []
    steps: list[int] = []

    @contextmanager
    def watched(title: str, total: int) -> Iterator[Callable[[int], None]]:
        told.append((title, total))
        yield steps.append

    monkeypatch.setattr(whole, "progress_bar", watched)
    shutil.copytree(folder, tmp_path / "run")
    study(tmp_path / "run")
    assert told == [("study, stages", whole.STAGES * len(trained.TASKS))]
    assert steps == [1] * whole.STAGES * len(trained.TASKS)


def test_head_means_take_answered_prompts_only(tmp_path):
    class Picky(FirstToken):
        """Counts no answer but two letters as right."""

        def answered(self, outputs, batch):
            wanted = torch.tensor([zoo.WORDS.index(" h"), zoo.WORDS.index(" i")])
            return super().answered(outputs, batch) & torch.isin(batch.target, wanted)[:, None]

    task = trained.TASKS["seven-on"]
    lens = replace(trained.lens(), readout=Picky())
    with Run.open(tmp_path, "study", {}) as run:
        means = stages.head_means(TextPlan(lens, task, SETTINGS), run)
    clean = task.prompts("train", shots=SETTINGS.shots, n=SETTINGS.n_means, seed=0)
    assert [i for i, prompt in enumerate(clean) if prompt.answer in "hi"] == list(means.kept)
    kept = f"seven-on: head means over the {len(means.kept)} of 20 clean 4-shot"
    assert manifest(tmp_path)["filters"][0].startswith(kept)


# --- resuming -------------------------------------------------------------------------------------


def refuse(*args: Any, **options: Any) -> None:
    raise AssertionError("a finished stage was computed again")


STAGES = [
    "mean_head_outputs",
    "indirect_effects",
    "fit_ltv",
    "choose_function_vectors",
    "evaluate",
]


def home(stage: str) -> Any:
    """The module that a stage is called from."""
    return next(place for place in (stages, fv, module) if hasattr(place, stage))


def test_a_finished_study_computes_nothing_again(folder, undrawn, monkeypatch):
    before = outcome(folder)
    for stage in STAGES:
        monkeypatch.setattr(home(stage), stage, refuse)
    study(folder)
    assert outcome(folder) == before
    assert manifest(folder)["state"] == "finished"
    assert manifest(folder)["earlier_sessions"]


def test_another_seed_draws_other_prompts(done, tmp_path):
    other = study_one(tmp_path, settings=replace(SETTINGS, seed=5))
    first = done.found["seven-on"]
    for column in ("aie", "omega", "contribution"):
        assert (first.heads[column] != other.heads[column]).all()
    assert not first.results["value"].equals(other.results["value"])
    assert set(other.history["seed"]) == {5, 6}


@contextmanager
def stopping_at(stage: str) -> Iterator[None]:
    """Ctrl-C at the first call of a stage; "training" is in the middle of an LTV."""

    def interrupt(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
        steps = iter([0] * (12 if "LTV" in title else 1000))
        yield lambda n: None if next(steps, None) is not None else interrupt()

    with pytest.MonkeyPatch.context() as patch:
        if stage == "training":
            patch.setattr(stages, "progress_bar", bar)
        elif stage == "figures":
            patch.setattr(module.figures, "method_dots", interrupt)
        else:
            patch.setattr(home(stage), stage, interrupt)
        yield


def test_a_study_interrupted_at_every_stage_ends_with_the_same_bytes(folder, tmp_path):
    path = tmp_path / "run"
    for stage in [*STAGES[:2], "training", *STAGES[2:], "figures"]:
        with stopping_at(stage), pytest.raises(KeyboardInterrupt):
            study(path)
        assert manifest(path)["state"] == "interrupted"
        if stage == "training":
            assert [file.name for file in (path / "checkpoints").iterdir()] == (
                ["seven-on-ltv-0.safetensors"]
            )
    study(path)
    assert outcome(path) == outcome(folder), "checkpoints and temporary files are gone as well"
    sessions = manifest(path)["earlier_sessions"]
    assert [session["state"] for session in sessions] == ["interrupted"] * 7
    assert manifest(path)["timings"].keys() == manifest(folder)["timings"].keys()


def test_training_goes_on_from_its_checkpoint(tmp_path, monkeypatch):
    """Steps before the last validation are not taken again."""
    settings = replace(SETTINGS, ltv_seeds=1)
    with stopping_at("training"), pytest.raises(KeyboardInterrupt):
        study_one(tmp_path, settings=settings)
    steps: list[int] = []

    @contextmanager
    def bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
        yield steps.append if "LTV" in title else lambda _: None

    monkeypatch.setattr(stages, "progress_bar", bar)
    study_one(tmp_path, settings=settings)
    assert sum(steps) == 20 - 10


# --- edges ----------------------------------------------------------------------------------------


class Lenient(FirstToken):
    """Counts every answer as right, for models that have learned nothing."""

    def answered(self, outputs, batch):
        return torch.ones(outputs.shape[:2], dtype=torch.bool)


@pytest.mark.parametrize(("n_layer", "n_head"), [(1, 1), (3, 1), (1, 4)])
def test_a_model_of_one_head_or_layer_is_studied(n_layer, n_head, tmp_path):
    sizes = {
        "num_hidden_layers": n_layer,
        "num_attention_heads": n_head,
        "num_key_value_heads": 1,
        "head_dim": 6,
    }
    model = LlamaForCausalLM(LlamaConfig(**(zoo.CONFIGS["llama"][1] | sizes)))
    zoo.randomise(model)
    lens = tvlens.load(model, tokenizer=zoo.tokenizer(), name="small")
    lens = replace(lens, readout=Lenient())
    tasks = {"seven-on": trained.TASKS["seven-on"]}
    settings = replace(SETTINGS, ks=(3, 10), compare_ks=(5, 10))
    study(tmp_path / "run", lens, tasks, settings)
    assert len(table(tmp_path / "run", "heads")) == n_layer * n_head
    at = fitting_ks((3, 10), n_layer * n_head)
    assert set(table(tmp_path / "run", "fv_sweep")["k"]) == set(at)
    shared = table(tmp_path / "run", "headsets", measure="overlap", comparison="aie and ltv")
    assert list(shared["k"]) == [n_layer * n_head]
    assert list(shared["value"]) == [1.0], "sets of all heads are equal"


def test_one_test_prompt_gives_shares_wide_intervals_and_others_none(tmp_path):
    results = study_one(tmp_path, settings=replace(SETTINGS, n_test=1)).results
    assert set(results["n"]) == {1}
    shares = results["metric"].isin(["accuracy", "exact_match"])
    assert (results["ci_low"] == results["ci_high"])[~shares].all()
    certain = results[shares & results["value"].isin([0, 1])]
    assert len(certain)
    assert ((certain["ci_high"] - certain["ci_low"]).round(3) == 0.793).all()


def test_one_seed_leaves_out_the_agreement_of_seeds(tmp_path):
    headsets = study_one(tmp_path, settings=replace(SETTINGS, ltv_seeds=1)).headsets
    assert set(headsets["comparison"]) == {"aie and ltv", "aie halves"}


def test_sizes_of_head_sets_fit_the_model():
    assert fitting_ks((3, 10, 30), 270) == [3, 10, 30]
    assert fitting_ks((3, 10, 30), 12) == [3, 10]
    assert fitting_ks((3, 10, 30), 3) == [3]
    assert fitting_ks((3, 10, 30), 2) == [2]
