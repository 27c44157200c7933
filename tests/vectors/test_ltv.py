import pandas as pd
import pytest
import torch

from helpers import zoo
from helpers.prompt_table import stacked
from tvlens.errors import NumericalError, ShapeError, UnknownNameError
from tvlens.lens.edits import NoEdit
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.hooks import WholePassEngine
from tvlens.vectors.controls import permuted_controls, random_controls
from tvlens.vectors.ltv.ltv import LearnableTaskVector


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def outputs():
    return random(3, 4, 32)


@pytest.fixture
def ltv(outputs):
    return LearnableTaskVector(outputs, start=random(3, 4, seed=1), model="llama", task="made-up")


def test_zero_weights_are_the_model_as_it_is(lens, outputs):
    made = LearnableTaskVector(outputs)
    assert not made.omega.any()
    edit = stacked([made.task_vector], lens)
    for engine, limit in ((WholePassEngine(lens.backend), 0), (lens.engine, 2e-6)):
        reading = engine.read(zoo.batch())
        assert zoo.off(engine.run(reading, edit), engine.run(reading, NoEdit(3))) <= limit


def test_vectors_are_weighted_sums_of_head_outputs(ltv):
    expected = torch.zeros(3, 32)
    for layer in range(3):
        for head in range(4):
            expected[layer] += ltv.omega[layer, head].detach() * ltv.outputs[layer, head]
    assert torch.allclose(ltv(), expected, atol=1e-6)
    assert torch.equal(ltv.task_vector.vectors, ltv().detach())
    assert ltv.task_vector.layers == (0, 1, 2)
    assert (ltv.task_vector.model, ltv.task_vector.origin) == ("llama", "LTV of made-up")


def test_omega_is_all_that_is_trained(ltv):
    assert [name for name, _ in ltv.named_parameters()] == ["omega"]
    ltv().sum().backward()
    assert torch.allclose(ltv.omega.grad, ltv.outputs.sum(dim=-1), atol=1e-5)


def test_blocks_are_slices_of_all_heads_projected_together(lens, task):
    """The released text code: project all heads at once, cut the result, weight the pieces."""
    prompts = task.prompts("train", shots=2, n=3)
    means = mean_head_outputs(lens, prompts, answered_only=False)
    weights = random(3, 4)
    made = LearnableTaskVector(means.outputs, start=weights, granularity="block")
    for layer in range(3):
        together = means.z[layer].flatten() @ lens.w_o[layer].flatten(0, 1)
        pieces = together.view(4, 8) * weights[layer, :, None]
        assert zoo.off(made()[layer], pieces.flatten()) < 1e-5
    with pytest.raises(
        ShapeError, match=r"cuts d_model 33 into 4 equal slices.*granularity='head'"
    ):
        LearnableTaskVector(random(3, 4, 33), granularity="block")


def test_contributions_are_norms_of_weighted_outputs(ltv):
    expected = (ltv.omega.detach()[..., None] * ltv.outputs).norm(dim=-1)
    assert torch.allclose(ltv.contributions(signed=False), expected)
    words = r"contributions have no sign; call tvlens.attribute.* or contributions\(signed=False\)"
    for ask in (ltv.contributions, lambda: ltv.scores, lambda: ltv.top(1)):
        with pytest.raises(NumericalError, match=words):
            ask()
    effect = random(3, 4, seed=2)
    ltv.attribution.copy_(effect)
    assert torch.allclose(ltv.contributions(), expected * effect.sign())
    assert torch.equal(ltv.scores, ltv.contributions())
    order = ltv.scores.flatten().argsort(descending=True)
    assert ltv.top(2) == [divmod(int(i), 4) for i in order[:2]]


def test_keep_top_leaves_the_heads_of_largest_contribution(ltv):
    norms = ltv.contributions(signed=False)
    ltv.keep_top(3)
    kept = norms >= norms.flatten().topk(3).values[-1]
    assert torch.equal(ltv.mask, kept)
    assert torch.equal(ltv.weights != 0, kept)
    expected = torch.einsum("lh,lhd->ld", ltv.omega * kept, ltv.outputs)
    assert torch.allclose(ltv(), expected)
    ltv().sum().backward()
    assert not ltv.omega.grad[~kept].any()
    for k in (0, 13):
        with pytest.raises(ShapeError, match=f"top {k} heads asked for, but there are 12 heads"):
            ltv.keep_top(k)
    assert torch.equal(ltv.mask, kept)


def test_travel_is_the_distance_from_the_start(ltv):
    assert ltv.travel == 0
    with torch.no_grad():
        ltv.omega[0, 0] += 3
        ltv.omega[2, 1] -= 4
    assert ltv.travel == pytest.approx(5)


@pytest.mark.parametrize("granularity", ["head", "block"])
def test_saved_and_read_back(outputs, tmp_path, granularity):
    made = LearnableTaskVector(
        outputs, start="normal", seed=3, granularity=granularity, model="m", task="t"
    )
    with torch.no_grad():
        made.omega += 0.5
        made.attribution.copy_(random(3, 4))
    made.keep_top(5)
    made.history = pd.DataFrame({"step": [0, 5], "train_loss": [float("nan"), 1.25]})
    path = tmp_path / "ltv.safetensors"
    made.save(path)
    found = LearnableTaskVector.load(path)
    for name, tensor in made.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert torch.equal(found(), made())
    assert (found.model, found.task, found.granularity) == ("m", "t", granularity)
    pd.testing.assert_frame_equal(found.history, made.history)
    assert found.travel == made.travel
    # safetensors: a length, then JSON; a pickle would be read by anything but this.
    content = path.read_bytes()
    assert content[8:9] == b"{"
    assert [p.name for p in tmp_path.iterdir()] == ["ltv.safetensors"]


