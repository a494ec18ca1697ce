"""opkit::batch_norm: the declaration is in batch_norm.py, the kernels beside it."""
