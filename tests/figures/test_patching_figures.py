from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from pandas import DataFrame

from helpers.drawn import draw, legend_of
from tvlens import figures
from tvlens.errors import NumericalError, ShapeError, UnknownNameError

TEXT = ["start", "input 1", "answer 1", "input 2", "answer 2", "input 10", "answer 10"]
TEXT += ["separators", "query", "answer prefix"]
REGRESSION = ["x 1", "y 1", "x 2", "y 2", "query"]
TOGETHER = ["inputs", "answers", "separators", "query", "answer prefix"]
TOKENS = ["<s>", "Q", ":", " $a$ b", "\n", "\tA"]


def patches(
    places: list[Any],
    site: str = "resid_pre",
    layers: int = 4,
    heads: int | None = None,
    **other: Any,
) -> DataFrame:
    """A shuffled table with another number in every row."""
    rows = [
        {"layer": layer, "head": head, "place": place}
        for layer in range(layers)
        for head in ([np.nan] if heads is None else range(heads))
        for place in places
    ]
    table = DataFrame(rows)
    rng = np.random.default_rng(len(table))
    single = not isinstance(places[0], str)
    table["position"] = table["place"] if single else np.nan
    table["role"] = "" if single else table["place"]
    value = rng.normal(size=len(table))
    table = table.assign(
        task="antonym", site=site, method="exact", metric="logit_difference", value=value, n=8
    )
    table = table.assign(ci_low=value - 1, ci_high=value + 1, normalised=value / 7)
    return table.assign(**other).drop(columns="place").sample(frac=1, random_state=0)


def grid(table: DataFrame, across: str, order: list[Any], value: str = "value") -> np.ndarray:
    return table.pivot(index="layer", columns=across, values=value)[order].to_numpy()


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images]


def scale_of(figure: Figure) -> Axes:
    (bar,) = (axes for axes in figure.axes if axes.get_label() == "<colorbar>")
    return bar


def drawn(axes: Axes) -> np.ndarray:
    return axes.images[0].get_array().filled(np.nan)


def below(axes: Axes) -> list[str]:
    """The labels that can be seen."""
    low, high = axes.get_xlim()
    labels = zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
    return [label.get_text() for place, label in labels if low <= place <= high]


def beside(axes: Axes) -> list[str]:
    low, high = axes.get_ylim()
    labels = zip(axes.get_yticks(), axes.get_yticklabels(), strict=True)
    return [label.get_text() for place, label in labels if low <= place <= high]


def framed(axes: Axes) -> set[tuple[float, float]]:
    return {(box.get_y() + 0.5, box.get_x() + 0.5) for box in axes.patches}


# --- places ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["value", "normalised"])
def test_a_position_map_shows_the_table_with_the_tokens_below(value: Any) -> None:
    table = patches(list(range(6)))
    others = [table.assign(**{name: "x"}, value=9.0) for name in ("task", "site", "method")]
    table = pd.concat([*others, table])
    figure = figures.position_map(
        table, task="antonym", site="resid_pre", tokens=TOKENS, value=value
    )
    (axes,) = panels(draw(figure))
    expected = grid(patches(list(range(6))), "position", list(range(6)), value)
    np.testing.assert_array_equal(drawn(axes), expected)
    assert axes.images[0].get_clim() == (-np.abs(expected).max(), np.abs(expected).max())
    # Layer 0 at the bottom, position 0 at the left.
    assert axes.images[0].origin == "lower"
    assert axes.images[0].get_extent() == [-0.5, 5.5, -0.5, 3.5]
    assert (*axes.get_xlim(), *axes.get_ylim()) == (-0.5, 5.5, -0.5, 3.5)
    assert axes.get_xticks().tolist() == list(range(6))
    assert below(axes) == ["<s>", "Q", ":", "·$a$·b", "⏎", "⇥A"]
    assert not any(label.get_parse_math() for label in axes.get_xticklabels())
    assert figure.get_suptitle() == "antonym"
    assert axes.get_title() == "residual stream before\nthe layer"
    words = {"value": "effect on logit difference", "normalised": "share of logit difference"}
    assert scale_of(figure).get_ylabel().startswith(words[value])


