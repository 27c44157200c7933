import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PolyCollection
from pandas import DataFrame

from helpers.drawn import draw, legend_of
from tvlens import figures
from tvlens.errors import UnknownNameError
from tvlens.figures.style import PALETTE

SHARES = (0.0, 0.02, 0.1, 0.2)
NAMES = ("aie", "ltv", "mine")


def table(rule: str = "top", tasks: int = 2, metric: str = "accuracy") -> DataFrame:
    """Every score falls from .9 at its own pace; random sets fall by less."""
    names = {"exclusive": [f"{a} without {b}" for a in NAMES for b in NAMES if a != b]}
    rows = []
    for task in range(tasks):
        for pace, name in enumerate(names.get(rule, NAMES), start=1):
            for share in SHARES:
                rows.append((f"task {task}", name, rule, share, np.nan, 0.9 - pace * share / 2))
                for n in range(20 if share and rule == "top" else 0):
                    value = 0.9 - share * (n + pace) / 22
                    rows.append((f"task {task}", name, "random", share, n, value))
    found = DataFrame(rows, columns=["task", "score", "rule", "share", "draw", "value"])
    found = found.assign(set_to="mean", positions="query", metric=metric)
    found = found.assign(ci_low=found["value"] - 0.05, ci_high=found["value"] + 0.04)
    change = found.assign(metric=f"{metric}_change", value=found["value"] - 0.9)
    both = pd.concat([found, change], ignore_index=True).sample(frac=1, random_state=0)
    return both.sort_values(["task", "score"])


def line_of(axes: Axes, label: str):
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


def test_a_panel_a_task_and_a_line_a_score():
    figure = draw(figures.ablation_curves(table()))
    assert [axes.get_title() for axes in figure.axes] == ["task 0", "task 1"]
    assert {*legend_of(figure)} == (
        {"AIE", "LTV contribution", "mine", "random, same layers", "nothing ablated"}
    )
    for axes in figure.axes:
        for pace, (label, colour) in enumerate(
            [("AIE", "red"), ("LTV contribution", "blue"), ("mine", "black")], start=1
        ):
            line = line_of(axes, label)
            assert line.get_xdata().tolist() == list(SHARES)
            assert line.get_ydata() == pytest.approx([0.9 - pace * s / 2 for s in SHARES])
            assert line.get_color() == PALETTE[colour]
        assert line_of(axes, "nothing ablated").get_ydata()[0] == pytest.approx(0.9)
        bars = [c for c in axes.collections if isinstance(c, LineCollection)]
        assert len(bars) == 3
        ends = bars[0].get_segments()[0][:, 1]
        assert ends == pytest.approx([0.85, 0.94])
    assert figure.get_supxlabel() == "share of heads set to their means at the query"


def test_the_band_holds_the_random_sets_of_all_scores():
    figure = draw(figures.ablation_curves(table()))
    (band,) = [c for c in figure.axes[0].collections if isinstance(c, PolyCollection)]
    vertices = band.get_paths()[0].vertices
    at_last = vertices[np.isclose(vertices[:, 0], 0.2), 1]
    draws = [0.9 - 0.2 * (draw + pace) / 22 for draw in range(20) for pace in (1, 2, 3)]
    assert (at_last.min(), at_last.max()) == pytest.approx(
        (np.quantile(draws, 0.025), np.quantile(draws, 0.975))
    )
    at_first = vertices[np.isclose(vertices[:, 0], 0), 1]
    assert at_first == pytest.approx(np.full(len(at_first), 0.9))


def test_exclusive_sets_have_a_column_a_score_that_is_left_out():
    both = pd.concat([table("exclusive"), table()])
    figure = draw(figures.ablation_curves(both, rule="exclusive"))
    titles = [axes.get_title().replace("\n", " ") for axes in figure.axes]
    assert titles == [
        "without best by AIE",
        "without best by LTV contribution",
        "without best by mine",
        *[""] * 3,
    ]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["task 0", "task 1"]
    lines = [{line.get_label() for line in axes.lines} for axes in figure.axes[:3]]
    assert lines[0] & {"AIE", "LTV contribution", "mine"} == {"LTV contribution", "mine"}
    assert lines[2] & {"AIE", "LTV contribution", "mine"} == {"AIE", "LTV contribution"}
    assert "random, same layers" in legend_of(figure)


def test_heads_that_stay_and_errors():
    both = pd.concat([table("keep", tasks=5), table(tasks=5)])
    figure = draw(figures.ablation_curves(both, rule="keep"))
    assert len(figure.axes) == 5
    assert "random, same layers" not in legend_of(figure)
    words = figure.get_supxlabel().replace("\n", " ")
    assert words == "share of heads that stay, all others set to their means at the query"
    assert line_of(figure.axes[0], "nothing ablated").get_ydata()[0] == pytest.approx(0.9)
    errors = draw(
        figures.ablation_curves(table(metric="squared_error", tasks=1), metric="squared_error")
    )
    assert errors.axes[0].get_yscale() == "log"
    shown = [text.get_text() for text in errors.axes[0].get_yticklabels()]
    assert "0.3" in shown or "1" in shown


@pytest.mark.parametrize("tasks", [1, 2, 4])
@pytest.mark.parametrize("width", ["single", "double"])
def test_the_legend_is_read_row_by_row_and_fits(tasks, width):
    figure = draw(figures.ablation_curves(table(tasks=tasks), width=width))
    assert figure.legends[0].get_window_extent().width <= figure.bbox.width
    known = ["AIE", "LTV contribution", "mine", "random, same layers", "nothing ablated"]
    assert legend_of(figure) == known


def test_what_is_refused():
    with pytest.raises(UnknownNameError, match="holds no 'accuracy' of 'keep' sets set to 'mean'"):
        figures.ablation_curves(table(), rule="keep")
    with pytest.raises(UnknownNameError, match=r"the ablation table lacks \['share'\]"):
        figures.ablation_curves(table().drop(columns="share"))
