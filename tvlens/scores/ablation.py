"""Which heads to ablate: sets chosen by a score, without those of another, or drawn at random.

A share is of all heads of the model: .02 of 270 heads are 5, and any share above 0 is at least one
head. Share 0 is no head at all, which every curve may begin with.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from tvlens.errors import ShapeError, UnknownNameError
from tvlens.scores.ranking import Head, rank_heads
from tvlens.scores.score import Scores
from tvlens.tasks.streams import generator

Rule = Literal["top", "exclusive", "keep"]
RULES: tuple[Rule, ...] = get_args(Rule)
"""Ways of choosing the heads of a set."""
SHARES = (0.0, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2)
"""Shares of heads that ablation curves have."""
EXCLUDED = 0.02
"""Share of the heads best by another score that exclusive sets leave out."""


@dataclass(frozen=True)
class HeadSet:
    """Heads that are ablated together.

    Attributes:
        name: the score that chose them, or any name of one's own.
        heads: the heads as (layer, head), none twice.
        rule: how they were chosen: "top", "exclusive", "keep", "random", or "given".
        share: the share of heads that was asked for, of which "keep" sets hold all the others; None
            for sets of one's own.
        draw: which of several random sets it is.
    """

    name: str
    heads: tuple[Head, ...]
    rule: str = "given"
    share: float | None = None
    draw: int | None = None

    def __post_init__(self) -> None:
        if not self.heads and self.share is None:
            raise ShapeError(
                f"head set {self.name!r} is empty; expected one or more heads as (layer, head): "
                "the model without ablation is measured anyway"
            )
        twice = [head for head in self.heads if self.heads.count(head) > 1]
        if twice:
            raise ShapeError(
                f"head set {self.name!r} names head {twice[0]} twice; expected every head once"
            )

    @property
    def k(self) -> int:
        """How many heads are ablated."""
        return len(self.heads)

    def mask(self, n_layer: int, n_head: int) -> Bool[Tensor, "layer head"]:
        """Which heads of a model they are.

        Raises:
            ShapeError: the model lacks one of them.
        """
        mask = torch.zeros(n_layer, n_head, dtype=torch.bool)
        for layer, head in self.heads:
            if not (0 <= layer < n_layer and 0 <= head < n_head):
                raise ShapeError(
                    f"head set {self.name!r} names head ({layer}, {head}), and the model has "
                    f"layers 0 to {n_layer - 1} of heads 0 to {n_head - 1}; choose the heads by "
                    "scores of this model"
                )
            mask[layer, head] = True
        return mask


def heads_in(share: float, n_heads: int) -> int:
    """How many of so many heads a share is, rounded; at least one of any share above 0.

    Example:
        >>> [heads_in(share, 270) for share in (0.0, 0.001, 0.02, 0.05, 1.0)]
        [0, 1, 5, 14, 270]

    Raises:
        ShapeError: the share is not from 0 to 1.
    """
    if not 0 <= share <= 1:
        raise ShapeError(
            f"a share of {share} of the heads asked for; expected shares from 0, no head, to 1, "
            "all of them: .02 is 2%"
        )
    return max(1, math.floor(share * n_heads + 0.5)) if share else 0


def top_share(scores: Scores, share: float, *, name: str | None = None) -> HeadSet:
    """The heads of highest score.

    Args:
        scores: the score.
        share: how many, as a share of all heads.
        name: what the set is called; the score's own name by default.

    Raises:
        ShapeError: the share is not from 0 to 1.
    """
    return _chosen(scores, share, (), name or scores.name, "top")


def exclusive(
    scores: Scores,
    other: Scores,
    share: float,
    *,
    excluded: float = EXCLUDED,
    name: str | None = None,
) -> HeadSet:
    """The heads of highest score that are not among the best by another score.

    The set is as large as that of `top_share`: heads that are left out are replaced by the next
    best ones, so that both curves say what so many heads do. Near all heads there may be no next.

    Args:
        scores: the score that chooses.
        other: the score whose best heads are left out.
        share: how many, as a share of all heads.
        excluded: the share of heads best by `other` that are left out.
        name: what the set is called; "A without B" by default.

    Raises:
        ShapeError: a share is not from 0 to 1, or the scores are of two models.
    """
    require_one_model({scores.name: scores, other.name: other})
    out = top_share(other, excluded).heads
    label = name or f"{scores.name} without {other.name}"
    return _chosen(scores, share, out, label, "exclusive")


def keep_only(scores: Scores, share: float, *, name: str | None = None) -> HeadSet:
    """All heads but those of highest score; share 0 is every head of the model.

    Args:
        scores: the score.
        share: how many stay, as a share of all heads.
        name: what the set is called; the score's own name by default.

    Raises:
        ShapeError: the share is not from 0 to 1.
    """
    ranked = rank_heads(scores)
    rest = ranked[heads_in(share, len(ranked)) :]
    return HeadSet(name or scores.name, tuple(sorted(rest)), "keep", share)


def matched_random(
    heads: HeadSet, scores: Scores, *, draws: int = 20, seed: int = 0
) -> list[HeadSet]:
    """Random sets with as many heads in every layer as a given one, and maybe some of its heads.

    Args:
        heads: the set that is matched.
        scores: any score of the model, which tells how many heads its layers have.
        draws: how many sets.
        seed: seed of the draws; sets of other names and sizes are drawn apart.

    Raises:
        ShapeError: the model lacks a head of the set.
    """
    mask = heads.mask(*scores.scores.shape)
    # Seeded with the heads too: equal sets of two scores have the same random ones.
    named = ",".join(f"{layer}.{head}" for layer, head in sorted(heads.heads))
    drawn = generator("random head sets", seed=seed, heads=named)
    found = []
    for draw in range(draws):
        chosen: list[Head] = []
        for layer, n in enumerate(mask.sum(dim=1).tolist()):
            if n:
                order = torch.randperm(mask.shape[1], generator=drawn)[:n].tolist()
                chosen += [(layer, head) for head in sorted(order)]
        found.append(replace(heads, heads=tuple(chosen), rule="random", draw=draw))
    return found


def sets_of(
    scores: Mapping[str, Scores],
    rules: Sequence[str],
    *,
    shares: Sequence[float] = SHARES,
    draws: int = 20,
    seed: int = 0,
) -> list[HeadSet]:
    """Every set of an ablation study.

    Args:
        scores: scores of one model, by what the sets are called.
        rules: "top", with random sets beside each, matched to it by layer; "exclusive", of every
            two scores; "keep".
        shares: shares of heads.
        draws: random sets beside each "top" set.
        seed: seed of the draws.

    Raises:
        UnknownNameError: there is no such rule, or exclusive sets are asked of one score.
        ShapeError: a share is not from 0 to 1, or the scores are of two models.
    """
    require_rules(rules, len(scores))
    require_one_model(scores)
    found: list[HeadSet] = []
    if "top" in rules:
        best = [top_share(each, s, name=name) for name, each in scores.items() for s in shares]
        found += best
        for each in best:
            if each.heads:
                found += matched_random(each, scores[each.name], draws=draws, seed=seed)
    if "exclusive" in rules:
        found += [
            exclusive(one, other, share, name=f"{a} without {b}")
            for a, one in scores.items()
            for b, other in scores.items()
            if a != b
            for share in shares
        ]
    if "keep" in rules:
        found += [keep_only(each, s, name=name) for name, each in scores.items() for s in shares]
    return found


def require_rules(rules: Sequence[str], n_scores: int) -> None:
    """Refuse rules that there are not, or that have nothing to choose from.

    Raises:
        UnknownNameError: there is no such rule, or exclusive sets are asked of one score.
    """
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown or not rules:
        raise UnknownNameError(
            f"there is no rule {unknown[0] if unknown else ''!r}; expected some of "
            f"{', '.join(RULES)}"
        )
    if "exclusive" in rules and n_scores < 2:
        raise UnknownNameError(
            "exclusive sets are of one score without the best heads of another, and only one score "
            "is given; name two or more scores, or leave the rule out"
        )


def require_one_model(scores: Mapping[str, Scores]) -> None:
    """Refuse scores of several models side by side.

    Raises:
        ShapeError: they differ in model, or in layers and heads.
    """
    for (a, one), (b, other) in combinations(scores.items(), 2):
        shapes = tuple(one.scores.shape), tuple(other.scores.shape)
        if shapes[0] != shapes[1] or (one.model and other.model and one.model != other.model):
            raise ShapeError(
                f"scores {a!r} are of {one.model or 'a model'} with {shapes[0]} (layer, head), "
                f"{b!r} of {other.model or 'a model'} with {shapes[1]}; expected scores of one "
                "model"
            )


def _chosen(scores: Scores, share: float, without: Iterable[Head], name: str, rule: str) -> HeadSet:
    left_out = set(without)
    ranked = [head for head in rank_heads(scores) if head not in left_out]
    return HeadSet(name, tuple(sorted(ranked[: heads_in(share, scores.n_heads)])), rule, share)