def test_positions_without_tokens_are_numbered() -> None:
    table = patches(list(range(3, 9)))
    figure = draw(figures.position_map(table, task="antonym", site="resid_pre"))
    (axes,) = panels(figure)
    assert axes.get_xlim() == (2.5, 8.5)
    assert below(axes) == [str(place) for place in range(3, 9)]
    assert figure.get_supxlabel() == "position"


def test_tokens_are_counted_from_the_start_of_the_prompt() -> None:
    table = patches(list(range(3, 9)))
    tokens = list("abcdefghi")
    (axes,) = panels(
        draw(figures.position_map(table, task="antonym", site="resid_pre", tokens=tokens))
    )
    assert dict(zip(axes.get_xticks(), below(axes), strict=True)) == dict(
        zip(range(3, 9), "defghi", strict=True)
    )


def test_what_was_not_patched_is_grey() -> None:
    table = patches(list(range(6))).query("layer != 2 and position != 4")
    (axes,) = panels(figures.position_map(table, task="antonym", site="resid_pre"))
    assert np.isnan(drawn(axes)[2]).all()
    assert np.isnan(drawn(axes)[:, 4]).all()
    assert np.isfinite(np.delete(np.delete(drawn(axes), 2, 0), 4, 1)).all()


def test_a_layer_without_heads_and_empty_shares_are_grey() -> None:
    table = patches(list(range(6)), "z", heads=2)
    table.loc[table["layer"] == 1, "value"] = np.nan
    table.loc[(table["layer"] == 3) & (table["position"] == 5), "normalised"] = np.nan

    def draw_it(**options: Any) -> Figure:
        return figures.position_map(table, task="antonym", site="z", head=1, **options)

    (axes,) = panels(draw_it())
    assert np.isnan(drawn(axes)).sum(axis=1).tolist() == [0, 6, 0, 0]
    assert axes.get_title() == "head outputs (z), head 1"
    part = table[table["head"] == 1]
    np.testing.assert_array_equal(drawn(axes), grid(part, "position", list(range(6))))
    (axes,) = panels(draw_it(value="normalised"))
    assert np.argwhere(np.isnan(drawn(axes))).tolist() == [[3, 5]]


@pytest.mark.parametrize(("n", "written"), [(1, 1), (100, 100), (180, 90), (300, 100)])
def test_many_tokens_are_thinned_from_the_query(n: int, written: int) -> None:
    table = patches(list(range(n)))
    tokens = [f"t{place}" for place in range(n)]
    figure = draw(figures.position_map(table, task="antonym", site="resid_pre", tokens=tokens))
    (axes,) = panels(figure)
    assert len(below(axes)) == written
    assert f"t{n - 1}" in below(axes)
    assert dict(zip(axes.get_xticks(), below(axes), strict=True)) == {
        place: f"t{place}" for place in axes.get_xticks()
    }
    boxes = sorted(label.get_window_extent().x0 for label in axes.get_xticklabels())
    points = np.diff(boxes).min(initial=np.inf) * 72 / figure.dpi
    assert points >= 0.9 * axes.get_xticklabels()[0].get_fontsize()


def test_long_tokens_are_cut_and_signs_that_cannot_be_printed_are_written_out() -> None:
    tokens = ["a" * 14, "b" * 15, "\r\x00"]
    table = patches([0, 1, 2])
    figure = draw(figures.position_map(table, task="antonym", site="resid_pre", tokens=tokens))
    assert below(panels(figure)[0]) == ["a" * 14, "b" * 13 + "…", r"\r\x00"]


@pytest.mark.parametrize("places", [TEXT, REGRESSION, TOGETHER])
def test_roles_stand_in_the_order_of_the_prompt(places: list[str]) -> None:
    table = patches(places)
    figure = draw(figures.position_map(table, task="antonym", site="resid_pre"))
    (axes,) = panels(figure)
    assert below(axes) == places
    np.testing.assert_array_equal(drawn(axes), grid(table, "role", places))
    assert figure.get_supxlabel() == "role in the prompt"


def test_an_empty_role_is_the_query_and_unknown_roles_stand_last() -> None:
    table = patches(["answer 1", "odd", "", "input 1"])
    (axes,) = panels(figures.position_map(table, task="antonym", site="resid_pre"))
    assert below(axes) == ["input 1", "answer 1", "query", "odd"]
    written = pd.to_numeric(table["position"]).isna()
    table.loc[written & (table["role"] == ""), "role"] = np.nan  # as read from a file
    (axes,) = panels(figures.position_map(table, task="antonym", site="resid_pre"))
    assert below(axes) == ["input 1", "answer 1", "query", "odd"]


