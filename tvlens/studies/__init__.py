"""Whole studies: every stage kept as a step of a run."""
