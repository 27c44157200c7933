import warnings

import pytest
import torch

import tvlens
from helpers import zoo
from tvlens.errors import ModelError, UnknownNameError
from tvlens.lens import selfcheck
from tvlens.lens.edits import AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.hooks import WholePassEngine, record_attention
from tvlens.lens.replay import ReplayEngine
from tvlens.lens.selfcheck import choose_engine
from tvlens.models.bridge import BridgeBackend
from tvlens.models.hooked import HookedBackend

KINDS = pytest.mark.parametrize("kind", zoo.KINDS)
BACKENDS = {"bridge": BridgeBackend, "hooked": HookedBackend}


def broken(kind, name="llama", **parts):
    """A backend of this kind with some of its parts replaced by wrong ones."""
    sound = zoo.backend(name, kind)
    return type("Broken", (BACKENDS[kind],), parts)(sound.model, name)


def test_a_sound_model_is_run_by_replay(backend):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_engine(backend).name == "replay"


def test_a_sound_model_in_low_precision_is_run_by_replay(half):
    assert choose_engine(half).name == "replay"


@KINDS
def test_a_wrong_output_projection_is_refused(kind):
    right = zoo.backend("llama", kind).w_o
    backend = broken(kind, w_o=property(lambda self: right.roll(1, dims=1)))
    words = (
        "model 'llama': head contributions plus bias do not sum to the attention output "
        r"\(off by .* standard deviations, expected < 1e-03\); something stands between"
    )
    with pytest.raises(ModelError, match=words):
        choose_engine(backend)


@KINDS
def test_a_wrong_output_bias_is_refused(kind):
    right = zoo.backend("gpt2", kind).b_o
    backend = broken(kind, "gpt2", b_o=property(lambda self: torch.zeros_like(right)))
    with pytest.raises(ModelError, match="head contributions plus bias do not sum"):
        choose_engine(backend)


@KINDS
def test_an_attention_output_read_elsewhere_is_refused(kind):
    elsewhere = broken(
        kind,
        added_hook=lambda self, layer: f"blocks.{layer}.hook_resid_post",
        projected_hooks=lambda self, layer: (),
    )
    with pytest.raises(ModelError, match="head contributions plus bias do not sum"):
        choose_engine(elsewhere)


@KINDS
def test_a_z_that_the_output_does_not_read_is_refused(kind):
    def read_only(self, hooks):
        """Heads may be looked at; what a hook puts in their place is dropped."""

        def watch(function):
            def call(a, hook):
                function(a.clone(), hook=hook)

            return call

        dropped = [(n, watch(f) if n.endswith("hook_z") else f) for n, f in hooks]
        return BACKENDS[kind].hooks(self, dropped)

    words = (
        r"zeroing z of head \(1, 2\) does not change the attention output by its z W_O "
        r"\(off by .*\); hook_z is not where the output projection reads"
    )
    with pytest.raises(ModelError, match=words):
        choose_engine(broken(kind, hooks=read_only))


@KINDS
def test_heads_that_do_not_reach_the_logits_are_refused(kind):
    model = zoo.huggingface("llama")
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    words = (
        "a large patch of all heads of layer 0 moves the logits by 0.0e.00 standard deviations, "
        "expected > 1e-4; hook_z does not reach the output"
    )
    with pytest.raises(ModelError, match=words):
        tvlens.load(model, backend=kind)


@KINDS
def test_key_heads_in_place_of_query_heads_are_refused(kind):
    right = zoo.backend("llama", kind).w_o
    backend = broken(kind, w_o=property(lambda self: right[:, :2]))
    words = r"hook_z has \(head, d_head\) \(4, 6\), W_O has \(2, 6\); both must describe the same"
    with pytest.raises(ModelError, match=words):
        choose_engine(backend)


@KINDS
def test_weights_that_are_not_numbers_are_refused(kind):
    backend = zoo.new_backend("llama", kind)
    with torch.no_grad():
        backend.parameters()[0].fill_(torch.nan)
    words = "'llama' gives activations that are not finite on a short prompt; .* its weights and"
    with pytest.raises(ModelError, match=words):
        choose_engine(backend)


@KINDS
def test_an_unknown_precision_is_refused(kind):
    backend = broken(kind, dtype=property(lambda self: torch.float8_e5m2))
    with pytest.raises(ModelError, match=r"has dtype torch.float8_e5m2; expected one of .*float32"):
        choose_engine(backend)


