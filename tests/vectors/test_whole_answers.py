"""Vectors trained on whole answers, and vectors that act at every position of an answer."""

from dataclasses import replace

import pytest
import torch

import tvlens
from helpers import tiny_regression, zoo
from tvlens.errors import ModelError, RunError, ShapeError, TaskError, UnknownNameError
from tvlens.evaluation import generate_tokens
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.hooks import WholePassEngine
from tvlens.runs.storage import load_tensors, save_tensors
from tvlens.tasks import Pair, Prompt, Template
from tvlens.vectors.catalogue import load_vector
from tvlens.vectors.ltv.attribution import attribute
from tvlens.vectors.ltv.fit import fit_ltv
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.sample import read_fit_prompts, validation_prompts
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.vector import HeadMixture, TaskVector, edits_of

SETTINGS = FitSettings(
    steps=20,
    batch_size=16,
    n_prompts=24,
    evaluate_every=5,
    shots=2,
    answer="whole",
    positions="all",
)


@pytest.fixture(scope="module", params=zoo.KINDS)
def setting(request):
    """A lens and mean head outputs."""
    lens = zoo.lens("llama", request.param)
    return lens, mean_head_outputs(
        lens, zoo.TASK.prompts("train", shots=2, n=8), answered_only=False
    )


@pytest.fixture(scope="module")
def lens():
    return zoo.lens()


@pytest.fixture(scope="module")
def means(lens):
    return mean_head_outputs(lens, zoo.TASK.prompts("train", shots=2, n=8), answered_only=False)


@pytest.fixture(scope="module")
def ltv(lens, means):
    return fit_ltv(lens, zoo.TASK, means, settings=SETTINGS)


def whole_loss(lens, vector):
    """Cross-entropy of whole answers on the validation prompts, by whole passes."""
    slow = replace(lens, engine=WholePassEngine(lens.backend)).answering("whole")
    found = []
    for prompts in validation_prompts(zoo.TASK, SETTINGS, 0):
        ((edit, _),) = edits_of([vector], lens, prompts)
        found.append(slow.outputs(prompts, edit, slow.readout.loss))
    return float(torch.cat(found).mean())


@pytest.mark.parametrize("positions", ["query", "all"])
def test_training_lowers_the_loss_of_whole_answers(setting, positions):
    lens, means = setting
    made = fit_ltv(lens, zoo.TASK, means, settings=replace(SETTINGS, positions=positions))
    losses = made.history["validation_loss"]
    assert losses.iloc[-1] < losses.iloc[0] - 0.5
    assert whole_loss(lens, made) == pytest.approx(losses.min(), rel=1e-4)
    assert whole_loss(lens, TaskVector.none(lens)) == pytest.approx(losses.iloc[0], rel=1e-4)
    assert made.positions == made.task_vector.positions == positions


def test_both_engines_train_alike(lens, means):
    slow = replace(lens, engine=WholePassEngine(lens.backend))
    settings = replace(SETTINGS, steps=5)
    slowly, fast = (fit_ltv(each, zoo.TASK, means, settings=settings) for each in (slow, lens))
    assert zoo.off(slowly.omega, fast.omega) < 1e-3


def test_attributions_sum_to_the_gain_in_log_probability_of_whole_answers(lens, ltv):
    prompts = validation_prompts(zoo.TASK, SETTINGS, 0)
    stored = ltv.attribution.clone()
    found = attribute(lens.answering("whole"), ltv, prompts, steps=64)
    gain = whole_loss(lens, TaskVector.none(lens)) - whole_loss(lens, ltv)
    assert float(found.sum()) == pytest.approx(gain, rel=0.02)
    assert zoo.off(stored, found) < 0.3
    ltv.attribution.copy_(stored)


def test_prompts_read_for_first_tokens_are_not_those_of_whole_answers(lens, means):
    read = read_fit_prompts(lens, zoo.TASK, replace(SETTINGS, answer="first"), 0)
    with pytest.raises(TaskError, match=r"got prompts read .*'first'.*; expected .*'whole'"):
        fit_ltv(lens, zoo.TASK, means, settings=SETTINGS, read=read)


