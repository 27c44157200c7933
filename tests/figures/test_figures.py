from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from pandas import DataFrame

from helpers.drawn import draw, legend_of
from tvlens import figures
from tvlens.errors import NumericalError, ShapeError, UnknownNameError
from tvlens.figures import curves as figures_regression
from tvlens.figures import style
from tvlens.figures.modalities import MODALITY_PANELS
from tvlens.figures.style import WIDTHS
from tvlens.tasks.regression.functions import CLASSES
from tvlens.tasks.regression.oracles import ORACLES

METHODS = ("none", "fv_layer", "fv_per_layer", "ltv", "random", "permuted")


def line_of(axes: Axes, label: str) -> Any:
    (line,) = [line for line in axes.lines if line.get_label() == label]
    return line


def curve(task: str | None = None, ceiling: float | None = None, heads: int = 100) -> DataFrame:
    k = np.arange(1, 31)
    columns: dict[str, Any] = {"k": k, "overlap": 1 - 0.01 * k, "chance": k / heads}
    columns |= {"chance_low": k / heads / 2, "chance_high": 2 * k / heads}
    columns |= {} if ceiling is None else {"ceiling": ceiling}
    columns |= {} if task is None else {"task": task}
    return DataFrame(columns)


def results(tasks: int = 2, metric: str = "accuracy") -> DataFrame:
    rng = np.random.default_rng(0)
    rows = [(f"task-{task}", "icl", "clean") for task in range(tasks)]
    rows += [
        (f"task-{task}", method, prompt)
        for task in range(tasks)
        for method in reversed(METHODS)
        for prompt in ("zero", "shuffled")
    ]
    table = DataFrame(rows, columns=["task", "method", "prompt"])
    value = rng.uniform(0.2, 0.8, size=len(table))
    return table.assign(metric=metric, value=value, ci_low=value - 0.1, ci_high=value + 0.15)


def travel_tables(start: float) -> tuple[DataFrame, DataFrame]:
    """Two presets, two seeds each: "paper" ends at its random start, "ours" starts at `start`."""
    rng = np.random.default_rng(0)
    travel, weights = [], []
    for preset in ("paper", "ours"):
        for seed in range(2):
            first = rng.normal(size=50) if preset == "paper" else np.full(50, start)
            end = first + (0 if preset == "paper" else rng.normal(size=50))
            steps = np.arange(0, 101, 10)
            distance = steps / 100 * np.linalg.norm(end - first)
            norm = np.full(len(steps), np.linalg.norm(first))
            run = {"preset": preset, "seed": seed}
            travel.append(DataFrame({**run, "step": steps, "travel": distance, "norm": norm}))
            weights.append(DataFrame({**run, "start": first, "end": end}))
    return pd.concat(travel), pd.concat(weights)


# --- head maps ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 9), (12, 8), (2, 2), (1, 1), (40, 40)])
def test_head_maps_show_the_scores_and_mark_the_best(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    aie, contribution = rng.normal(size=shape), rng.normal(size=shape)
    k = min(3, aie.size)
    figure = figures.head_maps(aie, contribution, task="present-past", k=k)
    draw(figure)
    maps = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in maps] == [
        "Causal mediation (AIE)",
        "Learnable Task Vector (LTV)",
    ]
    assert maps[0].get_ylabel() == "layer"
    assert figure.get_suptitle() == "present-past"
    for axes, scores in zip(maps, (aie, contribution), strict=True):
        assert axes.get_xlabel() == "head"
        np.testing.assert_array_equal(axes.images[0].get_array(), scores)
        low, high = axes.images[0].get_clim()
        assert (low, high) == (-np.abs(scores).max(), np.abs(scores).max())
        assert axes.get_ylim() == (-0.5, shape[0] - 0.5)  # layer 0 at the bottom
        squares = {(p.get_y() + 0.5, p.get_x() + 0.5) for p in axes.patches}
        dots = set(zip(axes.lines[0].get_ydata(), axes.lines[0].get_xdata(), strict=True))
        for marked, marks in ((aie, squares), (contribution, dots)):
            order = np.argsort(marked, axis=None)[::-1][:k]
            assert marks == set(zip(*np.unravel_index(order, shape), strict=True))
    both = len(squares & dots)
    assert legend_of(figure) == [f"top {k} by AIE", f"top {k} by LTV contribution ({both} in both)"]


