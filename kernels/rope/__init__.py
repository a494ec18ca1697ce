"""opkit::rope: the declaration is in rope.py, the kernels beside it."""
