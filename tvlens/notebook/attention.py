"""What heads attend to, and tokens coloured by numbers, in one call each."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float
from torch import Tensor, as_tensor

from tvlens.errors import ModelError, ShapeError, TaskError
from tvlens.figures.circuits import attention_patterns, coloured_tokens
from tvlens.lens.attention import attention_of, prompt_tokens
from tvlens.lens.lens import Lens
from tvlens.notebook.pieces import Shown
from tvlens.scores.ranking import HasHeadScores, Head, top_heads
from tvlens.tasks.base import PromptSet
from tvlens.tasks.text.prompts import Prompt, Prompts

Asked: TypeAlias = str | Prompt | PromptSet | Sequence[str]
"""Prompts as one may give them: a text, a prompt, several texts, or prompts of a task."""

Numbers: TypeAlias = Sequence[float | int] | Float[Tensor, " _token"] | Float[np.ndarray, " _token"]

MOST_PROMPTS = 8
"""Prompts that are shown at once, at most: more could not be read."""


def show_attention(
    lens: Lens,
    prompts: Asked,
    heads: Sequence[Head] | HasHeadScores,
    *,
    k: int = 4,
) -> Shown:
    """What chosen heads attend to on prompts: a picture that answers to a pointer, by CircuitsVis.

    It needs no network: it brings its program along, a megabyte and a half for each display.

    Example:
        >>> tvlens.show_attention(lens, "go went see", [(20, 5)])  # doctest: +SKIP
        >>> tvlens.show_attention(lens, task.prompts("test", n=1), aie)  # doctest: +SKIP

    Args:
        lens: the model.
        prompts: a text, several, one prompt, or prompts of a task.
        heads: heads as (layer, head), or what scores heads, such as indirect effects or a Learnable
            Task Vector, of which the k best are shown.
        k: how many of the best.

    Returns:
        What a notebook shows where it is a cell's last line.

    Raises:
        ShapeError: there is no head, the model lacks one, or the scores are of another model; or k
            is below 1 or above the number of heads.
        TaskError: there is no prompt, or there are more than `MOST_PROMPTS`.
        UnknownNameError: the model has no attention patterns that could be read.
        ModelError: the model does not read text.
    """
    asked = _prompts(lens, prompts)
    if len(asked) > MOST_PROMPTS:
        raise TaskError(
            f"attention on {len(asked)} prompts was asked for, of which {MOST_PROMPTS} can be read "
            f"at once; give some of them, such as prompts[:{MOST_PROMPTS}]"
        )
    chosen = _heads(lens, heads, k)
    pages = [
        (each.tokens, {f"layer {n}, head {j}": x.numpy() for (n, j), x in each.patterns.items()})
        for each in attention_of(lens, asked, chosen)
    ]
    named = ", ".join(map(str, chosen))
    return Shown(attention_patterns(pages), f"attention of {named} on {len(asked)} prompts")


def show_tokens(
    lens: Lens, prompt: Asked, values: Numbers | Mapping[str, Numbers], *, label: str = ""
) -> Shown:
    """The tokens of a prompt coloured by a number for each: red above 0, blue below.

    It needs no network: it brings its program along, a megabyte and a half for each display.

    Example:
        >>> effects = tvlens.patch(lens, clean, shuffled, positions="all")  # doctest: +SKIP
        >>> tvlens.show_tokens(lens, shuffled, effects.mean[12, 0])  # doctest: +SKIP

    Args:
        lens: the model.
        prompt: a text, or one prompt.
        values: a number for each token, special ones before the prompt included; or several such
            rows by what they measure, on one scale. NaN leaves a token without a colour.
        label: what the numbers measure.

    Returns:
        What a notebook shows where it is a cell's last line.

    Raises:
        ShapeError: there are not as many numbers as tokens, or no row of numbers.
        TaskError: there is no prompt, or there are several.
        ModelError: the model does not read text.
    """
    asked = _prompts(lens, prompt)
    if len(asked) != 1:
        raise TaskError(
            f"tokens of {len(asked)} prompts cannot be coloured by one row of numbers; expected "
            "one prompt, such as prompts[:1]"
        )
    (tokens,) = prompt_tokens(lens, asked)
    rows = values if isinstance(values, Mapping) else {label: values}
    if not rows:
        raise ShapeError(
            "values hold no row of numbers; expected a number for each of the prompt's "
            f"{len(tokens)} tokens"
        )
    found = {name: as_tensor(row).detach().cpu().double().numpy() for name, row in rows.items()}
    for name, row in found.items():
        if row.shape != (len(tokens),):
            several = f" {name!r}" if name else ""
            first = ", ".join(map(repr, tokens[:3]))
            raise ShapeError(
                f"values{several} have shape {row.shape}, the prompt has {len(tokens)} tokens "
                f"({first}, …); expected ({len(tokens)},): a number for each token, special ones "
                "before the prompt included"
            )
    return Shown(coloured_tokens(tokens, found), f"{len(tokens)} tokens by {', '.join(rows)}")


def _prompts(lens: Lens, given: Asked) -> Any:
    """Prompts that the lens reads; texts become tokens as they are, behind what it puts first."""
    if isinstance(given, Prompt):
        return Prompts("prompt", "test", given.kind, len(given.demos), 0, (given,))
    if not isinstance(given, str) and isinstance(given, PromptSet):
        return given
    texts = [given] if isinstance(given, str) else list(given)
    if not texts or not all(texts):
        raise TaskError(
            "no prompt was given, or an empty one; expected a text, several, or prompts of a task"
        )
    lens.require_text("attention to the tokens of a text")
    tokenizer = lens.backend.tokenizer
    if tokenizer is None:
        raise ModelError(
            f"{lens.name!r} has no tokenizer that could read {texts[0][:30]!r}; give tokens: "
            "tvlens.tasks.Prompts.of_tokens(...)"
        )
    rows = tokenizer(texts, add_special_tokens=False).input_ids
    return Prompts.of_tokens(
        [[*lens.prefix, *row] for row in rows], [row[-1:] for row in rows], task="texts"
    )


def _heads(lens: Lens, given: Sequence[Head] | HasHeadScores, k: int) -> list[Head]:
    """The heads that are asked for, each once."""
    if isinstance(given, HasHeadScores):
        shape = tuple(given.scores.shape)
        if shape != (lens.n_layer, lens.n_head):
            raise ShapeError(
                f"scores are of {shape} (layer, head), and {lens.name!r} has "
                f"{(lens.n_layer, lens.n_head)}; give scores of this model's heads"
            )
        return top_heads(given, k)
    try:
        heads = list(dict.fromkeys((int(layer), int(head)) for layer, head in given))
    except (TypeError, ValueError) as error:
        raise ShapeError(
            f"heads are {str(given)[:60]}; expected pairs of (layer, head), such as [(0, 0)]"
        ) from error
    if not heads:
        raise ShapeError(
            f"no head is given; expected one or more of {lens.name!r} as (layer, head), such as "
            "[(0, 0)], or scores of heads"
        )
    return heads
