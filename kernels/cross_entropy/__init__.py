"""opkit::cross_entropy: declaration, reference and gradient in cross_entropy.py, kernels in cross_entropy.cpp and cross_entropy.cu."""
