"""opkit::batch_norm and its gradient, opkit::batch_norm_backward: batch norm in training.

    y = (x - mean) rstd weight + bias        rstd = 1 / sqrt(var + eps), mean and var over each channel

Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
2015, arXiv:1502.03167.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating


class BatchNorm(NamedTuple):
    """What batch_norm returns: the normalised x, and mean and factor of each channel."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


class BatchNormGradients(NamedTuple):
    """What batch_norm_backward returns."""

    x: Tensor
    weight: Tensor
    bias: Tensor


@opkit.op(
    "opkit::batch_norm",
    shapes="b c *s, c, c, c, c -> b c *s:x, c:float32, c:float32",
    mutates_args=("running_mean", "running_var"),
)
def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BatchNorm:
    """Normalise each channel over the batch, multiply by its weight and add its bias; update the running statistics.

    x is [samples, channels, ...]. var is the biased variance. The running statistics r become (1 - momentum) r +
    momentum s, where s is the mean, and the unbiased variance, as torch has it; they stay where x has no
    elements. Of one value per channel the unbiased variance is nan.

    Sums are kept in float32, or in float64 where x is float64, and y is rounded once. y has the dtype of x; the
    other tensors may have other floating dtypes, and weight and bias may be None. Any strides.

    mean and rstd are for looking at: they are float32 also where x is float64, and have no gradient of their
    own.

    Raises:
        ShapeError: an argument does not have one element per channel, or x has less than two dimensions.
        DtypeError: an argument is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> running_mean, running_var = torch.zeros(1), torch.ones(1)
        >>> x = torch.tensor([[1.0], [5.0]])
        >>> opkit_kernels.batch_norm(x, None, None, running_mean, running_var).y
        tensor([[-1.0000],
                [ 1.0000]])
        >>> running_mean, running_var
        (tensor([0.3000]), tensor([1.7000]))
    """
    require_floating(
        "opkit::batch_norm", x=x, weight=weight, bias=bias, running_mean=running_mean, running_var=running_var
    )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    others = (0, *range(2, x.dim()))
    mean = wide.mean(others)
    centred = wide - _per_channel(mean, wide)
    squares = centred.square().sum(others)
    count = x.numel() // x.shape[1] if x.shape[1] else 0
    rstd = torch.rsqrt(squares / count + eps) if count else torch.full_like(mean, torch.nan)
    if count:
        running_mean.copy_(torch.lerp(running_mean.to(wide.dtype), mean.detach(), momentum))
        unbiased = squares / (count - 1) if count > 1 else mean * torch.nan
        running_var.copy_(torch.lerp(running_var.to(wide.dtype), unbiased.detach(), momentum))
    y = centred * _per_channel(rstd, wide)
    y = y if weight is None else y * _per_channel(weight, wide)
    y = y if bias is None else y + _per_channel(bias, wide)
    return BatchNorm(y.to(x.dtype), mean.to(torch.float32), rstd.to(torch.float32))


@opkit.op(
    "opkit::batch_norm_backward", shapes="b c *s:x, b c *s, c, c, c:float32 -> b c *s:x, c:weight, c:bias"
)
def batch_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, eps: float = 1e-5
) -> BatchNormGradients:
    """Return the gradients of batch_norm for x, weight and bias.

    With xhat = (x - mean) rstd, over each channel: grad_x = weight rstd (grad_y - mean(grad_y) - xhat
    mean(grad_y xhat)); grad_weight and grad_bias are the sums of grad_y xhat and of grad_y, added up in an order
    that depends on the shape alone. They have the dtypes of weight and bias, or of x where these are None;
    nothing else of bias counts.

    mean is what batch_norm returned. The native kernels add up x - mean rather than x, so that one pass over
    both gives exact statistics; the result is the same for any number near it, so it has no gradient.

    Raises:
        ShapeError: a shape is not that of batch_norm's argument or result.
        DtypeError: grad_y does not have the dtype of x, or an argument is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> x, grad_y = torch.tensor([[0.0], [1.0], [5.0]]), torch.tensor([[1.0], [0.0], [0.0]])
        >>> opkit_kernels.batch_norm_backward(grad_y, x, None, None, torch.tensor([2.0])).x
        tensor([[ 0.1763],
                [-0.2204],
                [ 0.0441]])
    """
    require_floating("opkit::batch_norm_backward", x=x, weight=weight, bias=bias)
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_wide, x_wide = grad_y.to(wide), x.to(wide)
    others = (0, *range(2, x.dim()))
    centred = x_wide - x_wide.mean(others, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(others, keepdim=True) + eps)
    xhat = centred * rstd
    along = grad_wide.mean(others, keepdim=True) + xhat * (grad_wide * xhat).mean(others, keepdim=True)
    grad_x = rstd * (grad_wide - along)
    grad_x = grad_x if weight is None else grad_x * _per_channel(weight, grad_x)
    return BatchNormGradients(
        grad_x.to(x.dtype),
        (grad_wide * xhat).sum(others).to(x.dtype if weight is None else weight.dtype),
        grad_wide.sum(others).to(x.dtype if bias is None else bias.dtype),
    )


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per channel so that it is broadcast over what follows the channels, in the dtype of `like`."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 2))


batch_norm.register_autograd(
    batch_norm_backward,
    saves=("x", "weight", "bias", "mean", "eps"),
    non_differentiable=("mean", "rstd", "running_mean", "running_var"),
)
batch_norm_backward.register_autograd(opkit.from_reference, non_differentiable=("mean",))

for _op in (batch_norm, batch_norm_backward):
    register_files(_op)