def test_each_head_map_has_a_scale_with_its_unit() -> None:
    figure = figures.head_maps(np.eye(4), torch.eye(4, dtype=torch.bfloat16), task="t", k=1)
    scales = [axes for axes in figure.axes if not axes.images]
    assert [axes.get_xlabel() for axes in scales] == [
        "average indirect effect (probability)",
        "LTV contribution, signed norm",
    ]


def test_the_unit_of_effects_can_be_another() -> None:
    figure = figures.head_maps(np.eye(4), np.eye(4), task="t", k=1, unit="squared error")
    (first, _) = (axes for axes in figure.axes if not axes.images)
    assert first.get_xlabel() == "average indirect effect (squared error)"


def test_a_head_that_works_against_the_task_is_not_among_the_best() -> None:
    scores = np.array([[-9.0, 1.0], [2.0, 0.0]])
    figure = figures.head_maps(scores, -scores, task="t", k=1)
    axes = figure.axes[0]
    (square,) = axes.patches
    assert (square.get_x(), square.get_y()) == (-0.5, 0.5)
    assert (axes.lines[0].get_xdata()[0], axes.lines[0].get_ydata()[0]) == (0, 0)


def test_maps_without_any_effect_can_be_drawn() -> None:
    figure = figures.head_maps(np.zeros((3, 2)), np.zeros((3, 2)), task="t", k=2)
    draw(figure)
    assert figure.axes[0].images[0].get_clim() == (-1, 1)


def test_head_maps_refuse_what_cannot_be_compared() -> None:
    ones = np.ones((3, 2))
    with pytest.raises(ShapeError, match=r"shape \[3, 2\].*\[2, 3\]; both must come from the same"):
        figures.head_maps(ones, ones.T.copy(), task="t", k=1)
    with pytest.raises(ShapeError):
        figures.head_maps(ones, ones, task="t", k=7)
    with pytest.raises(NumericalError):
        figures.head_maps(ones, np.where(ones > 0, np.nan, 0), task="t", k=1)


# --- overlap --------------------------------------------------------------------------------------


def test_one_overlap_curve_stands_against_its_chance_level() -> None:
    table = curve(ceiling=0.9)
    figure = figures.overlap_curve(table.sample(frac=1, random_state=0))
    draw(figure)
    (axes,) = figure.axes
    line = line_of(axes, "AIE and LTV")
    np.testing.assert_array_equal(line.get_xdata(), table["k"])
    np.testing.assert_array_equal(line.get_ydata(), table["overlap"])
    np.testing.assert_array_equal(line_of(axes, "chance, mean").get_ydata(), table["chance"])
    assert set(line_of(axes, "split-half ceiling").get_ydata()) == {0.9}
    corners = axes.collections[0].get_paths()[0].vertices
    band = {(k, round(y, 9)) for k, y in corners}
    for side in ("chance_low", "chance_high"):
        assert {(k, round(y, 9)) for k, y in zip(table["k"], table[side], strict=True)} <= band
    assert axes.get_xlabel() == "k, heads in each set"
    assert axes.get_ylabel() == "overlap (share of k)"
    assert legend_of(figure) == ["chance, 95%", "chance, mean", "split-half ceiling", "AIE and LTV"]


def test_several_tasks_share_one_chance_level_and_a_mean_ceiling() -> None:
    parts = [curve("b", 0.8), curve("a", 0.6), curve("c", 0.7).iloc[:9]]
    parts[1]["overlap"] *= 0.5
    figure = figures.overlap_curve(pd.concat(parts))
    draw(figure)
    (axes,) = figure.axes
    for part in parts:
        line = line_of(axes, part["task"].iloc[0])
        np.testing.assert_array_equal(line.get_ydata(), part["overlap"])
    looks = [(line_of(axes, t).get_color(), line_of(axes, t).get_marker()) for t in "abc"]
    assert len({colour for colour, _ in looks}) == len({marker for _, marker in looks}) == 3
    np.testing.assert_allclose(line_of(axes, "split-half ceiling, mean").get_ydata(), 0.7)
    assert len(line_of(axes, "chance, mean").get_xdata()) == 30
    assert legend_of(figure)[-3:] == ["b", "a", "c"]


