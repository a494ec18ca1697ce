"""opkit::swiglu: the declaration is in swiglu.py, the kernels beside it."""
