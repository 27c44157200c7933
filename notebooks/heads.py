# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Which heads carry a task: learned, causal, gated, ablated
#
# Four questions to every head of a model that solves a task from examples. Is it *learned*: does a
# Learnable Task Vector, trained to do the task without examples, weigh it? Is it *causal*: does its
# mean activation, put back alone, restore the answer? Does a *gate* on it stay open when closing it
# is rewarded? And what is lost when it is *ablated*? The first three are scores that can be
# compared; the last says which of them found what the model needs. First of a text task, then of a
# function class.

# %% fast={"n=60": "n=6"}
# %matplotlib inline
import pandas as pd

import tvlens

lens = tvlens.load("smollm2-135m")
task = tvlens.tasks.load("present-past")
clean = task.prompts("train", shots=10, n=60)
means = tvlens.mean_head_outputs(lens, clean)

# %% [markdown]
# ## Three scores
#
# Indirect effects are exact for the twenty heads that are best to first order. Gates multiply what
# heads say at the query position; several masks are trained at once, and intervals are over them.

# %% fast={"n=25": "n=2", "FitSettings()": "FitSettings(steps=3, n_prompts=8, n_validation=4)"}
asked = tvlens.mediation_prompts(task, clean, means, n=25)
aie = tvlens.indirect_effects(lens, asked, means, screen=20)
ltv = tvlens.fit_ltv(lens, task, means, settings=tvlens.FitSettings())

# %% fast={"[:32]": "[:4]", "steps=40": "steps=2"}
from tvlens.lens import Schedule
from tvlens.scores import head_gates

schedule = Schedule(steps=40, learning_rate=1.0, batch_size=16, patience=None, clip=1.0)
gates = head_gates(lens, clean[list(means.kept)[:32]], schedule=schedule)
scores = {"aie": aie, "ltv": ltv.head_scores(), "gates": gates.facilitating}
for name, score in scores.items():
    print(f"{name:6}", score.top(6))

# %%
of_gates = gates.facilitating.scores
grids = {"aie": aie.scores, "contribution": ltv.scores, "facilitating": of_gates}
tvlens.figures.score_maps(grids, task=task.name, k=10)

# %% [markdown]
# Do they name the same heads? Overlap of the ten best, beside what chance would give:

# %%
rows = []
for a, b in (("aie", "ltv"), ("aie", "gates"), ("ltv", "gates")):
    table = tvlens.compare_head_sets(scores[a], scores[b], ks=(10,)).set_index("measure")
    found = table.loc[["overlap", "spearman"], "value"]
    rows.append({"scores": f"{a}, {b}", **found, "chance": table.loc["overlap", "chance"]})
pd.DataFrame(rows).round(2)

# %% [markdown]
# ## What is lost without them
#
# The best heads by each score are set to their means, at the query position of clean test prompts,
# beside random sets with as many heads in every layer. All sets are rows of one reading.

# %% fast={"n=40": "n=4", "draws=20": "draws=2"}
from tvlens.scores import sets_of

sets = sets_of(scores, ["top"], draws=20)
ablation = tvlens.ablate(lens, task.prompts("test", n=40), sets, means=means)
tvlens.figures.ablation_curves(ablation.to_frame())

# %% [markdown]
# The area under each curve is the mean accuracy over all shares; the lower, the more the model
# needed those heads. Beside it the difference to the random sets.

# %%
areas = ablation.areas()
areas = areas[areas["metric"].isin(["accuracy", "accuracy_minus_random"]) & (areas.rule == "top")]
areas.pivot(index="score", columns="metric", values="value").round(3)

# %% [markdown]
# Learned, causal and gated heads are largely different ones, and none of the three sets is needed
# more than random ones: at the last token the model loses little without a fifth of its heads,
# whichever they are. A head can carry the task and be dispensable.
#
# ## The same of functions in context
#
# A small transformer that was trained to infer linear functions from points. Every prompt has a
# function of its own, so heads are set to those of the prompt's own donor, and errors take the
# place of accuracy.

# %% fast={"n=256": "n=16", "steps=100": "steps=5", "n=128": "n=8"}
from tvlens.models.catalogue import load_shipped

trained, card = load_shipped("linear-small")
points = tvlens.load(trained, name="linear-small")
functions = tvlens.tasks.FunctionTask.of_card("linear", card, trained.sizes.n_dims)
donors = functions.prompts("train", shots=11, n=256)
of_class = tvlens.mean_head_outputs(points, donors)
shuffled = functions.prompts("train", shots=11, n=128, kind="shuffled")
settings = tvlens.FitSettings(steps=100, shots=11, learning_rate=0.3, per_prompt=True)
gated = head_gates(points, donors, schedule=schedule)
scores = {
    "aie": tvlens.indirect_effects(points, shuffled, None),
    "ltv": tvlens.fit_ltv(points, functions, of_class, settings=settings).head_scores(),
    "gates": gated.facilitating,
}

# %% fast={"n=200": "n=8", "draws=20": "draws=2"}
sets = sets_of(scores, ["top"], shares=(0, 0.05, 0.1, 0.15, 0.2, 0.3), draws=20)
asked = functions.prompts("test", shots=11, n=200)
ablation = tvlens.ablate(points, asked, sets, means=of_class)
tvlens.figures.ablation_curves(ablation.to_frame(), metric="squared_error")

# %% [markdown]
# Every head that goes costs something here, and the best by a score cost about as much as random
# ones until many are gone; then those that the LTV weighs cost most.
#
# Overlap says which heads two methods share; ablation says which of the two sets the model needs.
# A table of one without the other is half an answer.
