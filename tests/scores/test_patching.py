"""Effects of patches: those of transformer-lens' own functions, and of passes hooked by hand."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from helpers import tiny_regression, trained, zoo
from tvlens.errors import ModelError, NumericalError, ShapeError, TaskError, UnknownNameError
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.sites import PER_HEAD, PER_KEY_VALUE_HEAD, SITE_KINDS, Site
from tvlens.scores.effects import COLUMNS, PatchEffects
from tvlens.scores.metrics import METRICS
from tvlens.scores.patching import patch
from tvlens.stats import bootstrap_mean
from tvlens.tasks import Prompts

N = 3


@pytest.fixture
def prompts(task):
    """Clean and label-shuffled prompts of one shot more than the others', for both."""
    return [task.prompts("train", shots=2, n=N, kind=kind) for kind in ("clean", "shuffled")]


def same_length(lens, prompts):
    clean, shuffled = (lens.encode(each) for each in prompts)
    return bool((clean.mask == shuffled.mask).all())


PATCHING = {
    "resid_pre": ("resid_pre", ()),
    "attn_out": ("attn_out", ()),
    "mlp_out": ("mlp_out", ()),
    "z": ("attn_head_out_by_pos", ("head",)),
    "q": ("attn_head_q_by_pos", ("head",)),
    "k": ("attn_head_k_by_pos", ("head",)),
    "v": ("attn_head_v_by_pos", ("head",)),
    "pattern": ("attn_head_pattern_by_pos", ("head",)),
}


@pytest.mark.skipif(not zoo.HAS_HOOKED, reason="transformer-lens 4 has other functions")
@pytest.mark.parametrize("kind", PATCHING)
def test_effects_are_those_of_transformer_lens_patching(kind, task):
    from transformer_lens import patching

    lens = zoo.lens("gpt2", "hooked")
    clean, corrupted = ([7, 12, 31, 6, 9], [7, 33, 20, 6, 9])
    pair = [Prompts.of_tokens([row], [11]) for row in (clean, corrupted)]
    model = lens.backend.model
    _, cache = model.run_with_cache(torch.tensor([clean]))

    def probability(logits):
        return logits[0, -1].softmax(dim=-1)[11]

    function = getattr(patching, f"get_act_patch_{PATCHING[kind][0]}")
    with torch.no_grad():
        found = function(model, torch.tensor([corrupted]), cache, probability)
        before = probability(model(torch.tensor([corrupted])))
    effects = patch(lens, *pair, site=kind, positions="all")
    # [layer, pos] or [layer, pos, head]
    expected = (found - before).unsqueeze(-1) if found.ndim == 2 else found - before
    assert expected.abs().max() > 1e-3
    assert torch.allclose(effects.mean, expected.transpose(1, 2), atol=1e-6)