def test_curves_of_models_of_different_size_are_refused() -> None:
    tables = pd.concat([curve("a"), curve("b", heads=270)])
    with pytest.raises(ShapeError, match="different numbers of heads; draw one figure for each"):
        figures.overlap_curve(tables)


# --- methods --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 8])
def test_every_method_is_a_dot_with_its_interval(tasks: int) -> None:
    table = results(tasks)
    figure = figures.method_dots(pd.concat([table, results(tasks, "perplexity")]))
    draw(figure)
    assert [axes.get_title() for axes in figure.axes] == [
        "zero-shot prompts",
        "shuffled-label prompts",
    ]
    names = ["no vector", "FV, one layer", "FV, per layer", "LTV", "random ω", "permuted ω"]
    assert legend_of(figure) == ["in context (clean prompts)", *names]
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == [f"task-{task}" for task in range(tasks)]
    for axes, prompt in zip(figure.axes, ("zero", "shuffled"), strict=True):
        assert axes.get_xlabel() == "accuracy, 95% interval"
        assert axes.get_yticks().tolist() == list(range(tasks))
        intervals = [c for c in axes.collections if isinstance(c, LineCollection)]
        for name, method, drawn in zip(names, METHODS, intervals, strict=True):
            part = table[(table["method"] == method) & (table["prompt"] == prompt)]
            dots = line_of(axes, name)
            np.testing.assert_array_equal(dots.get_xdata(), part["value"])
            np.testing.assert_array_equal(np.round(dots.get_ydata()), range(tasks))
            ends = np.array(drawn.get_segments())
            np.testing.assert_allclose(ends[:, :, 0], part[["ci_low", "ci_high"]])
            np.testing.assert_allclose(ends[:, 0, 1], dots.get_ydata())
        heights = [float(np.ravel(line_of(axes, name).get_ydata())[0]) for name in names]
        assert heights == sorted(heights)  # in the order of the legend, downwards
        icl = table[table["method"] == "icl"]
        bars = [line for line in axes.lines if line.get_color() == "black"]
        assert [bar.get_xdata()[0] for bar in bars] == icl["value"].tolist()
        boxes = [p for p in axes.patches if isinstance(p, Rectangle)]
        ends = [(box.get_x(), box.get_x() + box.get_width()) for box in boxes]
        np.testing.assert_allclose(ends, icl[["ci_low", "ci_high"]])


def test_other_metrics_and_methods_can_be_drawn() -> None:
    table = results(2, "cross_entropy")
    table.loc[table["method"] == "permuted", "method"] = "svd"
    table["value"] *= 5
    table = table[table["prompt"] != "shuffled"]
    figure = figures.method_dots(table, metric="cross_entropy")
    draw(figure)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "cross-entropy (nats), 95% interval"
    assert legend_of(figure)[-1] == "svd"
    assert axes.get_xlim()[1] > table["value"].max()


def test_a_metric_that_was_not_measured_is_named() -> None:
    with pytest.raises(
        UnknownNameError, match=r"no 'fidelity' on zero or shuffled.*\['accuracy'\]"
    ):
        figures.method_dots(results(), metric="fidelity")


# --- whole answers --------------------------------------------------------------------------------


def answer_results(tasks: int = 2) -> DataFrame:
    """Whole answers are right half as often as first tokens."""
    first, whole = results(tasks), results(tasks, "exact_match")
    return pd.concat([first, whole.assign(value=first["value"] / 2)], ignore_index=True)


def test_answer_dots_join_first_tokens_and_whole_answers() -> None:
    table = answer_results()
    figure = figures.answer_dots(table)
    draw(figure)
    assert [axes.get_title() for axes in figure.axes] == [
        "zero-shot prompts",
        "shuffled-label prompts",
    ]
    ticks = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert ticks == ["task-0", "task-1"]
    methods = [name for name in dict.fromkeys(table["method"]) if name not in ("icl", "none")]
    assert legend_of(figure) == ["in context (clean prompts)", *methods]
    for axes, kind in zip(figure.axes, ("zero", "shuffled"), strict=True):
        for method, label in (("icl", "in context (clean prompts)"), ("ltv", "ltv")):
            own = table[table["method"] == method]
            own = own[own["prompt"] == ("clean" if method == "icl" else kind)].set_index("metric")
            whole = line_of(axes, label)
            np.testing.assert_allclose(whole.get_xdata(), own.loc["exact_match", "value"])
            first = axes.lines[axes.lines.index(whole) - 1]
            assert first.get_markerfacecolor() == "white"
            np.testing.assert_allclose(first.get_xdata(), own.loc["accuracy", "value"])
            np.testing.assert_allclose(first.get_ydata(), whole.get_ydata())


