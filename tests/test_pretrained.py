"""The bundled model: its sizes, replay against hooked passes on it, and a task that it does."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import tvlens
from helpers import zoo
from tvlens.lens.edits import AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.hooks import WholePassEngine
from tvlens.models.catalogue import bundled_folder

pytestmark = pytest.mark.pretrained


@pytest.fixture(scope="module", params=zoo.KINDS)
def smollm2(request):
    """SmolLM2-135M-Instruct on every backend."""
    # Falling back to whole passes would warn, and warnings are errors.
    return tvlens.load("smollm2-135m", backend=request.param)


@pytest.fixture(scope="module")
def task():
    return tvlens.tasks.load("present-past")


def test_sizes(smollm2):
    backend = smollm2.backend
    assert (backend.n_layer, backend.n_head, backend.d_head, backend.d_model) == (30, 9, 64, 576)
    assert backend.d_vocab == 49152
    assert backend.anatomy().n_kv_head == 3
    assert smollm2.engine.name == "replay"
    assert smollm2.prefix == ()


def test_logits_are_those_of_the_original_model(smollm2, task):
    original = AutoModelForCausalLM.from_pretrained(bundled_folder("smollm2-135m"))
    batch = smollm2.encode(task.prompts("test", shots=3, n=1))
    with torch.no_grad():
        expected = original(batch.inputs).logits[:, -1:]
    found = smollm2.outputs(batch, NoEdit(30), lambda outputs, _: outputs)
    assert float((found - expected).abs().max()) < 5e-4


def test_replayed_probabilities_are_those_of_hooked_passes(smollm2, task):
    clean, zero = task.prompts("train", shots=3, n=1), task.prompts("train", n=1, kind="zero")
    batch = smollm2.encode(zoo.prompts(*clean, *zero))
    assert not batch.mask.all()
    whole = WholePassEngine(smollm2.backend)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(30, 9, 64, generator=generator)
    heads = ReplaceHeads.each_head(z).of_variants(torch.tensor([0, 100, 185, 269]))
    vectors = torch.randn(1, 2, 30, 576, generator=generator)
    active = torch.zeros(2, 30, dtype=torch.bool)
    active[0, 12], active[1, ::3] = True, True
    with smollm2.frozen(), torch.no_grad():
        fast, slow = smollm2.engine.read(batch), whole.read(batch)
        assert zoo.off(fast.z, slow.z) < 1e-4
        clean = whole.run(slow, NoEdit(30)).softmax(dim=-1)
        for edit in (heads, AddToResidual(vectors, active)):
            expected = whole.run(slow, edit).softmax(dim=-1)
            found = smollm2.engine.run(fast, edit).softmax(dim=-1)
            assert float((found - expected).abs().max()) < 1e-4
            assert float((expected - clean).abs().max()) > 1e-2


def test_present_past_is_done_in_context_and_not_without(smollm2, task):
    right = {
        kind: smollm2.outputs(
            task.prompts("test", shots=10, n=12, kind=kind), NoEdit(30), smollm2.readout.answered
        )
        for kind in ("clean", "zero")
    }
    assert right["clean"].double().mean() >= 0.8
    assert right["zero"].double().mean() <= 0.1
