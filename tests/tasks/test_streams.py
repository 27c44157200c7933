"""Streams and digests are those of runs that were made before: a change of one is a new result."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tvlens
from helpers import tiny_regression as tiny
from helpers import zoo
from tvlens.tasks import FunctionTask, function_class
from tvlens.tasks.regression.inputs import draw_points
from tvlens.tasks.streams import digest, generator, stream
from tvlens.vectors.controls import permuted_controls, random_controls
from tvlens.vectors.ltv.ltv import LearnableTaskVector


@pytest.mark.parametrize(
    ("purpose", "key", "seed", "draws"),
    [
        (
            "points",
            {"seed": 3, "split": "test", "what": "5 shots"},
            5888418799236722039,
            [493566844, 236274857, 305379805],
        ),
        (
            "training",
            {"seed": 2, "step": 7},
            4374579768054285967,
            [411679473, 707257536, 945398518],
        ),
        ("random omega", {"seed": 4}, 4088653883558530316, [404300495, 84530662, 641698804]),
    ],
)
def test_generators_are_those_of_earlier_runs(purpose, key, seed, draws):
    found = generator(purpose, **key)
    assert found.initial_seed() == seed == stream(purpose, **key).getrandbits(63)
    assert torch.randint(10**9, (3,), generator=found).tolist() == draws


def test_every_call_begins_its_stream_anew():
    assert torch.equal(*(torch.rand(3, generator=generator("a", seed=0)) for _ in range(2)))


def test_prompts_of_points_are_drawn_from_the_stream_of_their_split_and_length():
    prompts = tiny.TASK.prompts("test", shots=5, n=2, seed=3)
    drawn = generator("points", seed=3, split="test", what="5 shots")
    assert torch.equal(prompts.xs, draw_points(tiny.TASK.functions, 2, 6, drawn).xs)
    other = tiny.TASK.prompts("test", shots=5, n=2, seed=3, kind="zero").donors()
    drawn = generator("points", seed=3, split="test", what="donors of 5 shots")
    assert torch.equal(other.xs, torch.randn(2, tiny.TRAINED, 1, generator=drawn))


def test_controls_are_drawn_from_streams_of_their_own():
    start = torch.tensor([[3.0, 0.0, 4.0, 1.0]])
    ltv = LearnableTaskVector(torch.ones(1, 4, 2).cumsum(dim=1), start=start)
    drawn = generator("random omega", seed=4)
    expected = torch.randn(1, 4, generator=drawn)
    (made,) = random_controls(ltv, n=1, seed=4)
    weights = expected * (start.norm() / expected.norm())
    assert torch.allclose(made.vectors, torch.einsum("lh,lhd->ld", weights, ltv.outputs))
    order = torch.randperm(4, generator=generator("permuted omega", seed=4))
    (made,) = permuted_controls(ltv, n=1, seed=4)
    weights = start.flatten()[order][None]
    assert torch.allclose(made.vectors, torch.einsum("lh,lhd->ld", weights, ltv.outputs))


def test_digests_are_those_of_earlier_runs():
    assert zoo.TASK.digest == "bc99c3ee39d96b2baf6cd9376d4b5481fed82c956cc640aa62557c8c8a99e1f0"
    prompts = zoo.TASK.prompts("test", shots=2, n=3, seed=1, kind="shuffled")
    assert prompts.digest == "ed2aaad58f70d4a1485356e34c0df051e91c62c27d6b0839153aeeb88a7fd406"
    assert tiny.TASK.digest == "5bdcc31d9283510ba52be6f79cabcbfc7e9676661006bbe487b5ec1a22194c9f"
    noisy = FunctionTask("x", function_class("noisy-linear", 3, noise_std=0.5), "skewed")
    assert noisy.digest == "b0be89db7e0b8d257d40d0b4d9de8a0b2416621aea15b02c270b3054208070ad"


def test_a_digest_is_of_one_text_for_each_value():
    text = '{"a":["é",1,null],"b":0.5}'
    assert digest({"b": 0.5, "a": ["é", 1, None]}) == hashlib.sha256(text.encode()).hexdigest()
    assert digest([2, 1]) != digest([1, 2])
    assert digest("ω") == hashlib.sha256(json.dumps("ω", ensure_ascii=False).encode()).hexdigest()


def test_text_tasks_and_streams_need_no_torch():
    """Asked of the files themselves: the packages above them import everything."""
    code = """
import sys, types
sys.modules["torch"] = None
for name, folder in (("tvlens", sys.argv[1]), ("tvlens.tasks", sys.argv[1] + "/tasks")):
    package = types.ModuleType(name)
    package.__path__ = [folder]
    sys.modules[name] = package
import tvlens.tasks.base, tvlens.tasks.streams, tvlens.tasks.text.draw
from tvlens.tasks.text import files, prompts, task
print(len(files.load("antonym").prompts("test", n=2).digest))
"""
    folder = str(Path(tvlens.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code, folder], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "64\n"), done.stderr
