"""opkit::rms_norm_quant: rms_norm, quantised to float8_e4m3fn with a scale per row.

    y = x rstd weight        rstd = 1 / sqrt(mean(x^2) + eps)        scale = max(|y|) / 448        q = y / scale

What comes before a matrix product in 8 bits: y is never written. See rms_norm and quant_fp8 for the sources.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating
from opkit_kernels.quant_fp8.quant_fp8 import LARGEST, LEAST_SCALE


class RMSNormQuant(NamedTuple):
    """What rms_norm_quant returns: the normalised x divided by its scales, these, and the factor of each row."""

    q: Tensor
    scale: Tensor
    rstd: Tensor


@opkit.op("opkit::rms_norm_quant", shapes="*b n, n -> *b n:float8_e4m3fn, *b 1:float32, *b 1:float32")
def rms_norm_quant(x: Tensor, weight: Tensor, eps: float = 1e-6) -> RMSNormQuant:
    """Normalise each row by its root mean square, and quantise it with a scale of its own.

    y is computed in float32, also where x is float64, and is not rounded to the dtype of x before it is quantised. A
    scale is at least 2^-126. Any strides; weight may have another floating dtype. A row of no elements has rstd nan.
    There is no gradient: rounding has none.

    Raises:
        ShapeError: weight does not have the size of the last dimension of x, or x has no dimension.
        DtypeError: x or weight is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> q, scale, rstd = opkit_kernels.rms_norm_quant(torch.tensor([[1.0, 2.0]]), torch.ones(2))
        >>> q.float(), scale, rstd
        (tensor([[224., 448.]]), tensor([[0.0028]]), tensor([[0.6325]]))
    """
    require_floating("opkit::rms_norm_quant", x=x, weight=weight)
    wide = x.to(torch.float32)
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd * weight.to(torch.float32)
    largest = y.abs().amax(-1, keepdim=True) if x.shape[-1] else torch.zeros_like(rstd)
    scale = (largest / LARGEST).clamp_min(LEAST_SCALE)
    return RMSNormQuant(
        (y * scale.reciprocal()).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale, rstd
    )


register_files(rms_norm_quant)
