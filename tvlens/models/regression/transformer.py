"""Transformers that learn functions in context (Garg et al. 2022), and the files they are kept in.

A prompt of points x₁, f(x₁), x₂, f(x₂), … is read as a sequence of vectors: at even positions x, at
odd ones a vector whose coordinate 0 is y and whose others are zero. Predictions of f(xᵢ) are read
at the position of xᵢ, which sees the points before it.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import GPT2Config, GPT2Model

from tvlens.errors import ModelError, ShapeError
from tvlens.runs.storage import load_tensors, save_tensors


@dataclass(frozen=True)
class RegressionSizes:
    """Sizes of a regression transformer.

    Attributes:
        n_dims: coordinates of x.
        n_points: points that there are positions for; the last one may be asked, not shown.
        n_layer: blocks.
        n_head: heads in each.
        d_model: width of the residual stream.
    """

    n_dims: int
    n_points: int
    n_layer: int
    n_head: int
    d_model: int

    def __post_init__(self) -> None:
        sizes = asdict(self).values()
        if not all(type(size) is int and size >= 1 for size in sizes) or self.d_model % self.n_head:
            raise ShapeError(
                f"{str(self)[:200]}: every size must be a whole number, at least 1, and d_model "
                "divisible by n_head"
            )


def interleave(
    xs: Float[Tensor, "batch point n_dims"], ys: Float[Tensor, "batch point"]
) -> Float[Tensor, "batch pos n_dims"]:
    """The sequence x₁, y₁, x₂, y₂, … with y in coordinate 0, two positions a point."""
    wide = torch.zeros_like(xs)
    wide[..., 0] = ys
    return torch.stack([xs, wide], dim=2).flatten(1, 2)


class RegressionTransformer(nn.Module):
    """Linear read-in, GPT-2 blocks, linear read-out.

    Attributes:
        sizes: sizes it was made with.
        read_in: point to residual stream.
        backbone: Hugging Face GPT-2 without token embedding or dropout.
        read_out: normalised residual stream to prediction.
        card: how it was trained, where that is known.
    """

    def __init__(self, sizes: RegressionSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.card: dict[str, Any] = {}
        self.read_in = nn.Linear(sizes.n_dims, sizes.d_model)
        self.backbone = GPT2Model(gpt2_config(sizes))
        self.read_out = nn.Linear(sizes.d_model, 1)

    def forward(
        self, xs: Float[Tensor, "batch point n_dims"], ys: Float[Tensor, "batch point"]
    ) -> Float[Tensor, "batch point"]:
        """Prediction of every y from its x and the points before it.

        Raises:
            ShapeError: the points have other dimensions than the model, or are too many.
        """
        self.require_points(xs.shape[1], xs.shape[2])
        residual = self.backbone(inputs_embeds=self.read_in(interleave(xs, ys))).last_hidden_state
        return self.read_out(residual)[:, ::2, 0]

    @property
    def variance(self) -> float:
        """Variance of f(x) in training, over which errors are given; 1 where it is not known.

        Raises:
            ModelError: the card gives none that is a positive number.
        """
        found = self.card.get("variance", 1.0)
        if isinstance(found, int | float) and 0 < found < math.inf:
            return float(found)
        raise ModelError(
            f"the card of a regression model gives the variance {ascii(found)[:40]}; expected a "
            "positive number"
        )

    @property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of all weights."""
        found = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            found.update(name.encode())
            found.update(tensor.detach().cpu().float().numpy().tobytes())
        return found.hexdigest()

    def require_points(self, n_points: int, n_dims: int) -> None:
        """Refuse points that the model has no weights or positions for.

        Raises:
            ShapeError: the points have other dimensions than the model, or are too many.
        """
        if n_dims != self.sizes.n_dims:
            raise ShapeError(
                f"points have {n_dims} dimensions, the regression model reads "
                f"{self.sizes.n_dims}; draw them with n_dims={self.sizes.n_dims}"
            )
        if n_points > self.sizes.n_points:
            raise ShapeError(
                f"prompts have {n_points} points, the regression model has positions for "
                f"{self.sizes.n_points}; ask for fewer points"
            )


