"""opkit::vector_add: declaration, reference and gradient in vector_add.py, kernels in vector_add.cpp and vector_add.cu."""
