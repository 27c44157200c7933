"""Attention patterns and coloured tokens by CircuitsVis, in pieces of HTML that bring its program
along: they work without a network. What they say stands beside them in words, too, for where no
programs run.
"""

import json
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any
from uuid import uuid4

import circuitsvis
import numpy as np
from jaxtyping import Float

from tvlens.figures.style import BLUE, RED

NAMED = 5
"""Tokens that are named in words, at most."""

_LEAST = 0.005


def program() -> str:
    """The text of CircuitsVis, which defines a global `CircuitsVis`."""
    return (Path(circuitsvis.__file__).parent / "dist" / "cdn" / "iife.js").read_text("utf-8")


def inline(script: str) -> str:
    """A program that may stand in a page: no text in it ends it, and it looks for no other file."""
    script = re.sub(r"//# sourceMappingURL=\S+\s*$", "", script)
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def as_json(value: Any) -> str:
    """JSON that may stand in a script: none of it can end it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=_plain)
    return text.replace("<", "\\u003c")


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is no JSON")


def visible(token: str) -> str:
    """A token on one line."""
    return token.replace("\n", "↵")


def attention_patterns(
    prompts: Sequence[tuple[Sequence[str], Mapping[str, Float[np.ndarray, "_pos _key"]]]],
) -> str:
    """What heads attend to, one picture for each prompt with all its heads.

    Args:
        prompts: the tokens of each prompt, and the weights from every token (rows) to every token
            by name of the head.
    """
    parts, calls = [], []
    for tokens, patterns in prompts:
        place = _place()
        shown = list(map(visible, tokens))
        words = "".join(
            f"<li>{escape(name)}: {escape(_strongest(shown, weights[-1]))}</li>"
            for name, weights in patterns.items()
        )
        parts.append(
            f"<p>{escape(''.join(shown))}</p><p>From the last token, most attention to:</p>"
            f'<ul>{words}</ul><div id="{place}"></div>'
        )
        given = {
            "attention": [_rounded(weights) for weights in patterns.values()],
            "tokens": shown,
            "attentionHeadNames": list(patterns),
            "maxValue": 1,
            "minValue": -1,
            "positiveColor": BLUE,
            "maskUpperTri": True,
        }
        calls.append((place, "AttentionHeads", given))
    return _page(parts, calls)


def coloured_tokens(
    tokens: Sequence[str], values: Mapping[str, Float[np.ndarray, " _token"]]
) -> str:
    """The tokens of a prompt coloured by numbers: red above 0, blue below, and all on one scale.

    Tokens without a finite number stay without a colour.

    Args:
        tokens: the tokens.
        values: a number for each, by what it measures.
    """
    shown = list(map(visible, tokens))
    finite = {name: np.where(np.isfinite(own), own, 0.0) for name, own in values.items()}
    reach = max((float(np.abs(own).max(initial=0)) for own in finite.values()), default=0) or 1.0
    parts, calls = [], []
    for name, own in finite.items():
        place = _place()
        lacking = int((~np.isfinite(values[name])).sum())
        rest = f"; {lacking} tokens have none" if lacking else ""
        words = _largest(shown, own)
        title = f"{name}: " if name else ""
        parts.append(f'<p>{escape(f"{title}{words}{rest}")}</p><div id="{place}"></div>')
        given = {
            "tokens": shown,
            "values": [float(f"{each:.6g}") for each in own],
            "minValue": -reach,
            "maxValue": reach,
            "negativeColor": BLUE,
            "positiveColor": RED,
        }
        calls.append((place, "ColoredTokens", given))
    return _page(parts, calls)


def _place() -> str:
    """The name of a place that no other display in the page has."""
    return f"tvlens-{uuid4().hex[:12]}"


def _page(parts: Sequence[str], calls: Sequence[tuple[str, str, dict[str, Any]]]) -> str:
    drawn = "\n".join(
        f"CircuitsVis.render({as_json(place)}, CircuitsVis.{kind}, {as_json(given)});"
        for place, kind, given in calls
    )
    # In a function: another display in the same page has a CircuitsVis of its own.
    script = f"<script>(() => {{\n{inline(program())}\n{drawn}\n}})();</script>"
    return f'<div class="tvlens">{"".join(parts)}{script}</div>'


def _rounded(weights: Float[np.ndarray, "_pos _key"]) -> list[list[float]]:
    rounded: list[list[float]] = np.nan_to_num(weights).astype(float).round(3).tolist()
    return rounded


def _strongest(tokens: Sequence[str], weights: Float[np.ndarray, " _key"]) -> str:
    """Where the last token looks most, in words."""
    order = np.argsort(-np.nan_to_num(weights), kind="stable")[:NAMED].tolist()
    found = [f"“{tokens[i].strip()}” ({i}) {weights[i]:.2f}" for i in order if weights[i] > _LEAST]
    return ", ".join(found) or "nothing"


def _largest(tokens: Sequence[str], values: Float[np.ndarray, " _token"]) -> str:
    """Tokens whose numbers are furthest from 0, in words."""
    order = np.argsort(-np.abs(values), kind="stable")[:NAMED].tolist()
    return ", ".join(f"“{tokens[i].strip()}” ({i}) {values[i]:.3g}" for i in order if values[i])
