"""Effects to first order: exact where the model is linear, as near as they should be elsewhere."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers import tiny_regression, trained, zoo
from tvlens.errors import ModelError, ShapeError
from tvlens.lens.blocks import attend_all, causal, ready
from tvlens.lens.edits import ReplaceHeads
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.patches import Patch, Shift
from tvlens.lens.sites import SITE_KINDS, Site
from tvlens.scores.attributed import attributed_effects, attributed_heads
from tvlens.scores.attribution import attribution_patch
from tvlens.scores.mediation import IndirectEffects, indirect_effects
from tvlens.scores.patching import patch
from tvlens.tasks import Prompts


def pair():
    rows = {"clean": [[7, 12, 31, 6, 9], [8, 33, 20, 5, 9]], "corrupted": [[7, 33, 20, 6, 9]] * 2}
    return [Prompts.of_tokens(each, [11, 12]) for each in rows.values()]


def first_logit(outputs, batch):
    return outputs[..., 11]


def linear_pair():
    return [Prompts.of_tokens([row], [0]) for row in ([5, 40, 18, 9], [5, 18, 41, 4])]


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="the linear model is a HookedTransformer")
@pytest.mark.parametrize("kind", ["resid_pre", "resid_post", "attn_out", "v", "z", "pattern"])
def test_effects_of_a_linear_model_are_exact(kind):
    """Its heads attend to all tokens alike: logits are linear in all but queries and keys."""
    lens = zoo.linear_lens()

    def loud(outputs, batch):
        return outputs[..., 0] + outputs[..., 40]

    found, exact = (
        each(lens, *linear_pair(), site=kind, positions="all", metric=loud)
        for each in (attribution_patch, patch)
    )
    assert kind == "pattern" or exact.values.abs().max() > 0.1
    assert torch.allclose(found.values, exact.values, atol=1e-4)
    assert (found.method, exact.method) == ("attribution", "exact")


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_the_gradient_is_what_small_patches_change(lens, kind):
    """Central differences, along what the source would bring."""
    engine, (source, target) = lens.engine, pair()
    found = attribution_patch(lens, source, target, site=kind, positions="all", metric=first_logit)
    site = Site(kind, 1)
    records = [engine.record(lens.encode(each), [site])[site] for each in (source, target)]
    moved = records[0] - records[1]
    batch = lens.encode(target)
    with torch.no_grad():
        active = torch.tensor([[False, True, False]])
        change = torch.zeros_like(moved)
        change[:, 3] = moved[:, 3] if moved.ndim == 3 else 0
        if moved.ndim > 3:
            change[:, 3, 0] = moved[:, 3, 0]
        reading = engine.anywhere.read(batch)
        small = [
            engine.anywhere.run(reading, Shift(3, {site: sign * 1e-2 * change[:, None]}, active))
            for sign in (1, -1)
        ]
    expected = (small[0] - small[1])[:, 0, 11] / 2e-2
    assert torch.allclose(found.values[:, 1, 0, 3], expected, rtol=1e-2, atol=1e-4)
    assert expected.abs().max() > 5e-4


@pytest.mark.parametrize("kind", ["z", "v", "resid_mid", "mlp_out", "k", "q"])
def test_on_the_way_from_target_to_source_effects_of_a_layer_sum_to_that_of_all(lens, kind):
    """Integrated gradients are complete, the more steps the better."""
    source, target = pair()
    engine = lens.engine.anywhere
    sites = [Site(kind, n) for n in range(3)]
    with torch.no_grad():
        given = engine.record(lens.encode(source), sites)
        batch = lens.encode(target)
        reading = engine.read(batch)
        before = engine.run(reading, _all_put(lens, kind, 0, given, [])).flatten(1)[:, 11]
        expected = (
            torch.stack(
                [
                    engine.run(reading, _all_put(lens, kind, n, given, [0, 1, 2, 3, 4]))[:, 0, 11]
                    for n in range(3)
                ],
                dim=1,
            )
            - before[:, None]
        )
    errors = []
    for steps in (2, 64):
        found = attribution_patch(
            lens, source, target, site=kind, positions="all", metric=first_logit, steps=steps
        )
        errors.append(float((found.values.sum(dim=(2, 3)) - expected).abs().max()))
    assert expected.abs().max() > 0.02
    assert errors[1] < 2e-3 * float(expected.abs().max()) + 2e-4
    assert errors[1] < errors[0]


def _all_put(lens, kind, layer, given, columns):
    at = torch.tensor([[columns or [-1]]])
    heads = torch.tensor([-1]) if kind in ("z", "v", "k", "q") else None
    values = {site.layer: x for site, x in given.items()}
    return Patch(kind, 3, torch.tensor([layer]), heads, at, values, at.clamp(min=0))


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="made as a HookedTransformer")
@pytest.mark.parametrize("kind", ["q", "k"])
def test_a_fixed_softmax_is_exact_behind_one_layer_of_attention(kind):
    """Without a norm behind it, logits are linear in the patterns of the last layer."""
    model = zoo.attention_only(n_layers=1, normalization_type=None)
    lens = replace(zoo.lens("gpt2", "hooked"), backend=zoo.HookedBackend(model, "one layer"))
    lens = replace(lens, engine=type(lens.engine)(lens.backend))
    ways = {"site": kind, "positions": "all", "metric": first_logit}
    prompts = [Prompts.of_tokens([row], [11]) for row in ([7, 12, 31, 40], [7, 33, 20, 9])]
    exact = patch(lens, *prompts, **ways).values
    fixed = attribution_patch(lens, *prompts, **ways, fix_softmax=True).values
    plain = attribution_patch(lens, *prompts, **ways).values
    assert torch.allclose(fixed, exact, atol=1e-4)
    assert (plain - exact).abs().max() > 10 * (fixed - exact).abs().max() + 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3", "mistral", "mpt", "gpt-oss", "gemma2"])
@pytest.mark.parametrize("kind", ["q", "k"])
def test_patterns_of_patched_queries_and_keys_are_right(name, kind):
    """The pattern that the fixed softmax reckons is what a patched run has: caps, sinks, slopes."""
    lens = zoo.lens(name, "bridge")
    engine = lens.engine.anywhere
    source, target = (lens.encode(each) for each in pair())
    sites = [Site(each, 1) for each in ("q", "k", "pattern")]
    with torch.no_grad():
        given, own = engine.record(source, sites), engine.record(target, sites)

    def of_one(outputs, batch):
        return outputs[..., 11]

    fixed = attribution_patch(
        lens, *pair(), site=kind, positions=[2], layers=[1], metric=of_one, fix_softmax=True
    )
    # By hand: attend with the patched query or key through the model's own blocks.
    block, anatomy = engine.anatomy.blocks[1], engine.anatomy
    position = torch.arange(5).expand(2, -1)
    seen = {}

    def keep(weights):
        seen["pattern"] = weights
        return weights

    q, k = own[sites[0]].clone(), own[sites[1]].clone()
    head = 1
    if kind == "q":
        q[:, 2, head] = given[sites[0]][:, 2, head]
    else:
        k[:, 2, head] = given[sites[1]][:, 2, head]
    with torch.no_grad():
        v = torch.zeros_like(k)
        turned = ready(block, q, k, position)
        mask = torch.ones(2, 5, dtype=torch.bool)
        attend_all(anatomy, block, *turned, v, causal(mask, block.window), position, keep)
    zero = torch.zeros_like(own[sites[2]])[:, None].requires_grad_()
    reading = engine.read(target)
    active = torch.tensor([[False, True, False]])
    out = engine.run(reading, Shift(3, {sites[2]: zero}, active))[..., 11]
    (gradient,) = torch.autograd.grad(out.sum(), zero)
    expected = ((seen["pattern"] - own[sites[2]]) * gradient[:, 0]).sum(dim=(1, 2, 3))
    assert torch.allclose(fixed.values[:, 1, head, 0], expected, atol=1e-5)
    assert expected.abs().max() > 1e-5


def test_both_engines_give_the_same(lens):
    slow = replace(lens, engine=WholePassEngine(lens.backend))
    for kind in ("resid_mid", "z", "k"):
        for steps in (0, 3):
            found, expected = (
                attribution_patch(each, *pair(), site=kind, positions="all", steps=steps).values
                for each in (lens, slow)
            )
            assert torch.allclose(found, expected, atol=1e-6)
            assert expected.abs().max() > 1e-5


def test_what_cannot_be_attributed_is_refused(lens):
    with pytest.raises(ShapeError, match=r"at z with steps=0, fix_softmax=True: expected steps of"):
        attribution_patch(lens, *pair(), site="z", fix_softmax=True)
    with pytest.raises(ShapeError, match=r"at k with steps=2, fix_softmax=True"):
        attribution_patch(lens, *pair(), site="k", fix_softmax=True, steps=2)
    with pytest.raises(ShapeError, match=r"steps=-1"):
        attribution_patch(lens, *pair(), steps=-1)
    slow = replace(lens, engine=WholePassEngine(lens.backend))
    with pytest.raises(ModelError, match=r"is run by whole passes, and fixing the softmax needs"):
        attribution_patch(slow, *pair(), site="k", fix_softmax=True)


def mediated():
    lens, task = trained.lens(), trained.TASKS["seven-on"]
    means = mean_head_outputs(lens, task.prompts("train", shots=4, n=8), answered_only=False)
    return lens, task.prompts("train", shots=4, n=6, kind="shuffled"), means


def test_heads_to_first_order_are_the_gradient_by_hooks():
    lens, prompts, means = mediated()
    batch = lens.encode(prompts)
    reading = lens.engine.read(batch)
    found, before = attributed_heads(lens, reading, means.z[None])
    model, kept = lens.backend.model, {}

    def leaf(z, hook, name):
        kept[name] = torch.zeros_like(z[:, -1]).requires_grad_()
        z = z.clone()
        z[:, -1] = z[:, -1] + kept[name]
        return z

    names = [f"blocks.{n}.attn.hook_z" for n in range(lens.n_layer)]
    with lens.frozen(), model.hooks(fwd_hooks=[(n, partial(leaf, name=n)) for n in names]):
        score = lens.readout.score(model(batch.inputs)[:, -1:], batch)
        gradients = torch.autograd.grad(score.sum(), [kept[n] for n in names])
    moved = means.z[None] - reading.z
    expected = (torch.stack(gradients, dim=1) * moved).sum(dim=-1)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(before, score[:, 0], atol=1e-6)
    assert expected.abs().max() > 5e-4


def test_more_steps_of_heads_sum_to_all_of_a_layer():
    lens, prompts, means = mediated()
    batch = lens.encode(prompts)
    reading = lens.engine.read(batch)
    mask = torch.eye(lens.n_layer, dtype=torch.bool)[..., None].expand(-1, -1, lens.n_head)
    with torch.no_grad():
        whole = lens.engine.run(reading, ReplaceHeads(mask, means.z[None, None]))
        expected = lens.readout.score(whole, batch)
    found, before = attributed_heads(lens, reading, means.z[None], steps=200)
    assert torch.allclose(found.sum(dim=2), expected - before[:, None], atol=2e-3)


@pytest.mark.parametrize("screen", [1, 5])
def test_screened_effects_are_exact_where_they_say_so(screen):
    lens, prompts, means = mediated()
    exact = indirect_effects(lens, prompts, means)
    done = []
    found = indirect_effects(lens, prompts, means, screen=screen, progress=done.append)
    rough, _ = attributed_heads(lens, lens.engine.read(lens.encode(prompts)), means.z[None])
    best = rough.mean(dim=0).flatten().topk(screen).indices
    expected = torch.zeros(found.exact.numel(), dtype=torch.bool)
    expected[best] = True
    assert torch.equal(found.exact.flatten(), expected)
    assert torch.allclose(found.values[:, found.exact], exact.values[:, found.exact], atol=1e-6)
    assert torch.allclose(found.values[:, ~found.exact], rough[:, ~found.exact], atol=1e-6)
    assert torch.allclose(found.baseline, exact.baseline, atol=1e-6)
    assert sum(done) == len(prompts)
    table = found.to_frame()
    assert table["aie_exact"].sum() == screen
    chosen = table[table["aie_exact"]]
    assert {(row.layer, row.head) for row in chosen.itertuples()} == {
        tuple(index) for index in found.exact.nonzero().tolist()
    }
    assert "aie_exact" not in exact.to_frame()


def test_a_screen_of_all_heads_is_no_screen(tmp_path):
    lens, prompts, means = mediated()
    n = lens.n_layer * lens.n_head
    found, exact = indirect_effects(lens, prompts, means, screen=n), None
    exact = indirect_effects(lens, prompts, means)
    assert found.exact.all()
    assert torch.allclose(found.values, exact.values, atol=1e-6)
    found.save(tmp_path / "effects.safetensors")
    again = IndirectEffects.load(tmp_path / "effects.safetensors")
    assert torch.equal(again.exact, found.exact)
    assert torch.equal(again.values, found.values)
    for screen in (0, n + 1):
        with pytest.raises(ShapeError, match=rf"best {screen} heads asked for, .* has {n} heads"):
            indirect_effects(lens, prompts, means, screen=screen)


def test_effects_of_donors_are_screened_too():
    lens = tiny_regression.lens()
    prompts = tiny_regression.TASK.prompts("train", shots=5, n=6, kind="shuffled")
    exact = indirect_effects(lens, prompts, None)
    found = indirect_effects(replace(lens, max_tokens=30), prompts, None, screen=2)
    assert torch.allclose(found.values[:, found.exact], exact.values[:, found.exact], atol=1e-5)
    assert not torch.allclose(found.values[:, ~found.exact], exact.values[:, ~found.exact])


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_gradients_are_there_whatever_the_caller_has_switched_off(off):
    lens, prompts, means = mediated()
    expected = attribution_patch(lens, *pair(), site="z").values
    screened = indirect_effects(lens, prompts, means, screen=2).values
    rough = attributed_effects(lens, prompts, means).values
    with off():
        assert torch.equal(attribution_patch(lens, *pair(), site="z").values, expected)
        assert torch.equal(attributed_effects(lens, prompts, means).values, rough)
        assert torch.equal(indirect_effects(lens, prompts, means, screen=2).values, screened)
    assert not expected.requires_grad
    assert not rough.requires_grad
