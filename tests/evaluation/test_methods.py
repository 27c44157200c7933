import math
from dataclasses import replace

import pandas as pd
import pytest
import torch

from helpers import zoo
from helpers.prompt_table import prompt_table, stacked
from tvlens.errors import NumericalError, ShapeError, UnknownNameError
from tvlens.evaluation.methods import RESULT_COLUMNS, evaluate
from tvlens.lens.hooks import WholePassEngine, intervene
from tvlens.lens.readout import FirstToken
from tvlens.lens.suffix import SuffixEngine
from tvlens.stats import bootstrap_mean, share_interval
from tvlens.vectors.controls import random_controls
from tvlens.vectors.icv import InContextVector
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.vector import TaskVector


def vector(seed=0, size=1.0, layers=(0, 1, 2)):
    generator = torch.Generator().manual_seed(seed)
    values = size * torch.randn(3, 32, generator=generator)
    return TaskVector(values, layers, "llama", f"random {seed}")


def measured(lens, prompts, made):
    edit = stacked([made], lens)
    return lens.outputs(prompts, edit, lens.readout.measure)[:, 0]


def test_the_table_has_a_row_per_method_kind_and_metric(lens, task):
    table = evaluate(lens, task, {"mine": vector()}, shots=2)
    assert list(table.columns) == RESULT_COLUMNS
    assert RESULT_COLUMNS == [
        "task", "method", "prompt", "metric", "value", "ci_low", "ci_high", "n", "answers",
    ]  # fmt: skip
    metrics = ["accuracy", "cross_entropy", "perplexity", "exact_match"]
    expected = [
        ("kind-of-word", method, kind, metric)
        for kind in ("zero", "shuffled", "clean")
        for method in ("icl" if kind == "clean" else "none", "mine")
        for metric in metrics
    ]
    found = table[["task", "method", "prompt", "metric"]].itertuples(index=False, name=None)
    assert sorted(found) == sorted(expected)
    assert set(table["n"]) == {len(task.split("test"))}
    assert (table["ci_low"] <= table["value"]).all()
    assert (table["value"] <= table["ci_high"]).all()


def test_values_are_means_over_the_same_test_prompts(lens, task):
    made = vector()
    table = evaluate(lens, task, {"mine": made}, shots=2, seed=4).set_index(
        ["method", "prompt", "metric"]
    )
    for kind in ("zero", "shuffled", "clean"):
        prompts = task.prompts("test", shots=2, seed=4, kind=kind)
        baseline = "icl" if kind == "clean" else "none"
        for method, added in ((baseline, TaskVector.none(lens)), ("mine", made)):
            values = measured(lens, prompts, added)
            for i, metric in enumerate(("accuracy", "cross_entropy")):
                row = table.loc[(method, kind, metric)]
                made_of = share_interval if metric == "accuracy" else bootstrap_mean
                interval = made_of(values[:, i], seed=4)
                found = (row["value"], row["ci_low"], row["ci_high"])
                assert found == pytest.approx((interval.value, interval.low, interval.high), 1e-5)


def test_a_method_that_acts_everywhere_costs_the_others_nothing(lens, task, monkeypatch):
    made = vector()
    turned = InContextVector(made.vectors, made.layers, "llama", "turned", everywhere=True)
    options = {"kinds": ("zero",), "shots": 2}
    alone = [evaluate(lens, task, {name: m}, **options) for name, m in (("a", made), ("b", turned))]
    everywhere, run = [], SuffixEngine.run
    monkeypatch.setattr(
        SuffixEngine,
        "run",
        lambda self, reading, edit: everywhere.append(edit) or run(self, reading, edit),
    )
    both = evaluate(lens, task, {"a": made, "b": turned}, **options)
    expected = pd.concat(alone).drop_duplicates(["method", "metric"])
    pd.testing.assert_frame_equal(
        both.sort_values(["method", "metric"], ignore_index=True),
        expected.sort_values(["method", "metric"], ignore_index=True),
        rtol=1e-5,
    )
    assert everywhere
    assert not [edit for edit in everywhere if edit.at_query_only]


class Loud(FirstToken):
    """A readout of a thousand times the loss."""

    def measure(self, outputs, batch):
        return super().measure(outputs, batch) * torch.tensor([1.0, 1e3])


