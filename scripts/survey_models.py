"""Every kind of model against plain hooks of torch on the original: is tvlens right, and how?

    python scripts/survey_models.py                        # all kinds, in float32 and bfloat16
    python scripts/survey_models.py gemma2 opt --out FILE  # some, and the table as CSV

Each kind is a tiny random model. What tvlens finds by its lens, on padded prompts beside each
other, is held against transformers alone, one prompt at a time: logits, the effect of replacing
each of some heads at the last position, of adding a vector behind each layer, and what every head
contributes to the residual stream there, in standard deviations of the contributions. Other
differences are in standard deviations of the logits. Each is the largest one; in bfloat16 the
middle one over prompts and edits, because a mixture of experts may choose otherwise. `noise` is how
far the original itself is from its own logits in float32.
"""

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import torch
import transformers
import typer
from model_kinds import MODELS
from torch import Tensor, nn

import tvlens
from tvlens.errors import TvlensError
from tvlens.lens.edits import AddToResidual, ReplaceHeads
from tvlens.lens.heads import contributions
from tvlens.models.batch import Batch

ROWS = [[31, 6, 9, 40, 12] * 5, [8, 33, 20] * 6, [17, 5, 21, 9]]
BEHIND = ("post_self_attn_layernorm", "post_attention_layernorm")
PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj")


