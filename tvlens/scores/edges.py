"""Edges between parts of a model: prompts run with what heads say to receivers, and to no other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tvlens.lens.blocks import project_out, scaled_output
from tvlens.lens.engine import Engine, Reading
from tvlens.lens.lens import Lens
from tvlens.lens.norms import frozen
from tvlens.lens.passage import Passage
from tvlens.lens.patches import PutIn
from tvlens.lens.sites import Site
from tvlens.lens.suffix import SuffixEngine
from tvlens.scores.ranking import Head
from tvlens.scores.receivers import Receiver

NormScale = Literal["exact", "frozen"]
"""Whether the norm that a receiver reads through is made anew, or its scale is held."""

Change = Float[Tensor, "batch sender at d_model"]


@dataclass(frozen=True)
class Edges:
    """Runs prompts with what senders say to receivers.

    Attributes:
        lens: the model.
        engine: runs them.
        receivers: who hears the senders.
        norm: how receivers' norms are made.
        reading: the target prompts.
        to: columns at which senders are patched; -1 fills up.
        z: what heads gather there in the target prompts, layer by layer.
        new: what they are given.
        last: the residual stream behind the last block, at the query.
    """

    lens: Lens
    engine: Engine[Any]
    receivers: tuple[Receiver, ...]
    norm: NormScale
    reading: Reading
    to: Int[Tensor, "batch at"]
    z: Mapping[int, Float[Tensor, "batch at head d_head"]]
    new: Mapping[int, Float[Tensor, "some_batch some_at head d_head"]]
    last: Float[Tensor, "batch 1 d_model"]

    def outputs(
        self, senders: Sequence[Head]
    ) -> Iterator[tuple[Float[Tensor, "batch few d_vocab"], Bool[Tensor, "batch few"]]]:
        """Outputs under each sender, a few of them at a time, and where a receiver hears a change.

        Args:
            senders: heads in the order of layers.
        """
        rows, width = self.to.shape
        tokens = max(self.lens.max_tokens, getattr(self.engine, "max_tokens", 0))
        step = max(1, min(self.lens.max_rows // rows, tokens // (rows * width)))
        for start in range(0, len(senders), step):
            few = senders[start : start + step]
            layers = [layer for layer, _ in few]
            said = torch.cat(
                [
                    self._said(layer, [head for n, head in few if n == layer])
                    for layer in dict.fromkeys(layers)
                ],
                dim=1,
            ).where((self.to >= 0)[:, None, :, None], 0.0)
            # Queries, keys and values of one block hear the same.
            by_part = {(r.layer, r.kind == "mlp"): r for r in self.receivers}
            parts = {part: self._heard(r, said, layers) for part, r in by_part.items()}
            moved = [(change != 0).any(dim=3).any(dim=2) for change in parts.values()]
            heard = {r: parts[r.layer, r.kind == "mlp"] for r in self.receivers}
            yield self._run(heard), torch.stack(moved).any(dim=0)

    def _said(self, layer: int, heads: list[int]) -> Change:
        """How what the block adds by attention changes with each of these heads."""
        z, home = self.z[layer], self.lens.backend.device
        difference = (self.new[layer].to(z) - z)[:, :, heads]
        w_o = self.lens.w_o[layer, heads].to(z)
        change = torch.einsum("bphd,hdm->bhpm", difference, w_o)
        if not isinstance(self.engine, SuffixEngine):
            return change.to(home)
        block = self.engine.anatomy.blocks[layer]
        if block.scale_output is None:
            return change.to(home)
        out = project_out(block, z.to(block.device))[:, None]
        scaled = block.scale_output(out + change.to(block.device)) - block.scale_output(out)
        return scaled.to(home).where((change != 0).any(dim=3, keepdim=True).to(home), 0.0)

    def _heard(self, receiver: Receiver, said: Change, layers: Sequence[int]) -> Change:
        """What of it the receiver reads."""
        hears = torch.tensor([receiver.hears(self.engine, n) for n in layers])
        heard = said.where(hears.to(said.device)[None, :, None, None], 0.0)
        if receiver.layer is not None:
            return heard
        at_query = self.to == self.reading.batch.query[:, None]
        return heard.where(at_query[:, None, :, None], 0.0)

    def _run(self, heard: Mapping[Receiver, Change]) -> Float[Tensor, "batch few d_vocab"]:
        to_logits = next((change for r, change in heard.items() if r.layer is None), None)
        values: dict[Site, Tensor] = {}
        for layer in {r.layer for r in self.receivers if r.layer is not None}:
            values |= self._received(layer, {r: x for r, x in heard.items() if r.layer == layer})
        if values:
            edit = PutIn(self.lens.n_layer, self.to, values, to_logits)
            return self.engine.run(self.reading, edit)
        assert to_logits is not None
        backend, change = self.lens.backend, to_logits.sum(dim=2)
        if self.norm == "exact":
            return backend.unembed(self.last + change).to(backend.device)
        logits = backend.logits_of(self._normed(backend.final_norm, self.last, change))
        cap = backend.logit_cap
        return (logits if cap is None else cap * (logits / cap).tanh()).to(backend.device)

    def _received(self, layer: int, heard: Mapping[Receiver, Change]) -> dict[Site, Tensor]:
        """What receivers of one block make of their inputs."""
        assert isinstance(self.engine, SuffixEngine)
        assert isinstance(self.reading, Passage)
        block, home = self.engine.anatomy.blocks[layer], self.lens.backend.device
        x = at_columns(self.reading.residual[layer], self.to).to(block.device)[:, None]
        found: dict[Site, Tensor] = {}
        normed: Tensor | None = None
        for receiver, said in heard.items():
            change = said.to(block.device)
            if receiver.kind == "mlp":
                assert block.mlp is not None
                read = x
                if not block.parallel:
                    z = at_columns(self.reading.heads[layer], self.to).to(block.device)
                    read = x + scaled_output(block, z)[:, None]
                out = block.mlp.of_normed(self._normed(block.mlp.norm, read, change))
            else:
                if normed is None:
                    normed = self._normed(block.norm, x, change)
                part = _part(self.engine, receiver)
                out = normed @ block.w_qkv[:, part]
                out = out if block.b_qkv is None else out + block.b_qkv[part]
            found[Site(receiver.site_kind, layer, receiver.head)] = out.to(home)
        return found

    def _normed(
        self, norm: Callable[[Tensor], Tensor], x: Float[Tensor, "*rows"], change: Tensor
    ) -> Tensor:
        if self.norm == "exact":
            return norm(x + change)
        return norm(x) + frozen(norm, x)(change).to(x)


def _part(engine: SuffixEngine, receiver: Receiver) -> slice:
    """The columns of `w_qkv` that make the query, key or value of one head."""
    anatomy = engine.anatomy
    first = {"q": 0, "k": anatomy.n_head, "v": anatomy.n_head + anatomy.n_kv_head}
    start = (first[receiver.kind] + (receiver.head or 0)) * anatomy.d_head
    return slice(start, start + anatomy.d_head)


def at_columns(x: Float[Tensor, "batch pos *rest"], columns: Int[Tensor, "batch at"]) -> Tensor:
    """What stands at columns of every prompt; for -1 the first."""
    rows = torch.arange(len(columns), device=x.device)[:, None]
    return x[rows, columns.clamp(min=0).to(x.device)]
