"""Models whose blocks are on several devices: rows follow, and nothing meets across devices.

There is one device here, so places stand in for devices: every tensor has one, and a function of
torch that is given tensors of different places fails.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from helpers import zoo
from tvlens.lens.edits import AddToResidual, NoEdit, ReplaceHeads
from tvlens.lens.heads import contributions, mean_head_outputs
from tvlens.lens.hooks import WholePassEngine
from tvlens.lens.lens import Lens
from tvlens.lens.readout import FirstToken
from tvlens.lens.replay import ReplayEngine
from tvlens.models.bridge import BridgeBackend
from tvlens.scores.mediation import indirect_effects

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)
NAMES = pytest.mark.parametrize("name", ["llama", "gptj", "gemma3", "mpt", "granite"])


class Places(TorchFunctionMode):
    """Every tensor has a place, and only tensors of one place can meet."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return place(args[0])
        target = kwargs.pop("device", None)
        if func is torch.Tensor.to:
            where = [x for x in args[1:] if isinstance(x, torch.device | str | Tensor)]
            target = target or next(iter(where), None)
            if isinstance(target, Tensor):
                target = place(target)
                kwargs.setdefault("dtype", where[0].dtype)
            args = (args[0], *(x for x in args[1:] if x not in (target, *where)))
            if len(args) == 1 and not kwargs:
                kwargs = {"dtype": args[0].dtype}
        places = {
            place(x)
            for x in tree_leaves((args, kwargs))
            if isinstance(x, Tensor) and (x.ndim or place(x) != CPU)
        }
        if target is None and len(places) > 1:
            raise AssertionError(f"{getattr(func, '__name__', func)} of tensors on {places}")
        found = func(*args, **kwargs)
        there = torch.device(target) if target is not None else next(iter(places), CPU)
        moved = target is not None and isinstance(found, Tensor) and place(args[0]) != there
        found = found.clone() if moved and found is args[0] else found
        for x in tree_leaves(found):
            if isinstance(x, Tensor) and x is not (args[0] if args else None):
                x.place = there
        return found


def place(tensor: Tensor) -> torch.device:
    return getattr(tensor, "place", CPU)


def split(backend: BridgeBackend) -> None:
    """The first block on one card, the others and the last norm on another, the ends on the CPU."""
    model = backend.model
    modules = [*model.blocks, model.ln_final, model.unembed]
    for module, there in zip(modules, [FIRST, SECOND, SECOND, SECOND, CPU], strict=True):
        put(module, there)
        # As accelerate does: what comes to a module is moved to where it is.
        module.original_component.register_forward_pre_hook(follow(there), with_kwargs=True)


def put(module: nn.Module, there: torch.device) -> None:
    for part in (module, module.original_component):
        for tensor in (*part.parameters(), *part.buffers()):
            tensor.place = there


def follow(there: torch.device) -> Any:
    def hook(_: nn.Module, args: Any, kwargs: Any) -> Any:
        def move(x: Any) -> Any:
            return x.to(there) if isinstance(x, Tensor) else x

        return tree_map(move, args), tree_map(move, kwargs)

    return hook


def edits(backend: BridgeBackend) -> Iterator[Any]:
    generator = torch.Generator().manual_seed(0)
    n_layer, n_head, d_head = backend.n_layer, backend.n_head, backend.d_head
    yield NoEdit(n_layer)
    yield ReplaceHeads.each_head(torch.randn(n_layer, n_head, d_head, generator=generator))
    vectors = torch.randn(1, n_layer, n_layer, backend.d_model, generator=generator)
    yield AddToResidual(vectors, torch.eye(n_layer, dtype=torch.bool))


def test_places_are_told_apart():
    with Places():
        here, there = torch.ones(2), torch.ones(2).to(FIRST)
        assert (here.device, there.device, (there + 1).device) == (CPU, FIRST, FIRST)
        assert (here + there.to("cpu")).tolist() == [2.0, 2.0]
        with pytest.raises(AssertionError, match="add of tensors on"):
            here + there


@NAMES
@pytest.mark.parametrize("engine", [ReplayEngine, WholePassEngine])
def test_rows_follow_the_blocks_from_device_to_device(name, engine):
    whole, parted = (zoo.new_backend(name, "bridge") for _ in range(2))
    split(parted)
    found = []
    for backend in (whole, parted):
        with Places(), torch.no_grad():
            made = engine(backend)
            reading = made.read(zoo.batch())
            rows = reading.rows(torch.tensor([2, 0]))
            joined = made.join([rows, reading])
            logits = [made.run(r, edit) for edit in edits(backend) for r in (rows, joined)]
            tokens = [made.generate(reading, edit, 3) for edit in edits(backend)]
            lens = Lens(backend, made, FirstToken())
            written = contributions(lens, reading)
            assert {x.device for x in (*logits, *tokens, written, reading.z)} == {CPU}
        found.append([reading.z, written, *logits, *tokens])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_heads_are_scored_from_device_to_device():
    whole, parted = (zoo.new_backend("llama", "bridge") for _ in range(2))
    split(parted)
    clean = zoo.TASK.prompts("train", shots=2, n=4)
    shuffled = zoo.TASK.prompts("train", shots=2, n=3, kind="shuffled")
    found = []
    for backend in (whole, parted):
        with Places():
            lens = Lens(backend, ReplayEngine(backend), FirstToken())
            means = mean_head_outputs(lens, clean, answered_only=False)
            found.append(indirect_effects(lens, shuffled, means).values)
    assert torch.equal(*found)
