"""opkit::cross_entropy: the declaration is in cross_entropy.py, the kernels beside it."""