@KINDS
def test_a_replay_that_differs_is_not_used(kind):
    def anatomy(self):
        made = BACKENDS[kind].anatomy(self)
        object.__setattr__(made.blocks[2], "scale", 1.1 * made.blocks[2].scale)
        return made

    with pytest.warns(
        UserWarning, match=r"'llama' is run by whole .*: replayed heads of layer 2 differ by"
    ):
        engine = choose_engine(broken(kind, anatomy=anatomy))
    assert isinstance(engine, WholePassEngine)


@KINDS
def test_a_replay_that_fails_is_not_used(kind):
    def anatomy(self):
        made = BACKENDS[kind].anatomy(self)
        object.__setattr__(made.blocks[1], "w_o", made.blocks[1].w_o[:5])
        return made

    with pytest.warns(UserWarning, match="slower than replay: replay fails with RuntimeError: mat"):
        engine = choose_engine(broken(kind, anatomy=anatomy))
    assert isinstance(engine, WholePassEngine)


UNKNOWN = {
    ("mistral", "hooked"): "replay does not know use_local_attn",
    ("dynamic-rope", "bridge"): "replay does not know rope type 'dynamic'",
    ("opt-projected", "bridge"): "replay does not know a missing norm, attn or ln_final",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [case for case in UNKNOWN if case[1] in zoo.KINDS],
    ids=lambda part: part,
)
def test_unknown_architectures_are_run_whole_and_said_so(name, kind):
    model = zoo.huggingface(name)
    words = f"'{name}' is run by whole forward passes, which is exact but far slower than replay: "
    with pytest.warns(UserWarning, match=words + f".*{UNKNOWN[name, kind]}"):
        lens = tvlens.load(model, tokenizer=zoo.tokenizer(), backend=kind, name=name)
    assert lens.engine.name == "whole passes"
    batch = zoo.batch()
    values = torch.ones(3, 4, lens.backend.d_head)
    logits = lens.outputs(batch, ReplaceHeads.each_head(values), lambda x, b: x)
    clean = lens.outputs(batch, NoEdit(3), lambda x, b: x)
    assert (logits - clean).std() > 0.1
    with torch.no_grad():
        expected = zoo.huggingface(name)(torch.tensor([zoo.ROWS[0]])).logits[0, -1]
    assert zoo.off(clean[0, 0], expected) < 1e-4


@KINDS
def test_models_in_memory_with_any_tokenizer_or_none(kind):
    for tokenizer, prefix in (
        (None, ()),
        (zoo.tokenizer(), ()),
        (zoo.tokenizer(bos=True), (2,)),
        (zoo.tokenizer(eos=True), ()),
    ):
        before = None if tokenizer is None else tokenizer.backend_tokenizer.to_str()
        lens = tvlens.load(zoo.huggingface("llama"), tokenizer=tokenizer, backend=kind)
        assert lens.backend.tokenizer is tokenizer
        assert lens.prefix == prefix
        assert (lens.name, lens.backend.kind) == ("LlamaForCausalLM", kind)
        assert tokenizer is None or tokenizer.backend_tokenizer.to_str() == before
    with pytest.raises(ModelError, match="the lens has no tokenizer"):
        tvlens.load(zoo.huggingface("llama"), backend=kind).encode(zoo.TASK.prompts("test"))


@KINDS
def test_models_and_tokenizers_in_folders(kind, tmp_path):
    zoo.huggingface("qwen2").save_pretrained(tmp_path)
    zoo.tokenizer(bos=True).save_pretrained(tmp_path)
    lens = tvlens.load(str(tmp_path), backend=kind)
    assert (lens.name, lens.prefix, lens.engine.name) == (str(tmp_path), (2,), "replay")
    named = tvlens.load(tmp_path, backend=kind, name="mine", dtype=torch.bfloat16)
    assert (named.name, named.backend.dtype) == ("mine", torch.bfloat16)
    assert zoo.off(lens.w_o, zoo.backend("qwen2", kind).w_o) < 1e-6


