"""The one interface through which tvlens sees a TransformerLens model."""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tvlens.errors import ModelError, ShapeError, TaskError
from tvlens.models.anatomy import Anatomy
from tvlens.models.batch import Batch
from tvlens.models.encode import encode_text, encode_tokens, ends_of_texts
from tvlens.models.interrupts import surely
from tvlens.models.roles import Roles, no_roles, roles_of_text
from tvlens.tasks.text.prompts import Prompts, TokenPrompts

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
HookFunction = Callable[..., Tensor | None]

_SHORT, _LONGEST = 24, 256
# What a model does otherwise from some distance between two positions on.
_DISTANCES = ("sliding_window", "window_size", "attention_chunk_size")


def _wish(parameter: nn.Parameter, grad: bool) -> None:
    # Parameters made in inference mode keep their wish, which nothing heeds.
    if not parameter.is_inference():
        parameter.requires_grad_(grad)


def telling_length(config: Any) -> int:
    """A length of prompts at which windows of attention show.

    Longer than twice the longest window; windows of 127 positions and more are left out, because
    such prompts would take long on large models.

    Args:
        config: configuration of a model.
    """
    distances = [getattr(config, name, None) for name in _DISTANCES]
    within = [d for d in distances if isinstance(d, int) and 2 * d + 2 <= _LONGEST]
    longest = max([_SHORT, *(2 * d + 2 for d in within)])
    room = getattr(config, "max_position_embeddings", None) or getattr(config, "n_ctx", None)
    return min(longest, room or longest)


