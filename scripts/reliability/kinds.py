"""Every kind of file that tvlens reads: an example, and what reads and uses it."""

import contextlib
import csv
import io
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import torch
from torch import Tensor

import tvlens
from helpers import reports, zoo
from tvlens.cli.options import read_scores
from tvlens.cli.studies import read_functions
from tvlens.errors import TaskError
from tvlens.lens.heads import HeadMeans, mean_head_outputs
from tvlens.lens.lens import Lens
from tvlens.models.catalogue import BUNDLED, MARKER, is_complete, is_undamaged
from tvlens.models.regression.garg import load_garg
from tvlens.models.regression.training import PRESETS, TrainSettings, model_card, preset, train
from tvlens.models.regression.transformer import (
    RegressionTransformer,
    load_regression,
    save_regression,
)
from tvlens.runs.run import Run
from tvlens.runs.storage import Kept, file_sha256
from tvlens.scores.agreement import compare_head_sets, overlap_curve
from tvlens.scores.score import Scores
from tvlens.studies.report import find_runs, write_report
from tvlens.studies.text import TextSettings
from tvlens.tasks import (
    Pair,
    PromptPairs,
    Task,
    load_file,
    load_folder,
    load_pairs,
    read_template,
)
from tvlens.tasks.base import PromptKind
from tvlens.vectors.catalogue import load_vector
from tvlens.vectors.exchange import load_gguf, save_gguf
from tvlens.vectors.ltv.fit import fit_ltv
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.released import load_released
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.materials import fitting_ks
from tvlens.vectors.vector import HeadMixture, TaskVector, Vector


class Unequal(Exception):
    """What was saved and read again is another value, or no value that can be used."""


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        name: what it is called.
        make: writes a whole example into an empty folder.
        read: reads what is in a folder, and uses it.
        share: how many inputs it gets, against others.
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path], object]
    share: float = 1.0


PAIRS = [{"input": f"w{i}ä", "output": f" {'ab'[i % 2]}{i}"} for i in range(14)]
WORDS = {"name": "mine", "description": "a b", "source": "me", "licence": "MIT", "pairs": PAIRS}


