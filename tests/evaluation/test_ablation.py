"""Ablation: by replay as by hooks set by hand, what heads are set to, tables and areas."""

import numpy as np
import pytest
import torch

from helpers import tiny_regression, trained, zoo
from tvlens.errors import ModelError, ShapeError, TaskError, UnknownNameError
from tvlens.evaluation.ablation import Ablation, ablate, area
from tvlens.evaluation.methods import evaluate_prompts
from tvlens.evaluation.replacement import aligned, partners
from tvlens.lens.heads import mean_head_outputs
from tvlens.lens.hooks import WholePassEngine, counted_hooks, record_attention
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.models.batch import Batch
from tvlens.runs.run import Run
from tvlens.scores.ablation import HeadSet
from tvlens.stats import bootstrap_mean

SETS = [
    HeadSet("late", ((2, 1), (2, 3))),
    HeadSet("a", ((0, 1), (1, 2)), "top", 0.2),
    HeadSet("b", ((1, 2), (0, 1)), "keep", 0.8),
    HeadSet("all", tuple((layer, head) for layer in range(3) for head in range(4)), "keep", 0.0),
    HeadSet("none", (), "top", 0.0),
]


ENDS = ("metric", "value", "ci_low", "ci_high", "n")


def means_of(lens, seed=0, at="query"):
    prompts = zoo.TASK.prompts("train", shots=2, n=6, seed=seed)
    return mean_head_outputs(lens, prompts, answered_only=False, at=at)


def by_hand(lens: Lens, batch: Batch, values, heads, positions) -> torch.Tensor:
    """Measures of prompts that are run whole and alone, z being set by a hook of our own.

    `values` gives, of a prompt and how far before the query, what every head is set to.
    """
    backend, found = lens.backend, []
    for i in range(len(batch)):
        own = batch[i : i + 1]
        length = int(own.mask.sum())
        inputs, mask = own.inputs[:, -length:], own.mask[:, -length:]
        given = [values(i, back) for back in range(length if positions == "all" else 1)]

        def change(layer, z, given=given):
            z = z.clone()
            for head in (h for at, h in heads if at == layer):
                for back, new in enumerate(given):
                    z[0, z.shape[1] - 1 - back, head] = new[layer, head]
            return z

        hooks = {
            backend.z_hook(layer): lambda z, layer=layer, change=change: change(layer, z)
            for layer in {layer for layer, _ in heads}
        }
        with torch.no_grad(), backend.frozen(), counted_hooks(backend, hooks):
            logits = backend.forward(inputs, mask)
        found.append(lens.readout.measure(logits[:, -1:], own)[0, 0])
    return torch.stack(found).double()


def heads_of(lens: Lens, batch: Batch, i: int) -> torch.Tensor:
    """`z` of one prompt, run whole and alone, at its query and at all before it, last first."""
    own, back = batch[i : i + 1], torch.arange(int(batch.mask[i].sum()))
    rows = torch.zeros_like(back)
    with torch.no_grad(), lens.backend.frozen():
        return record_attention(lens.backend, own.inputs, own.mask, own.query - back, rows=rows).z


@pytest.mark.parametrize("positions", ["query", "all"])
@pytest.mark.parametrize("set_to", ["zero", "mean", "other", "resample"])
def test_ablation_is_that_of_hooks_set_by_hand(lens, set_to, positions):
    prompts = zoo.TASK.prompts("test", shots=2, n=5)
    batch = lens.encode(prompts)
    assert not batch.mask.all(), "the prompts differ in length"
    others = [means_of(lens, seed, positions) for seed in (1, 2)]
    means = {"mean": means_of(lens, at=positions), "other": others}.get(set_to)
    whom = partners(batch, seed=3)
    own = [heads_of(lens, batch, i) for i in range(len(batch))]

    def values(i, back):
        if set_to == "zero":
            return torch.zeros(3, 4, 6)
        if set_to == "mean":
            return means.z
        if set_to == "other":
            return (means[0].z + means[1].z) / 2
        other = own[int(whom[i])]
        return other[back % len(other)]

    done = []
    found = ablate(
        lens, prompts, SETS, set_to=set_to, means=means, positions=positions, seed=3,
        progress=done.append,
    )  # fmt: skip
    assert sum(done) == 5
    assert found.measures == ("accuracy", "cross_entropy")
    for number, one in enumerate(SETS):
        expected = by_hand(lens, batch, values, one.heads, positions)
        assert (found.values[:, number] - expected).abs().max() < 1e-4, one.name
        if one.heads:
            assert (found.values[:, number] - found.unablated).abs().max() > 1e-2, one.name
    assert torch.equal(found.values[:, 4], found.unablated)
    assert torch.equal(found.values[:, 1], found.values[:, 2])


