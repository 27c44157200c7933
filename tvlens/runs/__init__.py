"""Run folders: manifest, steps that survive interruption, tables, figures."""

from tvlens.runs.run import Run

__all__ = ["Run"]
