"""Which attention heads carry a task, and does a learned answer agree with a causal one?

lens  = tvlens.load("smollm2-135m")
task  = tvlens.tasks.load("present-past")
clean = task.prompts("train", shots=10, n=100, seed=0)
means = tvlens.mean_head_outputs(lens, clean)
aie   = tvlens.indirect_effects(lens, tvlens.mediation_prompts(task, clean, means), means)
ltv   = tvlens.fit_ltv(lens, task, means)
table = tvlens.evaluate(lens, task, {"LTV": ltv})
tvlens.compare_head_sets(ltv, aie)
"""

from tvlens import tasks
from tvlens.console import progress_bar
from tvlens.evaluation.methods import evaluate
from tvlens.lens.edits import AddToResidual, Edit, NoEdit, ReplaceHeads
from tvlens.lens.heads import HeadMeans, mean_head_outputs
from tvlens.lens.hooks import intervene
from tvlens.lens.lens import Lens
from tvlens.lens.loading import load
from tvlens.scores.agreement import compare_head_sets
from tvlens.scores.mediation import IndirectEffects, indirect_effects, mediation_prompts
from tvlens.vectors.controls import permuted_controls, random_controls
from tvlens.vectors.fv import choose_function_vectors, function_vector, function_vector_per_layer
from tvlens.vectors.ltv.attribution import attribute
from tvlens.vectors.ltv.fit import fit_ltv
from tvlens.vectors.ltv.ltv import LearnableTaskVector
from tvlens.vectors.ltv.settings import FitSettings
from tvlens.vectors.vector import TaskVector

__version__ = "0.1.0"

__all__ = [
    "AddToResidual",
    "Edit",
    "FitSettings",
    "HeadMeans",
    "IndirectEffects",
    "LearnableTaskVector",
    "Lens",
    "NoEdit",
    "ReplaceHeads",
    "TaskVector",
    "attribute",
    "choose_function_vectors",
    "compare_head_sets",
    "evaluate",
    "fit_ltv",
    "function_vector",
    "function_vector_per_layer",
    "indirect_effects",
    "intervene",
    "load",
    "mean_head_outputs",
    "mediation_prompts",
    "permuted_controls",
    "progress_bar",
    "random_controls",
    "tasks",
]
