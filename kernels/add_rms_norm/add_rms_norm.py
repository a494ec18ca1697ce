"""opkit::add_rms_norm and its gradient, opkit::add_rms_norm_backward.

    sum = x + residual        y = sum rstd weight        rstd = 1 / sqrt(mean(sum^2) + eps)

The step between the blocks of a transformer: the residual stream takes up what a block returned, and the next
block gets it normalised. RMS norm is by Zhang and Sennrich, 2019, arXiv:1910.07467.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating


class AddRMSNorm(NamedTuple):
    """What add_rms_norm returns: the normalised sum, the sum, and the factor of each row."""

    y: Tensor
    sum: Tensor
    rstd: Tensor


class AddRMSNormGradients(NamedTuple):
    """What add_rms_norm_backward returns: the gradient of the sum, which is that of x and of residual, and weight's."""

    sum: Tensor
    weight: Tensor


@opkit.op("opkit::add_rms_norm", shapes="*b n, *b n:x, n -> *b n:x, *b n:x, *b 1:float32")
def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> AddRMSNorm:
    """Add x to the residual, and return the sum and its rms_norm.

    The same as `sum = x + residual; rms_norm(sum, weight, eps)`, in one pass: what is normalised is the sum as
    it is returned, in the dtype of x. Sums of squares are kept in float32, or in float64 where x is float64.
    weight may have another floating dtype. Any strides. A row of no elements has rstd nan. y and sum have
    gradients, rstd, which is for looking at, has none.

    Raises:
        ShapeError: residual does not have the shape of x, or weight the size of its last dimension, or x has no
            dimension.
        DtypeError: residual does not have the dtype of x, or x or weight is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> x, residual = torch.tensor([[1.0, 1.0]]), torch.tensor([[2.0, 3.0]])
        >>> y, sum, rstd = opkit_kernels.add_rms_norm(x, residual, torch.ones(2))
        >>> y, sum, rstd
        (tensor([[0.8485, 1.1314]]), tensor([[3., 4.]]), tensor([[0.2828]]))
    """
    require_floating("opkit::add_rms_norm", x=x, weight=weight)
    total = x + residual
    wide = total.to(torch.promote_types(x.dtype, torch.float32))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return AddRMSNorm((wide * rstd * weight.to(wide.dtype)).to(x.dtype), total, rstd.to(torch.float32))


@opkit.op("opkit::add_rms_norm_backward", shapes="*b n:sum, *b n:sum, *b n, n -> *b n:sum, n:weight")
def add_rms_norm_backward(
    grad_y: Tensor, grad_sum: Tensor, sum: Tensor, weight: Tensor, eps: float = 1e-6
) -> AddRMSNormGradients:
    """Return the gradients of add_rms_norm for its sum and for weight.

    grad_sum and the gradient of rms_norm for the sum together. It is rounded once, and it is the gradient of x
    as well as that of residual. The sum over rows for weight is added up in an order that depends on the shape
    alone.

    Raises:
        ShapeError: grad_y or grad_sum does not have the shape of sum, or weight not the size of its last
            dimension.
        DtypeError: grad_y or grad_sum does not have the dtype of sum, or sum or weight is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> sum, ones, grad_y = torch.tensor([[3.0, 4.0]]), torch.ones(2), torch.tensor([[1.0, 0.0]])
        >>> opkit_kernels.add_rms_norm_backward(grad_y, torch.ones(1, 2), sum, ones).sum
        tensor([[1.1810, 0.8642]])
    """
    require_floating("opkit::add_rms_norm_backward", sum=sum, weight=weight)
    wide = torch.promote_types(sum.dtype, torch.float32)
    grad_wide, sum_wide = grad_y.to(wide), sum.to(wide)
    rstd = torch.rsqrt(sum_wide.square().mean(-1, keepdim=True) + eps)
    xhat = sum_wide * rstd
    weighted = grad_wide * weight.to(wide)
    grad = grad_sum.to(wide) + rstd * (weighted - xhat * (weighted * xhat).mean(-1, keepdim=True))
    grad_weight = (grad_wide * xhat).unsqueeze(0).flatten(0, -2).sum(0)
    return AddRMSNormGradients(grad.to(sum.dtype), grad_weight.to(weight.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: AddRMSNorm) -> None:
    _, _, weight, eps = inputs
    ctx.save_for_backward(output.sum, weight)
    ctx.eps = eps


def _backward(ctx: Any, grad_y: Tensor, grad_sum: Tensor, grad_rstd: Tensor) -> tuple[Tensor | None, ...]:
    # A function and no op: two outputs of an op never share memory, as these two gradients do.
    grad, grad_weight = add_rms_norm_backward(grad_y, grad_sum, *ctx.saved_tensors, ctx.eps)
    return grad, grad, grad_weight, None


add_rms_norm.register_autograd(_backward, setup_context=_save, non_differentiable=("rstd",))
add_rms_norm_backward.register_autograd(opkit.from_reference)
add_rms_norm.register_jvp(opkit.from_reference)

for _op in (add_rms_norm, add_rms_norm_backward):
    register_files(_op)
