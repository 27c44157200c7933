"""The page of a report, as text: what it says, what it holds, and that nothing in it is code."""

import re

import numpy as np
import pandas as pd
import pytest

from helpers import reports
from tvlens.figures.report import page, ranks, words
from tvlens.figures.report.contents import Contents, RunTables
from tvlens.figures.report.markup import short
from tvlens.figures.report.page import SECTIONS, report_page


def text_of(html: str) -> str:
    """What is read of a piece of HTML."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def section(html: str, name: str) -> str:
    """A section of the page."""
    start = html.index(f'<section id="{name}"')
    return html[start : html.index("</section>", start)]


@pytest.fixture(scope="module")
def html() -> str:
    return report_page(reports.contents())


def test_the_page_has_every_section_and_no_link_to_elsewhere(html):
    assert re.findall(r'<section id="(\w+)"', html) == [name for name, _, _ in SECTIONS]
    # What programs and data say is not loaded; the browser tests see that nothing is.
    own = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert set(re.findall(r'(?:href|src)="([^"]*)"', own)) == {
        "data:,", *(f"#{name}" for name, _, _ in SECTIONS)
    }  # fmt: skip
    assert "@import" not in own
    assert "url(" not in own
    assert len(html.encode()) < 5e6


def test_the_same_runs_give_the_same_bytes(html):
    assert report_page(reports.contents()) == html
    times = {"started": "later", "finished": "later", "timings": {"a": 2}, "peak_memory_gib": 9}
    runs = reports.contents().runs
    later = [
        RunTables(run.name, run.command, {**run.manifest, **times}, run.tables) for run in runs
    ]
    assert report_page(reports.contents(runs=later)) == html


def test_it_says_what_was_found_in_ten_lines_at_most(html):
    lines = [text_of(line) for line in re.findall(r"<li>(.*?)</li>", section(html, "found"))]
    assert 6 <= len(lines) <= words.LINES
    said = " ".join(lines)
    assert "which of the 24 attention heads of tiny carry 2 tasks: present-past and antonym" in said
    assert "answers 90% of test prompts, without examples 10%, with shuffled labels 30%" in said
    assert "the best vector is LTV: 80% (70% with shuffled labels); then FV, one layer 50%" in said
    assert "of controls, random ω 5%" in said
    assert "linear: at 8 points, past the 4 of training" in said
    assert "errs by 0.125 [0.100, 0.150]" in said
    assert "LTV, per prompt, brings it to 0.050 [0.040, 0.060]" in said
    assert "Strongest heads by AIE, as layer.head: 2.1, 5.0 and 4.0 (present-past)" in said
    assert (
        "Of the 10 best heads by AIE and by LTV, 5.0 are the same; 4.0 would be by chance" in said
    )
    assert "Without the best 10% of heads the accuracy goes from 0.90 to 0.78 by AIE" in said
    assert "restores most: 100% at answers, layer 0 (present-past)" in said


def test_tables_have_intervals_and_numbers_to_sort_by(html):
    methods = section(html, "methods")
    assert '<td class="number" data-value="0.8">0.80 [0.75, 0.85]</td>' in methods
    assert methods.count("<caption>") == methods.count(
        'scope="col"><button type="button" data-sort="0"'
    )
    assert "Mean over 2 tasks" in methods
    # No vector stands before the vectors, controls behind them.
    names = re.findall(r'<th scope="row">(.*?)</th>', methods)[:5]
    assert names == ["ICL", "no vector", "FV, one layer", "LTV", "random ω"]


def test_every_picture_says_how_it_was_made(html):
    figures = re.findall(r"<figure>.*?</figure>", html, flags=re.DOTALL)
    assert len(figures) == 2 * len(reports.TASKS) + 3 + 1 + 1 + 1 + 1
    for figure in figures:
        assert re.search(r"Made by <code>tvlens study \w+</code>; data in <code>\S+\.csv", figure)
        assert 'role="img" aria-label="' in figure


def test_every_score_has_interval_and_rank():
    scores = {each.score.name: each for each in ranks.by_task(reports.contents().runs)["antonym"]}
    assert list(scores) == ["aie", "omega", "contribution"]
    assert scores["aie"].said((2, 1)) == "AIE: 0.5000 [0.4800, 0.5200], rank 1 of 24"
    assert scores["contribution"].said((3, 0)) == "LTV contribution: 40.0000, rank 1 of 24"
    assert ranks.best_of([*scores.values()], 1) == [(2, 1), (3, 0)]


def test_layers_without_heads_have_no_rank():
    table = reports.heads(("a",))
    table.loc[table["layer"] == 1, ["aie", "aie_low", "aie_high"]] = np.nan
    runs = [RunTables(".", "c", reports.manifest(), {"heads": table})]
    (aie, *_), *_ = ranks.by_task(runs).values()
    assert aie.n_heads == 20
    assert aie.said((1, 0)) == "AIE: none"
    assert aie.table["rank"].max() == 20
    assert "layer 1, head 0" in report_page(Contents("m", runs, {}))


def test_scores_of_several_runs_stand_together():
    scores = pd.DataFrame(
        {"task": "antonym", "score": "direct", "layer": layer, "head": head, "value": -float(head)}
        | {"ci_low": -4.0, "ci_high": 4.0}
        for layer in range(reports.LAYERS)
        for head in range(reports.HEADS)
    )
    runs = [
        *reports.contents().runs,
        RunTables("s", "tvlens score", reports.manifest(), {"scores": scores}),
    ]
    found = ranks.by_task(runs)
    assert [each.score.name for each in found["antonym"]][-1] == "direct"
    assert found["antonym"][-1].made == "Made by `tvlens score`; data in `s/scores.csv`."
    assert "direct" not in [each.score.name for each in found["present-past"]]


def test_only_what_a_run_holds_is_shown():
    runs = [RunTables(".", "c", reports.manifest(), {"patching": reports.patched()})]
    html = report_page(Contents("m", runs, {}))
    assert re.findall(r'<section id="(\w+)"', html) == ["found", "patching", "origin"]
    assert "CircuitsVis.AttentionHeads" not in html, "1.3 MB that nothing would use"
    assert len(html) < 2e6


def test_maps_of_positions_bear_the_tokens_of_the_prompt():
    tokens = {"present-past/resid_post": reports.TOKENS}
    tables = {"patching": reports.patched(positions=True)}
    runs = [RunTables(".", "c", reports.manifest(), tables, tokens=tokens)]
    html = report_page(Contents("m", runs, {}))
    assert '"go 2"' in html
    assert "layer 3, A 4" in html.replace("\\u003cstrong>", "")
    plain = [RunTables(".", "c", reports.manifest(), tables)]
    assert '"go 2"' not in report_page(Contents("m", plain, {}))


def test_what_is_missing_is_said_first():
    state = reports.manifest(state="interrupted")
    run = RunTables("half", "c", state, {"heads": reports.heads()}, ("results",), finished=False)
    html = report_page(Contents("m", [run], {}))
    found = text_of(section(html, "found"))
    assert found.index("is not finished (its state is interrupted): it lacks results.csv") < (
        found.index("Asked:")
    )


def test_no_text_of_a_file_becomes_code():
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`"
    table = reports.heads((evil,))
    results = reports.text_results((evil,)).assign(method=evil)
    curves, sets = reports.overlaps((evil,))
    tables = {"heads": table, "results": results, "headsets": sets, "overlap_curves": curves}
    patched = reports.patched().assign(task=evil, role=evil)
    tables |= {"patching": patched, "ablation": reports.ablations().assign(task=evil, score=evil)}
    manifest = reports.manifest(command=evil, lens=evil, filters=[evil])
    runs = [RunTables(evil, evil, manifest, tables)]
    shown = {evil: (reports.example(),)}
    html = report_page(Contents(evil, runs, shown))
    own = re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL)
    assert "<img" not in own
    assert "alert(1)</script>" not in html
    # Data in JSON, three programs: bokeh is one and a line, CircuitsVis, the page's own.
    assert html.count("</script>") == 4 + len(page._scripts(reports.contents()))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.915, "0.92"), (0.0, "0.00"), (0.0035, "0.0035"), (1.24e-5, "1.2e-05"), (3e7, "3e+07")],
)
def test_small_and_large_numbers_keep_two_digits(value, shown):
    assert short(value) == shown
