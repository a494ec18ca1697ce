"""opkit::group_norm and its gradient, opkit::group_norm_backward.

    y = (x - mean) rstd weight + bias        rstd = 1 / sqrt(var + eps)

mean and var are those of a sample's group of neighbouring channels. One group is layer norm without the last
dimension alone, as many groups as channels are instance norm.

Wu and He, "Group Normalization", 2018, arXiv:1803.08494.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import opkit
from opkit_kernels._files import register_files
from opkit_kernels._floating import require_floating


class GroupNorm(NamedTuple):
    """What group_norm returns: the normalised x, and mean and factor of each group."""

    y: Tensor
    mean: Tensor
    rstd: Tensor


class GroupNormGradients(NamedTuple):
    """What group_norm_backward returns."""

    x: Tensor
    weight: Tensor
    bias: Tensor


@opkit.op("opkit::group_norm", shapes="b c *s, c, c -> b c *s:x, b groups:float32, b groups:float32")
def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> GroupNorm:
    """Normalise each group of channels of each sample; multiply every channel by its weight, add its bias.

    x is [samples, channels, ...], and channels of one group are neighbours. var is the biased variance. Sums
    are kept in float32, or in float64 where x is float64, and y is rounded once. y has the dtype of x; weight
    and bias may have other floating dtypes, and each may be None. Any strides.

    mean and rstd, [samples, groups], are for looking at: they are float32 also where x is float64, and have no
    gradient of their own: the gradient computes them again from x. They are nan where a group has no elements.

    Raises:
        ShapeError: weight or bias does not have one element per channel, or x has less than two dimensions, or
            groups do not divide the channels.
        DtypeError: x, weight or bias is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> x = torch.tensor([[[1.0, 2.0], [2.0, 3.0], [0.0, 0.0], [0.0, 4.0]]])
        >>> opkit_kernels.group_norm(x, 2, None, None).mean
        tensor([[2., 1.]])
    """
    require_floating("opkit::group_norm", x=x, weight=weight, bias=bias)
    require_groups("opkit::group_norm", x, groups)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grouped = wide.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]).flatten(2)
    mean = grouped.mean(-1, keepdim=True)
    centred = grouped - mean
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    y = (centred * rstd).reshape(x.shape)
    y = y if weight is None else y * _per_channel(weight, wide)
    y = y if bias is None else y + _per_channel(bias, wide)
    return GroupNorm(y.to(x.dtype), mean.squeeze(-1).to(torch.float32), rstd.squeeze(-1).to(torch.float32))


@opkit.op(
    "opkit::group_norm_backward",
    shapes="b c *s:x, b c *s, c, c -> b c *s:x, c:weight, c:bias",
)
def group_norm_backward(
    grad_y: Tensor,
    x: Tensor,
    groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
) -> GroupNormGradients:
    """Return the gradients of group_norm for x, weight and bias.

    With xhat = (x - mean) rstd and g = grad_y weight, over each group: grad_x = rstd (g - mean(g) - xhat mean(g
    xhat)); grad_weight and grad_bias are the sums of grad_y xhat and of grad_y over each channel, added up in
    an order that depends on the shape alone. They have the dtypes of weight and bias, or of x where these are
    None; nothing else of bias counts.

    Raises:
        ShapeError: a shape is not that of group_norm's argument or result, or groups do not divide the
            channels.
        DtypeError: grad_y does not have the dtype of x, or an argument is not floating.

    Example:
        >>> import torch, opkit_kernels
        >>> x = torch.tensor([[[0.0, 1.0, 5.0]]])
        >>> grad_y = torch.tensor([[[1.0, 0.0, 0.0]]])
        >>> opkit_kernels.group_norm_backward(grad_y, x, 1, None, None).x
        tensor([[[ 0.1763, -0.2204,  0.0441]]])
    """
    require_floating("opkit::group_norm_backward", x=x, weight=weight, bias=bias)
    require_groups("opkit::group_norm_backward", x, groups)
    wide = torch.promote_types(x.dtype, torch.float32)
    grad_wide, x_wide = grad_y.to(wide), x.to(wide)
    shape = (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    grouped = x_wide.reshape(shape).flatten(2)
    centred = grouped - grouped.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    xhat = centred * rstd
    weighted = grad_wide if weight is None else grad_wide * _per_channel(weight, grad_wide)
    weighted = weighted.reshape(shape).flatten(2)
    along = weighted.mean(-1, keepdim=True) + xhat * (weighted * xhat).mean(-1, keepdim=True)
    others = (0, *range(2, x.dim()))
    grad_weight = (grad_wide * xhat.reshape(x.shape)).sum(others)
    return GroupNormGradients(
        (rstd * (weighted - along)).reshape(x.shape).to(x.dtype),
        grad_weight.to(x.dtype if weight is None else weight.dtype),
        grad_wide.sum(others).to(x.dtype if bias is None else bias.dtype),
    )


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """Return one value per channel so that it is broadcast over what follows the channels, in the dtype of `like`."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.dim() - 2))


def require_groups(op: str, x: Tensor, groups: int) -> None:
    """Raise where the channels of x are not a whole number for each group."""
    if groups < 1 or x.shape[1] % groups:
        raise opkit.ShapeError(
            f"calling {op}: argument groups is {groups}, and x has {x.shape[1]} channels; expected a number of "
            "groups, at least 1, that divides the channels. Pass one that does.",
            op=op,
        )


group_norm.register_autograd(
    group_norm_backward,
    saves=("x", "groups", "weight", "bias", "eps"),
    non_differentiable=("mean", "rstd"),
)
group_norm_backward.register_autograd(opkit.from_reference)
group_norm.register_jvp(opkit.from_reference)

for _op in (group_norm, group_norm_backward):
    register_files(_op)
