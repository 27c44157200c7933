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

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
