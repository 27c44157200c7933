"""What is said of families is what tvlens does with models of them."""

import warnings

import pytest

import tvlens
from helpers import zoo
from helpers.commands import ok
from tvlens.models.families import FAMILIES

SAID = {model: family for family in FAMILIES for model in family.models}
KINDS = [*zoo.CONFIGS, *zoo.BRIDGED_CONFIGS, *zoo.HYBRID_CONFIGS, *zoo.LATENT_CONFIGS]


@pytest.mark.parametrize("name", KINDS)
def test_the_engine_is_the_one_that_is_said(name):
    model = zoo.huggingface(name)
    said = SAID[model.config.model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        lens = tvlens.load(model, tokenizer=zoo.tokenizer())
    assert lens.engine.name == said.engine


def test_a_model_is_said_once_and_what_is_slow_has_a_reason():
    assert len(SAID) == sum(len(family.models) for family in FAMILIES)
    assert all(family.why for family in FAMILIES if family.engine != "replay")


def test_the_command_lists_them():
    found = ok("models", "--families")
    for family in FAMILIES:
        assert ", ".join(family.models) in found
        assert family.why in found
