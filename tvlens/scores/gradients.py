"""Gradients of a metric by activations: at the run as it is, and on the way to another one."""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.lens.patches import Shift
from tvlens.lens.sites import Site

Activations = Mapping[Site, Float[Tensor, "batch pos *rest"]]
Measure = Callable[[Shift], Float[Tensor, "batch variant"]]
"""Runs prompts with something added, and gives the metric of every output."""


def at_run(
    n_layer: int, activations: Activations, measure: Measure, *, query_only: bool = False
) -> tuple[dict[Site, Tensor], Float[Tensor, " batch"]]:
    """Gradients with respect to activations of the run as it is, all at once, and its metric.

    Args:
        n_layer: number of layers of the model.
        activations: what stands at each site, at all columns or at the query position alone.
        measure: the metric.
        query_only: whether they are of the query position alone; `pos` then has size 1.
    """
    zeros = {site: torch.zeros_like(x[:, None]).requires_grad_() for site, x in activations.items()}
    active = torch.zeros(1, n_layer, dtype=torch.bool)
    active[0, [site.layer for site in activations]] = True
    found = measure(Shift(n_layer, zeros, active, query_only))
    gradients = torch.autograd.grad(found.sum(), list(zeros.values()))
    return {site: x[:, 0] for site, x in zip(zeros, gradients, strict=True)}, found.detach()[:, 0]


def on_the_way(
    n_layer: int,
    moved: Activations,
    measure: Measure,
    *,
    steps: int,
    at_once: int,
    query_only: bool = False,
) -> dict[Site, Tensor]:
    """Mean gradients between the run as it is and one in which a site's activations have moved.

    Of one site after the other, at so many points by the midpoint rule: integrated gradients
    (Sundararajan et al. 2017), without their factor.

    Args:
        n_layer: number of layers of the model.
        moved: how far the activations of each site move.
        measure: the metric.
        steps: number of points.
        at_once: points that are run together; bounds memory.
        query_only: as in `at_run`.
    """
    found = {}
    for site, way in moved.items():
        active = torch.zeros(1, n_layer, dtype=torch.bool)
        active[0, site.layer] = True
        found[site] = torch.zeros_like(way)
        for points in ((torch.arange(steps) + 0.5) / steps).split(max(1, at_once)):
            share = points.to(way).reshape(1, -1, *(1,) * (way.ndim - 1))
            added = (share * way[:, None]).detach().requires_grad_()
            edit = Shift(n_layer, {site: added}, active.expand(len(points), -1), query_only)
            (gradient,) = torch.autograd.grad(measure(edit).sum(), added)
            found[site] += gradient.sum(dim=1) / steps
    return found
