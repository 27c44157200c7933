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
from tvlens.edits import AddToResidual, Edit, NoEdit, ReplaceHeads
from tvlens.evaluate import evaluate
from tvlens.heads import HeadMeans, mean_head_outputs
from tvlens.headsets import compare_head_sets
from tvlens.interventions import intervene
from tvlens.lens import Lens
from tvlens.loading import load
from tvlens.mediation import IndirectEffects, indirect_effects, mediation_prompts
from tvlens.methods.attribution import attribute
from tvlens.methods.fit import FitSettings, fit_ltv
from tvlens.methods.fv import choose_function_vectors, function_vector, function_vector_per_layer
from tvlens.methods.ltv import LearnableTaskVector, permuted_controls, random_controls
from tvlens.methods.vector import TaskVector
from tvlens.progress import progress_bar

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
