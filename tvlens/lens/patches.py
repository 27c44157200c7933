"""Edits at any site and any column: activations put in from elsewhere, and added ones."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens.lens.edits import Activation, Edit
from tvlens.lens.sites import Site, SiteKind


@dataclass(frozen=True)
class Patch(Edit):
    """What stands at a site, at columns that every variant and prompt has, is replaced.

    Attributes:
        kind: the site.
        layers: number of layers of the model.
        layer: layer at which each variant acts.
        head: head that each variant replaces, -1 for all; None at sites without heads.
        at: columns at which each variant acts on each prompt; -1 fills up. Either of the first two
            axes may have size 1.
        values: what may be put in, for every layer that is patched, `[batch from …]`; what follows
            are the site's own axes.
        source: which of `values` each variant puts in at each column, as `at`.
    """

    kind: SiteKind
    layers: int
    layer: Int[Tensor, " variant"]
    head: Int[Tensor, " variant"] | None
    at: Int[Tensor, "_batch _variant at"]
    values: Mapping[int, Tensor]
    source: Int[Tensor, "_batch _variant at"]

    @property
    def n_variant(self) -> int:
        return len(self.layer)

    @property
    def n_layer(self) -> int:
        return self.layers

    @property
    def acting(self) -> Bool[Tensor, "variant layer"]:
        return self.layer[:, None] == torch.arange(self.layers, device=self.layer.device)

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(Site(self.kind, layer) for layer in set(self.layer.tolist()))

    @property
    def at_query_only(self) -> bool:
        return False

    def columns(self, query: Int[Tensor, " batch"]) -> Int[Tensor, "#batch #variant at"]:
        return self.at

    def change(self, site: Site, activation: Activation) -> Activation:
        n = activation.shape[1]
        given = self.values[site.layer].to(activation.dtype)
        source = self.source[:, :n].clamp(min=0).expand(len(given), n, -1)
        rows = torch.arange(len(given), device=given.device)[:, None, None]
        new = given[rows, source]
        mask = (self.layer[:n] == site.layer)[None, :, None]
        if self.head is not None:
            head = self.head[:n, None]
            heads = torch.arange(activation.shape[3], device=head.device)
            mask = mask[..., None] & ((head == heads) | (head < 0))[None, :, None]
        mask = mask.reshape(*mask.shape, *(1,) * (activation.ndim - mask.ndim))
        return torch.where(mask, new, activation)

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "Patch":
        def chosen(x: Tensor) -> Tensor:
            return x if x.shape[1] == 1 else x[:, index]

        return replace(
            self,
            layer=self.layer[index],
            head=None if self.head is None else self.head[index],
            at=chosen(self.at),
            source=chosen(self.source),
        )

    def of_prompts(self, start: int, stop: int) -> "Patch":
        def chosen(x: Tensor) -> Tensor:
            return x if len(x) == 1 else x[start:stop]

        values = {layer: chosen(x) for layer, x in self.values.items()}
        return replace(self, at=chosen(self.at), values=values, source=chosen(self.source))


@dataclass(frozen=True)
class ReplaceHeadsAt(Edit):
    """`hook_z` of the chosen heads is replaced at columns of each prompt, by values of each column.

    Attributes:
        mask: which heads each variant replaces.
        at: columns at which all variants act on each prompt; -1 fills up.
        values: what the heads are replaced by there.
    """

    mask: Bool[Tensor, "variant layer head"]
    at: Int[Tensor, "_batch at"]
    values: Float[Tensor, "_batch at layer head d_head"]

    @property
    def n_variant(self) -> int:
        return self.mask.shape[0]

    @property
    def n_layer(self) -> int:
        return self.mask.shape[1]

    @property
    def acting(self) -> Bool[Tensor, "variant layer"]:
        return self.mask.any(dim=2)

    @property
    def sites(self) -> frozenset[Site]:
        layers = self.mask.any(dim=2).any(dim=0).nonzero().flatten().tolist()
        return frozenset(Site("z", layer) for layer in layers)

    @property
    def at_query_only(self) -> bool:
        return False

    def columns(self, query: Int[Tensor, " batch"]) -> Int[Tensor, "#batch #variant at"]:
        return self.at[:, None]

    def change(self, site: Site, activation: Activation) -> Activation:
        mask = self.mask[None, : activation.shape[1], None, site.layer, :, None]
        new = self.values[:, None, :, site.layer].to(activation.dtype)
        return torch.where(mask, new, activation)

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "ReplaceHeadsAt":
        return replace(self, mask=self.mask[index])

    def of_prompts(self, start: int, stop: int) -> "ReplaceHeadsAt":
        return replace(self, at=self.at[start:stop], values=self.values[start:stop])


@dataclass(frozen=True)
class PutIn(Edit):
    """What stands at several sites is replaced at once, by values of every variant's own.

    Attributes:
        layers: number of layers of the model.
        at: columns at which all variants act on each prompt; -1 fills up.
        values: what is put in at each site, or at one head of it, `[batch variant at …]`.
        added: what is added behind the last block at the same columns, or None.
    """

    layers: int
    at: Int[Tensor, "_batch at"]
    values: Mapping[Site, Tensor]
    added: Float[Tensor, "_batch _variant at d_model"] | None = None

    @property
    def n_variant(self) -> int:
        return self._some.shape[1]

    @property
    def n_layer(self) -> int:
        return self.layers

    @property
    def acting(self) -> Bool[Tensor, "variant layer"]:
        here = torch.zeros(self.n_variant, self.layers, dtype=torch.bool)
        here[:, [site.layer for site in self.sites]] = True
        return here

    @property
    def sites(self) -> frozenset[Site]:
        whole = {Site(kind, layer) for kind, layer, _ in self.values}
        return frozenset(whole if self.added is None else {*whole, self._end})

    @property
    def at_query_only(self) -> bool:
        return False

    def columns(self, query: Int[Tensor, " batch"]) -> Int[Tensor, "#batch #variant at"]:
        return self.at[:, None]

    def change(self, site: Site, activation: Activation) -> Activation:
        n = activation.shape[1]
        new = activation.clone()
        for (kind, layer, head), value in self.values.items():
            if (kind, layer) == site[:2]:
                new[..., slice(None) if head is None else head, :] = value[:, :n].to(new.dtype)
        if site == self._end and self.added is not None:
            new = new + self.added[:, :n].to(new.dtype)
        return new

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "PutIn":
        values = {site: x[:, index] for site, x in self.values.items()}
        added = None if self.added is None else self.added[:, index]
        return replace(self, values=values, added=added)

    def of_prompts(self, start: int, stop: int) -> "PutIn":
        values = {site: x[start:stop] for site, x in self.values.items()}
        added = None if self.added is None else self.added[start:stop]
        return replace(self, at=self.at[start:stop], values=values, added=added)

    @property
    def _some(self) -> Tensor:
        return next(iter(self.values.values()))

    @property
    def _end(self) -> Site:
        return Site("resid_post", self.layers - 1)


@dataclass(frozen=True)
class Shift(Edit):
    """Something is added at sites: what gradients are taken with respect to.

    Attributes:
        layers: number of layers of the model.
        added: what is added at each site at every column, `[batch variant pos …]`; the first two
            axes may have size 1, and what follows are the site's own axes.
        active: layers at which each variant adds.
        query_only: whether it is added at the query position alone; `pos` then has size 1.
    """

    layers: int
    added: Mapping[Site, Tensor]
    active: Bool[Tensor, "variant layer"]
    query_only: bool = False

    @property
    def n_variant(self) -> int:
        return len(self.active)

    @property
    def n_layer(self) -> int:
        return self.layers

    @property
    def acting(self) -> Bool[Tensor, "variant layer"]:
        return self.active

    @property
    def sites(self) -> frozenset[Site]:
        return frozenset(self.added)

    @property
    def at_query_only(self) -> bool:
        return self.query_only

    def columns(self, query: Int[Tensor, " batch"]) -> Int[Tensor, "#batch #variant at"]:
        if self.query_only:
            return query[:, None, None]
        width = next(iter(self.added.values())).shape[2]
        return torch.arange(width, device=query.device)[None, None]

    def change(self, site: Site, activation: Activation) -> Activation:
        n = activation.shape[1]
        added = self.added[site]
        added = added if added.shape[1] == 1 else added[:, :n]
        active = self.active[:n, site.layer].reshape(n, *(1,) * (activation.ndim - 2))
        return activation + added.where(active, 0.0).to(activation.dtype)

    def of_variants(self, index: Int[Tensor, " chosen"]) -> "Shift":
        added = {site: x if x.shape[1] == 1 else x[:, index] for site, x in self.added.items()}
        return replace(self, added=added, active=self.active[index])

    def of_prompts(self, start: int, stop: int) -> "Shift":
        added = {site: x if len(x) == 1 else x[start:stop] for site, x in self.added.items()}
        return replace(self, added=added)
