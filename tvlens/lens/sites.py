"""Where in a model an edit can act: kinds of activations, layer by layer.

Residual streams stand before a block (`resid_pre`), between its attention and its MLP (`resid_mid`)
and behind it (`resid_post`); `attn_out` and `mlp_out` are what the two add, as they add it. Heads
have a query, a key and a value before any norm or rotation of them (`q`, `k`, `v`), the weights
with which a position attends (`pattern`), and what comes of it (`z`). Under grouped-query attention
there are fewer keys and values than queries: their heads are key/value heads.
"""

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, get_args

from tvlens.errors import ShapeError, UnknownNameError

SiteKind = Literal[
    "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z", "pattern"
]
SITE_KINDS: tuple[SiteKind, ...] = get_args(SiteKind)
"""Every kind of site."""

PER_HEAD: frozenset[SiteKind] = frozenset({"q", "z", "pattern"})
PER_KEY_VALUE_HEAD: frozenset[SiteKind] = frozenset({"k", "v"})
SEEN_BY_LATER: frozenset[SiteKind] = frozenset({"resid_pre", "k", "v"})
"""Sites that later positions see in the very layer; all others they see in the next one."""


class Site(NamedTuple):
    """An activation of one layer, or of one head of it.

    Attributes:
        kind: which activation.
        layer: of which block.
        head: of which head; key/value head for `k` and `v`; None for all, and for sites without
            heads.
    """

    kind: SiteKind
    layer: int
    head: int | None = None


def site_kind(name: str) -> SiteKind:
    """The kind of this name.

    Raises:
        UnknownNameError: there is none.
    """
    for kind in SITE_KINDS:
        if kind == name:
            return kind
    raise UnknownNameError(f"there is no site {name!r}; sites are {', '.join(SITE_KINDS)}")


def require_sites(
    model: str, there: Mapping[SiteKind, tuple[int, ...]], sites: Collection[Site]
) -> None:
    """Refuse sites that a model lacks.

    Args:
        model: what the model is called.
        there: layers that have each site.
        sites: what is asked for.

    Raises:
        UnknownNameError: no layer has the site.
        ShapeError: this layer lacks it.
    """
    for kind, layer, _ in sorted(sites, key=lambda site: site[:2]):
        layers = there.get(kind)
        if not layers:
            has = ", ".join(name for name in SITE_KINDS if there.get(name))
            raise UnknownNameError(
                f"model {model!r} has no site {kind!r} at which anything could be changed; it has "
                f"{has}"
            )
        if layer not in layers:
            raise ShapeError(
                f"layer {layer} of {model!r} has no {kind!r}; it is in layers "
                f"{', '.join(map(str, layers))} only: leave others out"
            )