def gpt2_config(sizes: RegressionSizes) -> GPT2Config:
    """The GPT-2 blocks of a regression transformer."""
    config = GPT2Config(
        vocab_size=1,
        n_positions=2 * sizes.n_points,
        n_embd=sizes.d_model,
        n_layer=sizes.n_layer,
        n_head=sizes.n_head,
        # The function of gelu_new, as one operation.
        activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    return config


def save_regression(
    model: RegressionTransformer, path: Path | str, card: dict[str, Any], *, dtype: torch.dtype
) -> None:
    """Write weights, sizes and a model card (how it was trained) as safetensors.

    Args:
        model: the model.
        path: file to write.
        card: JSON-able facts about the training.
        dtype: type that the weights are stored in; they are read as float32.

    Raises:
        RunError: the file cannot be written.
    """
    tensors = {name: x.detach().cpu().to(dtype) for name, x in model.state_dict().items()}
    save_tensors(path, tensors, {"sizes": asdict(model.sizes), "card": card})


def load_regression(path: Path | str) -> tuple[RegressionTransformer, dict[str, Any]]:
    """The model written by `save_regression`, in float32 and evaluation mode, and its card.

    Raises:
        RunError: the file is missing, truncated or not safetensors.
        ModelError: it holds another architecture, or weights that are not finite.
    """
    tensors, metadata = load_tensors(path)
    try:
        sizes = RegressionSizes(**metadata["sizes"])
        card = metadata["card"]
        if not isinstance(card, dict):
            raise TypeError("its card is no object")
    except (KeyError, TypeError, ShapeError) as error:
        expected = ", ".join(field.name for field in fields(RegressionSizes))
        raise ModelError(
            f"{path} holds no regression transformer: its metadata {str(sorted(metadata))[:100]} "
            "do not give "
            f"sizes ({expected}) and a card; expected a file that tvlens trained"
        ) from error
    model = filled(sizes, tensors, path)
    model.card = card
    return model, card


def filled(
    sizes: RegressionSizes, tensors: dict[str, Tensor], path: Path | str
) -> RegressionTransformer:
    """A model of these sizes with these weights, in float32 and evaluation mode.

    Raises:
        ModelError: the weights are of other sizes, or not finite.
    """
    _require_own_numbers(tensors, path)
    held = sum(tensor.numel() for tensor in tensors.values())
    if max(asdict(sizes).values()) > held or sizes.n_layer > len(tensors):
        raise ModelError(
            f"{path} holds {held} numbers in {len(tensors)} weights, too few for "
            f"{json.dumps(asdict(sizes))[:200]}; use the sizes that the file was made with"
        )
    # Sizes that a file only claims are not made room for.
    with torch.device("meta"):
        shapes = RegressionTransformer(sizes).state_dict()
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in shapes.items()}
    wrong = sorted(n for n in {*found, *expected} if found.get(n) != expected.get(n))
    if wrong:
        first = wrong[0]
        raise ModelError(
            f"{path} holds another architecture than {json.dumps(asdict(sizes))}: {len(wrong)} "
            f"weights differ, the first is {first!r} with shape {found.get(first)}, expected "
            f"{expected.get(first)}; use the sizes that the file was made with"
        )
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(
            f"{path}: weight {broken[0]!r} holds NaN or infinite numbers; expected finite ones; "
            "train or download the model again"
        )
    model = RegressionTransformer(sizes)
    model.load_state_dict(tensors)
    return model.float().eval()


def _require_own_numbers(tensors: dict[str, Tensor], path: Path | str) -> None:
    """Refuse weights that are no real numbers, or more of them than the file has.

    Raises:
        ModelError: a weight is sparse, complex or whole numbers, or shares its numbers.
    """
    for name, tensor in tensors.items():
        if tensor.layout is not torch.strided or not tensor.is_floating_point():
            raise ModelError(
                f"{path}: weight {ascii(name)[:60]} is of {tensor.dtype} and {tensor.layout}; "
                "expected real numbers in full"
            )
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in tensors.values()}
    if sum(x.nbytes for x in tensors.values()) > sum(len(x) for x in storages.values()):
        raise ModelError(
            f"{path}: its weights share their numbers; save each with numbers of its own"
        )
