"""opkit::geglu: the declaration is in geglu.py, the kernels beside it."""
