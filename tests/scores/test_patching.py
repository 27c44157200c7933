"""Effects of patches: those of transformer-lens' own functions, and of passes hooked by hand."""

from dataclasses import replace

import pytest
import torch

from helpers import tiny_regression, trained, zoo
from tvlens.errors import ModelError, NumericalError, ShapeError, TaskError, UnknownNameError
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.positions import places
from tvlens.lens.sites import PER_HEAD, PER_KEY_VALUE_HEAD, SITE_KINDS, Site
from tvlens.scores.approximation import agreement_of
from tvlens.scores.effects import COLUMNS, PatchEffects
from tvlens.scores.metrics import METRICS
from tvlens.scores.patching import patch
from tvlens.stats import bootstrap_mean
from tvlens.tasks import Prompts


def pair(**changes):
    """Two prompts of tokens of one length that part in the middle."""
    rows = {"clean": [[7, 12, 31, 6, 9], [8, 33, 20, 5, 9]], "corrupted": [[7, 33, 20, 6, 9]] * 2}
    rows |= changes
    return [Prompts.of_tokens(each, [11, 12][: len(each)]) for each in rows.values()]


PATCHING = {
    "resid_pre": ("resid_pre", ()),
    "attn_out": ("attn_out", ()),
    "mlp_out": ("mlp_out", ()),
    "z": ("attn_head_out_by_pos", ("head",)),
    "q": ("attn_head_q_by_pos", ("head",)),
    "k": ("attn_head_k_by_pos", ("head",)),
    "v": ("attn_head_v_by_pos", ("head",)),
    "pattern": ("attn_head_pattern_by_pos", ("head",)),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("kind", PATCHING)
def test_effects_are_those_of_transformer_lens_patching(kind):
    from transformer_lens import patching

    lens = zoo.lens("gpt2", "hooked" if zoo.HAS_HOOKED else "bridge")
    clean, corrupted = ([7, 12, 31, 6, 9], [7, 33, 20, 6, 9])
    prompts = [Prompts.of_tokens([row], [11]) for row in (clean, corrupted)]
    model = lens.backend.model
    _, cache = model.run_with_cache(torch.tensor([clean]))

    def probability(logits):
        return logits[0, -1].softmax(dim=-1)[11]

    function = getattr(patching, f"get_act_patch_{PATCHING[kind][0]}")
    with torch.no_grad():
        found = function(model, torch.tensor([corrupted]), cache, probability)
        before = probability(model(torch.tensor([corrupted])))
    effects = patch(lens, *prompts, site=kind, positions="all")
    found = torch.as_tensor(found).detach()
    expected = found - before
    if kind in PER_HEAD | PER_KEY_VALUE_HEAD and kind != "pattern":
        expected = expected.transpose(1, 2)
    elif found.ndim == 2:
        expected = expected[:, None]
    assert expected.abs().max() > 1e-3
    assert torch.allclose(effects.mean, expected, atol=1e-6)


def by_hand(lens, kind, source, target, place):
    """Probability of the answer with one activation put in by a hook of transformer-lens."""
    layer, head, position = place
    name = {"z": "attn.hook_z", "v": "attn.hook_v"}.get(kind, f"hook_{kind}")
    kept = {}

    def keep(x, hook):
        kept["source"] = x.detach().clone()

    def put(x, hook):
        x = x.clone()
        if kind in ("z", "v"):
            x[:, position, head] = kept["source"][:, position, head]
        else:
            x[:, position] = kept["source"][:, position]
        return x

    point, model = f"blocks.{layer}.{name}", lens.backend.model
    with torch.no_grad():
        with model.hooks(fwd_hooks=[(point, keep)]):
            model(source.inputs)
        with model.hooks(fwd_hooks=[(point, put)]):
            logits = model(target.inputs)[:, -1:]
        return lens.readout.score(logits, target) - lens.readout.score(
            model(target.inputs)[:, -1:], target
        )


@pytest.mark.parametrize("kind", ["resid_post", "z", "v"])
def test_effects_of_grouped_query_models_are_those_of_hooks(lens, kind):
    """Where transformer-lens' own functions for keys and values fail."""
    source, target = (lens.encode(each) for each in pair())
    effects = patch(lens, *pair(), site=kind, positions="all")
    assert effects.values.shape == (2, 3, {"resid_post": 1, "z": 4, "v": 2}[kind], 5)
    assert effects.values.abs().max() > 1e-3
    for place in ((0, 0, 1), (2, 1 if kind != "resid_post" else 0, 4), (1, 0, 2)):
        expected = by_hand(lens, kind, source, target, place)[:, 0]
        assert torch.allclose(effects.values[:, place[0], place[1], place[2]], expected, atol=1e-6)


@pytest.mark.parametrize("kind", SITE_KINDS)
def test_both_engines_give_the_same_effects(lens, kind):
    slow = replace(lens, engine=WholePassEngine(lens.backend), max_rows=7)
    found, expected = (
        patch(each, *pair(), site=kind, positions="all", metric="logit_difference")
        for each in (lens, slow)
    )
    assert torch.allclose(found.values, expected.values, atol=2e-5)
    assert torch.allclose(found.before, expected.before, atol=1e-5)
    assert torch.allclose(found.source, expected.source, atol=1e-5)


def test_all_of_the_last_residual_stream_brings_the_source_run():
    lens = trained.lens()
    task = trained.TASKS["seven-on"]
    clean, other = (task.prompts("train", shots=4, n=4, kind=k) for k in ("clean", "shuffled"))
    effects = patch(lens, clean, other, layers=[lens.n_layer - 1])
    assert effects.values.shape == (4, lens.n_layer, 1, 1)
    gap = effects.source - effects.before
    assert torch.allclose(effects.values[:, -1, 0, 0], gap, atol=1e-6)
    assert effects.values[:, 0].isnan().all()
    assert effects.normalised[-1, 0, 0] == pytest.approx(1.0)
    noising = patch(lens, other, clean, layers=[1], direction="noising")
    assert noising.normalised[-1, 0, 0] == pytest.approx(0.0, abs=1e-5)
    assert noising.gap == pytest.approx(effects.gap)


def test_what_stands_before_the_query_brings_nothing_at_the_last_layer(lens):
    effects = patch(lens, *pair(), positions=[1, 4], layers=[2])
    # Nothing but rounding, which is another in another batch on some processors.
    assert effects.at(1).values[:, 2, 0].abs().max() < 1e-7
    assert effects.at("4").values[:, 2].abs().min() > 1e-5


def test_a_prompt_put_into_itself_changes_nothing(lens):
    """Of two prompts only one differs from its source."""
    prompts = pair(clean=[[7, 33, 20, 6, 9], [8, 33, 20, 5, 9]])
    effects = patch(lens, *prompts, site="z", positions="all")
    assert effects.values[0].abs().max() < 1e-7
    assert effects.values[1].abs().max() > 1e-3


def test_roles_of_prompts_of_different_length(lens, task):
    clean, shuffled = (task.prompts("train", shots=2, n=5, kind=k) for k in ("clean", "shuffled"))
    effects = patch(lens, clean, shuffled, positions="roles")
    assert effects.by == "roles"
    assert {"input 1", "answer 2", "separators", "query", "answer prefix"} <= set(effects.places)
    source, target = lens.encode(clean), lens.encode(shuffled)
    differs = effects.at("answer 1").values.abs().amax(dim=(1, 2, 3)) > 1e-6
    shown = [a.demos[0] != b.demos[0] for a, b in zip(clean, shuffled, strict=True)]
    assert differs.tolist() == shown
    # One role of several tokens by hand, its tokens matched from the last one backwards.
    where = [places(lens, p, b, "separators") for p, b in ((clean, source), (shuffled, target))]
    model, point, expected = lens.backend.model, "blocks.1.hook_resid_post", []
    for i in range(5):
        columns = [w.columns[i, 0][w.columns[i, 0] >= 0] for w in where]
        n = min(map(len, columns))

        def keep(x, hook, at=columns[0][-n:]):
            hook.ctx["kept"] = x[0, at].clone()

        def put(x, hook, at=columns[1][-n:]):
            x = x.clone()
            x[0, at] = hook.ctx["kept"]
            return x

        row = target[i : i + 1]
        with torch.no_grad():
            with model.hooks(fwd_hooks=[(point, keep)]):
                lens.backend.forward(source.inputs[i : i + 1], source.mask[i : i + 1])
            with model.hooks(fwd_hooks=[(point, put)]):
                logits = lens.backend.forward(row.inputs, row.mask)[:, -1:]
            clean_logits = lens.backend.forward(row.inputs, row.mask)[:, -1:]
            score = lens.readout.score
            expected.append(score(logits, row)[0, 0] - score(clean_logits, row)[0, 0])
    found = effects.at("separators").values[:, 1, 0, 0]
    assert torch.allclose(found, torch.stack(expected), atol=1e-6)
    assert found.abs().max() > 1e-3


def test_a_place_that_a_prompt_lacks_has_no_effect_there(lens):
    prompts = pair(clean=[[7, 12, 31, 6, 9], [8, 33, 9]], corrupted=[[7, 33, 20, 6, 9], [8, 20, 9]])
    effects = patch(lens, *prompts, positions="all")
    assert effects.values[1, :, :, 3:].isnan().all()
    assert not effects.values[1, :, :, :3].isnan().any()
    table = effects.to_frame()
    assert table.groupby("position")["n"].first().tolist() == [2, 2, 2, 1, 1]
    alone = patch(lens, *(each[[1]] for each in prompts), positions="all")
    assert torch.allclose(alone.values[0], effects.values[1, :, :, :3], atol=1e-6)


def test_pieces_change_nothing(lens):
    whole = patch(lens, *pair(), site="v", positions="all").values
    small = replace(lens, max_tokens=5, max_rows=3)
    assert torch.allclose(patch(small, *pair(), site="v", positions="all").values, whole, atol=1e-6)


def test_layers_and_heads_that_are_chosen(lens):
    whole = patch(lens, *pair(), site="z", positions=[2]).values
    some = patch(lens, *pair(), site=Site("z", 1, 3), positions=[2]).values
    assert torch.allclose(some[:, 1, 3], whole[:, 1, 3], atol=1e-6)
    assert (~some.isnan()).sum() == 2
    chosen = patch(lens, *pair(), site="z", positions=[2], layers=[0, 2], heads=[1]).values
    assert torch.allclose(chosen[:, [0, 2], 1], whole[:, [0, 2], 1], atol=1e-6)
    assert (~chosen.isnan()).sum() == 4


@pytest.mark.parametrize("kind", ["bridge", *(["hooked"] if zoo.HAS_HOOKED else [])])
def test_regression_models_are_patched_alike(kind):
    lens = tiny_regression.lens(kind)
    clean, other = (
        tiny_regression.TASK.prompts("train", shots=5, n=6, kind=k) for k in ("clean", "shuffled")
    )
    effects = patch(lens, clean, other, site="resid_post", positions="roles")
    assert effects.metric == "squared_error"
    assert effects.places == (*(f"{a} {i}" for i in range(1, 6) for a in "xy"), "query")
    slow = replace(lens, engine=WholePassEngine(lens.backend))
    expected = patch(slow, clean, other, site="resid_post", positions="roles")
    assert torch.allclose(effects.values, expected.values, atol=1e-5)
    # Behind the last layer the query's stream is all there is: the clean error.
    last = effects.at("query").values[:, -1, 0, 0]
    assert torch.allclose(last, effects.source - effects.before, atol=1e-5)
    assert (effects.source - effects.before).mean() < 0
    # x is the same in both prompts, so its first residual stream is.
    assert (effects.at("x 1").values[:, 0, 0, 0].abs() < 1e-6 * effects.before.clamp(min=1)).all()


def test_metrics_by_name_and_by_function(lens):
    source, target = (lens.encode(each) for each in pair())
    logits = {"source": source, "target": target}
    with torch.no_grad():
        logits = {name: lens.backend.forward(b.inputs, b.mask)[:, -1] for name, b in logits.items()}
    log_p = {name: x.log_softmax(dim=-1) for name, x in logits.items()}
    right, wrong = torch.tensor([11, 12]), torch.tensor([20, 21])
    given = [Prompts.of_tokens(each.rows, wrong.tolist()) for each in pair()[1:]]
    rows = torch.arange(2)

    def of(name, **more):
        effects = patch(lens, *pair(), layers=[2], metric=name, **more)
        return effects.before, effects.source

    def expected(read):
        return read(logits["target"]), read(logits["source"])

    found = {
        "probability": expected(lambda x: x.softmax(-1)[rows, right]),
        "log_probability": expected(lambda x: x.log_softmax(-1)[rows, right]),
        "logit_difference": expected(lambda x: x[rows, right] - x.mean(-1)),
        "kl": (
            (log_p["source"].exp() * (log_p["source"] - log_p["target"])).sum(-1),
            torch.zeros(2),
        ),
    }
    assert set(found) == {metric.name for metric in METRICS if metric.of_text}
    for name, numbers in found.items():
        for a, b in zip(of(name), numbers, strict=True):
            assert torch.allclose(a, b, atol=2e-5), name
    for a, b in zip(
        of("logit_difference", wrong=given[0]),
        expected(lambda x: x[rows, right] - x[rows, wrong]),
        strict=True,
    ):
        assert torch.allclose(a, b, atol=1e-5)

    def first_logit(outputs, batch):
        return outputs[..., 0]

    effects = patch(lens, *pair(), layers=[2], metric=first_logit)
    assert effects.metric == "first_logit"
    assert torch.allclose(effects.before, logits["target"][:, 0], atol=1e-5)


def test_tables_say_all(lens):
    effects = patch(lens, *pair(), site="z", positions="all")
    table = effects.to_frame()
    assert tuple(table.columns) == COLUMNS
    assert len(table) == 3 * 4 * 5
    row = table[(table["layer"] == 1) & (table["head"] == 2) & (table["position"] == 3)].iloc[0]
    values = effects.values[:, 1, 2, 3]
    interval = bootstrap_mean(values)
    assert row["value"] == pytest.approx(interval.value, rel=1e-6)
    assert row["ci_low"] == pytest.approx(interval.low, rel=1e-6)
    assert row["ci_high"] == pytest.approx(interval.high, rel=1e-6)
    assert row["normalised"] == pytest.approx(
        float(values.mean() / (effects.source - effects.before).mean()), rel=1e-4
    )
    assert (row["site"], row["method"], row["metric"], row["n"]) == ("z", "exact", "probability", 2)
    assert (row["task"], row["role"]) == ("tokens", "")
    query = patch(lens, *pair()).to_frame()
    assert query["head"].isna().all()
    assert query["position"].isna().all()
    assert set(query["role"]) == {"query"}


def test_scores_of_one_place_are_scores_of_heads(lens):
    effects = patch(lens, *pair(), site="z", positions="all")
    scores = effects.at(3).scores
    assert torch.equal(scores.values, effects.values[..., 3])
    assert torch.equal(scores.baseline, effects.before)
    assert (scores.name, scores.unit) == ("z_exact", "probability")
    with pytest.raises(ShapeError, match=r"of 5 places, a score of heads is of one; choose one"):
        _ = effects.scores
    with pytest.raises(ShapeError, match=r"resid_post has no heads to score; patch one of k, patt"):
        _ = patch(lens, *pair()).scores
    with pytest.raises(UnknownNameError, match=r"no place 9; they have 0, 1, 2, 3, 4"):
        effects.at(9)


def test_effects_are_kept_and_restored(lens, tmp_path):
    effects = patch(lens, *pair(), site="k", positions="all", direction="noising")
    effects.save(tmp_path / "effects.safetensors")
    again = PatchEffects.load(tmp_path / "effects.safetensors")
    assert torch.equal(again.values, effects.values)
    assert again.to_frame().equals(effects.to_frame())
    assert (again.direction, again.site, again.tokens) == ("noising", "k", effects.tokens)


def test_a_labelled_array(lens):
    pytest.importorskip("xarray")
    effects = patch(lens, *pair(), site="z", positions="all")
    array = effects.to_xarray()
    assert array.dims == ("prompt", "layer", "head", "place")
    assert float(array.sel(place="3")[1, 2, 0]) == float(effects.values[1, 2, 0, 3])


def test_shares_that_are_not_defined_are_said(lens):
    def constant(outputs, batch):
        return outputs[..., 0] * 0 + 2.0

    effects = patch(lens, *pair(), metric=constant)
    with pytest.raises(NumericalError, match=r"mean constant of clean and corrupted prompts does "):
        _ = effects.normalised
    assert effects.to_frame()["normalised"].isna().all()
    assert (effects.values[:, :, 0] == 0).all()


BAD = {
    "an unknown site": (
        {"site": "hook_z"},
        UnknownNameError,
        r"there is no site 'hook_z'; sites are resid_pre, resid_mid,",
    ),
    "a position beyond the prompt": ({"positions": [5]}, TaskError, r"position 5"),
    "an unknown role": ({"positions": "answer 11"}, TaskError, r"roles"),
    "no place": ({"positions": []}, TaskError, r"position"),
    "a layer too many": (
        {"layers": [3]},
        ShapeError,
        r"layer 3 of 'llama' has no 'resid_post'; it is in layers 0, 1, 2 only",
    ),
    "a head too many": (
        {"site": "v", "heads": [2]},
        ShapeError,
        r"heads \[2\] of v asked for; 'llama' has heads 0 to 1 there",
    ),
    "heads of a residual stream": ({"heads": [0]}, ShapeError, r"resid_post has no heads"),
    "an unknown metric": (
        {"metric": "accuracy"},
        UnknownNameError,
        r"there is no metric 'accuracy'; expected one of probability, log_probability,",
    ),
    "a metric of numbers": (
        {"metric": "squared_error"},
        ModelError,
        r"metric 'squared_error' is not for 'llama', whose answers are text",
    ),
    "a metric of the wrong shape": (
        {"metric": lambda outputs, batch: outputs},
        ShapeError,
        r"metric '<lambda>' gave \(2, 1, 54\) for outputs of shape \(2, 1, 54\); expected a tensor",
    ),
    "a metric that is no tensor": (
        {"metric": lambda outputs, batch: 1.0},
        ShapeError,
        r"metric '<lambda>' gave float for outputs",
    ),
    "a metric that is NaN": (
        {"metric": lambda outputs, batch: outputs[..., 0] * torch.nan},
        NumericalError,
        r"metric '<lambda>' is NaN or infinite for 2 of 2 outputs of 'llama'",
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
        patch(lens, *pair(), **changes)


def test_prompts_that_cannot_be_paired_are_refused(lens):
    clean, corrupted = pair()
    with pytest.raises(ShapeError, match=r"1 source prompts for 2 target prompts; expected one"):
        patch(lens, clean[[0]], corrupted)
    with pytest.raises(TaskError, match=r"are the same, so there is nothing to patch"):
        patch(lens, clean, clean)
    longer = Prompts.of_tokens([[*row, 9] for row in clean.rows], [11, 12])
    with pytest.raises(ShapeError, match=r"6 tokens|6 .*5"):
        patch(lens, longer, corrupted, positions="all")
    with pytest.raises(ShapeError, match=r"prompt 0: a pattern of 6 source tokens does not fit 5"):
        patch(lens, longer, corrupted, site="pattern")
    with pytest.raises(TaskError, match=r"roles"):
        patch(lens, clean, corrupted, positions="roles")


@pytest.mark.parametrize("name", ["gptj", "gpt-neox"])
def test_a_site_that_a_model_lacks_is_refused(name):
    with pytest.raises(
        UnknownNameError,
        match=rf"model '{name}' has no site 'resid_mid' at which .* it has resid_pre, resid_post,",
    ):
        patch(zoo.lens(name, "bridge"), *pair(), site="resid_mid")


def test_progress_is_told_of_every_prompt(lens):
    done = []
    patch(replace(lens, max_tokens=5), *pair(), layers=[1], progress=done.append)
    assert sum(done) == 2


def test_effects_of_several_sets_are_joined():
    def effects(places, n, **changes):
        values = torch.arange(float(n * 2 * len(places))).view(n, 2, 1, len(places))
        given = {"by": "all", "metric": "kl", "unit": "nats"} | changes
        return PatchEffects(values, torch.zeros(n), torch.ones(n), "resid_post", places, **given)

    a, b = effects(("0", "1"), 2), effects(("0", "1", "2"), 1)
    joined = PatchEffects.joined([a, b])
    assert joined.places == ("0", "1", "2")
    assert torch.equal(joined.values[:2, ..., :2], a.values)
    assert joined.values[:2, ..., 2].isnan().all()
    assert torch.equal(joined.values[2:], b.values)
    with pytest.raises(ShapeError, match=r"effects of different metric cannot be joined: kl, nats"):
        PatchEffects.joined([a, effects(("0",), 1, metric="nats")])


@pytest.mark.parametrize("lower", [False, True])
def test_agreement_is_of_the_places_that_bring_the_source_over(lower):
    """Those of highest effects, or of lowest where the source prompts have the lower metric."""
    exact = torch.tensor([5.0, 4.0, 3.0, -6.0]).view(1, 4, 1, 1)
    other = torch.tensor([5.0, 1.0, 3.0, -6.0]).view(1, 4, 1, 1)
    sign, given = (-1 if lower else 1), {"by": "query", "metric": "kl", "unit": "nats"}
    made = [
        PatchEffects(
            sign * x, torch.zeros(1), torch.full((1,), sign * 5.0), "mlp_out", ("query",), **given
        )
        for x in (exact, other)
    ]
    assert made[0].towards == ("low" if lower else "high")
    found = agreement_of(*made, k=2)
    assert (found.recall, found.missed) == (0.5, ((1, 0, "query"),))
    assert found.spearman == pytest.approx(0.8)
    assert agreement_of(made[0], made[0]).recall == 1


def test_roles_of_all_demonstrations_are_patched_together(lens, task):
    one = [task.prompts("train", shots=1, n=4, kind=kind) for kind in ("clean", "shuffled")]
    ways = {"metric": "logit_difference"}
    alone = patch(lens, *one, positions="answer 1", **ways)
    together = patch(lens, *one, positions=["query", "answers"], **ways)
    assert together.places == ("query", "answers")
    assert torch.allclose(together.at("answers").values, alone.values, atol=1e-5)
    assert alone.values.abs().max() > 1e-2
    two = [task.prompts("train", shots=2, n=4, kind=kind) for kind in ("clean", "shuffled")]
    found = patch(lens, *two, positions="answers", layers=[1], **ways)
    # By hooks, answer by answer matched from its last token backwards.
    source, target = (lens.encode(each) for each in two)
    of = [
        [places(lens, p, b, name).columns[:, 0] for name in ("answer 1", "answer 2")]
        for p, b in zip(two, (source, target), strict=True)
    ]
    point, model = "blocks.1.hook_resid_post", lens.backend.model
    kept, pairs_of = {}, []
    for i in range(4):
        both = []
        for a, b in zip(*of, strict=True):
            a, b = a[i][a[i] >= 0].tolist(), b[i][b[i] >= 0].tolist()
            n = min(len(a), len(b))
            both += [(i, x, y) for x, y in zip(a[-n:], b[-n:], strict=True)]
        pairs_of += both

    def keep(x, hook):
        kept["source"] = x.clone()

    def put(x, hook):
        x = x.clone()
        for i, a, b in pairs_of:
            x[i, b] = kept["source"][i, a]
        return x

    def difference(batch):
        logits = lens.backend.forward(batch.inputs, batch.mask)[:, -1]
        return logits.gather(1, target.target[:, None])[:, 0] - logits.mean(dim=1)

    with torch.no_grad():
        with model.hooks(fwd_hooks=[(point, keep)]):
            difference(source)
        with model.hooks(fwd_hooks=[(point, put)]):
            patched = difference(target)
        expected = patched - difference(target)
    assert torch.allclose(found.values[:, 1, 0, 0], expected, atol=1e-5)
    assert expected.abs().max() > 1e-2
