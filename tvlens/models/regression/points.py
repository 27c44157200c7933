"""Regression transformers behind the backend interface: inputs are points, outputs predictions."""

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import GPT2LMHeadModel

from tvlens.errors import ModelError, NumericalError, ShapeError, TaskError
from tvlens.models.backend import Backend
from tvlens.models.batch import Batch
from tvlens.models.bridge import BridgeBackend, bridge_from_huggingface
from tvlens.models.hooked import HookedBackend, hooked_transformer_class, load_unprocessed
from tvlens.models.regression.transformer import RegressionTransformer, gpt2_config, interleave
from tvlens.models.roles import Roles, no_roles
from tvlens.tasks.regression.prompts import PointCurves, PointPrompts

Sequence = Float[Tensor, "batch pos n_dims"]


class _ReadsPoints(Backend):
    """The residual stream begins with the trained module's own read-in and positions."""

    trained: RegressionTransformer

    def forward(
        self, inputs: Sequence, mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Predictions at every position, d_vocab being 1; those at x positions were trained."""
        self._require(inputs, mask)
        return self._of_points(self.trained.read_in(inputs))

    def embed(
        self, inputs: Sequence, mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Residual stream before block 0, positions included."""
        self._require(inputs, mask)
        positions = self.trained.backbone.wpe.weight[: inputs.shape[1]]
        return self.trained.read_in(inputs) + positions

    def encode(self, prompts: Any, *, prefix: object = ()) -> Batch:
        """The prompts as interleaved points that end with the query's x.

        Raises:
            ShapeError: the points have other dimensions than the model, or are too many.
            ModelError: the prompts are not of points.
            TaskError: there is no prompt.
            NumericalError: an x, or a y that is shown, is not finite.
        """
        given = self._require_points(prompts)
        _require_usable(given)
        self.trained.require_points(given.xs.shape[1], given.xs.shape[2])
        sequences = interleave(given.xs, given.ys)[:, :-1]
        if isinstance(given, PointPrompts):
            return Batch.of_sequences(sequences.to(self.dtype), given.target)
        shared = len(given.points)
        whole = Batch.of_sequences(sequences.to(self.dtype), given.values[:, 0])
        rows = whole.take(torch.arange(len(given)) // shared)
        return replace(rows, query=given.query, target=given.target, shared=shared)

    def roles(self, prompts: Any, *, prefix: object = ()) -> Roles:
        """The role of every column of x₁, y₁, x₂, y₂, …, the same in all prompts.

        Raises:
            TaskError: the prompts are curves, which are asked at several numbers of points.
            ModelError: the prompts are not of points.
        """
        given = self._require_points(prompts)
        if isinstance(given, PointCurves):
            raise no_roles(given.task, "curves are asked at several points (curves.at(N) at one)")
        return (given.roles,) * len(given)

    def short_prompts(self) -> Batch:
        """Two prompts of random points, whatever they mean, for checking the model."""
        n_points = min(3, self.trained.sizes.n_points)
        generator = torch.Generator().manual_seed(0)
        shape = (2, 2 * n_points, self.trained.sizes.n_dims)
        inputs = torch.randn(shape, generator=generator).to(self.device, self.dtype)
        return Batch.of_sequences(inputs, torch.zeros(2).to(inputs))

    def repeated_prompts(
        self, n: int, length: int, *, prefix: object = (), seed: int
    ) -> tuple[Batch, int]:
        """Random points x₁, y₁, x₂, y₂, … and the same again, and the columns until they return.

        There are `length` of them, or as many as the model has positions for.

        Raises:
            ShapeError: no prompt or point is asked for, or there are too few positions.
        """
        n_points = min(length, self.trained.sizes.n_points // 2)
        if n < 1 or n_points < 1:
            raise ShapeError(
                f"{n} prompts of {length} points and the same again asked of {self.name!r}, which "
                f"has positions for {self.trained.sizes.n_points}; expected at least one prompt of "
                "one point, and positions for two"
            )
        generator = torch.Generator().manual_seed(seed)
        xs = torch.randn(n, n_points, self.trained.sizes.n_dims, generator=generator)
        ys = torch.randn(n, n_points, generator=generator)
        inputs = interleave(xs, ys).to(self.device, self.dtype).repeat(1, 2, 1)
        return Batch.of_sequences(inputs, ys[:, 0].to(inputs)), 2 * n_points

    def _require_points(self, prompts: Any) -> PointPrompts | PointCurves:
        if isinstance(prompts, PointPrompts | PointCurves):
            return prompts
        raise ModelError(
            f"model {self.name!r} reads points, not {type(prompts).__name__}; expected prompts "
            "of a FunctionTask"
        )

    def _of_points(self, read_in: Float[Tensor, "batch pos d_model"]) -> Tensor:
        raise NotImplementedError

    def _require(self, inputs: Tensor, mask: Tensor) -> None:
        self.trained.require_points((inputs.shape[1] + 1) // 2, inputs.shape[2])
        if not mask.all():
            raise ShapeError(
                "prompts of points must all be of one length; expected no padding, got some: "
                "batch prompts with the same number of points"
            )


class BridgePoints(_ReadsPoints, BridgeBackend):
    """A TransformerBridge over a regression transformer."""

    def __init__(self, trained: RegressionTransformer, name: str) -> None:
        """The bridge shares the weights of `trained`."""
        wrapped = bridge_from_huggingface(_as_language_model(trained), None, _dtype(trained))
        super().__init__(wrapped, name)
        self.trained = trained

    def _of_points(self, read_in: Float[Tensor, "batch pos d_model"]) -> Tensor:
        return self.model(read_in)


class HookedPoints(_ReadsPoints, HookedBackend):
    """A HookedTransformer with a copy of the weights of a regression transformer."""

    def __init__(self, trained: RegressionTransformer, name: str) -> None:
        """The blocks' weights are copied; the read-in stays that of `trained`.

        Raises:
            ModelError: transformer-lens is 4 or newer.
        """
        super().__init__(_hooked(trained), name)
        self.trained = trained

    def _of_points(self, read_in: Float[Tensor, "batch pos d_model"]) -> Tensor:
        positions = self.trained.backbone.wpe.weight[: read_in.shape[1]]
        return self.model(read_in + positions, start_at_layer=0)


def _require_usable(prompts: PointPrompts | PointCurves) -> None:
    if not len(prompts):
        raise TaskError(f"task {prompts.task!r}: no prompt to read; expected at least one")
    # The y of the last point is never shown.
    shown = {"x": prompts.xs, "y": prompts.ys[:, :-1]}
    for name, values in shown.items():
        broken = (~torch.isfinite(values)).nonzero()
        if len(broken):
            prompt, point, *_ = broken[0].tolist()
            raise NumericalError(
                f"task {prompts.task!r}: {name} of point {point + 1} of prompt {prompt} is not "
                "finite; expected finite points: drop such prompts, or mend what they come from"
            )


def _dtype(trained: RegressionTransformer) -> torch.dtype:
    return trained.read_in.weight.dtype


def _as_language_model(trained: RegressionTransformer) -> Any:
    """A Hugging Face GPT-2 whose only word is the prediction; it shares the weights."""
    with torch.device("meta"):
        language_model = GPT2LMHeadModel(gpt2_config(trained.sizes))
    language_model.transformer = trained.backbone
    language_model.lm_head = trained.read_out
    return language_model.eval()


def _hooked(trained: RegressionTransformer) -> Any:
    hooked_transformer = hooked_transformer_class()
    from transformer_lens import HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_gpt2_weights

    sizes, config = trained.sizes, trained.backbone.config
    cfg = HookedTransformerConfig(
        n_layers=sizes.n_layer,
        n_heads=sizes.n_head,
        d_model=sizes.d_model,
        d_head=sizes.d_model // sizes.n_head,
        d_mlp=4 * sizes.d_model,
        n_ctx=2 * sizes.n_points,
        d_vocab=1,
        act_fn=config.activation_function,
        normalization_type="LN",
        eps=config.layer_norm_epsilon,
        dtype=_dtype(trained),
        device=str(trained.read_in.weight.device),
        init_weights=False,
    )
    model = hooked_transformer(cfg, move_to_device=False)
    with torch.no_grad():
        state = convert_gpt2_weights(_as_language_model(trained), cfg)
        state["unembed.b_U"] = trained.read_out.bias
    load_unprocessed(model, state)
    return model.to(trained.read_in.weight.device, print_details=False)
