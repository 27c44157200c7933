"""Which heads are ablated: the rules on a map whose order is known, and what they refuse."""

import pytest
import torch

from tvlens.errors import ShapeError, UnknownNameError
from tvlens.scores.ablation import (
    HeadSet,
    exclusive,
    heads_in,
    keep_only,
    matched_random,
    sets_of,
    top_share,
)
from tvlens.scores.score import Scores

# Best first: (1, 1), (0, 0), (2, 3), (1, 0), …; the last ones are (0, 2) and (2, 0).
A = torch.tensor([[8.0, 1.0, -2.0, 4.0], [6.0, 9.0, 2.0, 0.0], [-3.0, 5.0, 3.0, 7.0]])


def scores(values=A, name="a", model="m"):
    return Scores(values, name, "unit", "task", model)


def test_shares_of_heads_are_rounded_and_never_none_of_some():
    assert [heads_in(share, 12) for share in (0.0, 0.01, 0.1, 0.125, 0.2, 1.0)] == (
        [0, 1, 1, 2, 2, 12]
    )


def test_the_best_heads_and_all_others():
    assert top_share(scores(), 0.25) == HeadSet("a", ((0, 0), (1, 1), (2, 3)), "top", 0.25)
    kept = keep_only(scores(), 0.25, name="mine")
    assert (kept.name, kept.rule, kept.share, kept.k) == ("mine", "keep", 0.25, 9)
    assert not {*kept.heads} & {(0, 0), (1, 1), (2, 3)}
    assert top_share(scores(), 0.0).heads == ()
    assert keep_only(scores(), 0.0).k == 12
    assert keep_only(scores(), 1.0).heads == ()
    assert top_share(scores(), 1.0).k == 12


def test_layers_without_heads_have_none():
    values = A.clone()
    values[1] = torch.nan
    assert top_share(scores(values), 0.25).heads == ((0, 0), (2, 3))
    assert keep_only(scores(values), 0.0).k == 8


def test_an_exclusive_set_is_as_large_and_without_the_others_best():
    other = scores(A.flip(1), "b")  # best: (1, 2), (0, 3), (2, 0)
    ones = exclusive(scores(), other, 0.25, excluded=0.25)
    assert ones == HeadSet("a without b", ((0, 0), (1, 1), (2, 3)), "exclusive", 0.25)
    # The second and the fourth best of the score are not among its own two best.
    same = exclusive(scores(), scores(name="c"), 0.25, excluded=2 / 12)
    assert same.heads == ((1, 0), (2, 1), (2, 3))
    assert not {*same.heads} & {*top_share(scores(), 2 / 12).heads}
    # Where all others are fewer than the share, they are all there is.
    assert exclusive(scores(), scores(name="c"), 1.0, excluded=0.5).k == 6


def test_random_sets_have_as_many_heads_in_every_layer():
    given = HeadSet("a", ((0, 1), (0, 2), (2, 3)), "top", 0.25)
    drawn = matched_random(given, scores(), draws=200, seed=1)
    assert [one.draw for one in drawn] == list(range(200))
    for one in drawn:
        assert (one.name, one.rule, one.share) == ("a", "random", 0.25)
        assert [layer for layer, _ in one.heads] == [0, 0, 2]
        assert len({*one.heads}) == 3
    # Every pair of the first layer and every head of the last comes up, about as often.
    pairs = [one.heads[:2] for one in drawn]
    assert len({*pairs}) == 6
    assert all(15 < pairs.count(pair) < 55 for pair in pairs)
    assert {one.heads[2] for one in drawn} == {(2, head) for head in range(4)}
    assert drawn[:5] == matched_random(given, scores(), draws=5, seed=1)
    assert drawn != matched_random(given, scores(), draws=200, seed=2)


def test_all_sets_of_a_study():
    each = {"a": scores(), "b": scores(A.flip(0), "contribution")}
    found = sets_of(each, ["top", "exclusive", "keep"], shares=(0.0, 0.25), draws=3, seed=0)
    named = [(one.name, one.rule, one.share, one.draw) for one in found]
    top = [(name, "top", share, None) for name in "ab" for share in (0.0, 0.25)]
    random = [(name, "random", 0.25, draw) for name in "ab" for draw in range(3)]
    pairs = ("a without b", "b without a")
    others = [(name, "exclusive", share, None) for name in pairs for share in (0.0, 0.25)]
    others += [(name, "keep", share, None) for name in "ab" for share in (0.0, 0.25)]
    assert named == top + random + others


def test_heads_become_a_mask():
    mask = HeadSet("mine", ((0, 1), (2, 3))).mask(3, 4)
    assert mask.nonzero().tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    ("make", "kind", "said"),
    [
        (lambda: HeadSet("mine", ()), ShapeError, "head set 'mine' is empty; expected one or more"),
        (
            lambda: HeadSet("mine", ((0, 1), (0, 1))),
            ShapeError,
            r"names head \(0, 1\) twice; expected every head once",
        ),
        (
            lambda: HeadSet("mine", ((3, 0),)).mask(3, 4),
            ShapeError,
            r"names head \(3, 0\), and the model has layers 0 to 2 of heads 0 to 3; choose",
        ),
        (
            lambda: top_share(scores(), 1.5),
            ShapeError,
            "a share of 1.5 of the heads asked for; expected shares from 0, no head, to 1",
        ),
        (lambda: keep_only(scores(), -0.1), ShapeError, "a share of -0.1 of the heads"),
        (lambda: top_share(scores(), float("nan")), ShapeError, "a share of nan of the heads"),
        (
            lambda: exclusive(scores(), scores(name="b", model="other"), 0.1),
            ShapeError,
            r"scores 'a' are of m with \(3, 4\) \(layer, head\), 'b' of other with \(3, 4\)",
        ),
        (
            lambda: sets_of({"a": scores(), "b": scores(A[:2], "b")}, ["top"]),
            ShapeError,
            r"'b' of m with \(2, 4\); expected scores of one model",
        ),
        (
            lambda: sets_of(
                {"a": scores(), "b": scores(model=""), "c": scores(model="x")}, ["top"]
            ),
            ShapeError,
            r"scores 'a' are of m with \(3, 4\) \(layer, head\), 'c' of x",
        ),
        (
            lambda: sets_of({"a": scores()}, ["top", "best"]),
            UnknownNameError,
            "there is no rule 'best'; expected some of top, exclusive, keep",
        ),
        (
            lambda: sets_of({"a": scores()}, ["exclusive"]),
            UnknownNameError,
            "only one score is given; name two or more scores, or leave the rule out",
        ),
    ],
)
def test_what_is_refused(make, kind, said):
    with pytest.raises(kind, match=said):
        make()
