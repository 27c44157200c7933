"""A text layout is given once, to the task, and everything that asks the task uses it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import tvlens
from helpers import trained, zoo
from helpers.commands import mistake, ok
from tvlens.errors import TaskError, UnknownNameError
from tvlens.models import backend as module
from tvlens.runs.run import Run
from tvlens.studies.study import study_all
from tvlens.studies.text import TextSettings, text_plans
from tvlens.tasks import TEMPLATES, Template, chat_template, read_template
from tvlens.vectors.ltv.settings import FitSettings

MINE = Template(query_prefix="B: ", answer_prefix="C:", instruction="Do it.")
FIT = FitSettings(steps=2, shots=3, n_prompts=8, n_validation=4)
SMALL = ["--shots", 3, "--n-means", 8, "--n-validation", 4, "--n-test", 4, "--steps", 2]


@pytest.fixture
def asked(monkeypatch):
    """How every prompt that a model is given begins."""
    found: list[str] = []
    encode = module.encode_text

    def spy(tokenizer, texts, *given, **options):
        found.extend(text.replace("\n", "|") for text in texts)
        return encode(tokenizer, texts, *given, **options)

    monkeypatch.setattr(module, "encode_text", spy)
    return found


def of_mine(text: str) -> bool:
    return text.startswith("Do it.||B: ") and text.endswith("|C:") and "Q:" not in text


def test_a_task_asks_in_its_own_layout():
    task = zoo.TASK.with_template(MINE)
    for kind in ("zero", "shuffled", "clean"):
        assert task.prompts("test", shots=2, kind=kind).template == MINE
    assert task.prompts("test", shots=2, template=Template()).template == Template()
    assert (task.pairs, task.name) == (zoo.TASK.pairs, zoo.TASK.name)
    assert zoo.TASK.template == Template()


def test_another_layout_is_another_digest_and_the_default_is_none():
    digests = {zoo.TASK.with_template(template).digest for template in (MINE, *TEMPLATES.values())}
    assert len(digests) == 1 + len(TEMPLATES)
    assert zoo.TASK.with_template(Template()).digest == zoo.TASK.digest
    assert zoo.TASK.digest in digests


def test_a_whole_study_asks_in_the_layout_of_its_task(asked, tmp_path):
    lens = trained.lens()
    # The model was trained on the layout of its task, in other words.
    mine = Template(instruction="Q")
    task = trained.TASKS["seven-on"].with_template(mine)
    settings = TextSettings(
        shots=3, n_means=8, n_mediation=4, n_test=4, ltv=FIT, ltv_seeds=2, ks=(2,), scales=(2.0,)
    )
    with Run.open(tmp_path / "run", "study", {}) as run:
        study_all(text_plans(lens, {task.name: task}, settings), run)
    assert len(asked) > 20
    assert all(text.startswith("Q||Q: ") for text in asked)


def test_means_mediation_training_and_evaluation_ask_alike(asked):
    lens, task = zoo.lens(), zoo.TASK.with_template(MINE)
    clean = task.prompts("train", shots=3, n=8)
    means = tvlens.mean_head_outputs(lens, clean, answered_only=False)
    shuffled = tvlens.mediation_prompts(task, clean, means, n=4)
    tvlens.indirect_effects(lens, shuffled, means)
    ltv = tvlens.fit_ltv(lens, task, means, settings=FIT)
    tvlens.evaluate(lens, task, {"LTV": ltv}, shots=3, n=3, exact_match=False)
    assert len(asked) > 20
    assert all(map(of_mine, asked))


def test_mediation_is_laid_out_as_the_clean_prompts():
    lens = zoo.lens()
    clean = zoo.TASK.prompts("train", shots=3, n=8, template=MINE)
    means = tvlens.mean_head_outputs(lens, clean, answered_only=False)
    assert tvlens.mediation_prompts(zoo.TASK, clean, means, n=4).template == MINE


def test_other_prompts_than_the_means_were_offered_are_refused(tmp_path):
    lens = zoo.lens()
    clean = zoo.TASK.prompts("train", shots=3, n=8)
    made = tvlens.mean_head_outputs(lens, clean, answered_only=False)
    made.save(tmp_path / "means.safetensors")
    for means in (made, tvlens.HeadMeans.load(tmp_path / "means.safetensors")):
        for other in (
            clean[:3],
            zoo.TASK.prompts("train", shots=3, n=8, seed=9),
            zoo.TASK.prompts("train", shots=2, n=8),
            zoo.TASK.prompts("train", shots=3, n=8, template=MINE),
            replace(zoo.TASK, pairs=zoo.TASK.pairs[:30]).prompts("train", shots=3, n=8),
        ):
            with pytest.raises(
                TaskError, match=r"the means were offered 8 other prompts than thes"
            ):
                tvlens.mediation_prompts(zoo.TASK, other, means)
        assert len(tvlens.mediation_prompts(zoo.TASK, clean, means, n=4)) == 4


def test_training_on_another_layout_than_that_of_the_means_is_refused():
    lens = zoo.lens()
    clean = zoo.TASK.prompts("train", shots=3, n=8, template=MINE)
    means = tvlens.mean_head_outputs(lens, clean, answered_only=False)
    with pytest.raises(
        TaskError, match=r"another layout than Template\(query_prefix='Q: '.*with_t"
    ):
        tvlens.fit_ltv(lens, zoo.TASK, means, settings=FIT)


# --- names, files and chats ----------------------------------------------------------------------


def test_layouts_by_name_and_from_a_file(tmp_path):
    assert read_template("arrow").render(zoo.TASK.pairs[:1], "x") == "aa ->k\nx ->".replace(
        "->k", "-> k"
    )
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(asdict(MINE)))
    assert read_template(file) == MINE
    file.write_text('{"answer_prefix": "Then:"}')
    assert read_template(str(file)) == Template(answer_prefix="Then:")


@pytest.mark.parametrize("text", ["[]", "{", '{"prefix": "a"}', '{"answer_prefix": 3}'])
def test_files_that_are_no_layout_are_refused(text, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(text)
    with pytest.raises(TaskError, match=f"template file {file}") as refused:
        read_template(file)
    assert "\n" not in str(refused.value)
    with pytest.raises(UnknownNameError, match="unknown template 'arow'; expected one of question"):
        read_template("arow")


TURNS = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
CHATS = {
    "plain": TURNS + "{% if add_generation_prompt %}<assistant>{% endif %}",
    "begins with a sign": "{{ bos_token }}" + TURNS + "<assistant>",
    "one system": "<system>Be kind<end>" + TURNS + "<assistant>",
    "system without an end": "Be kind. " + TURNS + "<assistant>",
}


@pytest.mark.parametrize("name", CHATS)
@pytest.mark.parametrize("bos", [True, False])
def test_a_chat_is_laid_out_as_the_tokenizer_lays_it_out(name, bos):
    tokenizer = zoo.tokenizer(bos=bos)
    tokenizer.chat_template = CHATS[name]
    task = zoo.TASK.with_template(chat_template(tokenizer))
    prompt = task.prompts("test", shots=2, n=1)[0]
    chat = []
    for pair in prompt.demos:
        chat += [{"role": "user", "content": pair.input}]
        chat += [{"role": "assistant", "content": pair.output}]
    chat += [{"role": "user", "content": prompt.query.input}]
    expected = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    # What the lens puts before a prompt does not stand in it.
    assert prompt.text == (expected.removeprefix("<bos>") if bos else expected)


def test_what_the_system_says():
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = CHATS["plain"]
    task = zoo.TASK.with_template(chat_template(tokenizer, instruction="Name it."))
    assert task.prompts("test", kind="zero", n=1).texts[0].startswith("<system>Name it.<end><user>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (None, "the model's tokenizer has no chat template; choose another layout"),
        ("{{ raise_exception('no') }}", "cannot be taken apart"),
        ("nothing", "cannot be taken apart"),
        (TURNS + "<assistant>think:", "lays out the last turn otherwise than those before"),
    ],
)
def test_chats_that_no_template_can_lay_out_are_refused(template, words):
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TaskError, match=words):
        chat_template(tokenizer)


# --- commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def places(tmp_path_factory) -> tuple[Path, Path]:
    """A model and tasks in folders."""
    root = tmp_path_factory.mktemp("places")
    return trained.save_model(root / "model"), trained.save_tasks(root / "tasks")


def command(places: tuple[Path, Path], *words: object) -> list[object]:
    return [*words, "--model", places[0], "--data", places[1], "--tasks", "seven-on"]


def test_commands_ask_in_the_layout_that_is_named(places, asked, tmp_path):
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"instruction": "Q"}))
    ok(*command(places, "study", "text", "--out", tmp_path / "run", "--template", file, *SMALL))
    vector = next((tmp_path / "run" / "vectors").glob("seven-on-ltv*.safetensors"))
    out = ["--out", tmp_path / "fit", "--shots", 3, "--steps", 2]
    ok(*command(places, "fit", "--template", file, *out))
    out = ["--out", tmp_path / "aie", "--shots", 3]
    ok(*command(places, "mediate", "--template", file, *out))
    out = ["--out", tmp_path / "eval", "--shots", 3, "--vector", f"v={vector}"]
    ok(*command(places, "evaluate", "--template", file, *out))
    assert len(asked) > 100
    assert all(text.startswith("Q||Q: ") for text in asked)


def test_runs_of_another_layout_do_not_resume(places, tmp_path):
    out = ["--out", tmp_path / "run", "--shots", 3]
    ok(*command(places, "mediate", *out))
    words = mistake(
        *command(places, "mediate", "--template", "input-output", *out), kind=tvlens.errors.RunError
    )
    assert "seven-on" in words


def test_layouts_that_are_not_there_are_refused_before_a_folder_is_made(places, tmp_path):
    out = ["--out", tmp_path / "run"]
    words = mistake(*command(places, "mediate", "--template", "no", *out), kind=UnknownNameError)
    assert "unknown template 'no'" in words
    words = mistake(*command(places, "mediate", "--template", "chat", *out), kind=TaskError)
    assert "has no chat template" in words
    assert not (tmp_path / "run").exists()