def test_answer_dots_need_both_measures() -> None:
    with pytest.raises(UnknownNameError, match=r"no accuracy and exact_match on .*\['accuracy'\]"):
        figures.answer_dots(results())
    some = answer_results().query("prompt != 'shuffled'")
    figure = figures.answer_dots(some[some["task"] == "task-1"])
    draw(figure)
    assert len(figure.axes) == 1


# --- error curves ---------------------------------------------------------------------------------


def error_results() -> DataFrame:
    """A class with methods of every panel, one unknown, and rows that no curve is made of."""
    rng = np.random.default_rng(0)
    methods = ("bare", "least_squares", "truncation", "ltv_class", "fv_layer_prompt", "icv")
    rows = [
        (functions, shift, prompt, points, method, metric)
        for functions in ("linear", "tree")
        for shift in ("none", "skewed")
        for prompt in ("clean", "zero")
        for metric in ("squared_error", "gain")
        for method in methods
        for points in (9, 1, 5, 3, 7, 2, 4, 6, 8)
    ]
    columns = ["functions", "shift", "prompt", "points", "method", "metric"]
    table = DataFrame(rows, columns=columns)
    value = rng.uniform(0.1, 0.9, size=len(table))
    return table.assign(value=value, ci_low=0.8 * value, ci_high=1.5 * value)


def rows_of(table: DataFrame, method: str, shift: str = "none") -> DataFrame:
    query = "functions == 'tree' and prompt == 'clean' and metric == 'squared_error'"
    rows = table.query(query)
    rows = rows[(rows["method"] == method) & (rows["shift"] == shift)]
    return rows.sort_values("points")


@pytest.mark.parametrize("shift", ["none", "skewed"])
def test_error_curves_have_three_panels_with_the_bare_model_in_each(shift: str) -> None:
    table = error_results()
    figure = figures_regression.error_curves(
        table, functions="tree", train_points=4, shift=shift, lines="all"
    )
    draw(figure)
    assert [axes.get_title() for axes in figure.axes] == [
        "model and estimators",
        "vectors of the class",
        "vectors of each prompt",
    ]
    drawn = {
        "bare": {0: "bare model", 1: "bare model", 2: "bare model"},
        "least_squares": {0: "least squares"},
        "truncation": {0: "last points only"},
        "ltv_class": {1: "LTV"},
        "fv_layer_prompt": {2: "FV, one layer"},
        "icv": {0: "icv"},
    }
    for method, panels in drawn.items():
        rows = rows_of(table, method, shift)
        for panel, label in panels.items():
            line = line_of(figure.axes[panel], label)
            np.testing.assert_array_equal(line.get_xdata(), range(1, 10))
            np.testing.assert_array_equal(line.get_ydata(), rows["value"])
    for panel, axes in enumerate(figure.axes):
        there = {label for panels in drawn.values() for n, label in panels.items() if n == panel}
        assert {text.get_text() for text in axes.get_legend().get_texts()} == {
            *there,
            "longest in training",
        }
        assert axes.get_yscale() == "log"
        assert axes.get_xlabel() == "points in the prompt"
        assert set(line_of(axes, "longest in training").get_xdata()) == {4}
        assert axes.get_xlim() == (1, 9)
        low, high = axes.get_ylim()
        assert low < rows_of(table, "bare", shift)["ci_low"].min()
        assert high > rows_of(table, "bare", shift)["value"].max()
    assert figure.get_suptitle() == ("tree" if shift == "none" else "tree, shift: skewed")
    assert figure.axes[0].get_ylabel() == "squared error / variance of f(x)"


