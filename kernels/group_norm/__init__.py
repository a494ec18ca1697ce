"""opkit::group_norm: the declaration is in group_norm.py, the kernels beside it."""
