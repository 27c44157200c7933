"""Figures of matrices: how far every two scores, or tasks, agree."""

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from pandas import DataFrame

from tvlens.errors import UnknownNameError
from tvlens.figures.style import PALE, STYLE, require_columns


@rc_context(STYLE)
def agreement_matrix(
    table: DataFrame, *, measure: str = "spearman", k: int | None = None
) -> Figure:
    """A square for every two, with the value in it, and the ceiling below it where there is one.

    Args:
        table: columns `first, second, measure, k, value, ceiling`, each pair in both orders.
        measure: which measure to draw.
        k: which size of head sets, for measures that have several.

    Raises:
        UnknownNameError: a column is missing, or the table holds no such measure or several of it.
    """
    require_columns(table, "agreement", "first", "second", "measure", "k", "value", "ceiling")
    rows = table[table["measure"] == measure]
    rows = rows if k is None else rows[rows["k"] == k]
    if rows.empty or rows.duplicated(["first", "second"]).any():
        raise UnknownNameError(
            f"the agreement table holds {'no' if rows.empty else 'several'} {measure!r} of every "
            f"two{'' if k is None else f' at k = {k}'}; it has "
            f"{table[['measure', 'k']].drop_duplicates().to_records(index=False).tolist()}"
        )
    names = list(dict.fromkeys(rows["first"]))
    order = {"index": names, "columns": names}
    values, ceilings = (
        rows.pivot(index="first", columns="second", values=column).reindex(**order)
        for column in ("value", "ceiling")
    )
    side = max(1.6, 0.52 * len(names))
    figure = Figure(figsize=(side + 2.2, side + 1.2), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor(PALE)
    image = axes.imshow(values.to_numpy(dtype=float), cmap="RdBu_r", vmin=-1, vmax=1)
    for i, j in np.argwhere(values.notna().to_numpy()).tolist():
        text = f"{values.iloc[i, j]:.2f}"
        if np.isfinite(ceilings.iloc[i, j]):
            text += f"\nof {ceilings.iloc[i, j]:.2f}"
        colour = "white" if abs(values.iloc[i, j]) > 0.6 else "black"
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=6)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.spines[:].set_visible(False)
    label = measure.replace("_", " ") + ("" if k is None else f" at {k}")
    figure.colorbar(image, ax=axes, label=f"{label} (of its split-half ceiling)")
    return figure
