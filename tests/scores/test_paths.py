"""Path patching: the same by hooks of transformer-lens, and identities that paths must sum to."""

from dataclasses import replace
from functools import partial

import pytest
import torch

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
CASES += [(name, "bridge") for name in ("gemma2", "granite")]
RECEIVERS = ["q of 2.3", "k of 2.1", "v of 1.0", "mlp 1", "logits"]
SENDERS = [(0, 1), (0, 3), (1, 2), (2, 0)]


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


def last_logits(outputs, batch):
    return outputs[..., 7] - outputs[..., 9]


class ByHand:
    """Paths by hooks of transformer-lens, the model's own modules computing what a receiver does.

    The model is run with the change added where the receiver reads, what the receiver then gives is
    kept, and put into a second run of the prompts as they are.
    """

    def __init__(self, lens, source, target, at):
        self.lens, self.backend = lens, lens.backend
        self.source, self.target = (lens.encode(each) for each in (source, target))
        self.columns = slice(None) if at == "all" else slice(-1, None)

    def run(self, batch, points=(), **changes):
        """Outputs at the query and what stood at hook points, changes made at others."""
        kept = {}

        def keep(x, hook, point):
            # Bridges call some hook points by names of their own.
            kept[point] = x.detach().clone()

        hooks = [(point, lambda x, hook, f=f: f(x.clone())) for point, f in changes.items()]
        hooks += [(point, partial(keep, point=point)) for point in points]
        with torch.no_grad(), self.backend.hooks(hooks):
            return self.backend.forward(batch.inputs, batch.mask)[:, -1:], kept

    def adding(self, change):
        def added(x):
            x[:, self.columns] += change
            return x

        return added

    def heads(self, x, n):
        return x if x.ndim == 4 else x.unflatten(-1, (n, -1))

    def said(self, layer, head):
        """How what attention adds changes with the head, read off a run with it replaced."""
        z, out = self.backend.z_hook(layer), self.backend.added_hook(layer)
        new = self.run(self.source, [z])[1][z]

        def replaced(x):
            shape, n = x.shape, self.backend.n_head
            x, of = self.heads(x, n).clone(), self.heads(new, n)
            x[:, self.columns, head] = of[:, self.columns, head]
            return x.reshape(shape)

        before, after = (
            self.run(self.target, [out], **changes)[1][out] for changes in ({}, {z: replaced})
        )
        return (after - before)[:, self.columns]

    def heard(self, receiver, change):
        """Hooks that put into a run what the receiver makes of the change."""
        layer, kind = receiver.layer, receiver.kind
        if kind == "logits":
            return {self.backend.residual_hook(self.backend.n_layer - 1): self.adding(change)}
        before, out = f"blocks.{layer}.hook_resid_pre", self.backend.added_hook(layer)
        if kind != "mlp":
            point = f"blocks.{layer}.attn.hook_{kind}"
            new = self.run(self.target, [point], **{before: self.adding(change)})[1][point]
            n = self.backend.n_head if kind == "q" else self.backend.n_kv_head

            def one_head(x):
                shape = x.shape
                x = self.heads(x, n).clone()
                x[:, :, receiver.head] = self.heads(new, n)[:, :, receiver.head]
                return x.reshape(shape)

            return {point: one_head}
        behind = self.backend.residual_hook(layer)
        parallel = self.backend.anatomy().blocks[layer].parallel
        attended = self.run(self.target, [out])[1][out]
        changed = self.run(
            self.target, [behind, out], **{before if parallel else out: self.adding(change)}
        )[1]
        # The stream behind holds the change once too often, or twice.
        residual = changed[behind] - (changed[out] - attended)
        if parallel:
            residual[:, self.columns] -= change
        return {behind: lambda x: residual}

    def effect(self, sender, receivers, metric="logit_difference"):
        change = self.said(*sender)
        hooks = {}
        for receiver in receivers:
            for point, function in self.heard(receiver, change).items():
                other = hooks.get(point, lambda x: x)
                hooks[point] = lambda x, f=function, g=other: f(g(x))
        measure = metric_of(self.lens, metric)
        after, before = (
            measured(measure, self.lens, self.run(self.target, **h)[0], self.target, NO_REFERENCE)
            for h in (hooks, {})
        )
        return (after - before)[:, 0]


NO_REFERENCE = Reference(None, torch.zeros(0, 0))


