"""Scores to a table and back, matched by layer and head, and as a file."""

import math
import re

import pandas as pd
import pytest
import torch

from helpers.commands import ok
from tvlens.errors import NumericalError, RunError, ShapeError, TvlensError, UnknownNameError
from tvlens.scores.agreement import compare_head_sets
from tvlens.scores.mediation import IndirectEffects
from tvlens.scores.score import Scores, join_scores

VALUES = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
EFFECTS = IndirectEffects.of(VALUES, torch.zeros(5), task="t", model="m", unit="probability")
TABLE = EFFECTS.to_frame()


def test_a_table_gives_every_head_its_own_score_whatever_the_order_of_rows():
    for seed in range(3):
        found = Scores.from_frame(TABLE.sample(frac=1, random_state=seed), "aie")["t"]
        assert torch.allclose(found.scores.float(), EFFECTS.scores, atol=1e-6)
        assert found.top(3) == EFFECTS.top(3)
    table = compare_head_sets(found, EFFECTS, ks=(3,), names=("a", "b"))
    assert table.set_index("measure").loc["overlap", "value"] == 1.0


def test_tables_of_other_heads_are_refused_not_matched_by_position():
    for broken in (
        TABLE[TABLE["layer"] > 0],
        TABLE.assign(layer=TABLE["layer"] + 1),
        TABLE.assign(head=TABLE["head"] + 1),
        TABLE.drop(index=[3]),
    ):
        with pytest.raises(ShapeError, match=r"have none \(first: .*counted from 0"):
            Scores.from_frame(broken, "aie")
    with pytest.raises(ShapeError, match="several rows for layer 0, head 0"):
        Scores.from_frame(pd.concat([TABLE, TABLE]), "aie")
    with pytest.raises(UnknownNameError, match="no column effect; it has task, layer, head, aie"):
        Scores.from_frame(TABLE, "effect")
    low = Scores.from_frame(TABLE[TABLE["layer"] < 2], "aie")["t"]
    with pytest.raises(ShapeError, match="cannot be compared"):
        compare_head_sets(low, EFFECTS, ks=(1,))


def test_effects_saved_and_read_back(tmp_path):
    EFFECTS.save(tmp_path / "aie.safetensors")
    found = IndirectEffects.load(tmp_path / "aie.safetensors")
    assert isinstance(found, IndirectEffects)
    assert torch.equal(found.values, VALUES)
    assert torch.equal(found.scores, EFFECTS.scores)
    assert (found.name, found.unit, found.task, found.model) == ("aie", "probability", "t", "m")


def test_scores_of_one_task_stand_side_by_side():
    omega = Scores(torch.arange(6.0).view(3, 2), "omega", "weight", "t", "m")
    table = join_scores([EFFECTS, omega])
    assert list(table.columns) == ["task", "layer", "head", "aie", "aie_low", "aie_high", "omega"]
    assert table["omega"].tolist() == list(range(6))
    assert omega.interval() is None
    with pytest.raises(ShapeError, match="no common table"):
        join_scores([EFFECTS, Scores(torch.zeros(2, 2), "omega", "weight")])


def test_a_single_head_that_is_no_number_is_no_layer_without_heads():
    values = VALUES.clone()
    values[0, 1, 0] = torch.nan
    spoilt = Scores.of_prompts(values, name="aie", unit="probability", task="t")
    assert spoilt.n_heads == EFFECTS.n_heads
    for call in (spoilt.to_frame, spoilt.interval, lambda: spoilt.top(1)):
        with pytest.raises(NumericalError):
            call()


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("layer", "2{", "layer '2{' in row 3"),
        ("layer", math.nan, "layer 'nan' in row 3"),
        ("head", math.inf, "head 'inf' in row 3"),
        ("head", 999_999_999, "head '999999999' in row 3"),
        ("head", 10**400, "head '1000"),
        ("head", 0.5, "head '0.5' in row 3"),
        ("layer", -1, "layer '-1' in row 3"),
        ("task", None, "rows without a task"),
    ],
)
def test_rows_that_are_of_no_head_are_refused_by_name(column, value, words):
    rows = [{"task": "t", "layer": n, "head": h, "aie": 0.1} for n in range(2) for h in range(2)]
    table = pd.DataFrame(rows).astype(object)
    table["aie"] = table["aie"].astype(float)
    table.loc[2, column] = value
    with pytest.raises(TvlensError, match=re.escape(words)):
        Scores.from_frame(table, "aie")


# --- files ----------------------------------------------------------------------------------------


def test_csv_gives_back_what_it_was_written_from(tmp_path):
    values = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    values[:, 1] = torch.nan
    made = Scores.of_prompts(values, name="aie", unit="p", task="NA", model="m")
    made.to_csv(tmp_path / "aie.csv")
    back = Scores.from_csv(tmp_path / "aie.csv", "aie", unit="p", model="m")
    assert list(back) == ["NA"]
    assert torch.equal(back["NA"].scores.float().nan_to_num(7), made.scores.nan_to_num(7))
    assert (back["NA"].unit, back["NA"].model, back["NA"].n_heads) == ("p", "m", 4)


def test_csv_that_holds_something_else_is_refused_by_name(tmp_path):
    Scores(torch.eye(2), "aie", "p", "t").to_csv(tmp_path / "aie.csv")
    with pytest.raises(UnknownNameError, match=r"aie\.csv: the table of heads has no column omega"):
        Scores.from_csv(tmp_path / "aie.csv", "omega")
    with pytest.raises(RunError, match="expected a table in CSV, as commands write them"):
        Scores.from_csv(tmp_path / "none.csv", "aie")


def test_tvlens_compare_reads_what_scores_write(tmp_path, wide):
    one = torch.arange(8.0).view(2, 4)
    Scores(one, "mine", "p", "t").to_csv(tmp_path / "a.csv")
    Scores(-one, "yours", "p", "t").to_csv(tmp_path / "b.csv")
    files = [f"mine@{tmp_path / 'a.csv'}", f"yours@{tmp_path / 'b.csv'}"]
    said = ok("compare", *files, "--out", tmp_path / "run")
    assert "spearman" in said
    assert "-1.000" in said
