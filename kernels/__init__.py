"""The ops that opkit ships, each with a reference, a gradient and kernels for CPU and CUDA.

    from opkit_kernels import rms_norm

    y, rstd = rms_norm(x, weight)

A name here is the op, never the folder it lives in: those are imported once, below, and the import
of the name comes after that.
"""

from opkit_kernels.cross_entropy.cross_entropy import CrossEntropy as CrossEntropy
from opkit_kernels.cross_entropy.cross_entropy import cross_entropy as cross_entropy
from opkit_kernels.cross_entropy.cross_entropy import cross_entropy_backward as cross_entropy_backward
from opkit_kernels.rms_norm.rms_norm import RMSNorm as RMSNorm
from opkit_kernels.rms_norm.rms_norm import rms_norm as rms_norm
from opkit_kernels.rms_norm.rms_norm import rms_norm_backward as rms_norm_backward
from opkit_kernels.swiglu.swiglu import swiglu as swiglu
from opkit_kernels.swiglu.swiglu import swiglu_backward as swiglu_backward
from opkit_kernels.vector_add.vector_add import vector_add as vector_add

__all__ = [
    "CrossEntropy",
    "RMSNorm",
    "cross_entropy",
    "cross_entropy_backward",
    "rms_norm",
    "rms_norm_backward",
    "swiglu",
    "swiglu_backward",
    "vector_add",
]