@pytest.mark.parametrize("places", [list(range(40)), TEXT])
def test_sites_have_a_panel_each_and_one_scale(places: list[Any]) -> None:
    sites = ["mlp_out", "resid_pre", "attn_out"]
    tables = [patches(places, site, layers=n) for site, n in zip(sites, (3, 4, 2), strict=True)]
    tables[1]["value"] *= 10
    figure = draw(figures.position_map(pd.concat(tables), task="antonym", site=sites))
    assert [axes.get_title().split()[0] for axes in panels(figure)] == [
        "MLP",
        "residual",
        "attention",
    ]
    across = "position" if isinstance(places[0], int) else "role"
    for axes, table in zip(panels(figure), tables, strict=True):
        expected = grid(table, across, places)
        np.testing.assert_array_equal(drawn(axes)[: len(expected)], expected)
        assert np.isnan(drawn(axes)[len(expected) :]).all()
        assert axes.images[0].get_clim()[1] == tables[1]["value"].abs().max()
    columns = {round(axes.get_position().x0, 3) for axes in panels(figure)}
    assert len(columns) == (1 if across == "position" else 3)


# --- roles of several tasks -----------------------------------------------------------------------


def several(tasks: int, sign: float = 1.0) -> DataFrame:
    tables = [patches(TEXT, task=f"task-{task}") for task in range(tasks)]
    return pd.concat(t.assign(value=sign * (n + 1) * t["value"]) for n, t in enumerate(tables))


@pytest.mark.parametrize("tasks", [1, 3, 8])
def test_role_maps_have_a_panel_for_each_task_and_fold_demonstrations(tasks: int) -> None:
    table = several(tasks)
    figure = draw(figures.role_maps(table, site="resid_pre"))
    assert [axes.get_title() for axes in panels(figure)] == [f"task-{n}" for n in range(tasks)]
    for n, axes in enumerate(panels(figure)):
        part = table[table["task"] == f"task-{n}"]
        expected = grid(part, "role", TEXT)
        folded = [expected[:, [1, 3, 5]].mean(axis=1), expected[:, [2, 4, 6]].mean(axis=1)]
        whole = np.column_stack([expected[:, 0], *folded, expected[:, 7:]])
        np.testing.assert_allclose(drawn(axes), whole)
        assert below(axes) == [
            "start",
            "inputs (mean)",
            "answers (mean)",
            "separators",
            "query",
            "answer prefix",
        ]
    assert len({axes.images[0].get_clim() for axes in panels(figure)}) == 1
    assert figure.get_suptitle() == "residual stream before the layer"


def test_role_maps_can_show_every_demonstration() -> None:
    table = several(3)
    figure = draw(figures.role_maps(table, site="resid_pre", folded=False))
    for n, axes in enumerate(panels(figure)):
        part = table[table["task"] == f"task-{n}"]
        np.testing.assert_array_equal(drawn(axes), grid(part, "role", TEXT))
        assert below(axes) == TEXT


def test_points_of_regression_are_folded_too() -> None:
    (axes,) = panels(figures.role_maps(patches(REGRESSION), site="resid_pre"))
    assert below(axes) == ["x (mean)", "y (mean)", "query"]


@pytest.mark.parametrize("as_column", [True, False])
def test_directions_of_patching_are_rows_of_maps(as_column: bool) -> None:
    first, second = several(3), several(3, -2.0)
    if as_column:
        named = first.assign(direction="denoising"), second.assign(direction="noising")
        figure = figures.role_maps(pd.concat(named), site="resid_pre", folded=False)
    else:
        figure = figures.role_maps(first, site="resid_pre", noising=second, folded=False)
    above, under = panels(draw(figure))[:3], panels(figure)[3:]
    assert above[0].get_ylabel() == "denoising\nlayer"
    assert under[0].get_ylabel() == "noising\nlayer"
    for n, (top, bottom) in enumerate(zip(above, under, strict=True)):
        expected = grid(first[first["task"] == f"task-{n}"], "role", TEXT)
        np.testing.assert_array_equal(drawn(top), expected)
        np.testing.assert_array_equal(drawn(bottom), -2 * expected)
        assert top.get_title() == f"task-{n}"
        assert top.get_position().x0 == pytest.approx(bottom.get_position().x0)
        assert top.get_position().y0 > bottom.get_position().y1


