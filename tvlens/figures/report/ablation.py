"""What a model loses without its best heads: a curve a score, before random sets of heads."""

from pandas import DataFrame

from tvlens.figures.report.contents import Block, Contents, Picture, RunTables
from tvlens.figures.report.markup import heading, with_ends
from tvlens.figures.report.pictures import CYCLE, Band, Line, lines
from tvlens.scores.catalogue import SCORES

_COLUMNS = ("task", "score", "rule", "set_to", "positions", "share", "k", "draw", "metric")
_LEFT_OUT = ("cross_entropy", "exact_match")
_RULES = {
    "top": "without the best heads",
    "exclusive": "without the best heads that are not the other score's",
    "keep": "with the best heads alone",
}


def ablations_of(run: RunTables) -> DataFrame | None:
    """The table of ablations that a run holds."""
    return run.table("ablation", *_COLUMNS, "value", "ci_low", "ci_high")


def ablation(contents: Contents) -> list[Block]:
    """A picture for each task, rule and main measure."""
    blocks: list[Block] = []
    for run in contents.runs:
        table = ablations_of(run)
        if table is None:
            continue
        shown = table[~table["metric"].str.endswith("_change") & (table["rule"] != "random")]
        shown = shown[~shown["metric"].isin(_LEFT_OUT)]
        for task, rows in shown.groupby("task", sort=False):
            blocks += [heading(task), '<div class="maps">']
            keys = ["rule", "set_to", "positions", "metric"]
            for key, part in rows.groupby(keys, sort=False):
                there = table[table["task"] == task]
                blocks += _pictures(run, str(task), key, part, there)
            blocks.append("</div>")
    return blocks


def _pictures(
    run: RunTables, task: str, key: tuple[str, ...], part: DataFrame, there: DataFrame
) -> list[Block]:
    rule, set_to, positions, metric = key
    if part["share"].nunique() < 2:
        return []
    same = (there["set_to"] == set_to) & (there["positions"] == positions)
    drawn = there[same & (there["metric"] == metric) & (there["rule"] == "random")]
    bands = [] if rule == "keep" else _band(drawn, part)
    words = metric.replace("_", " ")
    way = f"heads set to {set_to}, {'the query' if positions == 'query' else 'every position'}"
    return [
        Picture(
            lines(
                _curves(part),
                "share of heads that stay" if rule == "keep" else "share of heads ablated",
                words,
                bands=bands,
                logarithmic=metric.startswith("squared_error"),
            ),
            f"{task}, {words} {_RULES.get(rule, rule)}",
            f"{way.capitalize()}; intervals of 95% over prompts."
            + (" The grey band holds 95% of random sets in the same layers." if bands else "")
            + " Point at a curve for its numbers.",
            run.made("ablation"),
        )
    ]


def _band(drawn: DataFrame, part: DataFrame) -> list[Band]:
    if drawn.empty:
        return []
    start = part[part["share"] == 0].head(1)
    ends = [drawn.groupby("share")["value"].quantile(q) for q in (0.025, 0.975)]
    x = [*start["share"], *ends[0].index]
    low, high = ([*start["value"], *each] for each in ends)
    return [Band("random, same layers, 95%", x, low, high)]


def _curves(part: DataFrame) -> list[Line]:
    looks = {str(score.heads): score for score in SCORES if score.heads}
    found = []
    for i, (name, curve) in enumerate(part.groupby("score", sort=False)):
        curve = curve.sort_values("share")
        look = looks.get(str(name))
        label = str(name) if look is None else look.label
        told = [
            f"{label}\n{row.k} heads ({row.share:.0%}): "
            + with_ends(row.value, row.ci_low, row.ci_high, digits=3)
            for row in curve.itertuples()
        ]
        x, y, low, high = (
            curve[column].tolist() for column in ("share", "value", "ci_low", "ci_high")
        )
        colour = CYCLE[i % len(CYCLE)] if look is None else look.colour
        dash = "-" if look is None else look.dash
        found.append(Line(label, x, y, low, high, colour, dash, told))
    return found
