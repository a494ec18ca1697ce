"""opkit::rms_norm and its gradient, opkit::rms_norm_backward.

    y = x rstd weight        rstd = 1 / sqrt(mean(x^2) + eps), the mean over the last dimension

Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating


class RMSNorm(NamedTuple):
    """What rms_norm returns: the normalised x, and the factor of each row."""

    y: Tensor
    rstd: Tensor


class RMSNormGradients(NamedTuple):
    """What rms_norm_backward returns."""

    x: Tensor
    weight: Tensor


@opkit.op("opkit::rms_norm", shapes="*b n, n -> *b n:x, *b 1:float32")
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> RMSNorm:
    """Divide each row by its root mean square, and multiply it by weight.

    Sums are kept in float32, or in float64 where x is float64, and y is rounded once. y has the dtype of
    x; weight may have another floating dtype. Any strides. A row of no elements has rstd nan.

    rstd is for looking at: it is float32 also where x is float64, and has no gradient of its own. The
    gradient computes it again from x, which it reads anyway. That keeps gradients in float64 exact and
    makes second derivatives right, as nothing in them depends on a saved number that stands for x.

    Raises:
        ShapeError: weight does not have the size of the last dimension of x, or x has no dimension.
        DtypeError: x or weight is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> y, rstd = opkit_kernels.rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2))
        >>> y, rstd
        (tensor([[0.8485, 1.1314]]), tensor([[0.2828]]))
    """
    require_floating("opkit::rms_norm", x=x, weight=weight)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return RMSNorm((wide * rstd * weight.to(wide.dtype)).to(x.dtype), rstd.to(torch.float32))


@opkit.op("opkit::rms_norm_backward", shapes="*b n:x, *b n, n -> *b n:x, n:weight")
def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> RMSNormGradients:
    """Return the gradients of rms_norm for x and weight.

    With xhat = x rstd and g = grad_y weight, along the last dimension: grad_x = rstd (g - xhat mean(g xhat)),
    and grad_weight is the sum of grad_y xhat over all rows. The native kernels add it up in an order that
    depends on the shape alone, so the result is the same for any number of threads.

    Raises:
        ShapeError: grad_y does not have the shape of x, or weight not the size of its last dimension.
        DtypeError: grad_y does not have the dtype of x, or x or weight is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> x, ones = torch.tensor([[3.0, 4.0]]), torch.ones(2)
        >>> opkit_kernels.rms_norm_backward(torch.tensor([[1.0, 0.0]]), x, ones).x
        tensor([[ 0.1810, -0.1358]])
    """
    require_floating("opkit::rms_norm_backward", x=x, weight=weight)
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_wide, x_wide, weight_wide = grad_y.to(wide), x.to(wide), weight.to(wide)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    xhat = x_wide * rstd
    weighted = grad_wide * weight_wide
    grad_x = rstd * (weighted - xhat * (weighted * xhat).mean(-1, keepdim=True))
    grad_weight = (grad_wide * xhat).unsqueeze(0).flatten(0, -2).sum(0)
    return RMSNormGradients(grad_x.to(x.dtype), grad_weight.to(weight.dtype))


rms_norm.register_autograd(rms_norm_backward, saves=("x", "weight", "eps"), non_differentiable=("rstd",))
rms_norm_backward.register_autograd(opkit.from_reference)
rms_norm.register_jvp(opkit.from_reference)

for _op in (rms_norm, rms_norm_backward):
    register_files(_op)