def make(name: str, dtype: torch.dtype) -> Any:
    """The original, with large random weights and no norm or bias at its default."""
    family, config = MODELS[name]
    plain = family.removesuffix("Text")
    model = getattr(transformers, f"{plain}ForCausalLM", None)
    model = model or getattr(transformers, f"{plain}LMHeadModel")
    made = model(getattr(transformers, f"{family}Config")(**config)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            noise = torch.randn(weight.shape, generator=generator) * 0.3
            at_one = weight.ndim == 1 and bool((weight == 1).all())
            weight.copy_(1 + noise if at_one else noise)
    return made.to(dtype)


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the outermost list of modules with attention in them."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and any(map(projections_of, module)):
            return list(module)
    raise LookupError("no layers with attention")


def projections_of(layer: nn.Module) -> list[nn.Module]:
    """The output projection of the attention of a layer."""
    found = []
    for name, module in layer.named_modules():
        *path, last = name.split(".")
        if last in PROJECTIONS and any(re.search("attn|attention", part) for part in path):
            found.append(module)
    return found


@contextmanager
def hooked(module: nn.Module, hook: Callable[..., Any], *, before: bool) -> Iterator[None]:
    add = module.register_forward_pre_hook if before else module.register_forward_hook
    handle = add(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def last_logits(model: Any, row: list[int]) -> Tensor:
    return model(torch.tensor([row]), use_cache=False).logits[0, -1].float()


def with_head(model: Any, row: list[int], layer: int, head: int, value: Tensor) -> Tensor:
    """Logits with one head's slice of what the output projection reads replaced at the end."""
    width = len(value)

    def replace(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = inputs[0].clone()
        z.view(*z.shape[:-1], -1, width)[..., -1, head, :] = value
        return (z, *inputs[1:])

    (projection,) = projections_of(layers_of(model)[layer])
    with hooked(projection, replace, before=True):
        return last_logits(model, row)


def with_vector(model: Any, row: list[int], layer: int, vector: Tensor) -> Tensor:
    """Logits with a vector added behind a layer at the end."""

    def add(_: Any, __: Any, output: Any) -> Any:
        first = (output[0] if isinstance(output, tuple) else output).clone()
        first[:, -1] += vector
        return (first, *output[1:]) if isinstance(output, tuple) else first

    with hooked(layers_of(model)[layer], add, before=False):
        return last_logits(model, row)


def contributed(model: Any, row: list[int], layer: int) -> Tensor:
    """What each head adds to the residual stream at the end, `[head d_model]`, by plain hooks."""
    block = layers_of(model)[layer]
    (projection,) = projections_of(block)
    kept: dict[str, Tensor] = {}
    parts = dict(block.named_children())
    # Some norms of that name stand before the MLP.
    behind = {"post_self_attn_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"}
    norm = next((parts[n] for n in BEHIND if n in parts), None) if behind & set(parts) else None
    with ExitStack() as stack:
        stack.enter_context(
            hooked(projection, lambda _, x: kept.update(z=x[0][0, -1].clone()), before=True)
        )
        if norm is not None:
            stack.enter_context(
                hooked(norm, lambda _, x, y: kept.update(x=x[0][0, -1], y=y[0, -1]), before=False)
            )
        last_logits(model, row)
    n_head = model.config.num_attention_heads
    heads = kept["z"].view(n_head, -1)
    alone = torch.block_diag(*heads.unsqueeze(1))
    found = projection(alone) - projection(torch.zeros_like(alone))
    factor = getattr(model.config, "residual_multiplier", None) or 1.0
    return found.float() * (factor if norm is None else kept["y"].float() / kept["x"].float())


def survey(name: str, dtype: torch.dtype) -> dict[str, Any]:
    """One row of the table."""
    row: dict[str, Any] = {"kind": name, "dtype": str(dtype).removeprefix("torch.")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return row | looked_at(tvlens.load(make(name, dtype), name=name), name, dtype)
        except TvlensError as error:
            return row | {"refused": str(error)}


def looked_at(lens: tvlens.Lens, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Engine, differences and noise."""
    original = make(name, dtype)
    low = dtype == torch.bfloat16
    batch = Batch.pad(ROWS, [[[0]]] * len(ROWS))
    n_layer, n_head, d_head = lens.n_layer, lens.n_head, lens.backend.d_head
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(n_layer, n_head, d_head, generator=generator).to(dtype)
    vectors = torch.randn(n_layer, lens.d_model, generator=generator).to(dtype)
    layers = lens.backend.attention_layers
    at = [(0, 0), (len(layers) // 2, n_head - 1), (len(layers) - 1, n_head // 2)]
    heads = ReplaceHeads.each_head(values, layers).of_variants(
        torch.tensor([n * n_head + head for n, head in at])
    )
    places = [(layers[n], head) for n, head in at]
    active = torch.eye(n_layer, dtype=torch.bool)
    added = AddToResidual(vectors.expand(n_layer, -1, -1)[None], active)
    single = original if dtype == torch.float32 else make(name, torch.float32)
    clean = [[last_logits(original, r)] for r in ROWS]
    differences = {}
    for what, edit, expected in (
        ("logits", tvlens.NoEdit(n_layer), clean),
        ("heads", heads,
         [[with_head(original, r, *at, values[at]) for at in places] for r in ROWS]),
        ("vectors", added,
         [[with_vector(original, r, n, vectors[n]) for n in range(n_layer)] for r in ROWS]),
    ):  # fmt: skip
        found = lens.outputs(batch, edit, lambda x, _: x).float()
        differences[what] = off(found, stacked(expected), low=low)
    with torch.no_grad():
        reading = lens.engine.read(batch)
        written = contributions(lens, reading)[:, list(layers)].float()
    expected = torch.stack(
        [torch.stack([contributed(original, r, n) for n in layers]) for r in ROWS]
    )
    differences["contributions"] = typical(written - expected, expected, low=low)
    noise = off(stacked(clean), stacked([[last_logits(single, r)] for r in ROWS]), low=low)
    return {"engine": lens.engine.name, **differences, "noise": noise}


def stacked(logits: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(each) for each in logits])


def off(found: Tensor, expected: Tensor, *, low: bool) -> float:
    """The difference of logits but for what is the same for every token."""
    found, expected = (x - x.mean(dim=-1, keepdim=True) for x in (found, expected))
    errors = (found - expected).abs().amax(dim=-1) / expected.std()
    return float(errors.median() if low else errors.max())


def typical(error: Tensor, expected: Tensor, *, low: bool) -> float:
    errors = error.abs().amax(dim=-1) / expected.std()
    return float(errors.median() if low else errors.max())


def main(
    kinds: Annotated[list[str] | None, typer.Argument()] = None, out: Path | None = None
) -> None:
    """The table, and how many kinds are right, by which engine."""
    rows = []
    for name in kinds or MODELS:
        for dtype in (torch.float32, torch.bfloat16):
            rows.append(survey(name, dtype))
            said = [f"{k}={x:.1e}" if isinstance(x, float) else str(x) for k, x in rows[-1].items()]
            print(*said, flush=True)
    table = pd.DataFrame(rows)
    if out is not None:
        table.to_csv(out, index=False)
    if "engine" in table:
        print(table.groupby(["dtype", "engine"]).size().to_string())
    worst = table.reindex(columns=["logits", "heads", "vectors", "contributions"]).max(axis=1)
    limit = (3 * table.get("noise", table.index * 0)).where(table["dtype"] == "bfloat16", 1e-4)
    print(
        f"{len(table) // 2} kinds; off by more than 1e-4 in float32, or than three times the noise:"
    )
    print(table[worst > limit].to_string() if (worst > limit).any() else "none")


if __name__ == "__main__":
    typer.run(main)