@pytest.mark.parametrize("positions", ["query", "all"])
@pytest.mark.parametrize("set_to", ["zero", "resample"])
def test_memory_bounds_change_nothing(set_to, positions):
    prompts = zoo.TASK.prompts("test", shots=2, n=5)
    given = {"set_to": set_to, "positions": positions}
    whole = ablate(zoo.lens(), prompts, SETS, **given)
    pieces = ablate(zoo.lens(max_tokens=70, max_rows=4), prompts, SETS, **given)
    assert (whole.values - pieces.values).abs().max() < 1e-4
    parts = [ablate(zoo.lens(), prompts, part, **given) for part in (SETS[:2], SETS[2:])]
    joined = Ablation.joined(parts)
    assert joined.sets == whole.sets
    assert (whole.values - joined.values).abs().max() < 1e-4


def test_sets_of_the_same_heads_run_once():
    lens = zoo.lens()
    watched = zoo.Watched(lens.engine)
    prompts = zoo.TASK.prompts("test", shots=2, n=5)
    ablate(Lens(lens.backend, watched, lens.readout), prompts, SETS, set_to="zero")
    # Five prompts, of three different sets and of none.
    assert watched.rows == [20]


@pytest.mark.parametrize("positions", ["query", "all"])
@pytest.mark.parametrize("set_to", ["zero", "resample"])
def test_curves_of_numbers_are_those_of_their_prompts(set_to, positions):
    """Rows that share a prompt, asked at several columns, as prompts asked at their end."""
    lens, task = tiny_regression.lens(), tiny_regression.TASK
    curves = task.curves("test", points=(3, 6), n=4)
    sets = [HeadSet("one", ((0, 0),)), HeadSet("two", ((0, 1), (1, 0)))]
    given = {"set_to": set_to, "positions": positions}
    found = ablate(lens, curves, sets, **given)
    assert found.measures == ("squared_error",)
    for column, points in enumerate((3, 6)):
        alone = ablate(lens, curves.at(points), sets, **given)
        assert torch.allclose(found.values[column::2], alone.values, rtol=1e-3, atol=1e-5)
        assert not torch.allclose(alone.values[:, 0], alone.unablated, rtol=1e-2)


def test_whole_answers_too():
    lens, task = trained.lens(), trained.TASKS["seven-on"]
    prompts = task.prompts("test", shots=trained.SHOTS, n=6)
    every = tuple((layer, head) for layer in range(2) for head in range(4))
    sets = [HeadSet("every", every), HeadSet("none", (), "top", 0.0)]
    found = ablate(lens, prompts, sets, set_to="zero", exact_match=True)
    assert found.measures == ("accuracy", "cross_entropy", "exact_match")
    bare = evaluate_prompts(lens, prompts, {})
    for measure in found.measures:
        column = found.measures.index(measure)
        assert torch.equal(found.unablated[:, column], bare.of("bare", measure))
    assert found.unablated[:, 2].mean() == 1
    assert found.values[:, 0, 2].mean() < 0.5


def test_partners_are_other_prompts_of_the_same_rows():
    batch = Batch(
        torch.zeros(12, 4, dtype=torch.long), torch.ones(12, 4, dtype=torch.bool),
        torch.full((12,), 3), torch.zeros(12, dtype=torch.long), ((),) * 12, 3,
    )  # fmt: skip
    seen = torch.stack([partners(batch, seed).view(4, 3) for seed in range(60)])
    assert (seen % 3 == torch.arange(3)).all()
    prompts = seen // 3
    assert (prompts == prompts[..., :1]).all()
    own = torch.arange(4)[:, None]
    assert (prompts != own).all()
    assert all({*prompts[:, i, 0].tolist()} == {*range(4)} - {i} for i in range(4))


def test_columns_are_matched_from_the_query_on():
    batch = Batch.pad([[1, 2, 3, 4, 5], [1, 2, 3]], [[[9]]] * 2)
    others = Batch.pad([[1, 2], [1, 2, 3, 4]], [[[9]]] * 2)
    at, source = aligned(batch, others)
    assert at.tolist() == [[0, 1, 2, 3, 4], [-1, -1, 2, 3, 4]]
    # Two tokens at columns 2 and 3, again and again from the query back; four of which three count.
    assert source[0].tolist() == [3, 2, 3, 2, 3]
    assert source[1, 2:].tolist() == [1, 2, 3]


