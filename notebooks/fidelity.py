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
# # Functions in context: what a vector can fix, and what it cannot
#
# A small transformer was trained to infer linear functions from points: shown x₁, f(x₁), x₂, f(x₂),
# … and a query x, it answers f(x). It never saw more than 12 points in training. What happens when
# it is shown 31? And can a vector, added to its residual stream, help it there? Saglam et al.
# (2025) say that a learned one can and that a function vector cannot. It takes a few minutes on two
# CPU cores.
#
# Every prompt has a function of its own. One reading of a prompt gives its error at every number of
# points.

# %% fast={"n=256": "n=16"}
# %matplotlib inline
import pandas as pd

import tvlens
from tvlens.models.catalogue import load_shipped

trained, card = load_shipped("linear-small")
lens = tvlens.load(trained, name="linear-small")
task = tvlens.tasks.FunctionTask.of_card("linear", card, trained.sizes.n_dims)
longest, at_train = 31, task.train_points
curves = task.curves("test", points=range(2, longest + 1), n=256)

# %% [markdown]
# ## The problem
#
# Three answers to the same prompts: the model; the model shown only the last 12 points; and least
# squares, which knows that the function is linear and nothing else. Numbers are squared errors over
# the variance of f(x): at 1 one might as well answer with the mean.

# %% fast={"64": "8"}
from tvlens.evaluation import error_table, method_errors, oracle_errors, truncation_errors
from tvlens.tasks.regression.oracles import ORACLES

variance = task.functions.variance
errors = method_errors(lens, [curves], {})
errors["truncation"] = truncation_errors(lens, curves, at_train, errors["bare"])
for name in ("least_squares", "ridge", "nearest_neighbours", "averaging"):
    errors[name] = oracle_errors([curves], ORACLES[name].make(), variance, 64)
some = (4, at_train, 18, 24, longest)
means_of = {name: found.at(some).values.mean(dim=0) for name, found in errors.items()}
pd.DataFrame(means_of, some).T.round(3)

# %% [markdown]
# The model is nearly as good as least squares up to 12 points, and gets *worse* with every further
# one. It has not forgotten how: shown the last 12 points alone, it stays as good as it was.
#
# ## Two kinds of vectors
#
# Head outputs are averaged over clean prompts of 12 points. Mediation asks which heads, set to that
# mean on prompts of 31 points, lower the error; the best of them make function vectors, of which
# validation chooses layer and scale. Beside that stands one in the published proportions, for which
# nothing is chosen.

# %% fast={"n=512": "n=32", "n=128": "n=8", "n=64": "n=8", "(2, 4, 9)": "(2,)"}
from tvlens.vectors import published_mixture

means = tvlens.mean_head_outputs(lens, task.prompts("train", shots=at_train - 1, n=512))
aie = tvlens.indirect_effects(lens, task.prompts("train", shots=longest - 1, n=128), means)
validation = {"clean": task.curves("validation", points=(18, 24, longest), n=64)}
fv = tvlens.choose_function_vectors(lens, means, aie, validation, ks=(2, 4, 9), scales=(0.5, 1.0))
chosen = fv.one_layer["clean"]

# %% [markdown]
# The Learnable Task Vector gives every head a weight, trained on prompts of 31 points. It comes in
# two kinds: *of the class* weighs the means, so that every prompt gets the same vector; *of each
# prompt* weighs what the heads say on that prompt's own first 12 points, as in the paper. Random
# weights of the same size are the control.

# %% fast={"200": "3", "1024": "64", "512": "16"}
from dataclasses import replace

settings = tvlens.FitSettings(
    kinds=("clean",),
    shots=longest - 1,
    steps=200,
    learning_rate=0.3,
    batch_size=64,
    n_prompts=1024,
    n_validation=512,
    patience=None,
)
of_class = tvlens.fit_ltv(lens, task, means, settings=settings)
of_prompt = tvlens.fit_ltv(lens, task, means, settings=replace(settings, per_prompt=True))
tvlens.figures.training_history(of_class.history, unit="Huber")

# %% [markdown]
# ## All of them, at every number of points

# %%
methods = {
    "fv_layer_class": chosen,
    "fv_published_class": published_mixture(means, aie).of_means(means),
    "ltv_class": of_class,
    "ltv_prompt": of_prompt,
    "random_class": tvlens.random_controls(of_class),
}
errors |= method_errors(lens, [curves], methods)
about = {"functions": "linear", "shift": "none", "prompt": "clean"}
table = error_table(errors, **about, train_points=at_train, seed=0)
tvlens.figures.error_curves(table, functions="linear", train_points=at_train, lines="all")

# %% [markdown]
# In numbers: *gain* is the bare model's error over the method's on the same prompts, so above 1 a
# method helps; past 12 points it is that of the mean error over 13 to 31.

# %%
rows = table[table["points"].isin([at_train, longest]) & table["metric"].str.startswith("gain")]
rows = rows[(rows["metric"] == "gain_past") | (rows["points"] == at_train)]
rows = rows[rows["method"].isin(["truncation", *methods])]
shown = rows["value"].map("{:.2f}".format) + rows.apply(
    lambda row: f" [{row['ci_low']:.2f}, {row['ci_high']:.2f}]", axis=1
)
rows.assign(gain=shown).pivot(index="method", columns="metric", values="gain")

# %% [markdown]
# - **It can** take off some of what goes wrong in the same way on every prompt. That is what the
#   LTV of the class learns: it gains past 12 points, and loses at 12, where nothing was wrong.
# - **It cannot** give back what showing the last 12 points alone gives: what goes wrong past
#   training is another error on every prompt, and a sum of head outputs does not undo it, not even
#   one of the prompt's own heads.
# - A **function vector** has little to choose, its heads, layer and scale. What validation prefers
#   hardly does anything; the published proportions, chosen elsewhere, do harm.
#
# The other thing that a vector might do is to *carry* a function. Here the prompt is the query
# alone, and the vector is made of another prompt of the same function:

# %% fast={"256": "16", "steps=200": "steps=3"}
alone = replace(settings, kinds=("zero",), shots=at_train - 1, per_prompt=True, steps=200)
carried = tvlens.fit_ltv(lens, task, means, settings=alone)
asked = {"kinds": ("zero",), "shots": at_train - 1, "n": 256}
table = tvlens.evaluate(lens, task, {"LTV of each prompt": carried}, **asked)
table[["method", "metric", "value", "ci_low", "ci_high", "n"]].round(2)

# %% [markdown]
# Nothing: validation leaves the weights where they started, at zero. What is added does not depend
# on x, and for a linear function the best answer that does not depend on x is zero.
#
# ## Which heads?
#
# Frames mark the five heads of largest AIE, dots the five that contribute most to the LTV of the
# class. Hardly any head does better when it is set to its mean over functions; those of layers 2
# and 3 that do worst (blue) are the ones that tell one function from another. What learning adds
# comes from the first two layers.

# %%
tvlens.figures.head_maps(aie.scores, of_class.scores, task="linear", k=5, unit="squared error")

# %%
tvlens.compare_head_sets(aie, of_class, ks=(5,), names=("AIE", "LTV")).round(2)
