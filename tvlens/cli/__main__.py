"""`python -m tvlens.cli`."""

from tvlens.cli.app import main

main()
