"""Controls: vectors of the right size whose weights mean nothing."""

from collections.abc import Callable

import torch

from tvlens.tasks.streams import generator
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.materials import ByKind, Materials
from tvlens.vectors.vector import Vector


def random_controls(ltv: LearnableTaskVector, *, n: int = 5, seed: int = 0) -> list[Vector]:
    """Vectors of `n` random weight matrices of the learned norm: what any direction would do."""
    # A stream of its own: a random start of the same seed must not come back as its control.
    drawn = generator("random omega", seed=seed)
    norm = ltv.weights.detach().norm().cpu()
    there = ltv.has_heads.cpu()
    draws = [torch.randn(there.shape, generator=drawn) * there for _ in range(n)]
    return [
        ltv.with_weights(w * (norm / w.norm()), f"random omega {i}") for i, w in enumerate(draws)
    ]


def permuted_controls(ltv: LearnableTaskVector, *, n: int = 5, seed: int = 0) -> list[Vector]:
    """Vectors of `n` permutations of the learned weights: right sizes, wrong heads."""
    drawn = generator("permuted omega", seed=seed)
    weights, there = ltv.weights.detach().cpu(), ltv.has_heads.cpu()
    of_heads, drawn_vectors = weights[there], []
    for i in range(n):
        permuted = torch.zeros_like(weights)
        permuted[there] = of_heads[torch.randperm(len(of_heads), generator=drawn)]
        drawn_vectors.append(ltv.with_weights(permuted, f"permuted omega {i}"))
    return drawn_vectors


def make_random(materials: Materials) -> ByKind:
    """Random weights in place of those trained for each kind of prompts."""
    return _drawn(random_controls, materials)


def make_permuted(materials: Materials) -> ByKind:
    """Permuted weights in place of those trained for each kind of prompts."""
    return _drawn(permuted_controls, materials)


def _drawn(draw: Callable[..., list[Vector]], materials: Materials) -> ByKind:
    trained = materials.trained["ltv"]
    return {
        kind: draw(ltv, n=materials.control_draws, seed=materials.seed)
        for kind, ltv in trained.items()
    }
