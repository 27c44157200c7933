"""Figures of many methods: what is drawn is what the tables hold."""

import numpy as np
import pytest
from pandas import DataFrame

from helpers.drawn import draw
from tvlens import figures
from tvlens.errors import UnknownNameError

METHODS = ("none", "ltv", "fv_layer", "hendel", "icv", "mixing", "free", "ltv_sparse")


def results(metric="accuracy"):
    rng = np.random.default_rng(0)
    rows = [(f"t{i}", m, p) for i in range(3) for m in METHODS for p in ("zero", "shuffled")]
    rows += [(f"t{i}", "icl", "clean") for i in range(3)]
    table = DataFrame(rows, columns=["task", "method", "prompt"])
    return table.assign(metric=metric, value=rng.uniform(size=len(table)))


@pytest.mark.parametrize(("metric", "rising"), [("accuracy", True), ("d_ntp", False)])
def test_methods_are_sorted_by_their_means(metric, rising):
    table = results(metric)
    figure = figures.method_means(table, metric=metric)
    draw(figure)
    first, second = figure.axes
    means = table[table["prompt"] == "zero"].groupby("method")["value"].mean().sort_values()
    drawn = [float(line.get_xdata()[0]) for line in first.lines if len(line.get_xdata()) == 1]
    expected = means.tolist() if rising else means.tolist()[::-1]
    assert drawn == pytest.approx(expected)
    assert len(first.get_yticklabels()) == len(METHODS)
    assert second.get_title() == "shuffled-label prompts"
    assert {axes.get_xscale() for axes in figure.axes} == {"linear" if rising else "log"}
    with pytest.raises(UnknownNameError, match="hold no 'recall' on zero or shuffled"):
        figures.method_means(table, metric="recall")


def test_states_of_each_method_lie_beside_clean_and_bare_ones():
    rng = np.random.default_rng(0)
    rows = [
        (m, i, *rng.standard_normal(2)) for m in ("icl", "none", "ltv", "hendel") for i in range(5)
    ]
    table = DataFrame(rows, columns=["method", "prompt", "first", "second"])
    figure = figures.state_map(table)
    draw(figure)
    assert [axes.get_title() for axes in figure.axes] == ["LTV", "Hendel's task vector"]
    for axes, name in zip(figure.axes, ("ltv", "hendel"), strict=True):
        own = table[table["method"] == name]
        assert axes.lines[2].get_xdata() == pytest.approx(own["first"].to_numpy())
    with pytest.raises(UnknownNameError, match="hold none of svd; methods there"):
        figures.state_map(table, methods=("svd",))


def test_heads_needed_has_a_panel_for_each_task():
    rows = [
        (f"t{i}", m, k, "zero", "accuracy", 0.1 * k, 0.0, 1.0)
        for i in range(4)
        for m in ("LTV", "FV")
        for k in (1, 3, 9)
    ]
    columns = ["task", "method", "k", "prompt", "metric", "value", "ci_low", "ci_high"]
    figure = figures.heads_needed(DataFrame(rows, columns=columns))
    draw(figure)
    assert [axes.get_title() for axes in figure.axes[:4]] == ["t0", "t1", "t2", "t3"]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [1, 3, 9]
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([0.1, 0.3, 0.9])


def test_the_transfer_grid_says_its_numbers():
    table = DataFrame(
        {"learned_on": ["a", "a", "b"], "task": ["a", "b", "b"], "value": [0.9, 0.25, 1.0]}
    )
    figure = figures.transfer_grid(table)
    draw(figure)
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.90", "0.25", "1.00"]
    assert figure.axes[0].get_xlabel() == "asked of"
