"""opkit::swiglu: declaration, reference and gradient in swiglu.py, kernels in swiglu.cpp and swiglu.cu."""
