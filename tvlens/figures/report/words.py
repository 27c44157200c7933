"""What was asked and found, in plain words with numbers: ten lines at most.

A further sentence is a function from `Contents` to lines, and one line in `SAYINGS`.
"""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
from pandas import DataFrame

from tvlens.figures import grids
from tvlens.figures.report import markup, ranks
from tvlens.figures.report.ablation import ablations_of
from tvlens.figures.report.contents import Block, Contents
from tvlens.figures.report.markup import percent, several, short, with_ends
from tvlens.figures.report.methods import (
    LOOKS,
    label_of,
    points_of,
    text_of,
    trained_points,
)
from tvlens.figures.report.overlap import agreement_of
from tvlens.figures.report.patching import effects_of
from tvlens.scores.catalogue import SCORES
from tvlens.vectors.catalogue import METHODS, variants

LINES = 10
_NAMED = 3
_CONTROLS = {method.name for method in METHODS if method.family == "control"}


def words(contents: Contents) -> list[Block]:
    """The lines, and above them what the runs lack."""
    notices = [markup.paragraph(line, "notice") for line in lacking(contents)]
    lines = [line for say in SAYINGS for line in say(contents)]
    return [*notices, markup.listed(lines[:LINES])]


def lacking(contents: Contents) -> list[str]:
    """What is missing of runs that are not finished, a sentence each."""
    found = []
    for run in contents.runs:
        if run.finished:
            continue
        state = run.manifest.get("state")
        lacks = several([f"{name}.csv" for name in run.missing]) if run.missing else "no table"
        found.append(
            f"The run `{run.name}` is not finished (its state is {state}): it lacks {lacks}. What "
            "is shown here is what it holds; the same command goes on from there."
        )
    return found


def _asked(contents: Contents) -> list[str]:
    scores = ranks.by_task(contents.runs)
    results = [table for run in contents.runs if (table := text_of(run)) is not None]
    tasks = list(scores) or list(dict.fromkeys(t for table in results for t in table["task"]))
    tables = [table for run in contents.runs if (table := effects_of(run)) is not None]
    tasks = tasks or list(dict.fromkeys(t for table in tables for t in table["task"]))
    heads = max((each.n_heads for some in scores.values() for each in some), default=0)
    of = f"which of the {heads} attention heads of {contents.model}" if heads else "which parts"
    if not heads:
        of += f" of {contents.model}"
    by = [each.score.label for each in ranks.drawn(next(iter(scores.values()), []))]
    told = f", by {several(by)}" if by else ""
    named = f": {several(tasks)}" if 0 < len(tasks) < 8 else ""
    return [f"Asked: {of} carry {len(tasks)} task{'' if len(tasks) == 1 else 's'}{named}{told}."]


def _text(contents: Contents) -> list[str]:
    """Accuracy with examples, without, and with the best vector."""
    lines = []
    for run in contents.runs:
        results = text_of(run)
        if results is None or not (results["metric"] == "accuracy").any():
            continue
        means = _accuracies(results)
        tasks = results["task"].nunique()
        over = f", means over {tasks} tasks" if tasks > 1 else ""
        clean = means.get(("icl", "clean"))
        zero, shuffled = (means.get(("none", prompt)) for prompt in ("zero", "shuffled"))
        if clean is not None and zero is not None and shuffled is not None:
            lines.append(
                f"With right examples in the prompt the model answers {percent(clean)} of test "
                f"prompts, without examples {percent(zero)}, with shuffled labels "
                f"{percent(shuffled)} (first token{over})."
            )
        lines += _best(means)
    return lines


def _accuracies(results: DataFrame) -> dict[tuple[str, str], float]:
    rows = results[results["metric"] == "accuracy"]
    return {
        (str(method), str(prompt)): float(value)
        for (method, prompt), value in rows.groupby(["method", "prompt"])["value"].mean().items()
    }


def _best(means: Mapping[tuple[str, str], float]) -> list[str]:
    zero = {m: x for (m, p), x in means.items() if p == "zero" and m not in ("none", "icl")}
    made = {m: x for m, x in zero.items() if m not in _CONTROLS and m in LOOKS}
    if not made:
        return []
    ranked = sorted(made, key=lambda m: -made[m])
    first = ranked[0]
    line = (
        f"On prompts without examples the best vector is {label_of(first)}: {percent(made[first])}"
    )
    shuffled = means.get((first, "shuffled"))
    if shuffled is not None:
        line += f" ({percent(shuffled)} with shuffled labels)"
    others = [f"{label_of(m)} {percent(made[m])}" for m in ranked[1:5]]
    controls = [f"{label_of(m)} {percent(x)}" for m, x in zero.items() if m in _CONTROLS]
    line += f"; then {several(others)}" if others else ""
    line += f"; of controls, {several(controls)}" if controls else ""
    return [f"{line}."]


def _points(contents: Contents) -> list[str]:
    """Errors past T_train, bare and with the best vector."""
    lines = []
    for run in contents.runs:
        results = points_of(run)
        if results is None:
            continue
        rows = results[(results["shift"] == "none") & (results["prompt"] == "clean")]
        rows = rows[rows["metric"] == "squared_error"]
        for functions, part in rows.groupby("functions", sort=False):
            longest = part[part["points"] == part["points"].max()].set_index("method")
            known = {n: v for n, v in variants().items() if n in longest.index and not v.dummies}
            made = [n for n, v in known.items() if v.method.family != "control"]
            if "bare" not in longest.index or not made:
                continue
            best = longest.loc[made, "value"].idxmin()
            cells = [
                with_ends(*longest.loc[n, ["value", "ci_low", "ci_high"]], digits=3)
                for n in ("bare", best)
            ]
            trained = trained_points(run, results, functions)
            lines.append(
                f"{functions}: at {longest['points'].iloc[0]} points, past the {trained} of "
                f"training, the bare model errs by {cells[0]} of the variance; the best vector, "
                f"{label_of(best)}, brings it to {cells[1]}."
            )
    return lines[:4]


