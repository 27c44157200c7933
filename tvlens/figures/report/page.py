"""The page: its sections in order, in one file that needs nothing from outside it.

A new section is a function from `Contents` to blocks, and one line in `SECTIONS`.
"""

import base64
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.document import Document
from bokeh.resources import Resources

from tvlens.figures.circuits import as_json, inline, program
from tvlens.figures.report import markup, ranks
from tvlens.figures.report.ablation import ablation
from tvlens.figures.report.contents import Block, Contents, Example, Picture
from tvlens.figures.report.heads import heads
from tvlens.figures.report.methods import error_curves, methods
from tvlens.figures.report.origin import origin
from tvlens.figures.report.overlap import overlap
from tvlens.figures.report.patching import patching
from tvlens.figures.report.words import words

Section = tuple[str, str, Callable[[Contents], list[Block]]]

SECTIONS: tuple[Section, ...] = (
    ("found", "What was asked and found", words),
    ("methods", "What vectors do", methods),
    ("errors", "Errors by number of points", error_curves),
    ("heads", "Which heads carry the tasks", heads),
    ("overlap", "How far the head sets agree", overlap),
    ("ablation", "What is lost without them", ablation),
    ("patching", "Where the information is", patching),
    ("origin", "How it was made", origin),
)
"""Anchor, heading and maker of every section; one without blocks is left out."""

# What the page may do; a request to anywhere is refused by the browser itself.
_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' 'unsafe-eval'; style-src 'unsafe-inline'; "
    "img-src data: blob:; font-src data:"
)
_HERE = Path(__file__).parent
_MODEL = re.compile(r'"p\d{4,}"')


def report_page(contents: Contents) -> str:
    """The report as HTML; the same contents give the same text."""
    document = Document()
    places: dict[str, str] = {}
    links, sections = [], []
    for anchor, title, make in SECTIONS:
        blocks = make(contents)
        if not blocks:
            continue
        parts = []
        for block in blocks:
            if isinstance(block, Picture):
                place = f"picture-{len(places)}"
                document.add_root(block.drawn)
                places[block.drawn.id] = place
                parts.append(_figure(block, place))
            else:
                parts.append(block)
        inside = "\n".join(parts)
        links.append(f'<li><a href="#{anchor}">{markup.text(title)}</a></li>')
        sections.append(
            f'<section id="{anchor}" aria-labelledby="{anchor}-title">'
            f'<h2 id="{anchor}-title">{markup.text(title)}</h2>\n{inside}</section>'
        )
    document.title = _title(contents)
    items = [{"docid": "report", "roots": places, "root_ids": list(places)}]
    held = {
        **dict(
            zip(
                ("pictures", "places"),
                _renumbered(document.to_json(deferred=False), items),
                strict=True,
            )
        ),
        "examples": as_json(_examples(contents.examples)),
        "told": as_json(_told(contents)),
    }
    return _HTML.format(
        title=escape(_title(contents)),
        policy=escape(_POLICY),
        style=(_HERE / "page.css").read_text(encoding="utf-8"),
        links="".join(links),
        sections="\n".join(sections),
        held="\n".join(
            f'<script type="application/json" id="{name}">{text}</script>'
            for name, text in held.items()
        ),
        scripts="\n".join(f"<script>{inline(script)}</script>" for script in _scripts(contents)),
    )


def _title(contents: Contents) -> str:
    return f"Attention heads of {contents.model}"


def _figure(picture: Picture, place: str) -> str:
    title, caption = markup.text(picture.title), markup.text(picture.caption)
    made = markup.paragraph(picture.made, "made")
    return (
        f'<figure><div class="drawn" id="{place}" role="img" aria-label="{escape(picture.title)}">'
        f"</div><figcaption><strong>{title}</strong> {caption}{made}</figcaption></figure>"
    )


def _renumbered(*values: Any) -> list[str]:
    """Texts of JSON with models numbered from 1: bokeh goes on counting from page to page."""
    numbers: dict[str, str] = {}

    def renumber(found: re.Match[str]) -> str:
        return numbers.setdefault(found[0], f'"p{len(numbers) + 1001}"')

    return [_MODEL.sub(renumber, as_json(value)) for value in values]


def _examples(examples: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    return {
        task: [
            {
                "tokens": each.tokens,
                "answer": each.answer,
                "unit": each.unit,
                "heads": {
                    f"{layer}.{head}": {
                        "pattern": base64.b64encode(
                            weights[np.tril_indices(len(weights))].tobytes()
                        ).decode(),
                        "direct": each.direct.get((layer, head)),
                    }
                    for (layer, head), weights in each.patterns.items()
                },
            }
            for each in several
        ]
        for task, several in examples.items()
    }


def _told(contents: Contents) -> dict[str, dict[str, str]]:
    """Every score of every head in a sentence, for the place where a head is shown."""
    found = {}
    for task, scores in ranks.by_task(contents.runs).items():
        every = dict.fromkeys(head for each in scores for head in each.table.index)
        found[task] = {
            f"{layer}.{head}": "; ".join(
                each.said((layer, head)) for each in scores if (layer, head) in each.table.index
            )
            + "."
            for layer, head in every
        }
    return found


def _scripts(contents: Contents) -> list[str]:
    """The programs of the page: bokeh, CircuitsVis where it has something to show, its own."""
    found = Resources(mode="inline", log_level="warn", components=["bokeh"]).js_raw
    if any(contents.examples.values()):
        found = [*found, program()]
    return [*found, (_HERE / "page.js").read_text(encoding="utf-8")]


_HTML = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#found">Skip to what was found</a>
<header><h1>{title}</h1></header>
<nav aria-label="Sections"><ul>{links}</ul></nav>
<main>
{sections}
</main>
<footer>Made by tvlens report. Tables can be sorted by the names of their columns.</footer>
{held}
{scripts}
</body>
</html>
"""
