"""Text and regression beside each other."""

from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import DataFrame

from tvlens.errors import UnknownNameError
from tvlens.figures.style import (
    BLUE,
    GREEN,
    GREY,
    RED,
    STYLE,
    Width,
    inches,
    keep_panels,
    outside_legend,
    panels_in,
    require_columns,
)


@rc_context(STYLE)
def modality_dots(table: DataFrame, *, width: Width = "double") -> Figure:
    """Agreement, stability, concentration and depth of head scores, text beside regression.

    One dot a task; the bar is the mean of the modality.

    Args:
        table: columns `modality, task` and the measures of `MODALITY_PANELS`.
        width: how wide, "single" or "double" column; in a single one two panels stand side by side.

    Raises:
        UnknownNameError: a column is missing, the table holds no value, or there is no such width.
    """
    measures = [name for group in MODALITY_PANELS.values() for name in group]
    require_columns(table, "modalities", "modality", "task", *measures)
    modalities = list(dict.fromkeys(table["modality"]))
    # With one seed, for example, nothing says how far two trainings agree.
    drawn = {
        title: {name: label for name, label in group.items() if table[name].notna().any()}
        for title, group in MODALITY_PANELS.items()
    }
    drawn = {title: group for title, group in drawn.items() if group}
    if not drawn:
        raise UnknownNameError(f"the modalities table holds no value of {', '.join(measures)}")
    sizes = [len(group) for group in drawn.values()]
    lines, across = panels_in(width, 1.6, len(sizes))
    figure = Figure(figsize=(inches(width), 0.35 + 2.0 * lines), layout="constrained")
    ratios = sizes if lines == 1 else None
    grid = figure.subplots(lines, across, width_ratios=ratios, squeeze=False)
    panels = keep_panels(grid, len(drawn))
    colours = dict(zip(modalities, (BLUE, RED, GREEN), strict=False))
    spread = 0.36 / max(1, len(modalities))
    for axes, (title, group) in zip(panels, drawn.items(), strict=True):
        for place, measure in enumerate(group):
            for number, modality in enumerate(modalities):
                values = table.loc[table["modality"] == modality, measure].dropna()
                x = place + (number - (len(modalities) - 1) / 2) * 2 * spread
                marker = "os^"[number % 3]
                named = modality if axes is panels[0] and place == 0 else None
                axes.plot(
                    [x] * len(values),
                    values,
                    marker,
                    color=colours[modality],
                    ms=3.5,
                    alpha=0.6,
                    mew=0,
                    label=named,
                )
                if len(values):
                    mean = float(values.mean())
                    axes.hlines(mean, x - spread, x + spread, color=colours[modality], lw=1.6)
        axes.set_xticks(range(len(group)), list(group.values()))
        axes.set(title=title, xlim=(-0.6, len(group) - 0.4))
        axes.axhline(0, color=GREY, lw=0.6, ls=":")
        axes.grid(axis="y")
    outside_legend(figure, *panels[0].get_legend_handles_labels())
    return figure


MODALITY_PANELS = {
    "AIE against LTV": {"overlap above chance": "overlap", "spearman": "Spearman"},
    "each against itself\n(Spearman)": {
        "spearman of AIE halves": "AIE\nhalves",
        "spearman of LTV seeds": "LTV\nseeds",
    },
    "effective share of heads": {"effective share, AIE": "AIE", "effective share, LTV": "LTV"},
    "mean depth": {"depth, AIE": "AIE", "depth, LTV": "LTV"},
}
"""Panels of `modality_dots`: columns of its table and what to call them."""
