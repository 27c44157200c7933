"""Whether a wrapped model is the model that was given: the same logits on the same tokens."""

from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tvlens.errors import ModelError
from tvlens.models.backend import Backend, telling_length
from tvlens.models.batch import Batch

# Largest difference, in standard deviations of the logits: root mean square over all positions, in
# low precision over the vocabulary at the middle one. Two orders of the same additions drift apart
# there. Models and transformer-lens take norms and softmax of double precision in single.
_LIMIT = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Reference:
    """What a model answers before anything is wrapped around it.

    Attributes:
        architecture: its class.
        rows: tokens of prompts of different lengths.
        logits: its logits on each of them alone.
        noise: largest difference between two ways of its own to the same logits, in standard
            deviations: alone and beside other prompts of the same length.
    """

    architecture: str
    rows: tuple[tuple[int, ...], ...]
    logits: tuple[Float[Tensor, "_pos d_vocab"], ...]
    noise: float


def read_reference(model: Any) -> Reference:
    """The logits of a Hugging Face model on three prompts of random tokens.

    Their lengths are as `telling_length` says: what differs only beyond a longer window is not
    seen.

    Args:
        model: a causal language model.

    Raises:
        ModelError: it gives no logits of tokens alone.
    """
    architecture = type(model).__name__
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    longest = telling_length(model.config.get_text_config())
    rows = [
        torch.randint(weight.shape[0], (n,), generator=generator).tolist()
        for n in (longest, max(1, longest // 2), min(3, longest))
    ]
    logits, noise = [], 0.0
    for row in rows:
        beside = torch.randint(weight.shape[0], (4, len(row)), generator=generator)
        beside[2] = torch.tensor(row)
        try:
            with torch.no_grad():
                found, again = (
                    model(tokens.to(weight.device), use_cache=False).logits.float().cpu()
                    for tokens in (beside[2:3], beside)
                )
        except (RuntimeError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise ModelError(
                f"a {architecture} does not give logits of tokens alone "
                f"({type(error).__name__}: {error}); expected a causal language model, which reads "
                "tokens from left to right"
            ) from error
        logits.append(found[0])
        noise = max(noise, _off(again[2], found[0], weight.dtype))
    return Reference(architecture, tuple(map(tuple, rows)), tuple(logits), noise)


def require_same(backend: Backend, reference: Reference) -> None:
    """Refuse a wrapped model that gives other logits than the model that was given.

    Its prompts are run alone and beside each other, padded. Differences up to three times the
    model's own noise are let through.

    Raises:
        ModelError: the logits differ; the message says by how much.
    """
    limit = max(_LIMIT.get(backend.dtype, _LIMIT[torch.bfloat16]), 3 * reference.noise)
    alone = [Batch.pad([list(row)], [[[0]]]) for row in reference.rows]
    together = Batch.pad([list(row) for row in reference.rows], [[[0]]] * len(reference.rows))
    for batch, kept in (
        *((one, [logits]) for one, logits in zip(alone, reference.logits, strict=True)),
        (together, reference.logits),
    ):
        batch = batch.to(backend.device)
        with torch.no_grad():
            found = backend.forward(batch.inputs, batch.mask)
        errors = [
            _off(logits[mask].float().cpu(), expected, backend.dtype)
            for logits, mask, expected in zip(found, batch.mask, kept, strict=True)
        ]
        if not all(error < limit for error in errors):
            error = next((error for error in errors if isnan(error)), max(errors))
            beside = " beside a longer prompt" if len(batch) > 1 else f" on {len(kept[0])} tokens"
            other = "bridge" if backend.kind == "hooked" else "hooked"
            raise ModelError(
                f"{type(backend.model).__name__} made of a {reference.architecture} gives other "
                f"logits than the original: they differ by {error:.1e} standard deviations"
                f"{beside}, expected less than {limit:.0e}; use backend={other!r} or another "
                "version of transformer-lens"
            )


def _off(
    found: Float[Tensor, "pos d_vocab"], expected: Float[Tensor, "pos d_vocab"], dtype: torch.dtype
) -> float:
    # What is the same for every token of the vocabulary changes no answer.
    found, expected = (x - x.mean(dim=-1, keepdim=True) for x in (found, expected))
    errors = (found - expected).square().mean(dim=-1)
    # In low precision a mixture of experts may choose otherwise at some positions.
    low = dtype in (torch.float16, torch.bfloat16)
    error = errors.median() if low else errors.mean()
    return float(error.sqrt() / expected.std().clamp(min=1e-12))
