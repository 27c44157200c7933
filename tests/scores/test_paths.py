"""Path patching: the same by hooks of transformer-lens, and identities that paths must meet."""

import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch

import tvlens
from helpers import tiny_regression, zoo
from tvlens.errors import ModelError, NumericalError, ShapeError, TaskError, UnknownNameError
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.lens.replay import ReplayEngine
from tvlens.lens.suffix import SuffixEngine
from tvlens.models.hooked import HookedBackend
from tvlens.scores.metrics import Reference, measured, metric_of
from tvlens.scores.patching import patch
from tvlens.scores.paths import path_effects
from tvlens.scores.receivers import Receiver
from tvlens.tasks import Prompts

needs_hooked = pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has only bridges")

CASES = [(name, kind) for name in ("llama", "gpt2", "gpt-neox") for kind in zoo.KINDS]
CASES += [(name, "bridge") for name in ("gemma2", "granite", "qwen3")]
PLACES = [(*case, "all") for case in CASES]
PLACES += [(name, "bridge", "query") for name in ("llama", "gemma2")]
RECEIVERS = ["q of 2.3", "k of 2.1", "v of 1.0", "mlp 1", "logits"]
SENDERS = [(0, 1), (1, 2), (2, 0)]
NO_REFERENCE = Reference(None, torch.zeros(0, 0))


def pair():
    """Two prompts of tokens of one length that part in the middle."""
    rows = [[7, 12, 31, 6, 9], [8, 33, 20, 5, 9]], [[7, 33, 20, 6, 9], [8, 12, 31, 5, 9]]
    return [Prompts.of_tokens(each, [11, 12]) for each in rows]


def uneven():
    """Prompts of three lengths, alike in source and target."""
    rows = [[7, 12, 31, 6, 9], [8, 33, 20], [5, 44, 10, 30, 9, 21]]
    others = [[7, 33, 20, 6, 9], [8, 12, 31], [6, 44, 12, 30, 10, 21]]
    return [Prompts.of_tokens(each, [11, 12, 13]) for each in (rows, others)]


def own_lens(**changes):
    """A lens on a HookedTransformer of attention alone."""
    inner = HookedBackend(zoo.attention_only(**changes), "attention-only")
    return Lens(inner, ReplayEngine(inner), FirstToken())