def test_positions_of_several_tasks_are_not_drawn_as_roles() -> None:
    with pytest.raises(ShapeError, match=r"of 'antonym' holds positions.*give a table of roles"):
        figures.role_maps(patches([0, 1]), site="resid_pre")


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("places", "place"), [([0, 1, 2], 1), (TEXT, "answer 2")])
def test_a_head_map_shows_one_place_and_frames_the_best(places: list[Any], place: Any) -> None:
    table = patches(places, "z", heads=3)
    figure = draw(figures.head_map(table, task="antonym", site="z", place=place, k=2))
    (axes,) = panels(figure)
    across = "position" if place == 1 else "role"
    expected = grid(table[table[across] == place], "head", [0, 1, 2])
    np.testing.assert_array_equal(drawn(axes), expected)
    best = np.argsort(expected, axis=None)[::-1][:2]
    assert framed(axes) == set(zip(*np.unravel_index(best, expected.shape), strict=True))
    assert legend_of(figure) == ["top 2"]
    where = "position 1" if place == 1 else place
    assert figure.get_suptitle() == f"antonym, {where}"
    assert scale_of(figure).get_xlabel() == "effect on logit difference"


@pytest.mark.parametrize("over", ["sum", "max"])
def test_a_head_map_can_add_up_places_or_take_the_greatest(over: Any) -> None:
    table = patches(TEXT, "z", heads=3)
    table.loc[table["layer"] == 1, "value"] = np.nan
    (axes,) = panels(draw(figures.head_map(table, task="antonym", site="z", over=over)))
    heads = table.groupby(["layer", "head"])["value"]
    expected = (heads.max() if over == "max" else heads.sum()).unstack()
    expected.loc[1] = np.nan
    np.testing.assert_allclose(drawn(axes), expected)
    assert len(framed(axes)) == 9  # all heads, for there are no ten
    assert not any(layer == 1 for layer, _ in framed(axes))


@pytest.mark.parametrize(
    ("top", "ranked", "words"),
    [
        ("low", lambda x: -x, "lowest 3"),
        ("size", np.abs, "3 furthest from 0"),
    ],
)
def test_other_heads_can_be_the_best(top: Any, ranked: Any, words: str) -> None:
    table = patches(["query"], "z", heads=3)
    figure = figures.head_map(table, task="antonym", site="z", k=3, top=top)
    (axes,) = panels(draw(figure))
    best = np.argsort(ranked(drawn(axes)), axis=None)[::-1][:3]
    assert framed(axes) == set(zip(*np.unravel_index(best, (4, 3)), strict=True))
    assert legend_of(figure) == [words]


def test_keys_have_fewer_heads_than_queries() -> None:
    tables = [patches(["query"], site, heads=heads) for site, heads in (("q", 9), ("k", 3))]
    figure = draw(figures.head_map(pd.concat(tables), task="antonym", site=["q", "k"], k=1))
    assert [axes.get_title() for axes in panels(figure)] == ["queries", "keys"]
    for axes, table, heads in zip(panels(figure), tables, (9, 3), strict=True):
        np.testing.assert_array_equal(drawn(axes), grid(table, "head", list(range(heads))))
    assert legend_of(figure) == ["top 1 of each map"]