def test_bands_of_error_curves_are_the_intervals() -> None:
    table = error_results()
    figure = figures_regression.error_curves(table, functions="tree", train_points=4, lines="all")
    corners = figure.axes[1].collections[0].get_paths()[0].vertices
    band = {(x, round(y, 9)) for x, y in corners}
    rows = rows_of(table, "bare")
    for side in ("ci_low", "ci_high"):
        assert {(x, round(y, 9)) for x, y in zip(rows["points"], rows[side], strict=True)} <= band


@pytest.mark.parametrize("width", ["single", "double"])
def test_the_main_error_curves_are_five_lines_with_their_names_at_their_ends(width: Any) -> None:
    table = error_results()
    more = [
        rows_of(table, "bare").assign(method=name)
        for name in ("fv_layer_class", "boosting", "ltv_prompt")
    ]
    table = pd.concat([table, *more], ignore_index=True)
    figure = figures_regression.error_curves(table, functions="tree", train_points=4, width=width)
    draw(figure)
    assert figure.get_size_inches()[0] == WIDTHS[width]
    (axes,) = figure.axes
    # The estimator is that of the class, not the first that is there.
    names = ["bare model", "last points only", "FV, one layer", "LTV", "boosted trees"]
    methods = ["bare", "truncation", "fv_layer_class", "ltv_class", "boosting"]
    assert axes.get_legend() is None
    for name, method in zip(names, methods, strict=True):
        line = line_of(axes, name)
        np.testing.assert_array_equal(line.get_ydata(), rows_of(table, method)["value"])
        (label,) = [text for text in axes.texts if text.get_text() == name]
        assert label.get_color() == line.get_color()
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [t.get_window_extent(renderer) for t in axes.texts if t.get_text() in names]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert max(box.x1 for box in boxes) <= figure.bbox.x1
    assert [t.get_text() for t in axes.texts if t.get_text() not in names] == [
        "longest in training"
    ]


def test_an_own_class_of_functions_stands_beside_the_first_estimator_there_is() -> None:
    table = error_results()
    table["functions"] = "mine"
    table = table.drop_duplicates(["shift", "prompt", "metric", "method", "points"])
    figure = figures_regression.error_curves(table, functions="mine", train_points=None)
    assert line_of(figure.axes[0], "least squares")
    assert [text.get_text() for text in figure.axes[0].texts][-1] == "least squares"


def test_every_class_of_functions_has_an_estimator_that_there_is() -> None:
    assert {each.estimator for each in CLASSES.values()} <= set(ORACLES)


def test_labels_that_would_overlap_are_moved_apart_as_little_as_may_be() -> None:
    places = style._apart(np.array([0.5, 0.1, 0.52, 0.5]), 0.1)
    # Round their mean, in their order; what is alone stays where it is.
    np.testing.assert_allclose(places, [0.4067, 0.1, 0.6067, 0.5067], atol=1e-4)
    chained = style._apart(np.array([0.0, 0.05, 0.14]), 0.1)
    np.testing.assert_allclose(np.diff(chained), 0.1)
    np.testing.assert_allclose(chained.mean(), np.mean([0.0, 0.05, 0.14]))
    assert len(style._apart(np.array([]), 0.1)) == 0


@pytest.mark.parametrize("until", [3, 8])
@pytest.mark.parametrize("rest", [0.0, 1e-5], ids=["no error", "less than is shown"])
def test_a_line_that_ends_early_is_named_where_it_is_last_in_sight(rest: float, until: int) -> None:
    table = error_results()
    of_estimator = (table["method"] == "boosting") & (table["functions"] == "tree")
    rows = rows_of(table, "bare").assign(method="boosting")
    seen = rows["points"] <= until
    rows.loc[~seen, ["value", "ci_low", "ci_high"]] = rest
    table = pd.concat([table[~of_estimator], rows], ignore_index=True)
    figure = figures_regression.error_curves(table, functions="tree", train_points=4)
    draw(figure)
    (axes,) = figure.axes
    (label,) = [text for text in axes.texts if text.get_text() == "boosted trees"]
    last, bottom = rows[seen].iloc[-1], axes.get_ylim()[0]
    if rest:
        fallen = np.log(last["value"] / bottom) / np.log(last["value"] / rest)
        assert label.xy == (pytest.approx(last["points"] + fallen), bottom)
    else:
        assert label.xy == (last["points"], last["value"])
    # It stands inside the axes, on the side where there is room for it.
    assert label.get_ha() == ("left" if until == 3 else "right")
    assert label.get_window_extent().x1 < axes.bbox.x1


