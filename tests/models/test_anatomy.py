"""What both backends say of rotary positions, residual streams and parts that replay lacks."""

from dataclasses import replace

import pytest
import torch

from tvlens.models.anatomy import (
    BehindNorm,
    Block,
    UnknownArchitectureError,
    refuse_unknown,
    side_by_side,
    turn,
)


def test_the_first_components_are_turned_and_the_others_kept():
    x = torch.randn(2, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    angles = torch.tensor([[0.0, 0.0], [1.0, 0.5]]).repeat(1, 2)
    # One position for each of two prompts, shared by three rows.
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    found = turn(x, cos, sin, lambda y: torch.cat([-y[..., 2:], y[..., :2]], dim=-1))
    assert torch.equal(found[0], x[0])
    assert torch.equal(found[..., 4:], x[..., 4:])
    pairs = torch.complex(x[1, ..., :2], x[1, ..., 2:4])
    expected = pairs * torch.polar(torch.ones(2), torch.tensor([1.0, 0.5]))
    assert torch.allclose(found[1, ..., :2], expected.real, atol=1e-6)
    assert torch.allclose(found[1, ..., 2:4], expected.imag, atol=1e-6)


def test_an_mlp_reads_what_the_attention_leaves_or_what_it_reads():
    residual, attn_out = torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])

    def norm(x):
        return x + 0.5

    def mlp(x):
        return x * x

    block = Block(
        norm=norm, w_qkv=torch.ones(2, 3), b_qkv=None, w_o=torch.ones(1, 2), b_o=None, scale=1.0
    )
    assert block.finish(residual, attn_out).tolist() == [11, 22]
    behind = replace(block, mlp=BehindNorm(norm, mlp))
    assert behind.finish(residual, attn_out).tolist() == [11 + 11.5**2, 22 + 22.5**2]
    beside = replace(behind, parallel=True)
    assert beside.finish(residual, attn_out).tolist() == [11 + 1.5**2, 22 + 2.5**2]
    halved = replace(block, mlp=BehindNorm(norm, mlp, lambda x: x / 2))
    assert halved.finish(residual, attn_out).tolist() == [11 + 11.5**2 / 2, 22 + 22.5**2 / 2]


def test_projections_stand_side_by_side_head_after_head():
    query, key = torch.arange(24.0).view(2, 4, 3), torch.arange(12.0).view(1, 4, 3)
    found = side_by_side([query, key, -key])
    assert found.shape == (4, 12)
    assert torch.equal(found[:, 3:6], query[1])
    assert torch.equal(found[:, 9:], -key[0])
    assert found.is_contiguous()


def test_parts_that_replay_lacks_are_named():
    refuse_unknown({"alibi": False, "clip_qkv": False})
    with pytest.raises(UnknownArchitectureError, match=r"^replay does not know alibi, a window$"):
        refuse_unknown({"alibi": True, "clip_qkv": False, "a window": True})