@pytest.mark.parametrize("receivers", [1, 2, 7])
def test_direct_paths_have_a_map_for_each_receiver(receivers: int) -> None:
    rng = np.random.default_rng(0)
    tables = []
    for number in range(receivers):
        layers = 4 if number == 0 else 2
        rows = [(layer, head) for layer in range(layers) for head in range(5)]
        part = DataFrame(rows, columns=["layer", "head"])
        name = "logits" if number == 0 else f"q of 2.{number}"
        tables.append(part.assign(receiver=name, value=rng.normal(size=len(part))))
    table = pd.concat(tables).sample(frac=1, random_state=0).sort_values("receiver")
    figure = draw(figures.head_paths(table, k=2, unit="squared error"))
    names = [table["receiver"].iloc[0] for table in tables]
    assert {axes.get_title() for axes in panels(figure)} == {*names}
    for axes in panels(figure):
        part = table[table["receiver"] == axes.get_title()]
        expected = grid(part, "head", list(range(5)))
        np.testing.assert_array_equal(drawn(axes)[: len(expected)], expected)
        assert np.isnan(drawn(axes)[len(expected) :]).all()
        assert len(framed(axes)) == 2
    assert scale_of(figure).get_xlabel() == "direct effect (squared error)"
    one = figures.head_paths(table, receivers=["logits"])
    assert [axes.get_title() for axes in panels(one)] == ["logits"]


def test_receivers_and_tasks_that_are_not_there_are_named() -> None:
    table = DataFrame({"receiver": "logits", "layer": [0, 0], "head": [0, 1], "value": 1.0})
    with pytest.raises(UnknownNameError, match=r"paths table holds no receiver 'mlp 2'; there are"):
        figures.head_paths(table, receivers=["mlp 2"])
    with pytest.raises(UnknownNameError, match=r"paths table lacks \['task'\]"):
        figures.head_paths(table, task="antonym")
    with pytest.raises(UnknownNameError, match=r"rows of 2 tasks; there are \['a', 'b'\]"):
        figures.head_paths(table.assign(task=["a", "b"]))
    with pytest.raises(UnknownNameError, match="nothing is left to draw"):
        figures.head_paths(table.iloc[:0])
    with pytest.raises(ShapeError, match=r"receiver logits, layer 0, head 0\.0"):
        figures.head_paths(table.assign(head=0))


# --- approximations -------------------------------------------------------------------------------


def dots(axes: Axes, label: str) -> set[tuple[float, float]]:
    (line,) = (line for line in axes.lines if str(line.get_label()).endswith(label))
    return set(zip(line.get_xdata(), line.get_ydata(), strict=True))


@pytest.mark.parametrize("apart", [True, False])
def test_what_attribution_misses_is_named(apart: bool) -> None:
    exact = patches(["query"], "z", layers=3, heads=4)
    exact["value"] = exact["layer"] * 4 + exact["head"]
    other = exact.assign(method="attribution", value=exact["value"] / 2)
    missed = (other["layer"] == 2) & (other["head"] == 1)
    other.loc[missed, "value"] = -1.0
    tables = (exact, other) if apart else (pd.concat([exact, other]),)
    figure = draw(figures.approximation(*tables, task="antonym", site="z", k=4))
    (axes,) = figure.axes
    assert dots(axes, "found") == {(8, 4), (10, 5), (11, 5.5)}
    assert dots(axes, "missed") == {(9, -1)}
    assert dots(axes, "others") == {(x, x / 2) for x in range(8)}
    assert [text.get_text() for text in axes.texts] == ["2.1"]
    ranks = [exact["value"].rank(), other["value"].rank()]
    rho = np.corrcoef(*ranks)[0, 1]
    assert axes.get_title() == f"head outputs (z)\nSpearman {rho:.2f}, recall of top 4: 0.75"
    assert axes.get_xlim() == axes.get_ylim()
    assert axes.get_xlabel() == "exact effect on logit difference"
    assert axes.get_ylabel() == "by attribution"
    assert legend_of(figure) == ["others", "top 4, found", "top 4, missed"]


def test_names_of_what_is_missed_do_not_overlap() -> None:
    exact = patches(TEXT, "z", layers=5, heads=4)
    other = exact.assign(method="attribution", value=-exact["value"])
    residual = patches(TEXT)
    table = pd.concat([exact, other, residual, residual.assign(method="attribution", value=0.0)])
    figure = draw(figures.approximation(table, task="antonym", site=["z", "resid_pre"]))
    first, second = figure.axes
    assert len(first.texts) == 10
    best = exact.sort_values("value").iloc[-1]
    assert f"{best['layer']}.{best['head']:.0f}, {best['role']}" in {
        text.get_text() for text in first.texts
    }
    assert all(text.get_text().startswith("layer ") for text in second.texts)
    assert "Spearman" not in second.get_title()  # all are 0, so they have no order
    boxes = [Text.get_window_extent(text) for axes in figure.axes for text in axes.texts]
    assert not [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.overlaps(b)]
    assert all(box.x1 <= figure.bbox.x1 for box in boxes)
    for axes in figure.axes:
        middles = [np.mean(Text.get_window_extent(text).intervaly) for text in axes.texts]
        assert axes.bbox.y0 - 1 <= min(middles)
        assert max(middles) <= axes.bbox.y1 + 1


