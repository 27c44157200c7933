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
# # Your own model, task, score and functions
#
# Everything that tvlens ships can be replaced: here a model that is made on the spot, a task from a
# list of pairs, a score of heads from a tensor, and a class of functions in twenty lines. And what
# is refused, with the message that comes. It takes a minute.
#
# ## A model
#
# Any Hugging Face causal language model, HookedTransformer or TransformerBridge will do. This GPT-2
# has two layers of four heads, random weights and one token a letter. It has learned nothing, which
# makes it a good control: what is found of it below is what chance looks like.

# %%
# %matplotlib inline
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import tvlens

letters = "abcdefghijklmnopqrstuvwxyz"
words = ["<pad>", "<unk>", "Q", "A", ":", "\n", *letters, *(f" {letter}" for letter in letters)]
inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
inner.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w|[^\w]"), "isolated")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")

torch.manual_seed(0)
sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
sizes |= {"bos_token_id": None, "eos_token_id": None}
config = GPT2Config(vocab_size=len(words), initializer_range=0.3, **sizes)
lens = tvlens.load(GPT2LMHeadModel(config).eval(), tokenizer=tokenizer, name="mine")
lens

# %% [markdown]
# ## A task
#
# Pairs of an input and what it should become, in a file (JSON, JSON lines, CSV or TSV), or in
# memory as `tvlens.tasks.Task`. Splits are made once and for all, 70 to 9 to 21.

# %%
import json
import tempfile
from pathlib import Path

pairs = [{"input": a + b, "output": b} for a in letters[:12] for b in letters[:12] if a != b]
folder = Path(tempfile.mkdtemp())
(folder / "second-letter.json").write_text(json.dumps(pairs))
task = tvlens.tasks.load_file(folder / "second-letter.json")
print(task.prompts("test", shots=2, n=1)[0].text)

# %% [markdown]
# From here on all is as in the quick start. Only the means: they are taken over the prompts that a
# model answers, and this one answers next to none, so all of them are asked for.

# %% fast={"steps=30": "steps=3"}
clean = task.prompts("train", shots=5, n=40)
means = tvlens.mean_head_outputs(lens, clean, answered_only=False)
shuffled = task.prompts("train", shots=5, n=20, kind="shuffled")
aie = tvlens.indirect_effects(lens, shuffled, means)
settings = tvlens.FitSettings(shots=5, steps=30)
ltv = tvlens.fit_ltv(lens, task, means, settings=settings)
table = tvlens.evaluate(lens, task, {"LTV": ltv}, shots=5, kinds=("zero", "clean"))
table[table["metric"] == "accuracy"].round(2)

# %% [markdown]
# ## A score
#
# A score is a number for every head: any tensor of layers and heads with a name and a unit. This
# one asks how much a head *could* write, by the norm of its output matrix, and knows nothing of the
# task. Whatever compares or ablates heads takes it; made of values on single prompts
# (`Scores.of_prompts`) it would have intervals too.

# %%
from tvlens.scores import Scores, overlap_curve

size = Scores(lens.w_o.norm(dim=(2, 3)), "size of W_O", "norm", task=task.name, model=lens.name)
print(size.top(3), aie.top(3))
tvlens.compare_head_sets(aie, size, ks=(3,), names=("AIE", "size")).head(5).round(2)

# %% [markdown]
# Within the band of chance, as it should be:

# %%
tvlens.figures.overlap_curve(overlap_curve(aie, size).assign(task="AIE and size of W_O"))

# %% [markdown]
# Set the best heads by each score to their means, beside random ones of the same layers:

# %%
from tvlens.scores import sets_of

sets = sets_of({"aie": aie, "size": size}, ["top"], shares=(0, 0.125, 0.25, 0.5), draws=20)
ablation = tvlens.ablate(lens, task.prompts("test", shots=5), sets, means=means)
tvlens.figures.ablation_curves(ablation.to_frame(), metric="cross_entropy")

# %% [markdown]
# ## A class of functions
#
# For regression models: how functions are drawn, how one is evaluated, and the variance that errors
# are divided by. These are linear functions that all have the same offset, and the model has only
# learned linear functions through zero.

# %%
from dataclasses import dataclass

from tvlens.tasks import FunctionClass, Functions


@dataclass(frozen=True)
class Lines(Functions):
    weights: torch.Tensor
    offset: float

    def __call__(self, xs):
        return torch.einsum("bpd,bd->bp", xs, self.weights) + self.offset


@dataclass(frozen=True)
class WithOffset(FunctionClass):
    offset: float = 2.0

    def draw(self, n, generator):
        return Lines(torch.randn(n, self.n_dims, generator=generator), self.offset)

    @property
    def variance(self):
        return float(self.n_dims)


points = tvlens.load("linear-small")
functions = tvlens.tasks.FunctionTask("offset", WithOffset(n_dims=4), train_points=12)

# %% [markdown]
# What is the same for every function is what a vector of the class can carry. So it should help
# here, even where the prompt is the query alone and nothing says which function is meant.

# %% fast={"n=256": "n=16", "steps=60": "steps=3", "n=128": "n=16"}
of_class = tvlens.mean_head_outputs(points, functions.prompts("train", shots=11, n=256))
settings = tvlens.FitSettings(kinds=("zero",), shots=11, learning_rate=0.3, steps=60)
vector = tvlens.fit_ltv(points, functions, of_class, settings=settings)
controls = {"LTV": vector, "random": tvlens.random_controls(vector)}
found = tvlens.evaluate(points, functions, controls, kinds=("zero",), shots=11, n=128)
found[["method", "prompt", "metric", "value", "ci_low", "ci_high"]].round(2)

# %% [markdown]
# ## What is refused
#
# A mistake ends in one message: what was given, what was expected, and what to do.

# %%
pairs[0]["output"] = ["", "b"]
(folder / "broken.json").write_text(json.dumps(pairs))
mistakes = {
    "a name": lambda: tvlens.tasks.load("second-leter"),
    "a file": lambda: tvlens.tasks.load_file(folder / "broken.json"),
    "a model that answers nothing": lambda: tvlens.mean_head_outputs(lens, clean[:1]),
    "scores of another model": lambda: tvlens.compare_head_sets(aie, vector),
    "heads that are not there": lambda: tvlens.function_vector(means, [(2, 0)], layer=1),
    "another function class": lambda: WithOffset(n_dims=0),
}
for what, call in mistakes.items():
    try:
        call()
    except tvlens.errors.TvlensError as error:
        print(f"{what}: {type(error).__name__}: {error}\n".replace(str(folder), "FOLDER"))
