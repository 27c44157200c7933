"""A report of runs: one page of HTML that opens without a network."""
