"""Text layouts by name, from a file, or as a chat model was trained on."""

import json
from dataclasses import asdict, fields
from itertools import takewhile
from os.path import isfile
from pathlib import Path
from typing import Any

from tvlens.errors import TaskError, UnknownNameError
from tvlens.tasks.text.formats import shown
from tvlens.tasks.text.prompts import Template

TEMPLATES: dict[str, Template] = {
    # Todd et al. (2024)
    "question-answer": Template(),
    "input-output": Template(query_prefix="Input: ", answer_prefix="Output:"),
    # Hendel et al. (2023), with a space on either side of the arrow
    "arrow": Template(
        query_prefix="", field_separator=" ", answer_prefix="->", pair_separator="\n"
    ),
}
"""Layouts by name."""

_QUERY, _ANSWER, _LAST = "tvlens-query", "tvlens-answer", "tvlens-last"


def read_template(given: str | Path) -> Template:
    """The layout of this name, or in this JSON file of the fields of a `Template`.

    Raises:
        UnknownNameError: there is neither.
        TaskError: the file cannot be read, or holds something else.
    """
    if str(given) in TEMPLATES:
        return TEMPLATES[str(given)]
    path = Path(given)
    if not isfile(path):
        raise UnknownNameError(
            f"unknown template {shown(str(given))}; expected one of {', '.join(TEMPLATES)}, chat, "
            "or a JSON file"
        )
    names = [field.name for field in fields(Template)]
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise TaskError(f"template file {path} cannot be read as JSON: {error}") from error
    known = isinstance(found, dict) and not set(found) - set(names)
    if not known or not all(isinstance(text, str) for text in found.values()):
        raise TaskError(
            f"template file {path}: expected an object of texts under {', '.join(names)} (left out "
            f"where they are those of the default), such as {json.dumps(asdict(Template()))[:60]}…"
        )
    return Template(**found)


def chat_template(tokenizer: Any, *, instruction: str | None = None) -> Template:
    """The layout of a chat: every input a turn of the user, every output one of the assistant.

    Args:
        tokenizer: a tokenizer with a chat template.
        instruction: what the system says before; None for what the chat template puts there.

    Raises:
        TaskError: the tokenizer has no chat template, or lays a chat out as no `Template` can.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise TaskError(
            "the model's tokenizer has no chat template; choose another layout, such as one of "
            f"{', '.join(TEMPLATES)}"
        )
    turns = [("user", _QUERY), ("assistant", _ANSWER), ("user", _LAST)]
    if instruction is not None:
        turns.insert(0, ("system", instruction))
    chat = [{"role": role, "content": text} for role, text in turns]
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        head, rest = text.split(_QUERY)
        middle, rest = rest.split(_ANSWER)
        between, end = rest.split(_LAST)
    except Exception as error:
        raise TaskError(
            f"the tokenizer's chat template cannot be taken apart ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); write the layout down as a Template"
        ) from error
    begin = tokenizer.bos_token
    if begin and head.startswith(begin) and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        # The lens puts it there.
        head = head.removeprefix(begin)
    same = zip(reversed(head), reversed(between), strict=False)
    length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], same))
    query_prefix = between[len(between) - length :]
    if middle != end:
        raise TaskError(
            "the tokenizer's chat template lays out the last turn otherwise than those before, "
            "which no Template does; write the layout down as a Template"
        )
    return Template(
        query_prefix=query_prefix,
        answer_prefix=middle,
        field_separator="",
        pair_separator=between.removesuffix(query_prefix),
        answer_space="",
        opening=head.removesuffix(query_prefix),
    )
