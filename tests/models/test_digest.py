"""Weights and tokenizers that differ are told apart."""

import pytest
import torch

from helpers import zoo
from tvlens.models.bridge import BridgeBackend


@pytest.mark.parametrize("kind", zoo.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_weights_have_the_same_digest_and_one_other_number_another(kind, dtype):
    first, second = (zoo.new_backend("llama", kind, dtype) for _ in range(2))
    assert first.digest == second.digest
    for number in (0, 7, -1):
        other = zoo.new_backend("llama", kind, dtype)
        with torch.no_grad():
            other.parameters()[1].view(-1)[number] *= 1.5
        assert other.digest != first.digest


def test_another_precision_or_tokenizer_has_another_digest():
    plain = zoo.new_backend("gpt2", "bridge")
    half = zoo.new_backend("gpt2", "bridge", torch.bfloat16)
    other = BridgeBackend(plain.model, "gpt2", zoo.tokenizer(bos=True))
    same = BridgeBackend(plain.model, "another name", zoo.tokenizer())
    assert len({plain.digest, half.digest, other.digest}) == 3
    assert same.digest == plain.digest


def test_numbers_that_change_places_have_another_digest():
    first, second = (zoo.new_backend("llama", "bridge") for _ in range(2))
    weight = second.parameters()[0].view(-1)
    with torch.no_grad():
        weight[:2] = weight[:2].flip(0).clone()
    assert first.digest != second.digest