def test_steps_are_as_wide_as_their_answers_and_see_all_kinds(lens):
    training = read_fit_prompts(lens, zoo.TASK, SETTINGS, 0).training
    tokens = (training.reading.batch.following >= 0).sum(dim=1).tolist()
    assert tokens == sorted(tokens)
    assert {*tokens} == {2, 3}
    columns = [training.rows(slice(i, i + 16)).reading.batch for i in (0, 16, 32)]
    assert [batch.n_read for batch in columns] == [2, 3, 3]
    zero = min(training.reading.batch.mask.sum(dim=1).tolist())
    for batch in columns:
        prompts = batch.mask[:, : int(batch.query[0]) + 1].sum(dim=1)
        assert (prompts <= zero).sum() == 8


def spoken(lens, vector, positions="own"):
    prompts = zoo.TASK.prompts("test", kind="zero", n=6)
    return generate_tokens(lens, prompts, vector, n_tokens=4, positions=positions)


def test_a_vector_acts_where_it_says_when_it_is_read_back(lens, ltv, tmp_path):
    path = tmp_path / "ltv.safetensors"
    ltv.save(path)
    for found in (LearnableTaskVector.load(path), load_vector(path)):
        assert found.positions == "all"
        assert torch.equal(spoken(lens, found), spoken(lens, ltv, "all"))
        assert not torch.equal(spoken(lens, found), spoken(lens, ltv, "first"))
    ltv.task_vector.save(path)
    assert TaskVector.load(path).positions == "all"
    assert torch.equal(spoken(lens, TaskVector.load(path)), spoken(lens, ltv, "all"))
    mixture = replace(HeadMixture.in_place(ltv.weights, "llama", "made"), positions="all")
    mixture.save(path)
    assert HeadMixture.load(path).positions == "all"


def test_files_that_say_nothing_are_of_vectors_at_the_query(ltv, tmp_path):
    path = tmp_path / "vector.safetensors"
    once = replace(ltv.task_vector, positions="query")
    once.save(path)
    tensors, facts = load_tensors(path)
    assert "positions" not in facts
    assert load_vector(path).positions == "query"
    save_tensors(path, tensors, facts | {"positions": "everywhere"})
    with pytest.raises(RunError, match=r"'positions' is 'everywhere', expected 'query' or 'all'"):
        load_vector(path)


def test_each_vector_of_a_table_acts_where_it_says(lens):
    """A prompt whose answer is what the vector says when it is added everywhere, and another."""
    eos = zoo.WORDS.index("<eos>")
    for seed in range(200):
        values = 3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(seed))
        once = TaskVector(values, (0, 2), "llama", "made")
        everywhere = replace(once, positions="all")
        said, first = (spoken(lens, each)[0].tolist() for each in (everywhere, once))
        if said[0] == first[0] and said[1:3] != first[1:3] and min(said[:3]) > eos:
            break
    words = "".join(zoo.WORDS[token] for token in said[:2])
    template = Template(answer_space="", pair_separator=zoo.WORDS[said[2]])
    asked = zoo.TASK.prompts("test", kind="zero", n=6)[0].query
    prompts = zoo.prompts(Prompt((), Pair(asked.input, words), "zero", template))
    table = tvlens.evaluation.evaluate_prompts(lens, prompts, {"all": everywhere, "once": once})
    assert table.of("all", "exact_match").tolist() == [1.0]
    assert table.of("once", "exact_match").tolist() == [0.0]


def test_vectors_that_act_elsewhere_are_not_added(ltv):
    once = replace(ltv.task_vector, positions="query")
    with pytest.raises(ShapeError, match=r"act at positions 'all' and 'query'; expected one"):
        ltv.task_vector + once
    both = ltv.task_vector + ltv.task_vector
    assert both.positions == (2 * both).positions == "all"


def test_positions_that_are_none_are_refused(unchecked, lens, means, ltv):
    words = r"unknown positions 'end'; expected 'query', or 'all' for the query and every position"
    settings = replace(SETTINGS, positions="end")
    shuffled = zoo.TASK.prompts("train", shots=2, n=2, kind="shuffled")
    for attempt in (
        lambda: fit_ltv(lens, zoo.TASK, means, settings=settings),
        lambda: replace(ltv.task_vector, positions="end"),
        lambda: replace(HeadMixture.in_place(ltv.weights, "llama", "made"), positions="end"),
        lambda: LearnableTaskVector(means.outputs, positions="end"),
        lambda: tvlens.indirect_effects(lens, shuffled, means, positions="end"),
    ):
        with pytest.raises(UnknownNameError, match=words):
            attempt()
    with pytest.raises(UnknownNameError, match=r"unknown answer 'some'; expected 'first' or"):
        fit_ltv(lens, zoo.TASK, means, settings=replace(SETTINGS, answer="some"))


