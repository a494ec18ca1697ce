"""opkit::rms_norm: the declaration is in rms_norm.py, the kernels beside it."""
