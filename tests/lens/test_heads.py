from dataclasses import replace

import pytest
import torch

from helpers import tiny_regression as tiny
from helpers import zoo
from tvlens.errors import NumericalError, RunError, TaskError
from tvlens.lens.edits import NoEdit
from tvlens.lens.heads import HeadMeans, donor_outputs, mean_head_outputs
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.readout import FirstToken
from tvlens.lens.replay import ReplayEngine
from tvlens.runs.storage import save_tensors


@pytest.fixture
def clean(task):
    return task.prompts("train", shots=2, n=9)


def test_the_mean_is_that_over_all_prompts(lens, clean):
    z = lens.engine.read(lens.encode(clean)).z
    means = mean_head_outputs(lens, clean, answered_only=False)
    assert zoo.off(means.z, z.mean(dim=0)) < 1e-6
    assert (means.count, means.offered, means.kept) == (9, 9, tuple(range(9)))
    assert means.model == "llama"
    assert {t.dtype for t in (means.z, means.outputs)} == {torch.float32}


@pytest.mark.parametrize("max_tokens", [1, 60])
def test_reading_in_pieces_gives_the_same(lens, clean, max_tokens):
    watched = zoo.Watched(lens.engine)
    whole = mean_head_outputs(lens, clean, answered_only=False)
    parts = mean_head_outputs(
        replace(lens, engine=watched, max_tokens=max_tokens), clean, answered_only=False
    )
    assert max(watched.tokens) <= max(max_tokens, lens.encode(clean).inputs.shape[1])
    assert len(watched.tokens) > 3
    assert zoo.off(parts.z, whole.z) < 1e-5


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_contributions_and_bias_sum_to_the_attention_output(name, kind, clean):
    lens = zoo.lens(name, kind)
    backend, batch = lens.backend, lens.encode(clean)
    found = {}
    names = [backend.added_hook(layer) for layer in range(3)]
    keep = [(n, lambda a, hook, n=n: found.update({n: a[:, -1].mean(dim=0)})) for n in names]
    with torch.no_grad(), backend.model.hooks(keep):
        backend.forward(batch.inputs, batch.mask)
    means = mean_head_outputs(lens, clean, answered_only=False)
    expected = torch.stack([found[n] for n in names])
    assert zoo.off(means.outputs.sum(dim=1) + backend.b_o, expected) < 1e-5


def test_outputs_are_mean_z_times_the_output_projection(lens, clean):
    means = mean_head_outputs(lens, clean, answered_only=False)
    for layer, head in ((0, 0), (1, 3), (2, 1)):
        expected = means.z[layer, head] @ lens.w_o[layer, head]
        assert zoo.off(means.outputs[layer, head], expected) < 1e-5


def test_whole_passes_give_the_same_means(lens, clean):
    slow = replace(lens, engine=WholePassEngine(lens.backend))
    found = mean_head_outputs(slow, clean, answered_only=False)
    expected = mean_head_outputs(lens, clean, answered_only=False)
    assert zoo.off(found.z, expected.z) < 1e-5


class AnswersByRank(FirstToken):
    """Counts an answer as given where its logit is above the median."""

    def answered(self, outputs, batch):
        logit = outputs.gather(-1, batch.target[:, None, None].expand(-1, outputs.shape[1], 1))
        return logit[..., 0] > outputs.median(dim=-1).values


def test_only_answered_prompts_enter_the_mean(lens, clean):
    reading = lens.engine.read(lens.encode(clean))
    readout = AnswersByRank()
    kept = readout.answered(lens.engine.run(reading, NoEdit(3)), reading.batch)[:, 0].nonzero()
    kept = kept.flatten().tolist()
    assert 1 < len(kept) < 9
    means = mean_head_outputs(replace(lens, max_tokens=70, readout=readout), clean)
    assert means.kept == tuple(kept)
    assert (means.count, means.offered) == (len(kept), 9)
    assert zoo.off(means.z, reading.z[kept].mean(dim=0)) < 1e-5


def test_means_saved_and_read_back(lens, clean, tmp_path):
    means = mean_head_outputs(replace(lens, readout=AnswersByRank()), clean)
    assert 1 < means.count < means.offered == 9
    path = tmp_path / "new" / "means.safetensors"
    means.save(path)
    found = HeadMeans.load(str(path))
    assert torch.equal(found.z, means.z)
    assert torch.equal(found.outputs, means.outputs)
    assert (found.kept, found.offered, found.model) == (means.kept, 9, "llama")
    assert isinstance(found.kept, tuple)