def test_a_perplexity_beyond_numbers_is_refused_by_name(lens, task):
    loud = replace(lens, readout=Loud())
    with pytest.raises(NumericalError, match=r"method 'none' has a cross-entropy of .* nats"):
        evaluate(loud, task, {}, kinds=["zero"], exact_match=False)


def test_perplexity_is_the_exponential_of_cross_entropy(lens, task):
    table = evaluate(lens, task, {"mine": vector()}, kinds=["zero"], exact_match=False)
    entropy, perplexity = (
        table[table["metric"] == metric].set_index("method")
        for metric in ("cross_entropy", "perplexity")
    )
    for column in ("value", "ci_low", "ci_high"):
        for method in ("none", "mine"):
            expected = math.exp(entropy.loc[method, column])
            assert perplexity.loc[method, column] == pytest.approx(expected)
    assert "exact_match" not in set(table["metric"])


def test_splits_kinds_and_numbers_of_prompts(lens, task):
    table = evaluate(
        lens, task, {}, split="validation", kinds=["clean"], n=3, shots=1, exact_match=False
    )
    assert set(table["n"]) == {3}
    assert set(table["method"]) == {"icl"}
    values = measured(lens, task.prompts("validation", shots=1, n=3), TaskVector.none(lens))
    row = table[table["metric"] == "cross_entropy"].iloc[0]
    assert row["value"] == pytest.approx(float(values[:, 1].mean()), rel=1e-5)


def rows_of(frame, method):
    wide = frame[frame["method"] == method].pivot(
        index="prompt_index", columns="metric", values="value"
    )
    return torch.tensor(wide[["accuracy", "cross_entropy"]].to_numpy())


def test_methods_of_every_kind(lens, task):
    prompts = task.prompts("test", kind="zero")
    generator = torch.Generator().manual_seed(1)
    outputs = torch.randn(3, 4, 32, generator=generator)
    ltv = LearnableTaskVector(outputs, start="normal", model="llama")
    draws = random_controls(ltv, n=3)
    methods = {
        "vector": vector(1),
        "ltv": ltv,
        "draws": draws,
        "per kind": {"zero": vector(2), "clean": vector(3)},
        "nothing": None,
        "elsewhere": {"clean": vector(3)},
    }
    frame = prompt_table(lens, prompts, methods, kind="zero", exact_match=False)
    assert list(frame.columns) == ["method", "prompt_index", "metric", "value"]
    present = ["none", "vector", "ltv", "draws", "per kind", "nothing"]
    assert list(dict.fromkeys(frame["method"])) == present
    n = len(prompts)
    assert len(frame) == len(present) * n * 2
    expected = {
        "none": measured(lens, prompts, TaskVector.none(lens)),
        "vector": measured(lens, prompts, vector(1)),
        "ltv": measured(lens, prompts, ltv.task_vector),
        "draws": torch.stack([measured(lens, prompts, draw) for draw in draws]).mean(dim=0),
        "per kind": measured(lens, prompts, vector(2)),
        "nothing": measured(lens, prompts, TaskVector.none(lens)),
    }
    for method, values in expected.items():
        assert torch.allclose(rows_of(frame, method), values.double(), atol=1e-5), method
    spread = torch.stack([measured(lens, prompts, draw)[:, 1] for draw in draws]).std(dim=0)
    assert spread.min() > 0.01


def test_small_limits_change_nothing(lens, task):
    methods = {"mine": vector(), "draws": [vector(seed) for seed in range(3)]}
    whole = evaluate(lens, task, methods, shots=2)
    parts = evaluate(replace(lens, max_rows=3, max_tokens=80), task, methods, shots=2)
    pd.testing.assert_frame_equal(whole, parts, check_exact=False, rtol=1e-4)


def test_both_engines_give_the_same_table(lens, task):
    methods = {"mine": vector()}
    slow = replace(lens, engine=WholePassEngine(lens.backend))
    options = {"shots": 2, "n": 4}
    pd.testing.assert_frame_equal(
        evaluate(slow, task, methods, **options),
        evaluate(lens, task, methods, **options),
        check_exact=False,
        rtol=1e-4,
    )


