"""opkit::rms_norm_quant: the declaration is in rms_norm_quant.py, the kernels beside it."""