def _strongest(contents: Contents) -> list[str]:
    """The strongest heads by each ranked score."""
    scores = ranks.by_task(contents.runs)
    by_score: dict[str, list[str]] = {}
    shares: dict[str, list[float]] = {}
    for task, some in scores.items():
        for each in ranks.drawn(some):
            best = [f"{layer}.{head}" for layer, head in each.top(_NAMED)]
            by_score.setdefault(each.score.label, []).append(f"{several(best)} ({task})")
            mass = each.table["value"].clip(lower=0)
            if mass.sum() > 0:
                shares.setdefault(each.score.label, []).append(mass.nlargest(10).sum() / mass.sum())
    lines = []
    for label, told in list(by_score.items())[:2]:
        more = f" and {len(told) - 5} further tasks" if len(told) > 5 else ""
        line = f"Strongest heads by {label}, as layer.head: {'; '.join(told[:5])}{more}."
        if label in shares:
            mean = sum(shares[label]) / len(shares[label])
            line += f" The ten best hold {percent(mean)} of its positive sum."
        lines.append(line)
    return lines


def _agreement(contents: Contents) -> list[str]:
    """How many of the best heads two scores share, beside chance and ceiling."""
    for run in contents.runs:
        found = agreement_of(run)
        if found is None:
            continue
        table = found[1]
        rows = table[(table["comparison"] == "aie and ltv") & (table["measure"] == "overlap")]
        if rows.empty:
            continue
        sizes = rows["k"].astype(int)
        k = min(sizes, key=lambda size: abs(size - ranks.BEST))
        at = rows[sizes == k]
        line = (
            f"Of the {k} best heads by AIE and by LTV, {short(k * at['value'].mean(), 1)} are "
            f"the same; {short(k * at['chance'].mean(), 1)} would be by chance"
        )
        halves = table[(table["comparison"] == "aie halves") & (table["measure"] == "overlap")]
        halves = halves[halves["k"] == k]
        if len(halves):
            line += (
                f", and two halves of the prompts agree on {short(k * halves['value'].mean(), 1)}"
            )
        ranked = table[(table["comparison"] == "aie and ltv") & (table["measure"] == "spearman")]
        line += f". Over all heads their ranks correlate by {short(ranked['value'].mean())}."
        return [line]
    return []


def _ablated(contents: Contents) -> list[str]:
    """What is left without the best heads, and without random ones."""
    lines = []
    for run in contents.runs:
        table = ablations_of(run)
        if table is None:
            continue
        metric = next((m for m in ("accuracy", "squared_error") if m in set(table["metric"])), None)
        rows = table[(table["metric"] == metric) & (table["rule"] == "top")]
        own = rows[rows["share"] > 0]
        if own.empty:
            continue
        share = min(own["share"].unique(), key=lambda x: abs(x - 0.1))
        labels = {str(score.heads): score.label for score in SCORES if score.heads}
        means = own[own["share"] == share].groupby("score", sort=False)["value"].mean()
        told = [f"{short(x)} by {labels.get(str(name), name)}" for name, x in means.items()]
        none = rows.loc[rows["share"] == 0, "value"].mean()
        drawn = table[(table["metric"] == metric) & (table["rule"] == "random")]
        random = drawn.loc[drawn["share"] == share, "value"].mean()
        beside = "" if pd.isna(random) else f"; random heads of the same layers, {short(random)}"
        lines.append(
            f"Without the best {percent(share)} of heads the {str(metric).replace('_', ' ')} goes "
            f"from {short(none)} to {several(told)}{beside}."
        )
    return lines


def _patched(contents: Contents) -> list[str]:
    """Where most of the gap between clean and corrupted prompts is restored."""
    lines = []
    for run in contents.runs:
        table = effects_of(run)
        if table is None or table["normalised"].isna().all():
            continue
        if "direction" in table:
            table = table[table["direction"] == table["direction"].iloc[0]]
        told = []
        for task, part in table[table["head"].isna()].groupby("task", sort=False):
            row = part.loc[part["normalised"].idxmax()]
            at = row["role"] if isinstance(row["role"], str) else f"position {row['position']}"
            told.append(f"{percent(row['normalised'])} at {at}, layer {row['layer']} ({task})")
        if told:
            site = grids.named(str(table["site"].iloc[0]))
            lines.append(f"Patching the {site} restores most: {several(told[:5])}.")
    return lines


def _left_out(contents: Contents) -> list[str]:
    """What the runs left out of the data."""
    notes = [note for run in contents.runs for note in run.manifest.get("filters", [])]
    if not notes:
        return []
    more = f" ({len(notes) - 1} more notes of this kind are below.)" if len(notes) > 1 else ""
    return [f"What was left out: {notes[0]}.{more}"]


SAYINGS: Sequence[Callable[[Contents], list[str]]] = (
    _asked,
    _text,
    _points,
    _strongest,
    _agreement,
    _ablated,
    _patched,
    _left_out,
)
"""What is said, in order."""
