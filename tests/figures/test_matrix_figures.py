import numpy as np
import pytest
from pandas import DataFrame

from helpers.drawn import draw
from tvlens import figures
from tvlens.errors import UnknownNameError


def table() -> DataFrame:
    rows = [
        (a, b, measure, k, 0.1 * i - 0.05 * j, 0.0, 0.9 if a != "c" else np.nan)
        for i, a in enumerate("abc")
        for j, b in enumerate("abc")
        for measure, k in (("spearman", None), ("overlap", 5), ("overlap", 10))
        if a != b
    ]
    names = ["first", "second", "measure", "k", "value", "chance", "ceiling"]
    return DataFrame(rows, columns=names).astype({"k": "Int64"})


def test_a_square_for_every_two():
    figure = figures.agreement_matrix(table())
    draw(figure)
    axes = figure.axes[0]
    shown = axes.images[0].get_array().filled(np.nan)
    expected = [[0.1 * i - 0.05 * j for j in range(3)] for i in range(3)]
    off_diagonal = ~np.eye(3, dtype=bool)
    assert shown[off_diagonal] == pytest.approx(np.array(expected)[off_diagonal])
    assert np.isnan(shown[~off_diagonal]).all()
    texts = [text.get_text() for text in axes.texts]
    assert texts[:2] == ["-0.05\nof 0.90", "-0.10\nof 0.90"]
    assert texts[-1] == "0.15"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_head_sets_of_one_size():
    draw(figures.agreement_matrix(table(), measure="overlap", k=5))
    with pytest.raises(UnknownNameError, match="table holds several 'overlap' of every two; it"):
        figures.agreement_matrix(table(), measure="overlap")
    with pytest.raises(UnknownNameError, match="holds no 'overlap' of every two at k = 7"):
        figures.agreement_matrix(table(), measure="overlap", k=7)
