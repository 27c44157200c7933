"""How like in-context learning a method makes a model, each measure by a second way."""

import numpy as np
import pytest
import torch
from scipy.special import rel_entr

import tvlens
from helpers import trained, zoo
from tvlens.errors import TaskError, UnknownNameError
from tvlens.evaluation.likeness import PAIRED, frechet, likeness, mmd
from tvlens.evaluation.methods import RESULT_COLUMNS
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.states import residual_states
from tvlens.vectors.hendel import state_vector
from tvlens.vectors.vector import TaskVector

TASK = trained.TASKS["seven-on"]


def of(prompts_kind="zero", **methods):
    options = {"kind": prompts_kind, "shots": trained.SHOTS, "n": 6}
    return likeness(trained.lens(), TASK, methods, **options)


def test_measures_are_those_of_whole_passes():
    lens = trained.lens()
    vector = TaskVector(torch.randn(2, lens.d_model), (0, 1), lens.name, "made")
    found = of(added=vector)
    clean, zero = (
        TASK.prompts("test", shots=trained.SHOTS, n=6, kind=kind) for kind in ("clean", "zero")
    )
    whole = WholePassEngine(lens.backend)
    labels = sorted(
        {
            int(t)
            for s in ("train", "validation", "test")
            for t in lens.encode(TASK.prompts(s, kind="zero")).target
        }
    )
    reading, other = whole.read(lens.encode(zero)), whole.read(lens.encode(clean))
    with torch.no_grad():
        logits = whole.run(reading, vector.edit(lens, zero))[:, 0].double()
        icl = whole.run(other, TaskVector.none(lens).edit(lens, clean))[:, 0].double()
    for name, columns in (("d_ntp", slice(None)), ("d_ntp_labels", labels)):
        p, q = (x[:, columns].softmax(dim=1).numpy() for x in (icl, logits))
        expected = rel_entr(p, q).sum(axis=1)
        assert found.paired[:, 1, PAIRED.index(name)].numpy() == pytest.approx(expected, abs=1e-5)
    assert zoo.off(found.icl, residual_states(lens, clean)[:, 0, -1]) < 1e-5
    assert zoo.off(found.states[:, 0], residual_states(lens, zero)[:, 0, -1]) < 1e-5
    difference = found.states[:, 1] - found.icl
    assert torch.allclose(found.paired[:, 1, 2].float(), difference.square().mean(dim=1))
    moved = found.states[:, 1] - found.states[:, 0]
    assert moved.norm(dim=1).min() > 0.1


def test_a_method_that_makes_clean_prompts_is_at_no_distance():
    lens = trained.lens()
    one = TASK.prompts("test", shots=trained.SHOTS, n=1, kind="clean")
    found = likeness(
        lens, TASK, {"state": state_vector(lens, one, 1)}, shots=trained.SHOTS, n=1, kind="zero"
    )
    own = dict(zip(PAIRED, found.paired[0, 1].tolist(), strict=True))
    assert own["d_ntp"] == pytest.approx(0, abs=1e-6)
    assert own["d_ntp_labels"] == pytest.approx(0, abs=1e-6)
    assert own["hidden_mse"] == pytest.approx(0, abs=1e-8)
    assert own["hidden_cosine"] == pytest.approx(1, abs=1e-5)


def test_tables_hold_every_method_and_measure_with_intervals():
    vector = TaskVector(torch.ones(2, trained.lens().d_model), (1,), "m", "made")
    found = of("shuffled", added=vector, other={"zero": vector, "shuffled": vector * 0.5})
    table = found.to_frame()
    assert list(table.columns) == RESULT_COLUMNS
    assert set(table["method"]) == {"none", "added", "other"}
    assert (table.groupby("method")["metric"].nunique() == len(PAIRED) + 2).all()
    assert (table["ci_low"] <= table["ci_high"]).all()
    assert (found.to_frame()["ci_low"] == table["ci_low"]).all()
    points = found.projection()
    assert points.groupby("method").size().to_dict() == {
        "icl": 6,
        "none": 6,
        "added": 6,
        "other": 6,
    }
    with pytest.raises(UnknownNameError, match="is given for 'shuffled' of prompts, but 'zero'"):
        of("zero", other={"shuffled": vector})


def test_clean_prompts_are_not_compared_with_themselves():
    with pytest.raises(TaskError, match="expected kind 'zero' or 'shuffled'"):
        of("clean")


def test_frechet_distance_in_closed_form():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((4000, 2))
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, a + np.array([3, 4])) == pytest.approx(25, abs=1e-6)
    # Two normals of standard deviations s and t in one dimension: (s - t)².
    a -= a.mean(axis=0)
    assert frechet(a[:, :1], 3 * a[:, :1]) == pytest.approx(4 * a[:, 0].var(ddof=1), rel=1e-6)


def test_mmd_in_closed_form():
    # One point each: 2 - 2 exp(-d² / 2 w²), the width being their distance.
    assert mmd(np.zeros((1, 1)), np.ones((1, 1))) == pytest.approx(2 - 2 * np.exp(-0.5))
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 300, 3))
    assert mmd(a, a) == pytest.approx(0, abs=1e-12)
    assert mmd(a, b) < 0.02 < mmd(a, b + 1)


def test_it_is_public():
    assert tvlens.evaluation.likeness is likeness
