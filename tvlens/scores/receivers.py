"""Receivers of paths: what hears a change in the residual stream, and how it is written."""

import re
from dataclasses import dataclass
from typing import Literal, get_args

from tvlens.errors import ShapeError, UnknownNameError
from tvlens.lens.sites import Site, SiteKind
from tvlens.lens.suffix import SuffixEngine
from tvlens.models.anatomy import Anatomy

ReceiverKind = Literal["q", "k", "v", "mlp", "logits"]

_OF_HEAD, _OF_LAYER = re.compile(r"([qkv]) of (\d+)\.(\d+)"), re.compile(r"mlp (\d+)")
_EXPECTED = "expected 'q of LAYER.HEAD' (or k, v), 'mlp LAYER' or 'logits', such as 'q of 2.3'"


@dataclass(frozen=True)
class Receiver:
    """What hears a head: written `q of 12.3`, `k of 12.1`, `v of 12.1`, `mlp 20` or `logits`.

    Attributes:
        kind: what a head makes of the residual stream (`q`, `k`, `v`), an MLP (`mlp`), or the last
            norm and the unembedding (`logits`).
        layer: of which block; None for `logits`.
        head: of which head, key/value head for `k` and `v`; None for `mlp` and `logits`.
    """

    kind: ReceiverKind
    layer: int | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        has = (self.layer is not None, self.head is not None)
        if self.kind not in get_args(ReceiverKind) or has != (
            self.kind != "logits",
            self.kind in ("q", "k", "v"),
        ):
            raise UnknownNameError(
                f"there is no receiver of kind {self.kind!r}, layer {self.layer}, head "
                f"{self.head}; {_EXPECTED}"
            )

    def __str__(self) -> str:
        if self.kind == "logits":
            return self.kind
        return (
            f"mlp {self.layer}" if self.head is None else f"{self.kind} of {self.layer}.{self.head}"
        )

    @classmethod
    def of(cls, text: str) -> "Receiver":
        """The receiver that is written so.

        Example:
            >>> Receiver.of("q of 12.3")
            Receiver(kind='q', layer=12, head=3)

        Raises:
            UnknownNameError: it is not written as one.
        """
        words = " ".join(text.split())
        if words == "logits":
            return cls("logits")
        if found := _OF_LAYER.fullmatch(words):
            return cls("mlp", int(found[1]))
        if found := _OF_HEAD.fullmatch(words):
            kinds: dict[str, ReceiverKind] = {"q": "q", "k": "k", "v": "v"}
            return cls(kinds[found[1]], int(found[2]), int(found[3]))
        raise UnknownNameError(f"there is no receiver {text!r}; {_EXPECTED}")

    @property
    def site_kind(self) -> SiteKind:
        """Where its output stands; that of `logits` stands behind all sites."""
        kinds: dict[str, SiteKind] = {"q": "q", "k": "k", "v": "v", "mlp": "mlp_out"}
        return kinds.get(self.kind, "resid_post")

    def hears(self, anatomy: Anatomy, layer: int) -> bool:
        """Whether it reads what heads of this layer write."""
        if self.layer is None:
            return True
        behind = self.kind == "mlp" and not anatomy.blocks[self.layer].parallel
        return layer <= self.layer if behind else layer < self.layer

    def require_in(self, engine: SuffixEngine) -> None:
        """Refuse a receiver that the model lacks.

        Raises:
            UnknownNameError: no layer has such a site.
            ShapeError: the layer or the head is not there.
        """
        if self.layer is None:
            return
        engine.require_sites([Site(self.site_kind, self.layer)])
        anatomy = engine.anatomy
        n = anatomy.n_head if self.kind == "q" else anatomy.n_kv_head
        if self.head is not None and not 0 <= self.head < n:
            raise ShapeError(
                f"receiver {self} of {engine.backend.name!r}, whose {self.kind} have heads 0 to "
                f"{n - 1}: choose one of these"
            )
