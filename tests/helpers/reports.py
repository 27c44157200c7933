"""Made-up runs as reports read them, quick to make: every table with a few rows, no model."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from tvlens.figures.report.contents import Contents, Example, RunTables
from tvlens.runs.manifest import new_manifest

LAYERS, HEADS = 6, 4
TASKS = ("present-past", "antonym")
SHARES = (0.0, 0.1, 0.25, 0.5)
PLACES = ("answers", "query", "answer prefix")
TOKENS = ("Q", ":", " go", "\n", "A", ":")
PLACED = range(LAYERS * HEADS)


def manifest(command: str = "study text", **changes: Any) -> dict[str, Any]:
    """The manifest of a run of text that ended well."""
    identity = {
        "command": command,
        "config": {"model": "tiny", "settings": {"shots": 4}},
        "data": {**dict.fromkeys(TASKS, "0" * 64), "weights and tokenizer": "1" * 64},
        "seeds": {"seed": 0},
    }
    return new_manifest(identity) | {"state": "finished"} | changes


def heads(tasks: tuple[str, ...] = TASKS) -> pd.DataFrame:
    """Head 2.1 is best by AIE, 3.0 by LTV."""
    rows = []
    for task, layer, head in itertools.product(tasks, range(LAYERS), range(HEADS)):
        aie = 0.5 if (layer, head) == (2, 1) else 0.01 * (layer - head)
        ltv = 40.0 if (layer, head) == (3, 0) else float(head - layer)
        ends = {"aie_low": aie - 0.02, "aie_high": aie + 0.02}
        rows.append(
            {"task": task, "layer": layer, "head": head, "aie": aie, **ends}
            | {"omega": 0.1 * head, "contribution": ltv}
        )
    return pd.DataFrame(rows)


def text_results(tasks: tuple[str, ...] = TASKS) -> pd.DataFrame:
    """LTV is best on zero-shot prompts."""
    values = {
        ("none", "zero"): 0.1, ("none", "shuffled"): 0.3, ("icl", "clean"): 0.9,
        ("fv_layer", "zero"): 0.5, ("ltv", "zero"): 0.8, ("ltv", "shuffled"): 0.7,
        ("random", "zero"): 0.05,
    }  # fmt: skip
    return pd.DataFrame(
        {"task": task, "method": method, "prompt": prompt, "metric": metric, "value": value}
        | {"ci_low": value - 0.05, "ci_high": value + 0.05, "n": 20, "answers": 1}
        for task in tasks
        for (method, prompt), value in values.items()
        for metric in ("accuracy", "exact_match")
    )


def point_results() -> pd.DataFrame:
    """Errors of a class of functions; the LTV of each prompt is best."""
    sizes = {"bare": 1.0, "ltv_class": 0.6, "ltv_prompt": 0.4, "least_squares": 0.2}
    return pd.DataFrame(
        {"functions": "linear", "shift": "none", "prompt": "clean", "points": points}
        | {"method": method, "metric": "squared_error", "value": size / points}
        | {"ci_low": 0.8 * size / points, "ci_high": 1.2 * size / points, "n": 8}
        for method, size in sizes.items()
        for points in range(1, 9)
    )


def overlaps(tasks: tuple[str, ...] = TASKS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Curves of overlap and measures of agreement."""
    curves = [
        {"task": task, "k": k, "shared": 1.0, "overlap": 1 / k, "jaccard": 0.1, "chance": k / 24}
        | {"chance_low": 0.0, "chance_high": 0.5, "p_value": 0.1, "ceiling": 0.9}
        for task in tasks
        for k in (1, 2, 5, 10)
    ]
    measures = [("overlap", 5, 0.4, 0.2), ("overlap", 10, 0.5, 0.4), ("spearman", None, 0.3, 0.0)]
    sets = [
        {"task": task, "comparison": comparison, "measure": measure, "k": k, "value": value}
        | {"low": None, "high": None, "chance": chance, "p_value": 0.1}
        for task in tasks
        for comparison in ("aie and ltv", "aie halves")
        for measure, k, value, chance in measures
    ]
    return pd.DataFrame(curves), pd.DataFrame(sets)


def ablations() -> pd.DataFrame:
    """The best heads by AIE matter more than random ones."""
    rows = []
    for score, rule in (("aie", "top"), ("ltv", "top"), ("aie", "random")):
        for share in SHARES[rule == "random" :]:
            for draw in (0, 1) if rule == "random" else (None,):
                value = 0.9 - share * (0.2 if rule == "random" else 1.2) + 0.02 * (draw or 0)
                rows.append(
                    {"task": TASKS[0], "score": score, "rule": rule, "set_to": "mean"}
                    | {"positions": "query", "share": share, "k": round(24 * share), "draw": draw}
                    | {"metric": "accuracy", "value": value, "ci_low": value - 0.1}
                    | {"ci_high": value + 0.1, "n": 20}
                )
    return pd.DataFrame(rows)


def patched(positions: bool = False) -> pd.DataFrame:
    """Answers hold everything up to layer 3, the answer prefix from there on."""
    places = range(len(TOKENS)) if positions else PLACES
    return pd.DataFrame(
        {"task": TASKS[0], "site": "resid_post", "layer": layer, "head": None}
        | {"position": place if positions else None, "role": "" if positions else place}
        | {"method": "exact", "metric": "probability", "value": 0.5 * share, "ci_low": 0.4 * share}
        | {"ci_high": 0.6 * share, "normalised": share, "n": 6}
        for layer in range(LAYERS)
        for i, place in enumerate(places)
        for share in (1.0 if i == (0 if layer < 3 else len(places) - 1) else 0.02,)
    )


def tables() -> dict[str, pd.DataFrame]:
    """Every table of a run of text."""
    curves, sets = overlaps()
    return {
        "results": text_results(), "heads": heads(), "headsets": sets, "overlap_curves": curves,
        "ablation": ablations(), "patching": patched(),
    }  # fmt: skip


def example(best: tuple[tuple[int, int], ...] = ((2, 1), (3, 0))) -> Example:
    """A prompt of six tokens; head 2.1 attends from each to the token before."""
    n = len(TOKENS)
    before = np.zeros((n, n), dtype=np.uint8)
    before[range(n), [0, *range(n - 1)]] = 255
    even = np.tril(np.full((n, n), 42, dtype=np.uint8))
    patterns = {best[0]: before, best[1]: even}
    unit = "the logit of the answer, over the mean of the vocabulary"
    return Example(TOKENS, "went", patterns, {best[0]: 1.25, best[1]: -0.5}, unit)


def contents(**changes: Any) -> Contents:
    """A report of one run of text and one of functions, as it were."""
    text = RunTables(".", "tvlens study text", manifest(), tables())
    curves = overlaps(("linear-class-informative", "linear-prompt-informative"))
    of_points = {
        "results": point_results(),
        "models": pd.DataFrame({"functions": ["linear"], "train_points": [4]}),
        "headsets": curves[1],
        "overlap_curves": curves[0],
    }
    points = RunTables("points", "tvlens study regression", manifest(), of_points)
    given = {"model": "tiny", "runs": [text, points], "examples": {TASKS[0]: (example(),) * 2}}
    return Contents(**(given | changes))


def save(folder: Path, made: dict[str, pd.DataFrame], **changes: Any) -> Path:
    """A run folder with these tables."""
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps(manifest(**changes)))
    for name, table in made.items():
        table.to_csv(folder / f"{name}.csv", index=False)
    return folder