def as_table(delimiter: str) -> str:
    """The pairs as CSV or TSV."""
    kept = io.StringIO()
    writer = csv.DictWriter(kept, ["input", "output"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(PAIRS)
    return kept.getvalue()


TASK_FILES = {
    "list.json": json.dumps(PAIRS),
    "object.json": json.dumps(WORDS),
    "mapping.json": json.dumps({pair["input"]: pair["output"] for pair in PAIRS}),
    "columns.json": json.dumps({k: [pair[k] for pair in PAIRS] for k in ("input", "output")}),
    "lines.jsonl": "".join(f"{json.dumps(pair)}\n" for pair in PAIRS),
    "table.csv": as_table(","),
    "table.tsv": as_table("\t"),
}
PROMPT_PAIRS = [
    {"clean": f"w{i}ä is", "corrupted": f"v{i} is", "answer": " a", "wrong": "b"} for i in range(4)
]
LAYOUT = {"query_prefix": "In: ", "answer_prefix": "Out:", "instruction": "Do."}


def use_task(task: Task, folder: Path) -> None:
    """Digest, prompts and words of a task; saved, it is read as it was."""
    assert task.digest
    for text in (task.name, task.description, task.source, task.licence):
        text.encode()
    for kind in get_args(PromptKind):
        with contextlib.suppress(TaskError):  # there may be too few pairs
            prompts = task.prompts("train", shots=2, n=2, kind=kind)
            assert prompts.digest
            for prompt in prompts.items:
                (prompt.text + "".join(prompt.continuations)).encode()
    again = folder / "again.json"
    pairs = [{"input": pair.input, "output": list(pair.answers)} for pair in task.pairs]
    content = {"name": task.name, "pairs": pairs}
    again.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    if load_file(again).pairs != task.pairs:
        raise Unequal("a task saved and read again has other pairs")


def read_task(path: Path) -> None:
    """As a task file; what has different outputs for one input, without those too."""
    try:
        task = load_file(path)
    except TaskError as error:
        if "different outputs" not in str(error):
            raise
        task = load_file(path, duplicates="drop")
    use_task(task, path.parent)


def make_folder(folder: Path) -> None:
    for name in ("list.json", "object.json", "lines.jsonl", "table.csv"):
        (folder / name).write_text(TASK_FILES[name])


def read_pairs(path: Path) -> None:
    """Digests of pairs of prompts; made of their own texts again, they are what they were."""
    pairs = load_pairs(path)
    given = [pairs.clean, pairs.corrupted, *([pairs.wrong] if pairs.wrong else [])]
    assert all(prompts.digest for prompts in given)
    columns = [pairs.clean.texts, pairs.corrupted.texts]
    columns += [[text for (text,) in each.continuations] for each in (given[0], *given[2:])]
    names = ("clean", "corrupted", "answer", "wrong")[: len(columns)]
    texts = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
    if PromptPairs.of(texts, name=pairs.name) != pairs:
        raise Unequal("pairs of prompts made of their own texts are others")


def read_folder(folder: Path) -> None:
    for task in load_folder(folder).values():
        use_task(task, folder)


def read_layout(folder: Path) -> None:
    template = read_template(folder / "layout.json")
    assert template.digest
    pairs = tuple(Pair(f"w{i}", f"v{i}") for i in range(14))
    use_task(Task("mine", pairs, "d", "s", "l").with_template(template), folder)


def same_state(a: Kept, b: Kept) -> bool:
    """Whether two values are made of the same tensors and facts."""
    (held, facts), (others, other_facts) = a.state(), b.state()
    equal = [torch.equal(held[k].nan_to_num(7e7), others[k].nan_to_num(7e7)) for k in held]
    return all(equal) and json.dumps(facts) == json.dumps(other_facts)


def require_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that nothing can be computed with."""
    odd = [name for name, x in tensors.items() if not torch.isfinite(x).all()]
    if odd:
        raise Unequal(f"{odd[0]} was read and is not finite")


def read_vector(folder: Path) -> None:
    """As `--vector`; what acts is finite, and saved and read again it is the same."""
    vector = load_vector(folder / "vector.safetensors")
    require_finite(vector.plain.state()[0])
    vector.save(folder / "again.safetensors")
    if not same_state(vector, load_vector(folder / "again.safetensors")):
        raise Unequal("a vector saved and read again is another one")


def numbers(*shape: int) -> Tensor:
    """Random numbers, always the same."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def make_control_vector(folder: Path) -> None:
    save_gguf(TaskVector(numbers(3, 32), (1, 2), "m", "o", "all"), folder / "vector.gguf")


def read_control_vector(folder: Path) -> None:
    """What is read is finite; written and read again it is the same."""
    lens, _ = lens_and_means()
    vector = load_gguf(folder / "vector.gguf", lens)
    require_finite(vector.state()[0])
    save_gguf(vector, folder / "again.gguf")
    if not torch.equal(load_gguf(folder / "again.gguf", lens).vectors, vector.vectors):
        raise Unequal("a control vector saved and read again is another one")


def make_ltv() -> Vector:
    ltv = LearnableTaskVector(numbers(2, 4, 8), start="normal", model="m", task="t")
    ltv.history = pd.DataFrame({"step": [0, 1], "train_loss": [float("nan"), 1.0]})
    return ltv


def make_means() -> HeadMeans:
    return HeadMeans(numbers(2, 4, 6), numbers(2, 4, 8), (0, 2), 3, "m", None, "p", "l")


def read_means(folder: Path) -> None:
    means = HeadMeans.load(folder / "means.safetensors")
    require_finite(means.state()[0])
    assert means.n_heads >= 0
    assert means.count >= 0
    means.save(folder / "again.safetensors")
    if not same_state(means, HeadMeans.load(folder / "again.safetensors")):
        raise Unequal("means saved and read again are others")


def make_scores() -> Scores:
    return Scores.of_prompts(numbers(3, 2, 4), name="aie", unit="p", task="t", model="m")


def read_score_file(folder: Path) -> None:
    scores = Scores.load(folder / "scores.safetensors")
    scores.to_frame()
    scores.save(folder / "again.safetensors")
    if not same_state(scores, Scores.load(folder / "again.safetensors")):
        raise Unequal("scores saved and read again are others")


def read_table(folder: Path) -> None:
    """As `tvlens compare` of a column with itself."""
    for scores in read_scores(f"aie@{folder / 'heads.csv'}").values():
        ks = fitting_ks(TextSettings().compare_ks, scores.n_heads)
        compare_head_sets(scores, scores, ks=ks, names=("a", "b")).to_csv()
        overlap_curve(scores, scores)


def use_run(folder: Path) -> None:
    """A run with steps of every kind of output, as commands use it."""
    with Run.open(folder, "test", {"tasks": ["a"], "size": 1}, seeds={"seed": 0}) as run:
        table = pd.DataFrame({"x": [1.0, 2.0], "y": ["a", "b"]})
        outputs = {"table": table, "json": {"k": 1}, "tensors": {"x": numbers(3)}}
        saved = run.step("a/all", lambda: outputs)
        assert saved["json"] is not saved["tensors"]
        run.kept("a/means", HeadMeans, make_means)
        run.note_filter("one was left out")
        run.write_table("table", saved["table"])
    json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


SIZES = PRESETS["tiny"].sizes


def card() -> dict[str, Any]:
    """A model card that names all that is read of one."""
    settings = asdict(PRESETS["tiny"])
    return {"functions": "linear", "train_points": 6, "variance": 1.0, "settings": settings}


def make_regression(folder: Path) -> None:
    torch.manual_seed(0)
    model = RegressionTransformer(SIZES)
    save_regression(model, folder / "model.safetensors", card(), dtype=torch.float16)


def read_regression(folder: Path) -> None:
    """As `--functions FILE` of the study."""
    path = folder / "model.safetensors"
    model, described = load_regression(path)
    save_regression(model, folder / "again.safetensors", described, dtype=torch.float32)
    read_functions(str(path), "bridge")


def make_garg(folder: Path) -> None:
    torch.manual_seed(0)
    state = RegressionTransformer(SIZES).state_dict()
    torch.save({"model_state_dict": {f"_{k}": x for k, x in state.items()}}, folder / "state.pt")
    sizes = {"family": "gpt2", "n_dims": SIZES.n_dims, "n_positions": SIZES.n_points}
    sizes |= {"n_layer": SIZES.n_layer, "n_head": SIZES.n_head, "n_embd": SIZES.d_model}
    text = "".join(f"  {key}: {x}\n" for key, x in sizes.items())
    (folder / "config.yaml").write_text(f"inherit: [base]\nmodel:\n{text}training:\n  task: x\n")


def read_garg(folder: Path) -> None:
    load_garg(folder)(torch.zeros(1, 2, SIZES.n_dims), torch.zeros(1, 2))


def short() -> TrainSettings:
    """A training of two steps."""
    return preset("tiny", steps=2, evaluate_every=1, batch_size=2, n_validation=4)


def stop_in_the_second_step(work: Callable[[Callable[[int], None]], object]) -> None:
    """Begin a training, which is given its progress, and leave its first checkpoint."""
    done: list[int] = []

    def progress(_: int) -> None:
        done.append(1)
        if len(done) == 2:
            raise InterruptedError

    with contextlib.suppress(InterruptedError):
        work(progress)


def make_checkpoint(folder: Path) -> None:
    path = folder / "checkpoint.safetensors"
    stop_in_the_second_step(lambda p: train("linear", short(), checkpoint=path, progress=p))


def read_checkpoint(folder: Path) -> None:
    found = train("linear", short(), checkpoint=folder / "checkpoint.safetensors")
    found.history.to_csv()
    model_card("linear", short(), 0, None, "cpu", found)


@cache
def lens_and_means() -> tuple[Lens, HeadMeans]:
    """A tiny lens, and means of its heads."""
    lens = zoo.lens("gpt2")
    prompts = zoo.TASK.prompts("train", shots=2, n=4)
    return lens, mean_head_outputs(lens, prompts, answered_only=False)


def make_released(folder: Path) -> None:
    torch.save({"weights": numbers(3, 4)}, folder / "ltv_layer_5.pth")


def read_released(folder: Path) -> None:
    lens, means = lens_and_means()
    made = load_released(folder / "ltv_layer_5.pth", lens, means, granularity="head")
    made.save(folder / "again.safetensors")


def fit(folder: Path, progress: Callable[[int], None] = lambda _: None) -> None:
    """A Learnable Task Vector of two steps."""
    lens, means = lens_and_means()
    settings = FitSettings(steps=2, n_prompts=4, batch_size=2, evaluate_every=1, shots=2)
    path = folder / "checkpoint.safetensors"
    fit_ltv(lens, zoo.TASK, means, settings=settings, checkpoint=path, progress=progress)


def make_fit_checkpoint(folder: Path) -> None:
    stop_in_the_second_step(lambda progress: fit(folder, progress))


def make_cache(folder: Path) -> None:
    """A bundled model as the cache keeps it, with the note that it was found right."""
    kept = folder / "model"
    kept.mkdir()
    (kept / "config.json").write_text("{}")
    facts = {"size": 2, "sha256": file_sha256(kept / "config.json")}
    marker = {"gguf_sha256": BUNDLED["smollm2-135m"].sha256, "files": {"config.json": facts}}
    (kept / MARKER).write_text(json.dumps(marker))
    is_undamaged(kept)


def read_cache(folder: Path) -> None:
    kept = folder / "model"
    if is_complete(kept, BUNDLED["smollm2-135m"]):
        is_undamaged(kept)


def read_model(folder: Path) -> None:
    tvlens.load(folder)


def make_model(folder: Path) -> None:
    zoo.huggingface("llama").save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)


def _written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8")


def _task(name: str) -> Callable[[Path], object]:
    return lambda folder: read_task(folder / name)


def _saved(name: str, make: Callable[[], Kept]) -> Callable[[Path], object]:
    return lambda folder: make().save(folder / name)


HEADS = "task,layer,head,aie\n" + "".join(
    f"{task},{layer},{head},{layer * 0.1 + head}\n"
    for task in ("a", "b")
    for layer in range(2)
    for head in range(4)
)


def read_report(folder: Path) -> None:
    """Writes the page of a run folder."""
    write_report(find_runs([folder / "run"]), folder / "page.html")


KINDS = [
    *(Kind(f"task-{name}", _written(name, text), _task(name)) for name, text in TASK_FILES.items()),
    Kind("task-folder", make_folder, read_folder),
    Kind(
        "prompt-pairs",
        _written("pairs.json", json.dumps(PROMPT_PAIRS)),
        lambda folder: read_pairs(folder / "pairs.json"),
    ),
    Kind("template", _written("layout.json", json.dumps(LAYOUT)), read_layout),
    Kind(
        "task-vector",
        _saved("vector.safetensors", lambda: TaskVector(numbers(2, 8), (0, 1), "m", "o")),
        read_vector,
    ),
    Kind("ltv", _saved("vector.safetensors", make_ltv), read_vector),
    Kind(
        "mixture",
        _saved("vector.safetensors", lambda: HeadMixture(numbers(2, 2, 4), (0, 1), "m", "o")),
        read_vector,
    ),
    Kind("control-vector", make_control_vector, read_control_vector, 0.5),
    Kind("means", _saved("means.safetensors", make_means), read_means),
    Kind("scores", _saved("scores.safetensors", make_scores), read_score_file),
    Kind("heads-table", _written("heads.csv", HEADS), read_table),
    Kind("run", use_run, use_run, 2),
    Kind("report", lambda folder: reports.save(folder / "run", reports.tables()), read_report, 0.1),
    Kind("cache", make_cache, read_cache, 0.5),
    Kind("regression", make_regression, read_regression, 0.5),
    Kind("garg", make_garg, read_garg),
    Kind("checkpoint", make_checkpoint, read_checkpoint, 0.5),
    Kind("released", make_released, read_released, 0.5),
    Kind("fit-checkpoint", make_fit_checkpoint, fit, 0.2),
    Kind("model", make_model, read_model, 0.2),
]
"""Every kind, by name."""
