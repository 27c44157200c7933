"""Analyses of tvlens, each a command: `python -m analyses.NAME --preset small --out FOLDER`."""