@pytest.mark.parametrize(
    ("low", "shown"),
    [(0.2, ["0.3", "1", "3"]), (1e-3, ["10^{-3}", "10^{-2}", "10^{-1}", "10^{0}"])],
)
@pytest.mark.parametrize("which", ["x", "y"])
def test_logarithmic_axes_have_plain_numbers_where_they_span_little(
    which: Any, low: float, shown: list[str]
) -> None:
    figure = Figure()
    axes = figure.subplots()
    axes.set(**{f"{which}lim": (low, 4)})
    style.log_scale(axes, which)
    draw(figure)
    axis = getattr(axes, f"{which}axis")
    ends = axis.get_view_interval()
    ticks = zip(axis.get_majorticklocs(), axis.get_ticklabels(), strict=False)
    found = [label.get_text() for at, label in ticks if ends[0] <= at <= ends[1]]
    assert found == [f"$\\mathdefault{{{text}}}$" if "^" in text else text for text in shown]
    assert not any(label.get_text() for label in axis.get_minorticklabels())


def test_an_estimator_without_errors_and_an_unknown_training_length_leave_no_line() -> None:
    table = error_results()
    table.loc[table["method"] == "least_squares", ["value", "ci_low", "ci_high"]] = 0.0
    figure = figures_regression.error_curves(table, functions="tree", train_points=None)
    draw(figure)
    labels = {line.get_label() for axes in figure.axes for line in axes.lines}
    assert "least squares" not in labels
    assert "longest in training" not in labels
    assert "bare model" in labels


def test_curves_that_were_not_measured_are_named() -> None:
    table = error_results()
    words = r"no squared_error of 'cubic' under shift 'none' on clean prompts; there are \[\('lin"
    with pytest.raises(UnknownNameError, match=words):
        figures_regression.error_curves(table, functions="cubic", train_points=4)
    with pytest.raises(UnknownNameError, match=r"of 'tree' under shift 'bent'"):
        figures_regression.error_curves(table, functions="tree", train_points=4, shift="bent")
    with pytest.raises(UnknownNameError, match=r"results table lacks \['ci_low'\]; expected \["):
        figures_regression.error_curves(
            table.drop(columns="ci_low"), functions="tree", train_points=4
        )


# --- layers, weights, training --------------------------------------------------------------------


@pytest.mark.parametrize("tasks", [1, 5])
def test_layer_profiles_have_a_panel_for_each_task(tasks: int) -> None:
    layers = np.arange(6)
    table = pd.concat(
        DataFrame({"task": f"t{task}", "layer": layers, "score": score, "share": share})
        for task in range(tasks)
        for score, share in (("aie", layers / 15), ("contribution", layers[::-1] / (15 + task)))
    )
    figure = figures.layer_profiles(table.sample(frac=1, random_state=0).sort_values("task"))
    draw(figure)
    assert [axes.get_title() for axes in figure.axes] == [f"t{task}" for task in range(tasks)]
    for task, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(line_of(axes, "AIE").get_xdata(), layers)
        np.testing.assert_allclose(line_of(axes, "AIE").get_ydata(), layers / 15)
        other = line_of(axes, "LTV contribution").get_ydata()
        np.testing.assert_allclose(other, layers[::-1] / (15 + task))
    assert figure.get_supxlabel() == "layer"
    assert figure.get_supylabel() == "share of positive score"
    assert legend_of(figure) == ["AIE", "LTV contribution"]


