"""Whether a wrapped model is the model that was given: the same logits on the same tokens."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import ModelError
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch

# Largest root mean square of differences, in standard deviations of the logits. Two orders of the
# same additions drift apart in low precision.
_LIMIT = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
_SHORT, _LONGEST = 32, 256
# What a model does otherwise from some distance between two positions on.
_DISTANCES = ("sliding_window", "window_size", "attention_chunk_size")


@dataclass(frozen=True)
class Reference:
    """What a model answers before anything is wrapped around it.

    Attributes:
        architecture: its class.
        rows: tokens of prompts of different lengths.
        logits: its logits on each of them alone.
    """

    architecture: str
    rows: tuple[tuple[int, ...], ...]
    logits: tuple[Float[Tensor, "_pos d_vocab"], ...]


def read_reference(model: Any) -> Reference:
    """The logits of a Hugging Face model on three prompts of random tokens.

    The longest is longer than the model's windows of attention, where these are of 127 tokens at
    most: what differs only beyond a longer window is not seen.

    Args:
        model: a causal language model.

    Raises:
        ModelError: it gives no logits of tokens alone.
    """
    architecture = type(model).__name__
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    longest = _longest(model.config)
    rows = [
        torch.randint(weight.shape[0], (n,), generator=generator).tolist()
        for n in (longest, max(1, longest // 2), min(5, longest))
    ]
    logits = []
    for row in rows:
        try:
            with torch.no_grad():
                found = model(torch.tensor([row], device=weight.device), use_cache=False).logits
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise ModelError(
                f"a {architecture} does not give logits of tokens alone "
                f"({type(error).__name__}: {error}); expected a causal language model, which reads "
                "tokens from left to right"
            ) from error
        logits.append(found[0].float().cpu())
    return Reference(architecture, tuple(map(tuple, rows)), tuple(logits))


def require_same(backend: Backend, reference: Reference) -> None:
    """Refuse a wrapped model that gives other logits than the model that was given.

    Its prompts are run alone and beside each other, padded.

    Raises:
        ModelError: the logits differ; the message says by how much.
    """
    limit = _LIMIT.get(backend.dtype, _LIMIT[torch.bfloat16])
    alone = [Batch.pad([list(row)], [[0]]) for row in reference.rows]
    together = Batch.pad([list(row) for row in reference.rows], [[0]] * len(reference.rows))
    for batch, kept in (
        *((one, [logits]) for one, logits in zip(alone, reference.logits, strict=True)),
        (together, reference.logits),
    ):
        batch = batch.to(backend.device)
        with torch.no_grad():
            found = backend.forward(batch.inputs, batch.mask)
        error = max(
            _off(logits[mask].float().cpu(), expected)
            for logits, mask, expected in zip(found, batch.mask, kept, strict=True)
        )
        if not error < limit:
            beside = " beside a longer prompt" if len(batch) > 1 else f" on {len(kept[0])} tokens"
            other = "bridge" if backend.kind == "hooked" else "hooked"
            raise ModelError(
                f"{type(backend.model).__name__} made of a {reference.architecture} gives other "
                f"logits than the original: they differ by {error:.1e} standard deviations"
                f"{beside}, expected less than {limit:.0e}; use backend={other!r} or another "
                "version of transformer-lens"
            )


def _longest(config: Any) -> int:
    distances = [getattr(config, name, None) for name in _DISTANCES]
    within = [d for d in distances if isinstance(d, int) and 2 * d < _LONGEST]
    longest = max([_SHORT, *(2 * d + 2 for d in within)])
    return min(longest, getattr(config, "max_position_embeddings", None) or longest)


def _off(found: Tensor, expected: Tensor) -> float:
    # What is the same for every token of the vocabulary changes no answer.
    found, expected = (x - x.mean(dim=-1, keepdim=True) for x in (found, expected))
    return float((found - expected).square().mean().sqrt() / expected.std().clamp(min=1e-12))