class Backend(ABC):
    """A frozen transformer with TransformerLens hook points.

    Attributes:
        model: the HookedTransformer or TransformerBridge underneath.
        name: what the model is called in tables and manifests.
        tokenizer: turns prompts into tokens; None where the model has none.
    """

    kind: str

    def __init__(self, model: Any, name: str, tokenizer: Any = None) -> None:
        """A backend over `model`, with its own tokenizer unless another one is given."""
        self.model = model
        self.name = name
        self.tokenizer = model.tokenizer if tokenizer is None else tokenizer

    @property
    def n_layer(self) -> int:
        return int(self.model.cfg.n_layers)

    @property
    def n_head(self) -> int:
        return int(self.model.cfg.n_heads)

    @property
    def n_kv_head(self) -> int:
        """Heads of keys and values, fewer than those of queries under grouped-query attention."""
        return int(getattr(self.model.cfg, "n_key_value_heads", None) or self.n_head)

    @property
    def d_head(self) -> int:
        return int(self.model.cfg.d_head)

    @property
    def d_model(self) -> int:
        return int(self.model.cfg.d_model)

    @property
    def d_vocab(self) -> int:
        return int(self.model.cfg.d_vocab)

    @property
    def n_ctx(self) -> int:
        return int(self.model.cfg.n_ctx)

    @property
    def device(self) -> torch.device:
        return self.w_o.device

    @property
    def dtype(self) -> torch.dtype:
        return self.w_o.dtype

    @property
    def config(self) -> Any:
        """The configuration that says what the model does."""
        return self.model.cfg

    @property
    @abstractmethod
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that have attention heads, in order; the others mix positions by other means."""

    @property
    @abstractmethod
    def w_o(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output projection of every head, zero in layers without heads."""

    @property
    @abstractmethod
    def b_o(self) -> Float[Tensor, "layer d_model"]:
        """Output bias of every attention layer, zero where there is none."""

    def as_heads(self, z: Float[Tensor, "batch pos *given"]) -> Float[Tensor, "batch pos *heads"]:
        """What a hook point at the heads' activations gives, head by head.

        Values can be wider than queries, as in multi-head latent attention, and TransformerLens
        cuts both by the width of queries.
        """
        sizes = (self.n_head, self.d_head)
        same = z[0, 0].numel() == self.n_head * self.d_head
        return z.flatten(2).unflatten(-1, sizes) if same else z

    def added_hook(self, layer: int) -> str:
        """Name of the hook point at what attention adds to the residual stream, bias included."""
        return f"blocks.{layer}.hook_attn_out"

    @abstractmethod
    def projected_hooks(self, layer: int) -> tuple[str, ...]:
        """Names of hook points whose product is what the output projection gives, bias included.

        They are read where a block scales that before it adds it: by a norm behind the attention,
        as Gemma 2 and OLMo 2 do, or by a constant, as Granite does. Empty where it cannot be read.
        """

    def z_hook(self, layer: int) -> str:
        """Name of the hook point at the heads' activations."""
        return f"blocks.{layer}.attn.hook_z"

    def residual_hook(self, layer: int) -> str:
        """Name of the hook point at the block's output."""
        return f"blocks.{layer}.hook_resid_post"

    @cached_property
    def hook_points(self) -> dict[str, Any]:
        """Every hook point of the model, by each of its names; a bridge takes long to list them."""
        return dict(self.model.hook_dict)

    @contextmanager
    def hooks(self, hooks: Sequence[tuple[str, HookFunction]]) -> Iterator[None]:
        """A context in which `hooks`, pairs of a hook point's name and a function, are attached.

        Names of hook points that do not exist are passed over: their functions are never called.
        """
        found = [(self.hook_points.get(name), function) for name, function in hooks]
        there = [(point, function) for point, function in found if point is not None]
        self.model.context_level += 1
        level = self.model.context_level
        try:
            for point, function in there:
                point.add_hook(function, level=level)
            yield
        finally:
            for point, _ in there:
                point.remove_hooks(level=level)
            self.model.context_level -= 1

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of the model underneath."""
        return list(self.model.parameters())

    @cached_property
    def digest(self) -> str:
        """What tells these weights and this tokenizer from others.

        Of every weight its shape, the sum of the bits of all its numbers and 64 of them; of the
        tokenizer all it says of itself. Any one number that is changed alters it.
        """
        found = sha256()
        for weight in self.parameters():
            bits = weight.detach().flatten().view(_BITS[weight.element_size()])
            few = bits[:: max(1, len(bits) // 64)][:64].cpu()
            total = int(bits.sum(dtype=torch.int64))
            found.update(f"{tuple(weight.shape)} {weight.dtype} {total}".encode())
            found.update(few.numpy().tobytes())
        inner = getattr(self.tokenizer, "backend_tokenizer", None)
        if inner is not None:
            found.update(inner.to_str().encode())
        elif self.tokenizer is not None:
            found.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        return found.hexdigest()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """The model in evaluation mode without parameter gradients; both are restored on exit."""
        modes = [(module, module.training) for module in self.model.modules()]
        wanted = [(parameter, parameter.requires_grad) for parameter in self.parameters()]
        # To set the mode of every module takes long, and most models are in evaluation mode.
        trains = any(training for _, training in modes)

        def restore() -> None:
            if trains:
                # A TransformerBridge holds the original model outside of its own modules.
                self.model.train(modes[0][1])
                for module, training in modes:
                    module.training = training
            for parameter, grad in wanted:
                _wish(parameter, grad)

        with surely(restore):
            if trains:
                self.model.eval()
            for parameter, _ in wanted:
                _wish(parameter, False)
            yield

    def encode(self, prompts: Any, *, prefix: Sequence[int]) -> Batch:
        """The prompts as padded tokens with their answers.

        Raises:
            TaskError: an answer tokenises to nothing, or a prompt exceeds the context or holds a
                token that the model does not have.
            ModelError: the prompts are not text, or there is no tokenizer for them.
        """
        if isinstance(prompts, TokenPrompts):
            return encode_tokens(
                prompts.rows, prompts.answers, n_ctx=self.n_ctx, d_vocab=self.d_vocab
            )
        texts = self._require_text(prompts)
        return encode_text(
            self.tokenizer,
            texts.texts,
            texts.continuations,
            prefix=prefix,
            n_ctx=self.n_ctx,
            d_vocab=self.d_vocab,
        )

    def with_answers(self, prompts: Any, batch: Batch) -> Batch:
        """Encoded prompts with their answers behind them, and what ends these: whole answers.

        An answer ends where the first token of what the layout puts behind it follows; prompts that
        are tokens have no such end.

        Args:
            prompts: the prompts.
            batch: what `encode` makes of them.

        Raises:
            TaskError: prompts with answers are longer than the context, or an end is no token of
                the model.
        """
        if isinstance(prompts, Prompts):
            texts = [
                text + several[0]
                for text, several in zip(prompts.texts, prompts.continuations, strict=True)
            ]
            behind = [prompt.template.behind_answer for prompt in prompts]
            ends = ends_of_texts(self.tokenizer, texts, behind)
        else:
            ends = [[]] * len(batch)
        found = batch.with_answers(ends)
        beyond = [token for end in ends for token in end if token >= self.d_vocab]
        if beyond or found.inputs.shape[1] > self.n_ctx:
            end = f", and an end of an answer the token {beyond[0]}" if beyond else ""
            raise TaskError(
                f"task {prompts.task!r}: the longest prompt and the longest answer have "
                f"{found.inputs.shape[1]} tokens{end}; {self.name!r} has {self.n_ctx} positions, "
                f"and tokens up to {self.d_vocab - 1}; use fewer shots or another layout, or "
                "answer='first'"
            )
        if found.n_read == 1:
            warnings.warn(
                f"task {prompts.task!r}: every answer is one token that nothing ends, so whole "
                "answers are first tokens; give the layout a separator for an end to be learnt",
                stacklevel=2,
            )
        return found

    def roles(self, prompts: Any, *, prefix: Sequence[int]) -> Roles:
        """The role of every token of each prompt, those of `prefix` included, in order.

        Raises:
            TaskError: the prompts have no roles.
            ModelError: the prompts are not text, or no tokenizer says what its tokens stand for.
        """
        if isinstance(prompts, TokenPrompts):
            raise no_roles(prompts.task, "they are tokens already")
        return roles_of_text(self.tokenizer, self._require_text(prompts), prefix=prefix)

    def _require_text(self, prompts: Any) -> Prompts:
        if isinstance(prompts, Prompts):
            return prompts
        raise ModelError(
            f"model {self.name!r} reads text, not {type(prompts).__name__}; expected prompts "
            "of a text task, such as tvlens.tasks.load(NAME).prompts(...)"
        )

    def short_prompts(self) -> Batch:
        """Two prompts of random tokens and different lengths, for checking the model."""
        generator = torch.Generator().manual_seed(0)
        n = telling_length(self.config)
        tokens = torch.randint(self.d_vocab, (2, n), generator=generator).tolist()
        return Batch.pad([tokens[0], tokens[1][: max(1, n - 2)]], [[[0]], [[0]]]).to(self.device)

    def repeated_prompts(
        self, n: int, length: int, *, prefix: Sequence[int], seed: int
    ) -> tuple[Batch, int]:
        """Random tokens r1 … rn r1 … rn behind `prefix`, and the columns until they return.

        Tokens are drawn without replacement, special ones not at all, so that each has one first
        occurrence. They end with the last column.

        Args:
            n: number of prompts.
            length: how many tokens are repeated.
            prefix: special tokens put before every prompt.
            seed: seed of the draws.

        Raises:
            ShapeError: there are not as many tokens, or positions.
        """
        special = set() if self.tokenizer is None else set(self.tokenizer.all_special_ids)
        known = self.d_vocab if self.tokenizer is None else min(self.d_vocab, len(self.tokenizer))
        drawn = torch.tensor([token for token in range(known) if token not in special])
        most = min(len(drawn), (self.n_ctx - len(prefix)) // 2)
        if not (n >= 1 and 2 <= length <= most):
            raise ShapeError(
                f"{n} prompts of {length} tokens and the same again asked of {self.name!r}, which "
                f"has {len(drawn)} tokens to draw and {self.n_ctx} positions; expected at least "
                f"one prompt of 2 to {most} tokens"
            )
        generator = torch.Generator().manual_seed(seed)
        first = [drawn[torch.randperm(len(drawn), generator=generator)[:length]] for _ in range(n)]
        rows = [[*prefix, *tokens.tolist(), *tokens.tolist()] for tokens in first]
        # What would follow is the first of them once more.
        answers = [[[int(tokens[0])]] for tokens in first]
        return Batch.pad(rows, answers), length

    def forward(
        self, inputs: Tensor, mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of a whole forward pass."""
        return self.model(inputs, attention_mask=mask.long())

    def embed(
        self, inputs: Tensor, mask: Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """Residual stream before block 0, positions included, exactly as the model makes it."""
        return self.model(inputs, attention_mask=mask.long(), stop_at_layer=0)

    def unembed(
        self, residual: Float[Tensor, "batch pos d_model"]
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of residual streams after the last block."""
        logits = self.logits_of(self.final_norm(residual))
        cap = self.logit_cap
        return logits if cap is None else cap * (logits / cap).tanh()

    @abstractmethod
    def final_norm(
        self, residual: Float[Tensor, "*rows d_model"]
    ) -> Float[Tensor, "*rows d_model"]:
        """What logits are read off, of residual streams after the last block.

        Raises:
            ModelError: TransformerLens does not show the norm.
        """

    @abstractmethod
    def logits_of(self, normed: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_vocab"]:
        """Logits before any cap, linear in what the final norm gives but for a constant."""

    @property
    @abstractmethod
    def logit_cap(self) -> float | None:
        """Logits become cap tanh(logits / cap), which comes last; None leaves them."""

    @abstractmethod
    def anatomy(self) -> Anatomy:
        """The blocks taken apart for replay.

        Raises:
            UnknownArchitectureError: the model has a part that replay does not know.
        """