@pytest.mark.parametrize("at", ["query", "all"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_effects_are_those_of_hooks(name, kind, at):
    lens = zoo.lens(name, kind)
    slow = ByHand(lens, *pair(), at)
    for text in RECEIVERS:
        receiver = Receiver.of(text)
        effects = path_effects(lens, *pair(), text, at=at, metric="logit_difference")
        assert effects.values.abs().max() > 5e-4
        for sender in SENDERS:
            last = lens.n_layer if receiver.layer is None else receiver.layer
            parallel = lens.engine.anywhere.anatomy.blocks[0].parallel
            hears = sender[0] < last + (receiver.kind == "mlp" and not parallel)
            found = effects.values[:, sender[0], sender[1]]
            if hears:
                expected = slow.effect(sender, [receiver])
                assert torch.allclose(found, expected, atol=1e-5), (text, sender)
            else:
                assert torch.equal(found, torch.zeros(2)), (text, sender)


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_regression_models_are_patched_alike(kind):
    lens = tiny_regression.lens(kind)
    source, target = (
        tiny_regression.TASK.prompts("train", shots=5, n=4, kind=k) for k in ("clean", "shuffled")
    )
    for at in ("query", "all"):
        slow = ByHand(lens, source, target, at)
        for text in ("v of 1.0", "mlp 0", "logits"):
            effects = path_effects(lens, source, target, text, at=at)
            assert effects.unit == "squared error"
            expected = slow.effect((0, 1), [Receiver.of(text)], None)
            assert expected.abs().max() > 1e-6
            assert torch.allclose(effects.values[:, 0, 1], expected, atol=1e-5)


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
@pytest.mark.parametrize("at", ["query", "all"])
def test_all_paths_at_once_are_the_whole_patch(at):
    """Two layers of attention: heads of the first are heard by the second and by the logits."""
    lens = own_lens(n_layers=2)
    slow = ByHand(lens, *pair(), at)
    every = [Receiver(kind, 1, head) for kind in ("q", "k", "v") for head in range(lens.n_head)]
    found = slow.effect((0, 2), [*every, Receiver("logits")])
    z, new = lens.backend.z_hook(0), None
    new = slow.run(slow.source, [z])[1][z]

    def replaced(x):
        x[:, slow.columns, 2] = new[:, slow.columns, 2]
        return x

    outputs = [slow.run(slow.target, **changes)[0] for changes in ({z: replaced}, {})]
    measure = metric_of(lens, "logit_difference")
    after, before = (
        measured(measure, lens, each, slow.target, NO_REFERENCE)[:, 0] for each in outputs
    )
    assert (after - before).abs().max() > 1e-3
    assert torch.allclose(found, after - before, atol=1e-5)


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
    for at, positions in (("query", "query"), ("all", "all")):
        whole = patch(lens, *pair(), site="z", positions=positions, metric=last_logits)
        expected = whole.values.sum(dim=-1)[:, 0]
        paths = [path_effects(lens, *pair(), r, at=at, metric=last_logits) for r in receivers]
        found = torch.stack([each.values[:, 0] for each in paths]).sum(dim=0)
        assert expected.abs().max() > 1e-2
        assert torch.allclose(found, expected, atol=1e-4)
    assert path_effects(lens, *pair(), "k of 1.0", metric=last_logits).values.abs().max() < 1e-5


@pytest.mark.parametrize("at", ["query", "all"])
def test_a_prompt_put_into_itself_changes_nothing(lens, at):
    for text in RECEIVERS:
        effects = path_effects(lens, pair()[1], pair()[1], text, at=at)
        assert effects.values.abs().max() < 1e-6


@pytest.mark.parametrize("at", ["query", "all"])
def test_pieces_and_padding_change_nothing(lens, at, monkeypatch):
    rows, run = [], SuffixEngine.run

    def watched(self, reading, edit):
        rows.append(len(reading) * edit.n_variant)
        return run(self, reading, edit)

    monkeypatch.setattr(SuffixEngine, "run", watched)
    for text in ("k of 2.1", "mlp 1", "logits"):
        whole = path_effects(lens, *uneven(), text, at=at).values
        rows.clear()
        done = []
        small = replace(lens, max_tokens=13, max_rows=5)
        found = path_effects(small, *uneven(), text, at=at, progress=done.append).values
        assert max(rows) <= 5
        assert done == [2, 1]
        alone = [path_effects(lens, *(p[[i]] for p in uneven()), text, at=at) for i in range(3)]
        assert torch.allclose(found, whole, atol=1e-6)
        assert torch.allclose(torch.cat([each.values for each in alone]), whole, atol=1e-6)


def test_prompts_of_different_length_are_matched_at_the_query(lens):
    longer = Prompts.of_tokens([[3, *row] for row in pair()[0].rows], [11, 12])
    effects = path_effects(lens, longer, pair()[1], "v of 2.0")
    means = [mean_head_outputs(lens, longer[[i]], answered_only=False) for i in range(2)]
    of_means = [path_effects(lens, m, pair()[1][[i]], "v of 2.0") for i, m in enumerate(means)]
    assert effects.values.abs().max() > 1e-4
    assert torch.allclose(torch.cat([e.values for e in of_means]), effects.values, atol=1e-6)


def test_senders_that_are_chosen(lens):
    whole = path_effects(lens, *pair(), "mlp 1").values
    some = path_effects(lens, *pair(), "mlp 1", senders=[(1, 3), (2, 0), (0, 1), (1, 3)]).values
    assert torch.allclose(some[:, [1, 0], [3, 1]], whole[:, [1, 0], [3, 1]], atol=1e-6)
    assert torch.equal(some[:, 2, 0], torch.zeros(2))
    assert (~some.isnan()).sum() == 2 * 3


def test_effects_are_scores_with_their_baseline(lens):
    effects = path_effects(lens, *pair(), Receiver("logits"), metric="kl")
    expected = patch(lens, *pair(), layers=[2], metric="kl")
    assert (effects.name, effects.unit, effects.task, effects.model) == (
        "path",
        "nats",
        "tokens",
        "llama",
    )
    assert torch.allclose(effects.baseline, expected.before, atol=1e-5)
    assert effects.values.shape == (2, 3, 4)
    assert torch.allclose(effects.scores, effects.values.mean(dim=0))
    wrong = Prompts.of_tokens(pair()[1].rows, [20, 21])
    given = [
        path_effects(lens, *pair(), "mlp 2", metric="logit_difference", wrong=w)
        for w in (wrong, None)
    ]
    assert (given[0].values - given[1].values).abs().max() > 1e-3


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
    "a layer too many": (
        {"receiver": "q of 3.0"},
        ShapeError,
        r"layer 3 of 'llama' has no 'q'; it is in layers 0, 1, 2 only",
    ),
    "an MLP too many": ({"receiver": "mlp 3"}, ShapeError, r"layer 3 of 'llama' has no 'mlp_out'"),
    "a head too many": (
        {"receiver": "q of 2.4"},
        ShapeError,
        r"receiver q of 2.4 of 'llama', whose q have heads 0 to 3: choose",
    ),
    "a key/value head too many": (
        {"receiver": "k of 2.2"},
        ShapeError,
        r"receiver k of 2.2 of 'llama', whose k have heads 0 to 1: choose",
    ),
    "a sender too many": (
        {"senders": [(0, 1), (3, 0)]},
        ShapeError,
        r"senders \[\(3, 0\)\] asked for; 'llama' has layers 0 to 2 of heads 0 to 3",
    ),
    "no sender": ({"senders": []}, ShapeError, r"senders \[\] asked for; 'llama' has layers"),
    "nobody before the receiver": (
        {"receiver": "v of 0.1"},
        ShapeError,
        r"none of 12 heads of 'llama' comes before v of 0.1",
    ),
    "no sender before the receiver": (
        {"receiver": "mlp 1", "senders": [(2, 3)]},
        ShapeError,
        r"none of 1 heads of 'llama' comes before mlp 1, so none has a direct path",
    ),
    "an unknown place": ({"at": "last"}, UnknownNameError, r"act at 'query' or 'all', not at 'las"),
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
def test_what_cannot_be_patched_is_refused(lens, name):
    changes, error, words = BAD[name]
    with pytest.raises(error, match=words):
        path_effects(lens, *pair(), **{"receiver": "logits", **changes})


def test_prompts_that_cannot_be_paired_are_refused(lens):
    source, target = pair()
    with pytest.raises(ShapeError, match=r"1 source prompts for 2 target prompts; expected one"):
        path_effects(lens, source[[0]], target, "logits")
    longer = Prompts.of_tokens([source.rows[0], [9, *source.rows[1]]], [11, 12])
    with pytest.raises(
        ShapeError, match=r"prompt 1: 6 source tokens for 5 target tokens; path pat"
    ):
        path_effects(lens, longer, target, "logits", at="all")


def test_means_give_what_they_hold(lens):
    source, target = pair()
    means = mean_head_outputs(lens, source, answered_only=False)
    with pytest.raises(TaskError, match=r"at='all' asked for with the means of 2 prompts, which h"):
        path_effects(lens, means, target, "logits", at="all")
    with pytest.raises(TaskError, match=r"metric 'kl' asked for with the means"):
        path_effects(lens, means, target, "logits", metric="kl")
    few = replace(means, z=means.z[:2], outputs=means.outputs[:2], layers=None)
    with pytest.raises(ShapeError, match=r"means of 'llama' have sizes"):
        path_effects(lens, few, target, "mlp 1")


def test_models_without_the_receiver_or_without_replay_are_refused(lens):
    whole = replace(lens, engine=WholePassEngine(lens.backend))
    with pytest.raises(
        ModelError, match=r"'llama' is run by whole passes; path patching recomputes"
    ):
        path_effects(whole, *pair(), "logits")
    if zoo.HAS_HOOKED:
        with pytest.raises(UnknownNameError, match=r"has no site 'mlp_out'"):
            path_effects(own_lens(), *pair(), "mlp 1")
