"""The arithmetic of one block, at any positions: what replay of the query and of suffixes share.

Everything takes an `Act`, which is shown each activation under the name of its site and gives what
stands there instead: edits and recordings are made of it.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from tvlens.lens.sites import SiteKind
from tvlens.models.anatomy import Anatomy, Block

Act = Callable[[SiteKind, Tensor], Tensor]


def unchanged(kind: SiteKind, activation: Tensor) -> Tensor:
    """The activation itself."""
    return activation


def project(
    anatomy: Anatomy,
    block: Block,
    x: Float[Tensor, "*rows d_model"],
    position: Int[Tensor, "*#rows"],
    act: Act = unchanged,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values `[*rows head d_head]` of residual streams, ready to attend."""
    x, position = x.to(block.device), position.to(block.device)
    qkv = block.norm(x) @ block.w_qkv
    if block.b_qkv is not None:
        qkv = qkv + block.b_qkv
    heads = qkv.unflatten(-1, (anatomy.n_head + 2 * anatomy.n_kv_head, anatomy.d_head))
    q, k, v = heads.split([anatomy.n_head, anatomy.n_kv_head, anatomy.n_kv_head], dim=-2)
    q, k, v = act("q", q), act("k", k), act("v", v)
    q, k = ready(block, q, k, position)
    return q, k, v if block.clip is None else v.clamp(-block.clip, block.clip)


def ready(
    block: Block,
    q: Float[Tensor, "*rows head d_head"],
    k: Float[Tensor, "*rows kv_head d_head"],
    position: Int[Tensor, "*#rows"],
) -> tuple[Tensor, Tensor]:
    """Queries and keys normalised, clipped and turned, as they attend."""
    if block.norm_query is not None and block.norm_key is not None:
        q, k = block.norm_query(q), block.norm_key(k)
    if block.clip is not None:
        q, k = q.clamp(-block.clip, block.clip), k.clamp(-block.clip, block.clip)
    if block.rotate is not None:
        q, k = block.rotate(q, position), block.rotate(k, position)
    return q, k


