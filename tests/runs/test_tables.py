"""Tables as text for a paper: intervals in their cells, rows chosen, a column made columns."""

import pandas as pd
import pytest
from pandas import DataFrame

from helpers.commands import mistake, ok
from tvlens.errors import RunError, ShapeError, UnknownNameError
from tvlens.runs import tables

RESULTS = DataFrame(
    [
        ("NA", "ltv", "zero", "accuracy", 0.92, 0.85, 0.97, 75),
        ("NA", "icl", "clean", "accuracy", 0.9, float("nan"), float("nan"), 75),
        ("NA", "ltv", "zero", "loss", 1.5, 1.0, 2.0, 75),
        ("b_1", "ltv", "zero", "accuracy", 1.0, 0.95, 1.0, 20),
    ],
    columns=["task", "method", "prompt", "metric", "value", "ci_low", "ci_high", "n"],
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "results.csv"
    RESULTS.to_csv(path, index=False)
    return path


def test_a_number_and_its_interval_are_one_cell():
    told = tables.with_intervals(RESULTS)
    assert list(told) == ["task", "method", "prompt", "metric", "value", "n"]
    assert told["value"].tolist() == [
        "0.92 [0.85, 0.97]",
        "0.90",
        "1.50 [1.00, 2.00]",
        "1.00 [0.95, 1.00]",
    ]
    heads = DataFrame(
        {"layer": [0], "aie": [0.125], "aie_low": [0.0], "aie_high": [0.25], "x": 2.5}
    )
    told = tables.with_intervals(heads, digits=1)
    assert told.to_dict("list") == {"layer": [0], "aie": ["0.1 [0.0, 0.2]"], "x": ["2.5"]}


def test_values_of_a_column_become_columns_in_their_order():
    table = tables.selected(RESULTS, {"metric": "accuracy"})
    assert "metric" not in table
    wide = tables.across(table[["task", "method", "value"]], "method", "value")
    assert list(wide) == ["task", "ltv", "icl"]
    assert wide["task"].tolist() == ["NA", "b_1"]
    assert wide["ltv"].tolist() == [0.92, 1.0]
    assert wide["icl"].tolist() == [0.9, ""]
    alone = tables.across(table[["task", "value"]].iloc[1:], "task", "value")
    assert alone.to_dict("list") == {"NA": [0.9], "b_1": [1.0]}


def test_what_cannot_be_chosen_is_named():
    with pytest.raises(UnknownNameError, match=r"no column 'colour'; it has task, method, prompt"):
        tables.selected(RESULTS, {"colour": "red"})
    with pytest.raises(UnknownNameError, match=r"no row has metric 'f1'; there are accuracy, loss"):
        tables.selected(RESULTS, {"metric": "f1"})
    with pytest.raises(
        ShapeError, match=r"hold method 'ltv' twice; choose among them by one of ta"
    ):
        tables.across(RESULTS[["task", "method", "value"]], "method", "value")
    with pytest.raises(UnknownNameError, match="no column 'depth'"):
        tables.across(RESULTS, "depth", "value")


def test_the_command_writes_markdown_and_latex(file, tmp_path):
    options = ["--where", "metric=accuracy", "--columns", "task,method,value", "--across", "method"]
    assert ok("table", file, *options).splitlines() == [
        "| task | ltv | icl |",
        "| --- | --- | --- |",
        "| NA | 0.92 [0.85, 0.97] | 0.90 |",
        "| b_1 | 1.00 [0.95, 1.00] |  |",
    ]
    out = tmp_path / "table.tex"
    assert ok("table", file, *options, "--format", "latex", "--out", out) == ""
    text = out.read_text()
    assert text.startswith("\\begin{tabular}{lll}\n\\toprule\n")
    assert "b\\_1 & 1.00 [0.95, 1.00]" in text
    assert "0.9200 [0.8500, 0.9700]" in ok("table", file, "--digits", "4")


def test_tables_are_read_as_they_were_written(file):
    pd.testing.assert_frame_equal(tables.read_table(file), RESULTS)


def test_no_number_may_be_written_as_na(tmp_path):
    (tmp_path / "by-hand.csv").write_text("task,layer,head,mine\nNA,0,0,NA\nNA,0,1,0.5\n")
    table = tables.read_table(tmp_path / "by-hand.csv")
    assert table["task"].tolist() == ["NA", "NA"]
    assert table["mine"].isna().tolist() == [True, False]
    assert table["mine"].dtype == float


def test_a_column_of_many_values_is_named_in_short():
    many = DataFrame({"n": range(5000), "value": 1.0})
    with pytest.raises(UnknownNameError, match="no row has n '-1'; there are 0, 1") as caught:
        tables.selected(many, {"n": "-1"})
    assert len(str(caught.value)) < 600
    assert str(caught.value).endswith("and 4990 more")


def test_mistakes_are_named(file, tmp_path):
    asked = ["table", file, "--where"]
    assert "expected COLUMN=VALUE" in mistake(*asked, "accuracy", kind=UnknownNameError)
    words = mistake("table", tmp_path / "none.csv", kind=RunError)
    assert "there is no such file; expected a CSV table of a run folder" in words
    words = mistake("table", file, "--columns", "task,colour", kind=UnknownNameError)
    assert "no column 'colour'" in words
    (tmp_path / "empty.csv").write_bytes(b"")
    assert "cannot read" in mistake("table", tmp_path / "empty.csv", kind=RunError)


def test_bars_in_cells_do_not_end_them():
    assert tables.markdown(pd.DataFrame({"a": ["x|y"]})).splitlines()[-1] == "| x\\|y |"
