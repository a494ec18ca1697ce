"""opkit::add_rms_norm: the declaration is in add_rms_norm.py, the kernels beside it."""
