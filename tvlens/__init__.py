"""Which attention heads carry a task, and does a learned answer agree with a causal one?"""