def test_weight_travel_shows_weights_that_stay_and_weights_that_move() -> None:
    travel, weights = travel_tables(start=0.0)
    figure = figures.weight_travel(travel, weights)
    draw(figure)
    paper, ours, distance = figure.axes
    assert paper.get_title() == "paper\nr = 1.00, seeds: 2"
    assert ours.get_title() == "ours\nall start at one value, seeds: 2"
    for axes, preset in ((paper, "paper"), (ours, "ours")):
        part = weights[weights["preset"] == preset]
        points = axes.lines[-1]
        np.testing.assert_array_equal(points.get_xdata(), part["start"])
        np.testing.assert_array_equal(points.get_ydata(), part["end"])
        assert axes.get_xlabel() == "weight at the start"
        assert axes.get_xlim() == axes.get_ylim()
    assert distance.get_title() == "distance from the start"
    assert distance.get_ylabel() == r"$\|\omega - \omega_0\|$"
    drawn = [line for line in distance.lines if len(line.get_xdata()) > 2]
    assert len(drawn) == 4
    expected = [part["travel"] for _, part in travel.groupby(["preset", "seed"], sort=False)]
    for line, travelled in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(line.get_ydata(), travelled)
    assert legend_of(figure) == ["paper", r"$\|\omega_0\|$, paper", "ours"]
    norm = travel[(travel["preset"] == "paper") & (travel["step"] == 0)]["norm"].mean()
    assert line_of(distance, r"$\|\omega_0\|$, paper").get_ydata()[0] == norm


def test_correlations_that_differ_between_seeds_are_given_as_a_range() -> None:
    travel, weights = travel_tables(start=0.0)
    flipped = (weights["preset"] == "paper") & (weights["seed"] == 1)
    weights.loc[flipped, "end"] *= -1
    figure = figures.weight_travel(travel, weights)
    assert figure.axes[0].get_title() == "paper\nr = -1.00 to 1.00, seeds: 2"


def test_weight_tables_must_name_the_same_presets() -> None:
    travel, weights = travel_tables(start=1.0)
    with pytest.raises(UnknownNameError, match=r"presets \['paper', 'ours'\].*\['ours'\]; both"):
        figures.weight_travel(travel, weights[weights["preset"] == "ours"])


def test_training_history_marks_the_lowest_validation_loss() -> None:
    validation = [np.nan, 3.0, np.nan, 1.0, 1.5]
    train = [4.0, 3.0, 2.0, 1.0, 0.5]
    table = DataFrame({"step": [1, 2, 3, 4, 5], "train_loss": train, "validation_loss": validation})
    figure = figures.training_history(table)
    draw(figure)
    (axes,) = figure.axes
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel() == "loss (nats)"
    assert line_of(axes, "training").get_ydata().tolist() == train
    assert line_of(axes, "validation").get_xdata().tolist() == [2, 4, 5]
    best = line_of(axes, "lowest, step 4")
    assert (best.get_xdata(), best.get_ydata()) == ([4], [1.0])
    never_validated = figures.training_history(table.assign(validation_loss=np.nan))
    draw(never_validated)
    assert legend_of(never_validated) == ["training", "validation"]


# --- all ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "table", "column"),
    [
        (figures.overlap_curve, curve(), "chance_low"),
        (figures.method_dots, results(), "ci_high"),
        (figures.answer_dots, answer_results(), "ci_low"),
        (figures.training_history, DataFrame({"step": [1], "train_loss": [1.0]}), None),
        (figures.layer_profiles, DataFrame({"task": [], "layer": [], "score": []}), None),
        (
            lambda table: figures.weight_travel(table, travel_tables(0)[1]),
            travel_tables(0)[0],
            "norm",
        ),
    ],
)
def test_a_missing_column_is_named(function: Any, table: DataFrame, column: str | None) -> None:
    missing = column or {3: "share", 2: "validation_loss"}[len(table.columns)]
    with pytest.raises(UnknownNameError, match=rf"table lacks \['{missing}'\]; expected \["):
        function(table.drop(columns=[column] if column else []))


def test_drawing_leaves_no_global_state() -> None:
    before = dict(mpl.rcParams)
    for _ in range(2):
        figures.overlap_curve(curve())
    with pytest.raises(UnknownNameError):
        figures.overlap_curve(DataFrame())
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == []


# --- widths ---------------------------------------------------------------------------------------

