"""opkit::adamw_step: the declaration is in adamw_step.py, the kernels beside it."""