def test_starts(outputs):
    first, second = (LearnableTaskVector(outputs, start="normal", seed=s) for s in (1, 2))
    assert torch.equal(first.omega, random(3, 4, seed=1))
    assert not torch.equal(first.omega, second.omega)
    given = random(3, 4)
    made = LearnableTaskVector(outputs, start=given)
    with torch.no_grad():
        made.omega.zero_()
    assert torch.equal(made.start, random(3, 4))
    assert torch.equal(given, random(3, 4))


def test_wrong_starts_are_refused(outputs):
    words = r"start weights have shape \(4, 3\), expected \(layer, head\) = \(3, 4\)"
    with pytest.raises(ShapeError, match=words):
        LearnableTaskVector(outputs, start=torch.zeros(4, 3))
    start = torch.zeros(3, 4)
    start[1, 1] = torch.nan
    words = "start weights of the Learnable Task Vector hold NaN or infinite numbers; expected"
    with pytest.raises(NumericalError, match=words):
        LearnableTaskVector(outputs, start=start)


def test_head_outputs_that_are_not_numbers_are_refused(outputs):
    outputs[0, 0, 0] = torch.inf
    words = "head outputs of the Learnable Task Vector hold NaN or infinite numbers"
    with pytest.raises(NumericalError, match=words):
        LearnableTaskVector(outputs)


def test_trained_weights_that_are_not_numbers_make_no_vector(ltv):
    with torch.no_grad():
        ltv.omega[0, 0] = torch.nan
    with pytest.raises(NumericalError, match=r"task vector \(LTV of made-up\) holds NaN"):
        _ = ltv.task_vector


def weights_of(vector, outputs):
    """The weights that give these vectors: the head outputs are independent."""
    pairs = zip(outputs, vector.vectors, strict=True)
    return torch.stack([torch.linalg.lstsq(o.T, v[:, None]).solution[:, 0] for o, v in pairs])


def test_random_controls_have_the_learned_norm(ltv):
    ltv.keep_top(6)
    controls = random_controls(ltv, n=3, seed=1)
    found = torch.stack([weights_of(control, ltv.outputs) for control in controls])
    norm = ltv.weights.detach().norm()
    assert torch.allclose(found.flatten(1).norm(dim=1), norm.expand(3), rtol=1e-4)
    # The start was drawn with the same seed; no control may be that start again.
    assert (found.flatten(1) @ ltv.weights.detach().flatten()).abs().max() < 0.8 * norm**2
    again, other = random_controls(ltv, n=3, seed=1), random_controls(ltv, n=3, seed=2)
    assert torch.equal(again[2].vectors, controls[2].vectors)
    assert not torch.equal(other[0].vectors, controls[0].vectors)
    assert not torch.equal(controls[1].vectors, controls[0].vectors)
    assert controls[1].origin == "random omega 1"


def test_permuted_controls_hold_the_learned_weights_elsewhere(ltv):
    controls = permuted_controls(ltv, n=3, seed=1)
    learned = ltv.weights.detach().flatten()
    for control in controls:
        found = weights_of(control, ltv.outputs).flatten()
        assert torch.allclose(found.sort().values, learned.sort().values, atol=1e-4)
        assert not torch.allclose(found, learned, atol=1e-2)
    assert torch.equal(permuted_controls(ltv, seed=1)[2].vectors, controls[2].vectors)
    assert controls[2].origin == "permuted omega 2"


def test_names_that_do_not_exist_are_refused(outputs, unchecked):
    with pytest.raises(UnknownNameError, match=r"start 'ones': expected 'zero', 'normal' or a \["):
        LearnableTaskVector(outputs, start="ones")
    with pytest.raises(UnknownNameError, match="granularity 'layer': expected 'head' or 'block'"):
        LearnableTaskVector(outputs, granularity="layer")


@pytest.mark.parametrize("name", ["omega", "start", "mask", "attribution", "norms"])
def test_a_state_of_other_sizes_is_refused_and_never_stretched(name):
    made = LearnableTaskVector(random(3, 4, 5), norms=random(3, 4).abs(), model="m", task="t")
    tensors, facts = made.state()
    for shape in ((1, 4), (3, 1), (4, 3), (4,), (3, 4, 1)):
        wrong = tensors | {name: torch.ones(shape).to(tensors[name].dtype)}
        with pytest.raises(
            ShapeError, match=rf"{name} has shape \(.*\), its head outputs are of \(3"
        ):
            LearnableTaskVector.of_state(wrong, facts)


def test_a_state_with_weights_that_are_no_numbers_is_refused():
    tensors, facts = LearnableTaskVector(random(3, 4, 5), model="m", task="t").state()
    wrong = tensors | {"omega": torch.full((3, 4), torch.inf)}
    with pytest.raises(NumericalError, match="omega of the Learnable Task Vector of 't' hold NaN"):
        LearnableTaskVector.of_state(wrong, facts)