MODALITIES = DataFrame(
    [
        {"modality": modality, "task": f"{modality}-{i}"}
        | {name: 0.1 * i for group in MODALITY_PANELS.values() for name in group}
        for modality in ("text", "regression")
        for i in range(3)
    ]
)
LONG_NAMES = pd.concat([curve("a-task-with-a-long-name-" * n) for n in (1, 2, 6)])
MANY = pd.concat([results(1).assign(method=f"{n}-a-method-of-ones-own") for n in range(16)])
NEEDED = results(5).assign(k=3, method="LTV")
PROFILES = DataFrame(
    {"task": f"task-{task}", "layer": layer, "score": score, "share": 0.1}
    for task in range(5)
    for layer in range(4)
    for score in ("aie", "contribution")
)
STATES = DataFrame(
    {"method": method, "prompt": i, "first": 0.1 * i, "second": -0.1 * i}
    for method in ("none", "icl", "ltv", "fv_layer", "hendel")
    for i in range(4)
)
HISTORY = DataFrame({"step": [0, 10], "train_loss": [np.nan, 1.0], "validation_loss": [2.0, 1.0]})
MAPS = dict.fromkeys(("aie", "contribution", "induction", "direct", "gates"), np.eye(9))


@pytest.mark.parametrize("width", ["single", "double"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda width: figures.method_dots(results(3), width=width), id="dots"),
        pytest.param(lambda width: figures.method_dots(MANY, width=width), id="many methods"),
        pytest.param(lambda width: figures.method_means(results(3), width=width), id="means"),
        pytest.param(lambda width: figures.answer_dots(answer_results(3), width=width), id="ans"),
        pytest.param(lambda width: figures.overlap_curve(curve(), width=width), id="overlap"),
        pytest.param(lambda width: figures.overlap_curve(LONG_NAMES, width=width), id="long names"),
        pytest.param(lambda width: figures.heads_needed(NEEDED, width=width), id="needed"),
        pytest.param(lambda width: figures.layer_profiles(PROFILES, width=width), id="profiles"),
        pytest.param(lambda width: figures.state_map(STATES, width=width), id="states"),
        pytest.param(lambda width: figures.modality_dots(MODALITIES, width=width), id="modal"),
        pytest.param(lambda width: figures.training_history(HISTORY, width=width), id="history"),
        pytest.param(lambda width: figures.score_maps(MAPS, task="t", k=2, width=width), id="map"),
        pytest.param(
            lambda width: figures.weight_travel(*travel_tables(1.0), width=width), id="travel"
        ),
    ],
)
def test_figures_fit_the_columns_of_a_paper(make: Any, width: Any) -> None:
    figure = draw(make(width))
    assert figure.get_size_inches()[0] <= WIDTHS[width]


def test_what_was_not_measured_has_no_room_among_modalities() -> None:
    missing = ["spearman of LTV seeds", "depth, AIE", "depth, LTV"]
    figure = draw(figures.modality_dots(MODALITIES.assign(**dict.fromkeys(missing, np.nan))))
    shown = [[label.get_text() for label in axes.get_xticklabels()] for axes in figure.axes]
    assert shown == [["overlap", "Spearman"], ["AIE\nhalves"], ["AIE", "LTV"]]
    assert legend_of(figure) == ["text", "regression"]
    measures = [name for group in MODALITY_PANELS.values() for name in group]
    with pytest.raises(UnknownNameError, match="modalities table holds no value of overlap above"):
        figures.modality_dots(MODALITIES.assign(**dict.fromkeys(measures, np.nan)))


def test_widths_and_lines_that_there_are_not_are_named(unchecked: None) -> None:
    with pytest.raises(UnknownNameError, match=r"width='wide'; expected one of single, double"):
        figures.method_dots(results(), width=cast(Any, "wide"))
    with pytest.raises(UnknownNameError, match=r"lines='some'; expected one of 'main', 'all'"):
        figures_regression.error_curves(
            error_results(), functions="tree", train_points=4, lines=cast(Any, "some")
        )


@pytest.mark.parametrize("n", [2, 4, 5, 6])
def test_the_lowest_panel_of_every_column_is_labelled(n: int) -> None:
    figure = Figure()
    grid = figure.subplots(2, 3, sharex=True)
    kept = style.keep_panels(grid, n)
    assert figure.axes == kept == list(grid.flat)[:n]
    draw(figure)
    labelled = [axes.xaxis.get_tick_params()["labelbottom"] for axes in kept]
    assert labelled == [place + 3 >= n for place in range(n)]


def test_panels_fill_rows_evenly() -> None:
    assert style.panels_in("double", 1.6, 5) == (2, 3)
    assert style.panels_in("double", 1.6, 4) == (1, 4)
    assert style.panels_in("single", 5.0, 2) == (2, 1)
