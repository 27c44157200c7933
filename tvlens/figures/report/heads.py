"""Which heads carry a task: a map for each score, and what the best heads attend to."""

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from tvlens.figures.report import markup, pictures, ranks
from tvlens.figures.report.contents import Block, Contents, Head, Picture

_SHOW = "showHead({task}, [row('layer'), row('head')])"


def heads(contents: Contents) -> list[Block]:
    """Maps of every score of every task, and below them the place where a head is looked at."""
    blocks: list[Block] = []
    for task, scores in ranks.by_task(contents.runs).items():
        shown = ranks.drawn(scores)
        if shown:
            blocks += [markup.heading(task), *_maps(contents, task, scores, shown)]
    return blocks


def _maps(
    contents: Contents, task: str, scores: Sequence[ranks.Ranked], shown: Sequence[ranks.Ranked]
) -> list[Block]:
    every = list(shown[0].table.index)
    layers, numbers = ([int(head[i]) for head in every] for i in (0, 1))
    k = max(1, min(ranks.BEST, shown[0].n_heads // 4))
    columns: dict[str, Sequence[Any]] = {
        "layer": layers,
        "head": numbers,
        "told": [told(head, scores) for head in every],
    }
    for each in shown:
        table = each.table.reindex(every)
        columns[each.score.name] = table["value"].tolist()
        columns[f"best {each.score.name}"] = (table["rank"] <= k).astype(int).tolist()
    source = pictures.source_of(columns)
    pictures.chosen(source, _SHOW.format(task=_quoted(task)))
    height = 90 + max(110, 9 * (max(layers) + 1))
    maps: list[Block] = [
        Picture(
            pictures.tile_map(
                source,
                each.score.name,
                "head",
                "layer",
                height=height,
                edge=f"best {each.score.name}",
            ),
            f"{each.score.title or each.score.label}, {task}",
            f"{_capital(each.score.measured or each.score.label)} of every head, red above 0, blue "
            "below; "
            f"the {k} best are framed. Point at a head for all its scores, click it to see what "
            "it attends to.",
            each.made,
        )
        for each in shown
    ]
    return [
        '<div class="maps">',
        *maps,
        "</div>",
        _table(task, scores, shown),
        _place(contents, task, scores),
    ]


def told(head: Head, scores: Sequence[ranks.Ranked]) -> str:
    """All that is known of a head, in HTML."""
    layer, number = head
    lines = [f"<strong>layer {layer}, head {number}</strong>"]
    there = [each for each in scores if head in each.table.index]
    return "<br>".join([*lines, *(escape(each.said(head)) for each in there)])


def _table(task: str, scores: Sequence[ranks.Ranked], shown: Sequence[ranks.Ranked]) -> str:
    """The best heads by any score, for those who do not point."""
    rows = []
    for head in ranks.best_of(shown):
        cells = [markup.Cell(f"{head[0]}.{head[1]}")]
        for each in scores:
            if head not in each.table.index:
                cells.append(markup.Cell(""))
                continue
            value, low, high, rank = each.table.loc[head, ["value", "low", "high", "rank"]]
            cell = markup.number(value, low, high, digits=4)
            rest = f" ({rank:.0f})" if cell.text and each.score.heads is not None else ""
            cells.append(markup.Cell(cell.text + rest, cell.value))
        rows.append(cells)
    caption = f"The {ranks.BEST} best heads by each score, {task}: layer.head, score (rank)"
    columns = ["head", *(each.score.label for each in scores)]
    made = " ".join(dict.fromkeys(each.made for each in scores))
    return markup.folded(
        f"The best heads of {task} in numbers", markup.table(caption, columns, rows, made)
    )


def _place(contents: Contents, task: str, scores: Sequence[ranks.Ranked]) -> str:
    """Where a head is shown, and a button for every one that can be."""
    examples = contents.examples.get(task, ())
    if not examples:
        said = contents.unseen.get(task, f"No prompts of {task} were looked at.")
        return (
            f'<div class="attention" data-task="{escape(task)}">{markup.paragraph(said)}'
            '<div class="shown" aria-live="polite"></div></div>'
        )
    buttons = "".join(
        f'<button type="button" data-head="{layer}.{head}" aria-pressed="false">{layer}.{head}'
        "</button>"
        for layer, head in sorted(examples[0].patterns)
    )
    return (
        f'<div class="attention" data-task="{escape(task)}">'
        f'<p class="how">What a head attends to, {escape(task)}; click a map, or choose one of '
        "the best:</p>"
        f'<div class="choices" role="group" aria-label="Heads of {escape(task)}">{buttons}</div>'
        '<div class="shown" aria-live="polite"></div></div>'
    )


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]


def _quoted(name: str) -> str:
    """A text of JavaScript."""
    return json.dumps(name).replace("<", "\\u003c")