def test_a_bridge_of_ones_own_is_used_as_it_is():
    bridge = zoo.new_backend("gpt2", "bridge").model
    bridge.cfg.default_prepend_bos = False
    lens = tvlens.load(bridge)
    assert lens.backend.model is bridge
    bridge.cfg.default_prepend_bos = True
    assert (lens.backend.kind, lens.engine.name) == ("bridge", "replay")
    other = zoo.tokenizer(bos=True)
    lens = tvlens.load(bridge, tokenizer=other, name="mine")
    assert (lens.name, lens.prefix) == ("mine", (2,))
    assert lens.backend.tokenizer is other
    assert bridge.tokenizer is not other
    assert lens.backend.d_vocab == zoo.D_VOCAB


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"normalization_type": None},
        {"normalization_type": "RMS", "positional_embedding_type": "rotary", "rotary_dim": 6},
        {"n_key_value_heads": 2},
        {"attn_only": False, "act_fn": "gelu", "d_mlp": 20, "parallel_attn_mlp": True},
        {"attn_only": False, "act_fn": "silu", "d_mlp": 20, "gated_mlp": True},
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_a_hooked_transformer_of_ones_own_is_used_as_it_is(changes):
    model = zoo.attention_only(**changes)
    lens = tvlens.load(model)
    assert lens.backend.model is model
    assert (lens.backend.kind, lens.engine.name) == ("hooked", "replay")
    fast, slow = lens.engine, WholePassEngine(lens.backend)
    edit = AddToResidual(torch.ones(1, 1, 3, 32), torch.tensor([[True, False, True]]))
    found, expected = (e.run(e.read(zoo.batch()), edit) for e in (fast, slow))
    assert zoo.off(found, expected) < zoo.TOLERANCE[torch.float32]


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_a_model_in_training_with_dropout_is_looked_at_without(kind):
    changes = {"resid_pdrop": 0.5, "attn_pdrop": 0.5, "embd_pdrop": 0.5}
    inner = tvlens.load(zoo.huggingface("gpt2", **changes), backend=kind).backend.model
    inner.train()
    lens = tvlens.load(inner, tokenizer=zoo.tokenizer())
    assert lens.engine.name == "replay"
    assert inner.training
    first, second = (lens.outputs(zoo.batch(), NoEdit(3), lambda x, b: x) for _ in range(2))
    assert torch.equal(first, second)


def test_names_that_do_not_exist_are_refused(tmp_path):
    words = (
        r"model 'no-such-model' cannot be loaded: tvlens knows none of this name \(but smollm2-13"
    )
    with pytest.raises(UnknownNameError, match=words + ".*check the spelling, the folder or the"):
        tvlens.load("no-such-model")
    with pytest.raises(UnknownNameError, match=f"model '{tmp_path}' cannot be loaded"):
        tvlens.load(str(tmp_path))


def test_things_that_are_no_models_are_refused():
    words = "cannot look at a Linear; expected a name, a folder, a Hugging Face causal language"
    with pytest.raises(ModelError, match=words):
        tvlens.load(torch.nn.Linear(2, 2))


@pytest.mark.skipif(zoo.HAS_HOOKED, reason="transformer-lens 3 has HookedTransformer")
def test_the_hooked_backend_needs_transformer_lens_3():
    words = "backend 'hooked' needs HookedTransformer, which transformer-lens 4 removed; install"
    with pytest.raises(ModelError, match=words):
        tvlens.load(zoo.huggingface("llama"), backend="hooked")


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
def test_an_architecture_that_cannot_be_converted_is_refused():
    words = "HookedTransformer cannot take over a Gemma2ForCausalLM: .*; use backend='bridge'"
    with pytest.raises(ModelError, match=words):
        tvlens.load(zoo.huggingface("gemma2"), backend="hooked")


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
def test_a_conversion_into_another_model_is_refused():
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    words = (
        "HookedTransformer made of a LlamaForCausalLM gives other logits than the original: they"
    )
    with pytest.raises(ModelError, match=words):
        tvlens.load(zoo.huggingface("llama", rope_parameters=rope), backend="hooked")


def test_replay_engine_is_what_a_loaded_lens_has():
    assert isinstance(tvlens.load(zoo.huggingface("llama")).engine, ReplayEngine)


def test_contributions_are_checked_at_every_position_in_two_passes(monkeypatch):
    backend, asked = zoo.backend("llama", "bridge"), []

    def watched(*given, **words):
        found = record_attention(*given, **words)
        batch = backend.short_prompts()
        rows, columns = batch.mask.nonzero(as_tuple=True)
        if "change_z" not in words:
            alone = record_attention(backend, batch.inputs[rows], batch.mask[rows], columns)
            assert zoo.off(found.z, alone.z) < 1e-5
            assert zoo.off(found.added, alone.added) < 1e-5
        asked.append((len(found.z), len(rows)))
        return found

    monkeypatch.setattr(selfcheck, "record_attention", watched)
    selfcheck.choose_engine(backend)
    assert len(asked) == 2
    assert all(n == positions > 2 for n, positions in asked)