def test_effects_in_one_table_only_are_left_out() -> None:
    exact = patches(TEXT, layers=3)
    other = exact.assign(method="attribution")
    table = pd.concat([exact[exact["layer"] > 0], other[other["layer"] < 2]])
    (axes,) = figures.approximation(table, task="antonym", site="resid_pre", k=2).axes
    assert sum(len(dots(axes, name)) for name in ("found", "missed", "others")) == len(TEXT)
    table = pd.concat([exact[exact["layer"] > 1], other[other["layer"] < 1]])
    with pytest.raises(ShapeError, match=r"both exact \(10 rows\) and by attribution \(10 rows\)"):
        figures.approximation(table, task="antonym", site="resid_pre")


# --- all ------------------------------------------------------------------------------------------


def position(table: DataFrame, **options: Any) -> Figure:
    return figures.position_map(table, **{"task": "antonym", "site": "resid_pre"} | options)


def roles(table: DataFrame, **options: Any) -> Figure:
    return figures.role_maps(table, **{"site": "resid_pre"} | options)


def heads(table: DataFrame, **options: Any) -> Figure:
    return figures.head_map(table, **{"task": "antonym", "site": "z"} | options)


@pytest.mark.parametrize("function", [position, roles])
def test_one_layer_and_one_place_can_be_drawn(function: Any) -> None:
    table = patches(["query"], layers=20).query("layer == 17")
    (axes,) = panels(draw(function(table)))
    assert drawn(axes).shape == (1, 1)
    assert beside(axes) == ["17"]


def test_one_head_can_be_drawn() -> None:
    (axes,) = panels(draw(heads(patches(["query"], "z", layers=1, heads=1))))
    assert below(axes) == ["0"]
    assert framed(axes) == {(0, 0)}


def test_a_site_without_shares_is_grey_beside_one_that_has_them() -> None:
    table = pd.concat([patches(TEXT), patches(TEXT, "mlp_out", normalised=np.nan)])
    figure = draw(position(table, site=["resid_pre", "mlp_out"], value="normalised"))
    first, second = panels(figure)
    assert np.isfinite(drawn(first)).all()
    assert np.isnan(drawn(second)).all()


@pytest.mark.parametrize("places", [[0, 1, 2], TEXT, [""]])
def test_a_table_from_a_file_draws_the_same(places: list[Any], tmp_path: Path) -> None:
    table = pd.concat([patches(places), patches(places, "z", heads=2)])
    table.to_csv(tmp_path / "patching.csv", index=False)
    read = pd.read_csv(tmp_path / "patching.csv")
    empty = table.astype(object).where(table.notna(), "")
    for again in (read, empty):
        (first,), (second,) = (panels(position(each)) for each in (table, again))
        np.testing.assert_allclose(drawn(first), drawn(second))
        assert below(first) == below(second)
        (first,), (second,) = (panels(heads(each, over="sum")) for each in (table, again))
        np.testing.assert_allclose(drawn(first), drawn(second))


def test_effects_that_are_all_0_can_be_drawn() -> None:
    (axes,) = panels(draw(position(patches(TEXT, value=0.0))))
    assert axes.images[0].get_clim() == (-1, 1)