def made() -> Ablation:
    """Two prompts; without ablation both are right."""
    sets = [HeadSet("a", (), "top", 0.0), HeadSet("a", ((0, 0),), "top", 0.1)]
    sets += [HeadSet("a", ((0, 0), (0, 1)), "top", 0.2)]
    sets += [HeadSet("a", ((0, i),), "random", 0.1, i) for i in range(2)]
    sets += [HeadSet("a", ((0, i), (1, 0)), "random", 0.2, i) for i in range(2)]
    accuracy = [[1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]]
    loss = [[0.5, 1.0, 2.0, 0.5, 0.7, 0.6, 1.0], [0.25, 3.0, 4.0, 0.25, 0.25, 0.25, 0.25]]
    values = torch.tensor([accuracy, loss], dtype=torch.float64).permute(1, 2, 0)
    return Ablation(
        tuple(sets), values, values[:, 0], ("accuracy", "cross_entropy"), "mean", "query", "t", "m"
    )


def test_a_table_has_a_row_for_each_set_and_metric():
    table = made().to_frame()
    assert list(table.columns) == (
        [*("task", "score", "rule", "set_to", "positions", "share", "k", "draw"), *ENDS]
    )
    assert len(table) == 7 * 4
    assert (table["n"] == 2).all()
    assert table[["task", "set_to", "positions"]].drop_duplicates().to_numpy().tolist() == (
        [["t", "mean", "query"]]
    )
    top = table[(table["rule"] == "top") & (table["metric"] == "accuracy")]
    assert top[["share", "k", "value"]].to_numpy().tolist() == [
        [0, 0, 1],
        [0.1, 1, 0.5],
        [0.2, 2, 0],
    ]
    # No spread of shares that are 0 or 1: Wilson's interval of two prompts.
    wilson = 1.959964**2 / (2 + 1.959964**2)
    assert top["ci_low"].iloc[0] == pytest.approx(1 - wilson)
    assert top["ci_high"].iloc[2] == pytest.approx(wilson)
    change = table[(table["rule"] == "top") & (table["metric"] == "cross_entropy_change")]
    assert change["value"].tolist() == pytest.approx([0, (0.5 + 2.75) / 2, (1.5 + 3.75) / 2])
    paired = bootstrap_mean(np.array([0.5, 2.75]), seed=0)
    assert (change["ci_low"].iloc[1], change["ci_high"].iloc[1]) == pytest.approx(
        (paired.low, paired.high)
    )
    random = table[(table["rule"] == "random") & (table["metric"] == "accuracy")]
    assert random["draw"].tolist() == [0, 1, 0, 1]
    assert table.loc[table["rule"] == "top", "draw"].isna().all()


def test_areas_in_closed_form():
    shares = [0.0, 0.05, 0.2]
    slope = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    line = 3 + slope * torch.tensor([shares], dtype=torch.float64)
    # A straight line is on the mean as high as in its middle.
    assert area(shares, line).tolist() == pytest.approx([3.1, 2.8])
    areas = made().areas().set_index(["rule", "metric"])
    top = [(1 + 1) / 4 + (1 + 0) / 4, (1 + 0) / 4 + (0 + 0) / 4]
    random = [(1 + 0.5) / 4 + (0.5 + 1) / 4, (1 + 1) / 4 + (1 + 0.5) / 4]
    assert areas.loc[("top", "accuracy"), "value"] == pytest.approx(np.mean(top))
    assert areas.loc[("random", "accuracy"), "value"] == pytest.approx(np.mean(random))
    off = areas.loc[("top", "accuracy_minus_random")]
    paired = bootstrap_mean(np.array(top) - np.array(random), seed=0)
    assert (off["value"], off["ci_low"], off["ci_high"], off["n"]) == pytest.approx(
        (paired.value, paired.low, paired.high, 2)
    )
    assert ("random", "accuracy_minus_random") not in areas.index
    only = Ablation((made().sets[1],), made().values[:, 1:2], made().unablated, ("a", "b"), "", "")
    assert only.areas().empty
    assert list(only.areas().columns) == (
        [
            "task",
            "score",
            "rule",
            "set_to",
            "positions",
            "metric",
            "value",
            "ci_low",
            "ci_high",
            "n",
        ]
    )