def test_regression_models_have_no_whole_answers():
    lens, task = tiny_regression.lens(), tiny_regression.TASK
    means = mean_head_outputs(lens, task.prompts("train", shots=4, n=4))
    for changes in ({"positions": "all", "answer": "first"}, {"positions": "query"}):
        settings = replace(SETTINGS, **changes)
        word = "positions='all'" if changes["positions"] == "all" else "answer='whole'"
        with pytest.raises(ModelError, match=f"{word} asked of 'tiny', which answers with one num"):
            fit_ltv(lens, task, means, settings=settings)
    prompts = task.prompts("train", shots=4, n=4)
    with pytest.raises(ModelError, match=r"answer='whole' asked of 'tiny'"):
        tvlens.indirect_effects(lens, prompts, means, answer="whole")


@pytest.mark.parametrize("positions", ["query", "all"])
def test_effects_are_those_of_whole_passes_of_prompts_with_their_answers(lens, means, positions):
    prompts = zoo.TASK.prompts("train", shots=2, n=4, kind="shuffled")
    found = tvlens.indirect_effects(lens, prompts, means, answer="whole", positions=positions)
    assert found.unit == "log-probability"
    model = lens.backend.model
    batch = lens.answering("whole").encode(prompts)
    for i in (0, 1):
        row = batch.inputs[i][batch.mask[i]][None]
        following = batch.following[i][batch.following[i] >= 0]
        columns = list(range(row.shape[1] - len(following), row.shape[1]))
        acting = columns if positions == "all" else columns[:1]

        def score(layer=None, head=None, row=row, following=following, columns=columns, at=acting):
            def patch(z, hook):
                z = z.clone()
                z[:, at, head] = means.z[layer, head]
                return z

            hooks = [] if layer is None else [(f"blocks.{layer}.attn.hook_z", patch)]
            with torch.no_grad():
                logits = model.run_with_hooks(row, fwd_hooks=hooks)[0, columns]
            return float(logits.log_softmax(dim=-1).gather(1, following[:, None]).sum())

        assert float(found.baseline[i]) == pytest.approx(score(), abs=1e-4)
        for layer in range(3):
            for head in range(4):
                effect = score(layer, head) - score()
                assert float(found.values[i, layer, head]) == pytest.approx(effect, abs=1e-4)


def test_effects_of_whole_answers_are_screened_too(lens, means):
    prompts = zoo.TASK.prompts("train", shots=2, n=4, kind="shuffled")
    exact = tvlens.indirect_effects(lens, prompts, means, answer="whole")
    found = tvlens.indirect_effects(lens, prompts, means, answer="whole", screen=5)
    assert int(found.exact.sum()) == 5
    assert zoo.off(found.values[:, found.exact], exact.values[:, found.exact]) < 1e-3
    assert not torch.allclose(found.values, exact.values)


@pytest.mark.parametrize("options", [{}, {"answer": "whole", "screen": 3}])
def test_effects_behind_the_query_need_whole_answers_and_no_screen(lens, means, options):
    prompts = zoo.TASK.prompts("train", shots=2, n=2, kind="shuffled")
    with pytest.raises(TaskError, match=r"positions='all' replaces heads at the positions of"):
        tvlens.indirect_effects(lens, prompts, means, positions="all", **options)


def test_means_at_answers_are_weighed_as_others_are(lens):
    prompts = zoo.TASK.prompts("train", shots=2, n=8)
    at_answers = mean_head_outputs(lens, prompts, answered_only=False, at="answers")
    made = fit_ltv(lens, zoo.TASK, at_answers, settings=SETTINGS)
    assert torch.equal(made.outputs, at_answers.outputs)
    assert made.history["validation_loss"].min() < made.history["validation_loss"].iloc[0] - 0.5
