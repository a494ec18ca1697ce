"""Which kernel runs: the table of an op's kernels, and the choice made for one call."""
