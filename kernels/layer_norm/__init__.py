"""opkit::layer_norm: the declaration is in layer_norm.py, the kernels beside it."""
