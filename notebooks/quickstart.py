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
# # Quick start: learned heads against function-vector heads
#
# Shown ten verbs with their past tense, a small language model puts an eleventh into the past
# tense. Shown none, it does not know what is wanted. Which of its attention heads carry the task
# from the examples to the answer? This notebook asks twice:
#
# - **causally**: which head, put back alone into a prompt with wrong examples, restores the right
#   answer? The average gain is its *average indirect effect* (AIE; Todd et al., 2024);
# - **by learning**: which weighted sum of head outputs, added to a prompt without examples, makes
#   the model do the task? That is the *Learnable Task Vector* (LTV; Saglam et al., 2025).
#
# Then it compares the two answers. It takes some minutes on two CPU cores.
#
# First the model, the task, and what every head says at the last token of a prompt that shows the
# task: its mean output over 100 prompts with ten examples (of these, the ones that the model
# answers).

# %% readme=true fast={"n=100": "n=10"}
import tvlens

lens = tvlens.load("smollm2-135m")
task = tvlens.tasks.load("present-past")
clean = task.prompts("train", shots=10, n=100, seed=0)
means = tvlens.mean_head_outputs(lens, clean)

# %% [markdown]
# ## Which heads cause the answer?
#
# 25 prompts show verbs with past tenses that belong to other verbs, and ask for one that the model
# answers when the examples are right. In each prompt every one of the 270 heads is set to its mean,
# one at a time. These 6,750 runs need only the last token, because nothing before it can depend on
# what is changed there.

# %% readme=true fast={"means), means)": "means, n=4), means)"}
aie = tvlens.indirect_effects(lens, tvlens.mediation_prompts(task, clean, means), means)

# %% [markdown]
# ## Which heads does a learned vector use?
#
# One weight per head, starting at zero, trained on prompts without examples and with wrong ones.
# Validation prompts decide when to stop.

# %% readme=true fast={"s)": "s, settings=tvlens.FitSettings(steps=3, n_prompts=9,n_validation=4))"}
ltv = tvlens.fit_ltv(lens, task, means)

# %% [markdown]
# Now the test pairs, which nothing above has seen, without examples (`zero`), with wrong examples
# (`shuffled`) and with right ones (`clean`); then how far the two head rankings agree, beside the
# agreement of two random rankings.

# %% readme=true fast={"\"clean\")": "\"clean\"), n=4"}
table = tvlens.evaluate(lens, task, {"LTV": ltv}, kinds=("zero", "shuffled", "clean"))
print(tvlens.compare_head_sets(aie, ltv, names=("AIE", "LTV")))

# %% [markdown]
# `none` is the model left alone, `icl` the same on prompts with right examples, which is as good as
# it gets without a vector. The intervals are over test prompts.

# %%
table[table["metric"] == "accuracy"].round(3)

# %% [markdown]
# ## Where the heads are
#
# Frames mark the ten heads of largest AIE, dots the ten that contribute most to the learned vector.
# A contribution has the sign of the head's effect on the answer within the vector: blue heads work
# against it. Few heads have an effect of their own, while the learned vector spreads over many.

# %%
# %matplotlib inline
from tvlens import figures

figures.head_maps(aie.scores, ltv.scores, task=task.name)

# %%
aie.to_frame().nlargest(5, "aie").round(4)

# %% [markdown]
# ## Is the difference real?
#
# Two rankings cannot agree better than each agrees with itself. The ceilings: AIE over one half of
# its prompts against the other half, and an LTV trained with another seed against the first.

# %% fast={"FitSettings()": "FitSettings(steps=3, n_prompts=8, n_validation=4)"}
import pandas as pd
import torch

from tvlens.scores.agreement import split_half, stability

settings = tvlens.FitSettings()
with tvlens.progress_bar("LTV, seed 1", settings.steps) as advance:
    other = tvlens.fit_ltv(lens, task, means, settings=settings, seed=1, progress=advance)
ceilings = {
    "AIE": split_half(aie.values, k=10),
    "LTV": stability(torch.stack([ltv.scores, other.scores]), k=10),
}
pd.concat(ceilings).droplevel(1).round(3)

# %% [markdown]
# ## Against a function vector
#
# The sum of the mean outputs of the ten heads of largest AIE, added at one layer, is a *function
# vector*. Its layer and scale are chosen on validation prompts, for each kind of prompt by itself.
# `random` shows what random weights of the same norm do.

# %% fast={"=kind)": "=kind, n=4)", "=(10,)": "=(10,), layers=(9,)", "=False": "=False, n=4"}
validation = {kind: task.prompts("validation", kind=kind) for kind in ("zero", "shuffled")}
fv = tvlens.choose_function_vectors(lens, means, aie, validation, ks=(10,))
methods = {"FV": fv.one_layer, "LTV": ltv, "random": tvlens.random_controls(ltv)}
results = tvlens.evaluate(lens, task, methods, kinds=("zero", "shuffled"), exact_match=False)
results[results["metric"] == "accuracy"].round(3)

# %% [markdown]
# ## What the strongest head looks at
#
# The head of largest AIE on a prompt with four examples, read with a TransformerLens hook. At the
# last token (`:`), where the answer is due, these are the five tokens it attends to most:

# %%
from circuitsvis.attention import attention_heads
from IPython.display import HTML

layer, head = aie.top(1)[0]
hook = f"blocks.{layer}.attn.hook_pattern"
prompt = lens.encode(task.prompts("test", shots=4, n=1, seed=0))
with torch.no_grad():
    _, cache = lens.backend.model.run_with_cache(prompt.inputs, names_filter=hook)
pattern = cache[hook][0, head]
tokens = [lens.backend.tokenizer.decode(token).replace("\n", "↵") for token in prompt.inputs[0]]
seen = pd.DataFrame({"position": range(len(tokens)), "token": tokens, "attention": pattern[-1]})
seen.nlargest(5, "attention").round(3)

# %% [markdown]
# The whole pattern, by CircuitsVis: each row is a token that looks, each column one that it looks
# at; point at a square for its weight. The diagonals are those of an induction head, which looks at
# what followed earlier copies of the token it stands on.
#
# The view brings its JavaScript along, so it works without a network. Sites that display notebooks
# without running scripts, and editors that do not trust this one yet, show nothing here.

# %%
label = f"layer {layer}, head {head}"
HTML(attention_heads(pattern[None].double().round(decimals=3), tokens, [label]).local_src)

# %% [markdown]
# ## What to try next
#
# - Another task: `tvlens.tasks.names()` lists the shipped ones, `tvlens.tasks.load_file` reads your
#   own.
# - Another model: `tvlens.load` takes any Hugging Face name or folder, and a HookedTransformer or
#   TransformerBridge of your own.
# - Fewer heads: `tvlens.FitSettings(l1=0.01)` or `FitSettings(top_k=10)`, and `settings=` in
#   `fit_ltv`.
# - The published training: `settings=tvlens.FitSettings.paper()`, and
#   `python -m analyses.weight_travel` for why its weights stay where they started.
# - Everything at once, for several tasks, in a folder with tables and figures:
#   `tvlens study text --tasks present-past,antonym --out runs/mine`.
