"""Activation patching at any site and position."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from tvlens.cli.options import (
    BackendOption,
    DataOption,
    DeviceOption,
    DtypeOption,
    DuplicatesOption,
    ModelOption,
    OutOption,
    RevisionOption,
    SeedOption,
    ShotsOption,
    TemplateOption,
    complete_tasks,
    lay_out,
    listed,
    load_lens,
    open_run,
    read_tasks,
)
from tvlens.console import complain, say, show
from tvlens.errors import NumericalError, UnknownNameError
from tvlens.lens.sites import site_kind
from tvlens.tasks.text.pairs import load_pairs

if TYPE_CHECKING:
    from tvlens.lens.positions import Positions
    from tvlens.scores.effects import PatchEffects

MetricName = Literal["probability", "log_probability", "logit_difference", "kl"]


def patch(
    out: OutOption,
    task: Annotated[
        str | None,
        typer.Option(
            "--task", help="Task names, separated by commas.", autocompletion=complete_tasks
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts",
            help="Pairs of your own instead, in JSON: clean, corrupted, answer and wrong of each.",
        ),
    ] = None,
    site: Annotated[
        str, typer.Option("--site", help="Sites, separated by commas, such as resid_post,z.")
    ] = "resid_post",
    positions: Annotated[
        str,
        typer.Option(
            "--positions", help="Where: query, all, roles, or numbers or roles separated by commas."
        ),
    ] = "query",
    metric: Annotated[MetricName, typer.Option("--metric", help="What effects are in.")] = (
        "probability"
    ),
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="How: exact, attribution (to first order), or exact,attribution for both.",
        ),
    ] = "exact",
    integration: Annotated[
        int,
        typer.Option(
            "--steps", min=0, help="Points of integrated gradients of attribution; 0 for none."
        ),
    ] = 0,
    fix_softmax: Annotated[
        bool,
        typer.Option(
            "--fix-softmax", help="Attribution of q and k attends anew instead of linearising."
        ),
    ] = False,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", min=1, help="Prompts of each task, or pairs.", show_default="16, or all pairs"
        ),
    ] = None,
    noising: Annotated[
        bool,
        typer.Option("--noising", help="Put corrupted activations into clean prompts instead."),
    ] = False,
    shots: ShotsOption = 10,
    seed: SeedOption = 0,
    model: ModelOption = "smollm2-135m",
    data: DataOption = None,
    duplicates: DuplicatesOption = "error",
    template: TemplateOption = None,
    backend: BackendOption = "bridge",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    revision: RevisionOption = None,
) -> None:
    """Effects of clean activations put into corrupted prompts; writes OUT/patching.csv.

    Of a task, label-shuffled prompts are corrupted; of pairs of your own, those that you give.
    Positions that are counted need as many tokens in both: of a task, other prompts are drawn in
    place of those that differ.
    """
    if (task is None) == (prompts is None):
        raise UnknownNameError(
            "--task and --prompts: expected one of the two, to say which prompts are patched"
        )
    chosen = {} if task is None else read_tasks(task, data, duplicates, template)
    pairs = None if prompts is None else load_pairs(prompts)
    ways = listed("--method", method)
    for way in ways:
        if way not in ("exact", "attribution"):
            raise UnknownNameError(
                f"--method {way!r}: expected exact, attribution, or exact,attribution for both"
            )
    if (integration or fix_softmax) and "attribution" not in ways:
        raise UnknownNameError(
            f"--steps and --fix-softmax are of attribution, and --method is {method}; leave them "
            "out, or ask for attribution"
        )
    sites = tuple(map(site_kind, listed("--site", site)))

    import pandas as pd

    from tvlens.studies.patching import (
        PatchSettings,
        Twins,
        patched,
        require_patchable,
        twins,
        write_figures,
    )

    settings = PatchSettings(
        sites=sites,
        positions=_positions(positions),
        methods=tuple(ways),
        metric=metric,
        n=n or (PatchSettings.n if pairs is None else len(pairs)),
        shots=shots,
        seed=seed,
        noising=noising,
        steps=integration,
        fix_softmax=fix_softmax,
    )
    lens = load_lens(model, backend, dtype, device, revision)
    several: list[Twins] = []
    notes: list[str] = []
    chosen = lay_out(chosen, template, lens)
    for asked in chosen.values():
        found, said = twins(lens, asked, settings)
        several.append(found)
        notes += said
    if pairs is not None:
        several.append(Twins.of_pairs(pairs, settings.n))
    for each in several:
        require_patchable(lens, each, settings)
    with open_run(out, "patch", lens, chosen, settings, prompts=prompts) as run:
        for note in notes:
            run.note_filter(note)
            say(note)
        effects: list[PatchEffects] = []
        for each in several:
            for kind in settings.sites:
                both = [patched(lens, each, kind, way, settings, run) for way in settings.methods]
                for of_method in both:
                    _say_best(of_method, seed)
                if len(both) > 1:
                    _say_agreement(*both)
                effects += both
            _say_if_undefined(effects[-1])
        table = pd.concat([each.to_frame(seed=seed) for each in effects], ignore_index=True)
        path = run.write_table("patching", table)
        write_figures(run, table, effects)
    say(f"Wrote {path}")


def _positions(text: str) -> "Positions":
    words = listed("--positions", text)
    if len(words) == 1 and words[0] in ("query", "all", "roles"):
        return words[0]
    try:
        return [int(word) for word in words]
    except ValueError:
        return words


def _say_best(effects: "PatchEffects", seed: int) -> None:
    """The layers, heads and places of largest effect, either way."""
    table = effects.to_frame(seed=seed)
    table["place"] = table["role"].where(table["role"] != "", table["position"].astype("string"))
    best = table.loc[table["value"].abs().nlargest(5).index]
    columns = ["layer", *(["head"] if effects.has_heads else []), "place"]
    show(
        best[[*columns, "value", "ci_low", "ci_high", "normalised", "n"]],
        f"{effects.task}: {effects.site}, {effects.method}, largest effects ({effects.metric} "
        f"{float(effects.before.mean()):.3g} as it is, {float(effects.source.mean()):.3g} in the "
        "source run)",
        digits=4,
    )


def _say_if_undefined(effects: "PatchEffects") -> None:
    """Where clean and corrupted prompts of a task do not differ, which all its sites share."""
    try:
        _ = effects.normalised
    except NumericalError as error:
        complain(f"column normalised is empty: {error}", "warning")


def _say_agreement(exact: "PatchEffects", approximate: "PatchEffects") -> None:
    if exact.method != "exact":
        exact, approximate = approximate, exact

    from tvlens.scores.approximation import agreement_of

    found = agreement_of(exact, approximate)
    say(
        f"{exact.task}: {exact.site}, attribution against exact effects of {found.n_places} "
        f"places: Spearman {found.spearman:.2f}, recall of the best {found.k} {found.recall:.2f}"
    )
