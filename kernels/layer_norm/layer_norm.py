"""opkit::layer_norm and its gradient, opkit::layer_norm_backward.

    y = (x - mean) rstd weight + bias        rstd = 1 / sqrt(var + eps), mean and var over the last dimension

Ba, Kiros and Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating


class LayerNorm(NamedTuple):
    """What layer_norm returns: the normalised x, and mean and factor of each row."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


class LayerNormGradients(NamedTuple):
    """What layer_norm_backward returns."""

    x: Tensor
    weight: Tensor
    bias: Tensor


@opkit.op("opkit::layer_norm", shapes="*b n, n, n -> *b n:x, *b 1:float32, *b 1:float32")
def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> LayerNorm:
    """Take the mean of each row from it, divide by the standard deviation, multiply by weight and add bias.

    var is the biased variance. Sums are kept in float32, or in float64 where x is float64, and y is rounded
    once. y has the dtype of x; weight and bias may have other floating dtypes, and each may be None. Any
    strides. A row of no elements has mean and rstd nan.

    mean and rstd are for looking at: they are float32 also where x is float64, and have no gradient of their
    own. The gradient computes them again from x, which it reads anyway; so it is exact in float64, and second
    derivatives are right.

    Raises:
        ShapeError: weight or bias does not have the size of the last dimension of x, or x has no dimension.
        DtypeError: x, weight or bias is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> y, mean, rstd = opkit_kernels.layer_norm(torch.tensor([[1.0, 5.0]]), torch.ones(2), None)
        >>> y, mean, rstd
        (tensor([[-1.0000,  1.0000]]), tensor([[3.]]), tensor([[0.5000]]))
    """
    require_floating("opkit::layer_norm", x=x, weight=weight, bias=bias)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = wide.mean(-1, keepdim=True)
    centred = wide - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = centred * rstd
    y = y if weight is None else y * weight.to(wide.dtype)
    y = y if bias is None else y + bias.to(wide.dtype)
    return LayerNorm(y.to(x.dtype), mean.to(torch.float32), rstd.to(torch.float32))


@opkit.op("opkit::layer_norm_backward", shapes="*b n:x, *b n, n, n -> *b n:x, n:weight, n:bias")
def layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> LayerNormGradients:
    """Return the gradients of layer_norm for x, weight and bias.

    With xhat = (x - mean) rstd and g = grad_y weight, along the last dimension: grad_x = rstd (g - mean(g) -
    xhat mean(g xhat)); grad_weight and grad_bias are the sums of grad_y xhat and of grad_y over all rows,
    added up in an order that depends on the shape alone. They have the dtypes of weight and bias, or of x where
    these are None; nothing else of bias counts.

    Raises:
        ShapeError: a shape is not that of layer_norm's argument or result.
        DtypeError: grad_y does not have the dtype of x, or an argument is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> x, ones = torch.tensor([[1.0, 2.0, 6.0]]), torch.ones(3)
        >>> grad_y = torch.tensor([[1.0, 0.0, 0.0]])
        >>> opkit_kernels.layer_norm_backward(grad_y, x, ones, ones).x
        tensor([[ 0.1763, -0.2204,  0.0441]])
    """
    require_floating("opkit::layer_norm_backward", x=x, weight=weight, bias=bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_wide, x_wide = grad_y.to(wide), x.to(wide)
    centred = x_wide - x_wide.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    xhat = centred * rstd
    weighted = grad_wide if weight is None else grad_wide * weight.to(wide)
    along = weighted.mean(-1, keepdim=True) + xhat * (weighted * xhat).mean(-1, keepdim=True)
    grad_weight = (grad_wide * xhat).unsqueeze(0).flatten(0, -2).sum(0)
    grad_bias = grad_wide.unsqueeze(0).flatten(0, -2).sum(0)
    return LayerNormGradients(
        (rstd * (weighted - along)).to(x.dtype),
        grad_weight.to(x.dtype if weight is None else weight.dtype),
        grad_bias.to(x.dtype if bias is None else bias.dtype),
    )


layer_norm.register_autograd(
    layer_norm_backward,
    saves=("x", "weight", "bias", "eps"),
    non_differentiable=("mean", "rstd"),
)
layer_norm_backward.register_autograd(opkit.from_reference)
layer_norm.register_jvp(opkit.from_reference)

for _op in (layer_norm, layer_norm_backward):
    register_files(_op)