def attend_all(
    anatomy: Anatomy,
    block: Block,
    q: Float[Tensor, "batch pos head d_head"],
    k: Float[Tensor, "batch pos kv_head d_head"],
    v: Float[Tensor, "batch pos kv_head d_head"],
    allowed: Bool[Tensor, "batch 1 pos pos"],
    position: Int[Tensor, "batch pos"],
    pattern: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch pos head d_head"]:
    """Attention of all positions to all before them; `pattern` is shown `[batch pos head key]`."""
    allowed, position = allowed.to(block.device), position.to(block.device)
    group = anatomy.n_head // anatomy.n_kv_head
    q = q.transpose(1, 2)
    k, v = (x.transpose(1, 2).repeat_interleave(group, dim=1) for x in (k, v))
    plain = block.cap is None and block.slopes is None and block.sinks is None
    if plain and pattern is None:
        z = scaled_dot_product_attention(q, k, v, attn_mask=allowed, scale=block.scale)
        return z.transpose(1, 2)
    scores = capped(block, (q * block.scale) @ k.transpose(-1, -2))
    if block.slopes is not None:
        scores = scores + block.slopes[:, None, None] * position[:, None, None, :]
    found = weights(block, scores.masked_fill(~allowed, float("-inf")))
    if pattern is not None:
        found = pattern(found.transpose(1, 2)).transpose(1, 2)
    return (found.to(v.dtype) @ v).transpose(1, 2)


def attend_rows(
    block: Block,
    q: Float[Tensor, "batch variant token head d_head"],
    shared: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None,
    allowed: Bool[Tensor, "batch variants token key"],
    position: Int[Tensor, "batch key"],
    pattern: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "batch variant token head d_head"]:
    """Attention of rows of tokens to what their prompt's rows share, and to their own.

    Args:
        block: the block.
        q: queries.
        shared: keys and values `[batch kv_head key d_head]`, the same for all rows of a prompt.
        own: further keys and values, `[batch variant key kv_head d_head]`, or None.
        allowed: which of the keys, shared ones first, every token attends to; `variants` may be 1.
        position: position of every key.
        pattern: is shown the weights `[batch variant token head key]`.
    """
    batch, variant, token = q.shape[:3]
    n_kv, n_shared = shared[0].shape[1:3]
    allowed = allowed.to(block.device)
    grouped = (q * block.scale).unflatten(3, (n_kv, -1)).permute(0, 1, 3, 4, 2, 5).flatten(3, 4)
    by_kv = grouped.transpose(1, 2).flatten(2, 3)
    scores = (by_kv @ shared[0].transpose(-1, -2)).unflatten(2, (variant, -1)).transpose(1, 2)
    if own is not None:
        scores = torch.cat([scores, grouped @ own[0].permute(0, 1, 3, 4, 2)], dim=-1)
    scores = capped(block, scores.unflatten(3, (-1, token)).flatten(2, 3))
    if block.slopes is not None:
        at = position[:, None, None, None].to(block.device)
        scores = scores + block.slopes[:, None, None] * at
    scores = scores.masked_fill(~allowed[:, :, None], float("-inf"))
    found = weights(block, scores.flatten(0, 1)).unflatten(0, (batch, variant))
    if pattern is not None:
        found = pattern(found.transpose(2, 3)).transpose(2, 3)
    found = found.to(q.dtype).unflatten(2, (n_kv, -1)).flatten(3, 4)
    by_kv = found[..., :n_shared].transpose(1, 2).flatten(2, 3)
    z = (by_kv @ shared[1]).unflatten(2, (variant, -1)).transpose(1, 2)
    if own is not None:
        z = z + found[..., n_shared:] @ own[1].permute(0, 1, 3, 2, 4)
    return z.unflatten(3, (-1, token)).flatten(2, 3).transpose(2, 3)


def capped(block: Block, scores: Tensor) -> Tensor:
    """Scores of attention as the block bounds them."""
    return scores if block.cap is None else block.cap * (scores / block.cap).tanh()


def weights(
    block: Block, scores: Float[Tensor, "batch head row column"]
) -> Float[Tensor, "batch head row column"]:
    """Attention weights in single precision at least, without those of the sinks."""
    at_least_single = torch.promote_types(scores.dtype, torch.float32)
    if block.sinks is None:
        return scores.softmax(dim=-1, dtype=at_least_single)
    sinks = block.sinks.to(scores)[:, None, None].expand(*scores.shape[:3], 1)
    return torch.cat([scores, sinks], dim=-1).softmax(dim=-1, dtype=at_least_single)[..., :-1]


def project_out(
    block: Block, z: Float[Tensor, "*rows head d_head"]
) -> Float[Tensor, "*rows d_model"]:
    """What the output projection gives, bias included."""
    out = z.flatten(-2) @ block.w_o
    return out if block.b_o is None else out + block.b_o


def scaled_output(
    block: Block, z: Float[Tensor, "*rows head d_head"]
) -> Float[Tensor, "*rows d_model"]:
    """What attention adds to the residual stream: what is projected, as the block scales it."""
    out = project_out(block, z)
    return out if block.scale_output is None else block.scale_output(out)


def factor(block: Block, z: Float[Tensor, "batch head d_head"]) -> Float[Tensor, "batch d_model"]:
    """What the block multiplies the output of its attention by before it adds it."""
    out = project_out(block, z)
    if block.scale_output is None:
        return torch.ones_like(out)
    return (block.scale_output(out) / out).where(out != 0, 0.0)


def causal(mask: Bool[Tensor, "batch pos"], window: int | None) -> Bool[Tensor, "batch 1 pos pos"]:
    """Which columns (last axis) every column attends to."""
    n = mask.shape[1]
    triangle = torch.ones(n, n, dtype=torch.bool, device=mask.device).tril()
    if window is not None:
        triangle = triangle.triu(1 - window)
    # Padding attends to itself: a softmax over nothing would be NaN.
    own = torch.eye(n, dtype=torch.bool, device=mask.device)
    return ((triangle & mask[:, None, :]) | own)[:, None]


def write(
    block: Block,
    x: Float[Tensor, "*rows d_model"],
    z: Float[Tensor, "*rows head d_head"],
    act: Act | None = None,
) -> Float[Tensor, "*rows d_model"]:
    """The residual streams behind a block, of those before it and of what attention gathered."""
    if act is not None:
        z = act("z", z)
    out = scaled_output(block, z)
    x = x.to(out.device)
    if act is None:
        return block.finish(x, out)
    middle = x + act("attn_out", out)
    if not block.parallel:
        middle = act("resid_mid", middle)
    if block.mlp is not None:
        middle = middle + act("mlp_out", block.mlp(x if block.parallel else middle))
    return act("resid_post", middle)