@pytest.mark.parametrize(
    ("tensors", "metadata", "lacks"),
    [
        (("vectors",), {"layers": [0], "model": "m"}, "z"),
        (("z", "outputs", "kept"), {"model": "m", "offered": 3, "z": 1}, "kept"),
        (("z",), {"model": "m", "offered": 3, "kept": [0], "outputs": 1}, "outputs"),
    ],
)
def test_files_of_anything_else_hold_no_means(tmp_path, tensors, metadata, lacks):
    path = tmp_path / "other.safetensors"
    save_tensors(path, {name: torch.ones(1, 1, 1) for name in tensors}, metadata)
    words = f"{path} holds no HeadMeans: it lacks '{lacks}', it has"
    with pytest.raises(RunError, match=words):
        HeadMeans.load(path)


def test_a_damaged_file_of_means_is_refused(tmp_path):
    path = tmp_path / "means.safetensors"
    HeadMeans(torch.ones(1, 2, 3), torch.ones(1, 2, 4), (0, 2), 3, "m").save(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RunError, match=f"cannot read {path}"):
        HeadMeans.load(path)


def test_a_model_that_answers_nothing_has_no_answered_mean(lens):
    prompts = zoo.prompts(*[zoo.one_shot("k", query) for query in "bcd"])
    said = lens.outputs(prompts, NoEdit(3), lambda x, b: x.argmax(dim=-1))
    assert (said != zoo.WORDS.index(" k")).all()
    words = (
        "task 'made-up': 'llama' answers none of 3 clean 1-shot prompts, so there is no mean over "
        "answered prompts; pass answered_only=False, or a task that the model does"
    )
    with pytest.raises(TaskError, match=words):
        mean_head_outputs(lens, prompts)


def test_activations_that_are_not_finite_are_refused(lens, clean):
    class Broken(ReplayEngine):
        def read(self, batch):
            prefix = super().read(batch)
            heads = prefix.heads.clone()
            heads[1, -1, 2, 0] = torch.nan
            return replace(prefix, heads=heads)

    words = r"hook_z of head \(1, 2\) of 'llama' is not finite on task 'kind-of-word'; expected"
    with pytest.raises(NumericalError, match=words):
        mean_head_outputs(replace(lens, engine=Broken(lens.backend)), clean, answered_only=False)


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("asked", ["clean", "zero", "shuffled", "curves"])
def test_donor_outputs_are_what_the_heads_of_the_donors_write(kind, asked):
    lens = tiny.lens(kind)
    if asked == "curves":
        prompts = tiny.TASK.curves("test", points=(2, 6, 9), n=3)
        # Row by row, the prompt's own first 2, 6 and 6 points.
        sets = [prompts.at(points) for points in (2, 6, 6)]
        expected = torch.stack([tiny.head_outputs(lens, p) for p in sets], dim=1).flatten(0, 1)
    else:
        prompts = tiny.TASK.prompts("test", shots=8, n=3, kind=asked)
        expected = tiny.head_outputs(lens, prompts.donors())
    found = donor_outputs(lens, prompts)
    assert found.model == "tiny"
    assert zoo.off(found.outputs, expected) < 1e-4
    for layer, head in ((0, 1), (1, 0)):
        written = found.z[:, layer, head] @ lens.w_o[layer, head]
        assert zoo.off(found.outputs[:, layer, head], written) < 1e-5
    parts = donor_outputs(replace(lens, max_tokens=1), prompts)
    assert zoo.off(parts.z, found.z) < 1e-4


def test_prompts_of_text_have_no_donors(clean):
    words = (
        "Prompts of task 'kind-of-word' have no donors: vectors of each prompt's own activations "
        "need prompts of a FunctionTask; use one vector for the task"
    )
    with pytest.raises(TaskError, match=words):
        donor_outputs(zoo.lens(), clean)


def test_donor_outputs_that_are_not_finite_are_refused():
    class Broken(ReplayEngine):
        def read(self, batch):
            prefix = super().read(batch)
            return replace(prefix, heads=prefix.heads * torch.nan)

    lens = tiny.lens()
    words = "head outputs of 'tiny' on donors of task 'linear' are not finite; expected finite"
    with pytest.raises(NumericalError, match=words):
        donor_outputs(replace(lens, engine=Broken(lens.backend)), tiny.TASK.prompts("test", n=1))