def test_an_ablation_is_kept_as_it_is(tmp_path):
    with Run.open(tmp_path / "run", "test", {}) as run:
        kept = run.kept("one", Ablation, made)
    assert kept.sets == made().sets
    assert torch.equal(kept.values, made().values)
    assert torch.equal(kept.unablated, made().unablated)
    for field in ("measures", "set_to", "positions", "task", "model"):
        assert getattr(kept, field) == getattr(made(), field)
    assert kept.of("a", "accuracy").shape == (2, 7)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        ({"sets": []}, ShapeError, "no head set is given to ablate; expected one or more"),
        (
            {"sets": [HeadSet("mine", ((3, 0),))]},
            ShapeError,
            r"'mine' names head \(3, 0\), and the model has layers 0 to 2 of heads 0 to 3",
        ),
        (
            {"set_to": "median"},
            UnknownNameError,
            "heads cannot be set to 'median'; expected some of mean, zero, other, resample",
        ),
        (
            {"positions": "last"},
            UnknownNameError,
            "heads cannot be ablated at positions 'last'; expected query or all",
        ),
        (
            {"set_to": "mean"},
            TaskError,
            "set_to='mean' needs mean head outputs over clean prompts of the task, and 0 are given",
        ),
        (
            {"set_to": "other", "means": []},
            TaskError,
            "clean prompts of one or more other tasks, and 0 are given; pass means=",
        ),
        (
            {"exact_match": True, "positions": "all"},
            ModelError,
            "but 'llama' is ablated at all positions; pass exact_match=False",
        ),
    ],
)
def test_what_is_refused(words, kind, said):
    given = {"sets": SETS, "set_to": "zero"} | words
    with pytest.raises(kind, match=said):
        ablate(zoo.lens(), zoo.TASK.prompts("test", shots=2, n=2), **given)


def test_means_of_all_positions_are_those_of_whole_passes(lens):
    prompts = zoo.TASK.prompts("train", shots=2, n=6)
    found = means_of(lens, at="all")
    batch = lens.encode(prompts)
    every = torch.cat([heads_of(lens, batch, i) for i in range(len(batch))])
    assert torch.allclose(found.z, every.mean(dim=0), atol=1e-5)
    assert (found.at, found.count) == ("all", 6)
    assert zoo.off(found.z, means_of(lens).z) > 0.1
    with pytest.raises(ModelError, match="blocks of 'gemma2' scale what attention writes"):
        means_of(zoo.lens("gemma2"), at="all")


def test_means_of_another_model_and_no_other_prompt():
    prompts = zoo.TASK.prompts("test", shots=2, n=2)
    with pytest.raises(TaskError, match="at positions 'all', and the means are those at 'query'"):
        ablate(zoo.lens(), prompts, SETS, means=means_of(zoo.lens()), positions="all")
    with pytest.raises(ShapeError, match=r"means of 'gpt2' have sizes \(3, 4, 8, 32\)"):
        ablate(zoo.lens(), prompts, SETS, means=means_of(zoo.lens("gpt2")))
    with pytest.raises(TaskError, match="heads from another prompt, and there is 1; give two"):
        ablate(zoo.lens(), prompts[:1], SETS, set_to="resample")
    lens = tiny_regression.lens()
    points = tiny_regression.TASK.prompts("test", shots=3, n=2)
    with pytest.raises(ModelError, match="but 'tiny' answers with numbers; pass exact_match=False"):
        ablate(lens, points, [HeadSet("a", ((0, 0),))], set_to="zero", exact_match=True)
    with pytest.raises(UnknownNameError, match="has no 'loss' of sets 'a'; expected accuracy"):
        made().of("a", "loss")


def test_layers_without_heads_are_left_alone():
    backend = zoo.backend("lfm2", "bridge")
    prompts = zoo.TASK.prompts("test", shots=2, n=2)
    hybrid = Lens(backend, WholePassEngine(backend), FirstToken())
    for positions in ("query", "all"):
        found = ablate(
            hybrid, prompts, [HeadSet("a", ((1, 0),))], set_to="resample", positions=positions
        )
        assert (found.values[:, 0] - found.unablated).abs().max() > 1e-3
    with pytest.raises(ShapeError, match="layer 0 of 'lfm2' has no heads; layers that have are 1"):
        ablate(hybrid, prompts, [HeadSet("a", ((0, 0),))], set_to="zero")
