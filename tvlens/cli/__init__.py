"""The `tvlens` command."""

from tvlens.cli.app import main

__all__ = ["main"]