def loaded(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return tvlens.load(zoo.huggingface(name), tokenizer=zoo.tokenizer(), name=name)


def one_difference(outputs, batch):
    return outputs[..., 7] - outputs[..., 9]


class ByHand:
    """Paths by hooks of transformer-lens, the model's own modules making what a receiver gives.

    The model is run with the change added where the receiver reads, what the receiver then gives is
    kept, and put into a second run of the prompts as they are. Norms are held by the hook points at
    their scales, which HookedTransformers have.
    """

    def __init__(self, lens, source, target, columns, norm="exact"):
        self.lens, self.backend, self.norm = lens, lens.backend, norm
        self.source, self.target = (lens.encode(each) for each in (source, target))
        self.changes, self.clean = {}, self.run(self.target)[0]
        named = {"all": slice(None), "query": slice(-1, None)}
        self.columns = named[columns] if isinstance(columns, str) else columns

    def run(self, batch, points=(), **changes):
        """Outputs at the query and what stood at hook points, changes made at others."""
        kept = {}

        def keep(point, x, hook):
            # Bridges call some of their hook points otherwise.
            kept[point] = x.detach().clone()

        hooks = [(point, lambda x, hook, f=f: f(x.clone())) for point, f in changes.items()]
        hooks += [(point, partial(keep, point)) for point in points]
        with torch.no_grad(), self.backend.hooks(hooks):
            return self.backend.forward(batch.inputs, batch.mask)[:, -1:], kept

    def adding(self, change):
        def added(x):
            x[:, self.columns] += change
            return x

        return added

    def held(self, norm):
        """A hook that keeps the scale of a norm as it is in the target prompts."""
        if self.norm == "exact":
            return {}
        point = f"{norm}.hook_scale"
        scale = self.run(self.target, [point])[1][point]
        return {point: lambda x: scale}

    def heads(self, x, n):
        return x if x.ndim == 4 else x.unflatten(-1, (n, -1))

    def replaced(self, layer, head):
        """A hook that gives the head what it gathers in the source prompts."""
        z, heads = self.backend.z_hook(layer), self.backend.as_heads
        new = self.run(self.source, [z])[1][z]

        def change(x):
            changed = heads(x).clone()
            changed[:, self.columns, head] = heads(new)[:, self.columns, head]
            return changed.reshape(x.shape)

        return {z: change}

    def said(self, layer, head):
        """How what attention adds changes with the head, read off a run with it replaced."""
        out = self.backend.added_hook(layer)
        before, after = (
            self.run(self.target, [out], **changes)[1][out]
            for changes in ({}, self.replaced(layer, head))
        )
        return (after - before)[:, self.columns]

    def heard(self, receiver, change):
        """Hooks that put into a run what the receiver makes of the change."""
        layer, kind = receiver.layer, receiver.kind
        if kind == "logits":
            end = self.backend.residual_hook(self.backend.n_layer - 1)
            return {end: self.adding(change), **self.held("ln_final")}
        before, out = f"blocks.{layer}.hook_resid_pre", self.backend.added_hook(layer)
        if kind != "mlp":
            point = f"blocks.{layer}.attn.hook_{kind}"
            changes = {before: self.adding(change), **self.held(f"blocks.{layer}.ln1")}
            new = self.run(self.target, [point], **changes)[1][point]
            n = self.backend.n_head if kind == "q" else self.backend.n_kv_head

            def one_head(x):
                shape = x.shape
                x = self.heads(x, n).clone()
                x[:, :, receiver.head] = self.heads(new, n)[:, :, receiver.head]
                return x.reshape(shape)

            return {point: one_head}
        behind, seen = self.backend.residual_hook(layer), {}
        parallel = self.backend.anatomy().blocks[layer].parallel
        reads = {before if parallel else out: self.adding(change)}
        points, held = [before, out, behind], self.held(f"blocks.{layer}.ln2")
        changed = self.run(self.target, points, **reads, **held)[1]
        mlp_out = changed[behind] - changed[before] - changed[out]
        return {
            before: lambda x: seen.setdefault("before", x),
            out: lambda x: seen.setdefault("out", x),
            behind: lambda x: seen["before"] + seen["out"] + mlp_out,
        }

    def effect(self, sender, receivers, metric="logit_difference"):
        if sender not in self.changes:
            self.changes[sender] = self.said(*sender)
        hooks = {}
        for receiver in receivers:
            for point, function in self.heard(receiver, self.changes[sender]).items():
                other = hooks.get(point, lambda x: x)
                hooks[point] = lambda x, f=function, g=other: f(g(x))
        return self.difference(hooks, metric)

    def difference(self, hooks, metric="logit_difference"):
        measure = metric_of(self.lens, metric)
        after, before = (
            measured(measure, self.lens, outputs, self.target, NO_REFERENCE)
            for outputs in (self.run(self.target, **hooks)[0], self.clean)
        )
        return (after - before)[:, 0]


def hears(lens, receiver, sender):
    last = lens.n_layer if receiver.layer is None else receiver.layer
    parallel = lens.engine.anywhere.anatomy.blocks[0].parallel
    return sender[0] < last + (receiver.kind == "mlp" and not parallel)


def compare(lens, positions, norm="exact"):
    """Effects and those by hand, for every receiver and sender."""
    columns = [1, 3] if positions == [1, -2] else positions
    slow = ByHand(lens, *pair(), columns, norm)
    for text in RECEIVERS:
        receiver = Receiver.of(text)
        options = {"at": positions, "norm": norm, "metric": "logit_difference"}
        effects = path_effects(lens, *pair(), text, **options)
        for sender in SENDERS:
            found = effects.values[:, sender[0], sender[1]]
            if hears(lens, receiver, sender):
                expected = slow.effect(sender, [receiver])
                assert torch.allclose(found, expected, atol=2e-5), (text, sender)
            else:
                assert torch.equal(found, torch.zeros(2)), (text, sender)
        # Behind the last keys and values, the query position alone matters.
        reaches = positions != [1, -2] or receiver.kind in ("k", "v", "mlp")
        assert (effects.values.abs().max() > 2e-4) == reaches


@pytest.mark.parametrize(("name", "kind", "positions"), PLACES)
def test_effects_are_those_of_hooks(name, kind, positions):
    compare(zoo.lens(name, kind), positions)


def test_senders_act_at_positions_that_are_chosen():
    compare(zoo.lens("llama"), [1, -2])


@needs_hooked
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt-neox"])
def test_a_frozen_norm_keeps_its_scale(name):
    lens = zoo.lens(name, "hooked")
    compare(lens, "all", "frozen")
    for text in RECEIVERS:
        exact, held, bridged = (
            path_effects(each, *pair(), text, at="all", norm=norm, metric=one_difference).values
            for each, norm in ((lens, "exact"), (lens, "frozen"), (zoo.lens(name), "frozen"))
        )
        assert torch.allclose(bridged, held, atol=1e-5)
        assert (exact - held).abs().max() > 1e-3


def test_logits_behind_a_frozen_norm_are_bounded():
    """Gemma 2 caps its logits: the formula of its norm and cap, on what its last layer leaves."""
    lens, slow = zoo.lens("gemma2"), ByHand(zoo.lens("gemma2"), *pair(), "query")
    model, end = zoo.huggingface("gemma2"), lens.backend.residual_hook(2)
    x = slow.run(slow.target, [end])[1][end][:, -1:]
    norm, cap = model.model.norm, model.config.final_logit_softcapping
    held = (1 + norm.weight) / (x.square().mean(dim=-1, keepdim=True) + norm.eps).sqrt()

    def difference(stream):
        with torch.no_grad():
            logits = cap * (model.lm_head(stream * held) / cap).tanh()
        return one_difference(logits, None)[:, 0]

    options = {"norm": "frozen", "metric": one_difference}
    effects = path_effects(lens, *pair(), "logits", **options)
    assert torch.allclose(effects.baseline, difference(x), atol=1e-4)
    expected = difference(x + slow.said(1, 2)) - difference(x)
    assert expected.abs().max() > 1e-2
    assert torch.allclose(effects.values[:, 1, 2], expected, atol=1e-4)


@needs_hooked
def test_without_norms_none_is_frozen():
    lens = own_lens(normalization_type=None)
    for text in ("q of 2.3", "k of 1.1", "v of 2.0", "logits"):
        exact, held = (
            path_effects(lens, *pair(), text, norm=norm, metric=one_difference).values
            for norm in ("exact", "frozen")
        )
        assert exact.abs().max() > 1e-2
        assert torch.allclose(exact, held, atol=1e-4)


@pytest.mark.parametrize("positions", ["query", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt-neox"])
def test_several_receivers_are_patched_jointly(name, positions):
    """Each hears the sender alone: the queries of the last layer nothing of what the others say."""
    lens = zoo.lens(name)
    slow = ByHand(lens, *pair(), positions)
    several = ["v of 1.0", "q of 2.3", "v of 2.0", "mlp 1", "q of 2.1", "logits"]
    options = {"at": positions, "metric": "logit_difference"}
    effects = path_effects(lens, *pair(), several, **options)
    for sender in [(0, 2), (1, 1), (2, 3)]:
        receivers = [r for r in map(Receiver.of, several) if hears(lens, r, sender)]
        expected = slow.effect(sender, receivers)
        assert torch.allclose(effects.values[:, sender[0], sender[1]], expected, atol=2e-5), sender
    alone = sum(path_effects(lens, *pair(), each, **options).values for each in several)
    assert (effects.values - alone)[:, 0].abs().max() > 1e-3
    assert torch.allclose(effects.values[:, 2], alone[:, 2], atol=2e-5)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_regression_models_are_patched_alike(kind):
    lens = tiny_regression.lens(kind)
    source, target = (
        tiny_regression.TASK.prompts("train", shots=5, n=4, kind=k) for k in ("clean", "shuffled")
    )
    for positions in ("query", "all"):
        slow = ByHand(lens, source, target, positions)
        for text in ("v of 1.0", "mlp 0", "logits"):
            effects = path_effects(lens, source, target, text, at=positions)
            assert effects.unit == "squared error"
            expected = slow.effect((0, 1), [Receiver.of(text)], None)
            assert expected.abs().max() > 1e-6
            assert torch.allclose(effects.values[:, 0, 1], expected, atol=1e-5)


JOINT = ["llama", "gpt2", "gemma2", "olmo2", "granite", "olmoe", "gpt-oss", "opt", "bloom"]


@pytest.mark.parametrize("name", JOINT)
def test_a_last_head_acts_by_its_mlp_and_the_logits(name):
    """Nothing else hears it, so that both paths jointly are the whole patch, and neither alone."""
    lens = zoo.lens(name)
    expected = patch(lens, *pair(), site="z", metric="logit_difference").values[:, -1, :, 0]
    found = {
        receivers: path_effects(lens, *pair(), receivers, metric="logit_difference").values[:, -1]
        for receivers in (("mlp 2", "logits"), ("mlp 2",), ("logits",))
    }
    assert expected.abs().max() > 1e-3
    assert torch.allclose(found["mlp 2", "logits"], expected, atol=2e-5)
    for alone in (("mlp 2",), ("logits",)):
        assert (found[alone] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    "of", ["gpt-neox", *(pytest.param(n, marks=needs_hooked) for n in ("LN", None))]
)
def test_a_last_head_that_no_mlp_reads_has_its_whole_effect_on_the_logits(of):
    lens = zoo.lens(of) if of == "gpt-neox" else own_lens(normalization_type=of)
    for metric in ("probability", "logit_difference"):
        found = path_effects(lens, *pair(), "logits", metric=metric).values[:, -1]
        expected = patch(lens, *pair(), site="z", metric=metric).values[:, -1, :, 0]
        assert expected.abs().max() > 1e-3
        assert torch.allclose(found, expected, atol=1e-5)


@needs_hooked
@pytest.mark.parametrize("positions", ["query", "all"])
def test_all_paths_at_once_are_the_whole_patch(positions):
    """Two layers of attention: heads of the first are heard by the second and by the logits."""
    lens = own_lens(n_layers=2)
    every = [Receiver(kind, 1, head) for kind in ("q", "k", "v") for head in range(lens.n_head)]
    every.append(Receiver("logits"))
    options = {"at": positions, "metric": "logit_difference"}
    found = path_effects(lens, *pair(), every, **options).values
    slow = ByHand(lens, *pair(), positions)
    for layer, head in [(0, 0), (0, 2), (1, 3)]:
        expected = slow.difference(slow.replaced(layer, head))
        assert expected.abs().max() > 1e-3
        assert torch.allclose(found[:, layer, head], expected, atol=1e-5)


@needs_hooked
def test_paths_of_a_linear_model_sum_to_the_whole_patch():
    """Attention to all alike and no norm: values and logits hear all that a head says."""
    model = zoo.attention_only(n_layers=2, normalization_type=None)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.W_Q.zero_()
            block.attn.b_Q.zero_()
    inner = HookedBackend(model, "uniform")
    lens = Lens(inner, ReplayEngine(inner), FirstToken())
    receivers = [*(f"v of 1.{head}" for head in range(lens.n_head)), "logits"]
    for positions in ("query", "all"):
        options = {"at": positions, "metric": one_difference}
        whole = patch(lens, *pair(), site="z", positions=positions, metric=one_difference)
        expected = whole.values.sum(dim=-1)[:, 0]
        paths = [path_effects(lens, *pair(), r, **options) for r in receivers]
        found = torch.stack([each.values[:, 0] for each in paths]).sum(dim=0)
        assert expected.abs().max() > 1e-2
        assert torch.allclose(found, expected, atol=1e-4)
    assert path_effects(lens, *pair(), "k of 1.0", metric=one_difference).values.abs().max() < 1e-5


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("component", ["q", "k", "v"])
def test_effects_are_those_of_transformer_lens(component):
    from transformer_lens import patching

    if not hasattr(patching, "get_act_patch_direct_path"):
        pytest.skip("this transformer-lens has no direct paths")
    inner = zoo.new_backend("gpt2", "bridge")
    lens = Lens(inner, ReplayEngine(inner), FirstToken())
    source, target = (each[[0]] for each in pair())
    inputs = [lens.encode(each).inputs for each in (source, target)]

    def difference(logits):
        return one_difference(logits[0, -1], None)

    with torch.no_grad():
        caches = [inner.model.run_with_cache(each)[1] for each in inputs]
        before = difference(inner.model(inputs[1]))
        whole = patching.get_act_patch_direct_path(
            inner.model, inputs[1], *caches, difference, 0, 2, component, verbose=False
        )
    expected = whole[1:].cpu() - before
    assert expected.abs().max() > 1e-3
    for layer in (1, 2):
        for head in range(lens.n_head):
            receiver = Receiver(component, layer, head)
            options = {"at": "all", "metric": one_difference}
            found = path_effects(lens, source, target, receiver, **options).scores[0, 2].item()
            assert found == pytest.approx(expected[layer - 1, head].item(), abs=1e-5)


@pytest.mark.parametrize("positions", ["query", "all"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_prompt_put_into_itself_changes_nothing_at_all(name, positions):
    lens = zoo.lens(name)
    for receiver in (*RECEIVERS, ["q of 2.3", "mlp 1", "logits"]):
        effects = path_effects(lens, pair()[1], pair()[1], receiver, at=positions)
        assert torch.equal(effects.values, torch.zeros(2, 3, 4))


@pytest.mark.parametrize("positions", ["query", "all"])
def test_pieces_and_padding_change_nothing(positions, monkeypatch):
    lens, rows, run = zoo.lens("gemma2"), [], SuffixEngine.run

    def watched(self, reading, edit):
        rows.append(len(reading) * edit.n_variant)
        return run(self, reading, edit)

    monkeypatch.setattr(SuffixEngine, "run", watched)
    for receiver in ("k of 2.1", "mlp 1", "logits", ["v of 2.0", "logits"]):
        whole = path_effects(lens, *uneven(), receiver, at=positions).values
        rows.clear()
        done = []
        small = replace(lens, max_tokens=13, max_rows=5)
        options = {"at": positions, "progress": done.append}
        found = path_effects(small, *uneven(), receiver, **options).values
        assert max(rows) <= 5
        assert done == [2, 1]
        alone = [
            path_effects(lens, *(p[[i]] for p in uneven()), receiver, at=positions)
            for i in range(3)
        ]
        assert torch.allclose(found, whole, atol=1e-6)
        assert torch.allclose(torch.cat([each.values for each in alone]), whole, atol=1e-6)


def test_prompts_of_different_length_are_matched_at_the_query(lens):
    longer = Prompts.of_tokens([[3, *row] for row in pair()[0].rows], [11, 12])
    effects = path_effects(lens, longer, pair()[1], "v of 2.0")
    means = [mean_head_outputs(lens, longer[[i]], answered_only=False) for i in range(2)]
    of_means = [path_effects(lens, m, pair()[1][[i]], "v of 2.0") for i, m in enumerate(means)]
    assert effects.values.abs().max() > 1e-4
    assert torch.allclose(torch.cat([e.values for e in of_means]), effects.values, atol=1e-6)


def test_a_position_given_twice_counts_once(lens):
    for receiver in ("logits", ["q of 2.1", "logits"], "v of 1.0"):
        twice, once = (
            path_effects(lens, *pair(), receiver, at=positions).values
            for positions in ([-1, 4], "query")
        )
        assert torch.allclose(twice, once, atol=1e-6)


def test_roles_are_all_positions_of_prompts_laid_out_alike(lens):
    clean, shuffled = (zoo.prompts(*[zoo.one_shot(x, y) for y in "bc"]) for x in "kl")
    found = {
        positions: path_effects(
            lens, clean, shuffled, "v of 1.1", at=positions, metric="logit_difference"
        ).values
        for positions in ("all", "roles", "query")
    }
    assert found["all"].abs().max() > 1e-4
    assert torch.allclose(found["all"], found["roles"], atol=1e-6)
    assert (found["all"] - found["query"]).abs().max() > 1e-4


def test_senders_that_are_chosen(lens):
    whole = path_effects(lens, *pair(), "mlp 1").values
    some = path_effects(lens, *pair(), "mlp 1", senders=[(1, 3), (2, 0), (0, 1), (1, 3)]).values
    assert torch.allclose(some[:, [1, 0], [3, 1]], whole[:, [1, 0], [3, 1]], atol=1e-6)
    assert torch.equal(some[:, 2, 0], torch.zeros(2))
    assert (~some.isnan()).sum() == 2 * 3


def test_effects_are_scores_with_their_baseline(lens):
    effects = path_effects(lens, *pair(), Receiver("logits"), metric="kl")
    expected = patch(lens, *pair(), layers=[2], metric="kl")
    assert (effects.name, effects.unit) == ("path", "nats")
    assert (effects.task, effects.model) == ("tokens", "llama")
    assert torch.allclose(effects.baseline, expected.before, atol=1e-5)
    assert effects.values.shape == (2, 3, 4)
    assert torch.allclose(effects.scores, effects.values.mean(dim=0))
    assert path_effects(lens, *pair(), "logits").unit == "probability"
    wrong = Prompts.of_tokens(pair()[1].rows, [20, 21])
    given = [
        path_effects(lens, *pair(), "mlp 2", metric="logit_difference", wrong=w)
        for w in (wrong, None)
    ]
    assert (given[0].values - given[1].values).abs().max() > 1e-3


@pytest.mark.parametrize("norm", ["exact", "frozen"])
def test_paths_to_the_logits_need_no_replay(lens, norm):
    whole = replace(lens, engine=WholePassEngine(lens.backend))
    for positions in ("query", "all"):
        found, expected = (
            path_effects(each, *uneven(), "logits", at=positions, norm=norm).values
            for each in (whole, lens)
        )
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(("name", "layers"), [("lfm2", [1]), ("deepseek-v3", [0, 1, 2])])
def test_paths_to_the_logits_of_models_that_are_run_whole(name, layers):
    lens = loaded(name)
    assert isinstance(lens.engine, WholePassEngine)
    effects = path_effects(lens, *pair(), "logits", metric="logit_difference").values
    slow = ByHand(lens, *pair(), "query")
    for layer in range(3):
        if layer in layers:
            expected = slow.effect((layer, 2), [Receiver("logits")])
            assert expected.abs().max() > 1e-3
            assert torch.allclose(effects[:, layer, 2], expected, atol=2e-5)
        else:
            assert effects[:, layer].isnan().all()


@pytest.mark.parametrize("norm", ["exact", "frozen"])
def test_half_precision(norm):
    half = zoo.backend("llama", "bridge", torch.bfloat16)
    lens = Lens(half, ReplayEngine(half), FirstToken())
    for receiver in ("v of 1.0", "mlp 1", "logits"):
        found, expected = (
            path_effects(each, *pair(), receiver, norm=norm, metric=one_difference).values
            for each in (lens, zoo.lens("llama"))
        )
        assert (found - expected).abs().max() < 0.3 * expected.abs().max()


@pytest.mark.parametrize("text", ["q of 12.3", "k of 0.1", "v of 2.0", "mlp 20", "logits"])
def test_receivers_are_read_as_they_are_written(text):
    assert str(Receiver.of(text)) == text
    assert Receiver.of(f" {text}  ".replace(" ", "  ")) == Receiver.of(text)


@pytest.mark.parametrize(
    "text", ["", "q", "q of 3", "q 3.1", "z of 1.2", "mlp", "mlp 1.2", "logits 3", "mlp -1"]
)
def test_what_is_no_receiver_is_refused(text):
    with pytest.raises(UnknownNameError, match=r"there is no receiver '.*'; expected 'q of LAYER"):
        Receiver.of(text)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("parts", [("q", 1), ("mlp", 1, 2), ("mlp",), ("logits", 2), ("z", 1, 2)])
def test_receivers_of_wrong_parts_are_refused(parts):
    with pytest.raises(UnknownNameError, match=rf"no receiver of kind '{parts[0]}', layer .* head"):
        Receiver(*parts)


BAD = {
    "an unknown receiver": ({"receiver": "head 3"}, UnknownNameError, r"no receiver 'head 3'"),
    "no receiver": ({"receiver": []}, UnknownNameError, r"no receiver is given; expected one or"),
    "a layer too many": (
        {"receiver": "q of 3.0"},
        ShapeError,
        r"layer 3 of 'llama' has no 'q'; it is in layers 0, 1, 2 only",
    ),
    "an MLP too many": ({"receiver": "mlp 3"}, ShapeError, r"layer 3 of 'llama' has no 'mlp_out'"),
    "a head too many": (
        {"receiver": ["logits", "q of 2.4"]},
        ShapeError,
        r"receiver q of 2.4 of 'llama', whose q have heads 0 to 3: choose",
    ),
    "a key/value head too many": (
        {"receiver": "k of 2.2"},
        ShapeError,
        r"receiver k of 2.2 of 'llama', whose k have heads 0 to 1: choose",
    ),
    "a sender too many": (
        {"senders": [(0, 1), (3, 0), (1, 4)]},
        ShapeError,
        r"senders \[\(3, 0\), \(1, 4\)\] asked for; 'llama' has heads 0 to 3 in layers 0, 1, 2: ch",
    ),
    "no sender": ({"senders": []}, ShapeError, r"senders \[\] asked for; 'llama' has heads"),
    "nobody before the receiver": (
        {"receiver": "v of 0.1"},
        ShapeError,
        r"none of 12 senders of 'llama' comes before v of 0.1",
    ),
    "no sender before the receivers": (
        {"receiver": ["mlp 1", "q of 2.0"], "senders": [(2, 3)]},
        ShapeError,
        r"none of 1 senders of 'llama' comes before mlp 1 or q of 2.0, so none has a direct path",
    ),
    "an unknown norm": ({"norm": "held"}, UnknownNameError, r"'exact' or 'frozen', not 'held'"),
    "a norm that is read through twice": (
        {"receiver": ["logits", "mlp 1"], "norm": "frozen"},
        ModelError,
        r"norm='frozen' asked for mlp 1 and the logits jointly, whose norm reads what",
    ),
    "a position too far": (
        {"at": 5},
        TaskError,
        r"position 5 lies beyond prompt 0, which has 5 tokens",
    ),
    "an unknown metric": ({"metric": "accuracy"}, UnknownNameError, r"no metric 'accuracy'"),
    "a metric that is NaN": (
        {"metric": lambda outputs, batch: outputs[..., 0] * torch.nan},
        NumericalError,
        r"NaN or infinite for 2 of 2 outputs",
    ),
    "wrong answers to fewer prompts": (
        {"metric": "logit_difference", "wrong": Prompts.of_tokens([[1, 2]], [3])},
        TaskError,
        r"1 wrong answers for 2 prompts",
    ),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_patched_is_refused(name):
    changes, error, words = BAD[name]
    with pytest.raises(error, match=words):
        path_effects(zoo.lens("llama"), *pair(), **{"receiver": "logits", **changes})


def test_prompts_that_cannot_be_paired_are_refused(lens):
    source, target = pair()
    with pytest.raises(ShapeError, match=r"1 source prompts for 2 target prompts; expected one"):
        path_effects(lens, source[[0]], target, "logits")
    longer = Prompts.of_tokens([source.rows[0], [9, *source.rows[1]]], [11, 12])
    with pytest.raises(ShapeError, match=r"prompt 1 has 6 tokens as source and 5 as target"):
        path_effects(lens, longer, target, "logits", at="all")


def test_means_give_what_they_hold(lens):
    source, target = pair()
    means = mean_head_outputs(lens, source, answered_only=False)
    with pytest.raises(TaskError, match=r"at='all' asked for with the means of 2 prompts"):
        path_effects(lens, means, target, "logits", at="all")
    with pytest.raises(TaskError, match=r"metric 'kl' asked for with the means"):
        path_effects(lens, means, target, "logits", metric="kl")
    few = replace(means, z=means.z[:2], outputs=means.outputs[:2], layers=None)
    with pytest.raises(ShapeError, match=r"means of 'llama' have sizes"):
        path_effects(lens, few, target, "mlp 1")


def test_models_without_the_receiver_or_without_replay_are_refused(lens):
    whole = replace(lens, engine=WholePassEngine(lens.backend))
    words = r"'llama' is run by whole passes, which do not take a receiver such as q of 2.3 out"
    with pytest.raises(ModelError, match=words):
        path_effects(whole, *pair(), ["logits", "q of 2.3"])
    if zoo.HAS_HOOKED:
        with pytest.raises(UnknownNameError, match=r"has no site 'mlp_out'"):
            path_effects(own_lens(), *pair(), "mlp 1")


WHOLE = {
    "granite-hybrid": r"is run by whole passes, and its blocks scale what heads write",
    "opt-projected": r"'opt-projected' has no norm behind its last block that Transf",
}


@pytest.mark.parametrize("name", WHOLE)
def test_models_run_whole_that_are_read_or_written_otherwise_are_refused(name):
    with pytest.raises(ModelError, match=WHOLE[name]):
        path_effects(loaded(name), *pair(), "logits")
