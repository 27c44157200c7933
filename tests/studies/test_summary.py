"""The tables of a paper hold the numbers of a study in their places."""

import numpy as np
import pandas as pd

from tvlens.studies import summary


def test_method_summary_puts_numbers_where_they_belong():
    cells = [("icl", "clean", 0.9)]
    cells += [
        (method, prompt, (0.3 if method == "ltv" else 0.6) + (0.05 * (prompt == "shuffled")))
        for method in (m for m in summary.TEXT_LABELS if m != "icl")
        for prompt in summary.PROMPTS
    ]
    rows = [
        {"task": task, "method": method, "prompt": prompt, "value": value - less}
        for task, less in (("b", 0.0), ("a", 0.1))
        for method, prompt, value in cells
    ]
    results = pd.DataFrame(rows).assign(metric="accuracy")
    results["ci_low"], results["ci_high"] = results["value"] - 0.2, results["value"] + 0.2
    other = results.assign(metric="exact_match", value=-1.0)
    values, shown = summary.text_methods(pd.concat([results, other]))
    assert list(values["task"]) == ["b", "b", "a", "a", "mean over tasks", "mean over tasks"]
    assert list(values["prompt"]) == ["zero-shot", "shuffled labels"] * 3
    np.testing.assert_allclose(values["ICL"], [0.9, 0.9, 0.8, 0.8, 0.85, 0.85])
    np.testing.assert_allclose(values["LTV"], [0.3, 0.35, 0.2, 0.25, 0.25, 0.3])
    assert shown["LTV"][1] == "0.35 [0.15, 0.55]"
    assert shown["LTV"][4] == "0.25"


def test_headset_summary_sorts_sizes_and_averages_over_tasks():
    rows = [
        (task, comparison, "overlap", k, value + more, k / 100)
        for task, more in (("b", 0.0), ("a", 0.2))
        for comparison, value in (("ltv seeds", 0.5), ("aie and ltv", 0.1))
        for k in (10, 5)
    ]
    rows.append(("b", "aie and ltv", "spearman", None, 0.3, 0.0))
    rows.append(("b", "aie and ltv", "gini_aie", None, 0.9, None))
    columns = ["task", "comparison", "measure", "k", "value", "chance"]
    headsets = pd.DataFrame(rows, columns=columns)
    table, shown = summary.head_sets(headsets)
    assert shown.loc[0, "chance"] == "0.050"
    assert list(table.columns) == ["comparison", "measure", "b", "a", "mean", "chance"]
    sizes = ["overlap at 5", "overlap at 10"]
    assert list(table["measure"]) == [*sizes, "spearman", *sizes]
    assert list(table["comparison"]) == ["aie and ltv"] * 3 + ["ltv seeds"] * 2
    np.testing.assert_allclose(table["mean"], [0.2, 0.2, 0.3, 0.6, 0.6])
    np.testing.assert_allclose(table["chance"], [0.05, 0.1, 0.0, 0.05, 0.1])
