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
# # From a pair of prompts to a head's path to the logits
#
# Two prompts differ in one name, and so does what should follow. Which activation carries the
# difference to the answer, position by position, layer by layer, head by head? *Activation
# patching* puts activations of the clean prompt into a run of the corrupted one, one at a time, and
# asks how much of the answer comes back (Wang et al., 2023). It takes some minutes on two CPU
# cores.
#
# Several pairs of one pattern, so that effects have an interval; `answer` follows the clean prompt,
# `wrong` the corrupted one.

# %% fast={"names[:4]": "names[:1]"}
# %matplotlib inline
import tvlens
from tvlens.tasks import PromptPairs

names = [("Mary", "John"), ("Anna", "Paul"), ("Laura", "Mark"), ("Emma", "Tom")]
entries = [
    {
        "clean": f"Then {a} and {b} went to the store. {b} gave a drink to",
        "corrupted": f"Then {a} and {b} went to the store. {a} gave a drink to",
        "answer": f" {a}",
        "wrong": f" {b}",
    }
    for a, b in names[:4]
]
pairs = PromptPairs.of(entries, name="who-gets-it")
lens = tvlens.load("smollm2-135m")

# %% [markdown]
# ## Where and in which layer?
#
# The residual stream behind every block, at every position. The number is the logit of the right
# name minus that of the wrong one, patched minus not.

# %% fast={"positions=\"all\"": "positions=\"all\", layers=[3, 29]"}
setting = {"metric": "logit_difference", "wrong": pairs.wrong}
streams = tvlens.patch(lens, pairs.clean, pairs.corrupted, positions="all", **setting)
print(f"corrupted {streams.before.mean():.2f}, clean {streams.source.mean():.2f}")
tvlens.figures.position_map(
    streams.to_frame(), task="who-gets-it", site="resid_post", tokens=streams.tokens
)

# %% [markdown]
# The difference enters at the second name, and moves to the last token, where the answer is read.
#
# ## Which heads move it?
#
# Every head's `z` at the last token, exactly and to first order: the approximation takes one
# backward pass.

# %%
heads = tvlens.patch(lens, pairs.clean, pairs.corrupted, site="z", **setting)
rough = tvlens.attribution_patch(lens, pairs.clean, pairs.corrupted, site="z", **setting)
best = heads.scores.top(5)
print("exact:", best, "to first order:", rough.scores.top(5))
tvlens.figures.head_map(heads.to_frame(), task="who-gets-it", site="z")

# %% [markdown]
# Where the two part, as far as they do:

# %%
import pandas as pd

both = pd.concat([heads.to_frame(), rough.to_frame()])
tvlens.figures.approximation(both, task="who-gets-it", site="z")

# %% [markdown]
# ## What does the best head say, and to whom?
#
# Its effect goes straight to the logits, or by way of other components. *Path patching* changes
# what the head says to one receiver alone. Beside it, the head's direct logit attribution on the
# clean prompts: its part of the difference as it stands.

# %%
from tvlens.scores import direct_effects, path_effects

layer, head = best[0]
to_logits = path_effects(lens, pairs.clean, pairs.corrupted, "logits", **setting)
parts = direct_effects(lens, pairs.clean, against=pairs.wrong)
print(f"head {layer}.{head}: effect {heads.at('query').scores.scores[layer, head]:.2f}")
print(f"straight to the logits {to_logits.scores[layer, head]:.2f}")
print(f"part of the clean difference {parts.scores.scores[layer, head]:.2f} of")
print(f"{parts.total.mean():.2f}, all parts sum to {parts.sum.mean():.2f}")

# %%
table = to_logits.to_frame().rename(columns={"path": "value"}).assign(receiver="logits")
tvlens.figures.head_paths(table, unit="logit difference")

# %% [markdown]
# ## Who tells the best head where to look?
#
# Its query at the last token hears what earlier heads say there.

# %%
to_query = path_effects(lens, pairs.clean, pairs.corrupted, f"q of {layer}.{head}", **setting)
table = to_query.to_frame().rename(columns={"path": "value"})
tvlens.figures.head_paths(table.assign(receiver=f"q of {layer}.{head}"), unit="logit difference")

# %% [markdown]
# And where it looks, on the first clean prompt: rows attend to columns.

# %%
from circuitsvis.attention import attention_heads
from IPython.display import HTML

site = tvlens.lens.Site("pattern", layer)
batch = lens.encode(pairs.clean)[:1]
pattern = lens.engine.anywhere.record(batch, [site])[site][0, :, head]
label = f"layer {layer}, head {head}"
tokens = [lens.backend.tokenizer.decode(token) for token in batch.inputs[0]]
HTML(attention_heads(pattern[None].double().round(decimals=3), tokens, [label]).local_src)
