"""opkit::vector_add: the declaration is in vector_add.py, the kernels beside it."""
