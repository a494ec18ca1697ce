"""opkit::quant_fp8: the declaration is in quant_fp8.py, the kernels beside it."""