@pytest.mark.parametrize("function", [position, roles, heads])
@pytest.mark.parametrize("column", ["layer", "role", "metric", "value"])
def test_a_missing_column_is_named(function: Any, column: str) -> None:
    with pytest.raises(UnknownNameError, match=rf"table lacks \['{column}'\]; expected \["):
        function(patches(TEXT).drop(columns=column))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "no"}, r"holds no task 'no'; there are \['antonym'\]"),
        ({"site": "no"}, r"holds no site 'no'; there are \['resid_pre', 'z'\]"),
        ({"site": []}, "nothing is left to draw: the list of names is empty"),
        ({"method": "no"}, r"holds no method 'no'; there are \['exact'\]"),
        ({"metric": "no"}, r"holds no metric 'no'; there are \['logit_difference'\]"),
        ({"head": 1}, r"holds no heads of site 'resid_pre'; sites that have heads are q, k"),
        ({"site": "z"}, r"rows of 2 heads; there are \[0, 1\]: give one of them as head"),
        ({"site": "z", "head": 2}, r"holds no head 2; there are \[0, 1\]"),
    ],
)
def test_what_the_table_does_not_hold_is_named(options: dict[str, Any], words: str) -> None:
    z = patches(TEXT, "z", heads=2).sort_values("head")
    table = pd.concat([patches(TEXT), z])
    with pytest.raises(UnknownNameError, match=words):
        position(table, **options)


def test_a_place_or_a_metric_must_be_chosen_where_there_are_several() -> None:
    table = patches(["query", "start"], "z", heads=2).sort_values("role")
    with pytest.raises(UnknownNameError, match=r"of 2 places; there are \['query', 'start'\]"):
        heads(table)
    with pytest.raises(UnknownNameError, match=r"holds no place 3; there are \['query', 'start'\]"):
        heads(table, place=3)
    both = pd.concat([table, table.assign(metric="kl")])
    with pytest.raises(UnknownNameError, match=r"rows of 2 metrics; there are"):
        heads(both, over="sum")
    figure = heads(both, over="sum", metric="kl")
    assert scale_of(figure).get_xlabel() == "effect on kl"


def test_positions_and_roles_are_not_drawn_in_one_map() -> None:
    table = pd.concat([patches([0, 1]), patches(["start"])])
    with pytest.raises(ShapeError, match=r"holds 8 rows of positions and 4 of roles: draw a table"):
        position(table)


def test_tokens_must_fit_the_positions() -> None:
    words = r"5 tokens were given.*end at 5: expected the 6 tokens up to there"
    with pytest.raises(ShapeError, match=words):
        position(patches(list(range(6))), tokens=TOKENS[:5])
    with pytest.raises(ShapeError, match=r"holds roles \('start', …\): leave tokens out"):
        position(patches(TEXT), tokens=TOKENS)


@pytest.mark.parametrize("function", [position, roles, heads])
def test_a_place_that_is_there_twice_is_named(function: Any) -> None:
    heads_of = 2 if function is heads else None
    table = patches(TEXT, "z" if heads_of else "resid_pre", heads=heads_of)
    options = {"over": "max"} if function is heads else {}
    extra = table[(table["layer"] == 1) & (table["role"] == "start")]
    words = r"effects twice \(first: site \w+, layer 1, head .*, place start\): keep"
    with pytest.raises(ShapeError, match=words):
        function(pd.concat([table, extra]), **options)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("function", [position, roles])
def test_values_that_are_not_finite_are_named(function: Any, value: float) -> None:
    table = patches(TEXT)
    table.loc[(table["layer"] == 2) & (table["role"] == "answer 2"), "value"] = value
    words = rf"1 of 40 effects are not finite \(first: {value} at .*layer 2, .*place answer 2\)"
    with pytest.raises(NumericalError, match=words):
        function(table)


@pytest.mark.parametrize("function", [position, roles, heads])
def test_a_column_without_values_leaves_nothing_to_draw(function: Any) -> None:
    heads_of = 2 if function is heads else None
    table = patches(["query"], "z" if heads_of else "resid_pre", heads=heads_of, normalised=np.nan)
    words = "nothing is left to draw: column 'normalised'.*do not differ: draw 'value'"
    with pytest.raises(NumericalError, match=words):
        function(table, value="normalised")


def test_an_empty_table_of_roles_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="holds no rows"):
        roles(patches(TEXT).iloc[:0])


def test_a_negative_number_of_heads_is_refused() -> None:
    with pytest.raises(ShapeError, match="top -1 were asked for; expected 0"):
        heads(patches(["query"], "z", heads=2), k=-1)
    assert not heads(patches(["query"], "z", heads=2), k=0).legends


def test_a_column_that_is_none_of_effects_is_refused(unchecked: None) -> None:
    with pytest.raises(UnknownNameError, match="has 'value' and 'normalised'"):
        position(patches(TEXT), value="ci_low")
