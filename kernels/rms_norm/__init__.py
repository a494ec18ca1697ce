"""opkit::rms_norm: declaration, reference and gradient in rms_norm.py, kernels in rms_norm.cpp and rms_norm.cu."""