def said(lens, prompt, made, n_tokens):
    """The greedy continuation, generated by hand and decoded."""
    tokens = zoo.tokenizer()(prompt.text).input_ids
    last = torch.tensor([len(tokens) - 1])
    edit = stacked([made], lens)
    for _ in range(n_tokens):
        with torch.no_grad(), intervene(lens.backend, edit, last):
            tokens.append(int(lens.backend.model(torch.tensor([tokens]))[0, -1].argmax()))
    return zoo.tokenizer().decode(tokens[last + 1 :])


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has no HookedTransformer")
def test_exact_match_is_that_of_the_whole_answer():
    """A bigram model: after ":" comes " l" or, with the vector, " k"; " l" m, m newline, k m."""
    lens, up = bigrams({":": " l", " l": "m", "m": "\n", " k": "m", "\n": "Q", "Q": ":"})
    items = [
        zoo.one_shot("k", "b", "lm"),
        zoo.one_shot("k", "c", "l"),
        zoo.one_shot("k", "d", "k"),
        zoo.one_shot("k", "e", "km"),
        zoo.one_shot("k", "f", "lmn"),
        zoo.one_shot("k", "g", "no"),
    ]
    prompts = zoo.prompts(*items)
    frame = prompt_table(lens, prompts, {"up": up}, kind="clean")
    found = frame[frame["metric"] == "exact_match"].pivot(
        index="prompt_index", columns="method", values="value"
    )
    # The model says "lm", with the vector "km": a part of it, or more than it, is no match.
    assert found["icl"].tolist() == [1, 0, 0, 0, 0, 0]
    assert found["up"].tolist() == [0, 0, 0, 1, 0, 0]
    accuracy = frame[frame["metric"] == "accuracy"].pivot(
        index="prompt_index", columns="method", values="value"
    )
    assert accuracy["icl"].tolist() == [1, 1, 0, 0, 1, 0]
    assert accuracy["up"].tolist() == [0, 0, 1, 1, 0, 0]


def bigrams(following):
    """A lens whose logits depend on the last token alone, and a vector that turns ":" to " k"."""
    lens = zoo.linear_lens()
    model = lens.backend.model
    with torch.no_grad():
        for parameter in model.blocks.parameters():
            parameter.zero_()
        model.unembed.W_U.zero_()
        for token, after in following.items():
            model.unembed.W_U[zoo.WORDS.index(token), zoo.WORDS.index(after)] = 1.0
        # A coordinate of no token of the prompt writes the other answer.
        model.unembed.W_U[zoo.WORDS.index("<unk>"), zoo.WORDS.index(" k")] = 1.0
    vectors = torch.zeros(2, zoo.D_VOCAB)
    vectors[1, zoo.WORDS.index("<unk>")] = 5.0
    return lens, TaskVector(vectors, (1,), "linear", "up")


@pytest.mark.parametrize("kind", zoo.KINDS)
def test_exact_match_is_that_of_generation_by_hand(kind, task):
    """Answers are made to be what the model says, where it says a word and ends the line."""
    lens = zoo.lens("qwen2", kind)
    made = vector(49, size=4.0)
    items = []
    for prompt in task.prompts("test", kind="zero", n=8):
        word, *rest = said(lens, prompt, made, 3).split("\n")
        if rest and word.startswith(" "):
            prompt = replace(prompt, query=replace(prompt.query, output=word.strip()))
        items.append(prompt)
    prompts = zoo.prompts(*items)
    length = max(len(answer) for (answer,) in lens.encode(prompts).answers) + 1
    frame = prompt_table(lens, prompts, {"mine": made}, kind="zero")
    frame = frame[frame["metric"] == "exact_match"]
    for method, added in (("none", TaskVector.none(lens)), ("mine", made)):
        expected = [
            float(said(lens, prompt, added, length).split("\n")[0].strip() == prompt.answer)
            for prompt in prompts
        ]
        assert frame[frame["method"] == method]["value"].tolist() == expected
        # Only where some answers match does the comparison say anything.
        assert method == "none" or 0 < sum(expected) < len(expected)


@pytest.mark.parametrize("name", ["none", "icl"])
def test_names_of_baselines_are_taken(lens, task, name):
    words = f"method name '{name}' is taken by the baseline without a vector; rename yours"
    with pytest.raises(UnknownNameError, match=words):
        evaluate(lens, task, {"mine": vector(), name: vector()})


def test_vectors_of_another_model_are_refused(lens, task):
    other = TaskVector(torch.zeros(3, 16), (0,), "other", "made")
    with pytest.raises(ShapeError, match="task vector of 'other' has 3 layers and d_model 16"):
        evaluate(lens, task, {"mine": other})
