"""The ops that opkit ships, each with a reference, a gradient and kernels for CPU and CUDA.

    from opkit_kernels import rms_norm

    y, rstd = rms_norm(x, weight)

A name here is the op, never the folder it lives in: those are imported once, below, and the import
of the name comes after that.
"""

from opkit_kernels.adamw_step.adamw_step import adamw_step as adamw_step
from opkit_kernels.add_rms_norm.add_rms_norm import AddRMSNorm as AddRMSNorm
from opkit_kernels.add_rms_norm.add_rms_norm import add_rms_norm as add_rms_norm
from opkit_kernels.add_rms_norm.add_rms_norm import add_rms_norm_backward as add_rms_norm_backward
from opkit_kernels.batch_norm.batch_norm import BatchNorm as BatchNorm
from opkit_kernels.batch_norm.batch_norm import batch_norm as batch_norm
from opkit_kernels.batch_norm.batch_norm import batch_norm_backward as batch_norm_backward
from opkit_kernels.cross_entropy.cross_entropy import CrossEntropy as CrossEntropy
from opkit_kernels.cross_entropy.cross_entropy import cross_entropy as cross_entropy
from opkit_kernels.cross_entropy.cross_entropy import cross_entropy_backward as cross_entropy_backward
from opkit_kernels.geglu.geglu import geglu as geglu
from opkit_kernels.geglu.geglu import geglu_backward as geglu_backward
from opkit_kernels.group_norm.group_norm import GroupNorm as GroupNorm
from opkit_kernels.group_norm.group_norm import group_norm as group_norm
from opkit_kernels.group_norm.group_norm import group_norm_backward as group_norm_backward
from opkit_kernels.layer_norm.layer_norm import LayerNorm as LayerNorm
from opkit_kernels.layer_norm.layer_norm import layer_norm as layer_norm
from opkit_kernels.layer_norm.layer_norm import layer_norm_backward as layer_norm_backward
from opkit_kernels.quant_fp8.quant_fp8 import QuantFP8 as QuantFP8
from opkit_kernels.quant_fp8.quant_fp8 import quant_fp8 as quant_fp8
from opkit_kernels.rms_norm.rms_norm import RMSNorm as RMSNorm
from opkit_kernels.rms_norm.rms_norm import rms_norm as rms_norm
from opkit_kernels.rms_norm.rms_norm import rms_norm_backward as rms_norm_backward
from opkit_kernels.rms_norm_quant.rms_norm_quant import RMSNormQuant as RMSNormQuant
from opkit_kernels.rms_norm_quant.rms_norm_quant import rms_norm_quant as rms_norm_quant
from opkit_kernels.rope.rope import RoPE as RoPE
from opkit_kernels.rope.rope import rope as rope
from opkit_kernels.rope.rope import rope_backward as rope_backward
from opkit_kernels.swiglu.swiglu import swiglu as swiglu
from opkit_kernels.swiglu.swiglu import swiglu_backward as swiglu_backward
from opkit_kernels.topk_softmax.topk_softmax import TopKSoftmax as TopKSoftmax
from opkit_kernels.topk_softmax.topk_softmax import topk_softmax as topk_softmax
from opkit_kernels.topk_softmax.topk_softmax import topk_softmax_backward as topk_softmax_backward
from opkit_kernels.vector_add.vector_add import vector_add as vector_add

from opkit_kernels import _samples as _samples  # isort: skip  (of the ops above)

__all__ = [
    "AddRMSNorm",
    "BatchNorm",
    "CrossEntropy",
    "GroupNorm",
    "LayerNorm",
    "QuantFP8",
    "RMSNorm",
    "RMSNormQuant",
    "RoPE",
    "TopKSoftmax",
    "adamw_step",
    "add_rms_norm",
    "add_rms_norm_backward",
    "batch_norm",
    "batch_norm_backward",
    "cross_entropy",
    "cross_entropy_backward",
    "geglu",
    "geglu_backward",
    "group_norm",
    "group_norm_backward",
    "layer_norm",
    "layer_norm_backward",
    "quant_fp8",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_quant",
    "rope",
    "rope_backward",
    "swiglu",
    "swiglu_backward",
    "topk_softmax",
    "topk_softmax_backward",
    "vector_add",
]
