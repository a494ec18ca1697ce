"""The kernels of batch_norm in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from opkit_kernels._planes_triton import Stats, as_planes, column_stats, differentiate, normalise, plane_stats
from opkit_kernels.batch_norm.batch_norm import BatchNorm, BatchNormGradients


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> BatchNorm:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    planes = as_planes(x)
    stats = _of_channels(planes, None)
    rstd = stats.rstd(eps)
    if x.numel():
        unbiased = stats.squares / (stats.count - 1)
        for running, news in ((running_mean, stats.mean), (running_var, unbiased)):
            running.copy_(running.double() * (1 - momentum) + momentum * news)
    level = torch.zeros_like(rstd) if bias is None else bias.double()
    scale = rstd if weight is None else rstd * weight.double()
    normalise(planes, y, centre=stats.mean, scale=scale, level=level)
    return BatchNorm(y, stats.mean.float(), rstd.float())


def batch_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, eps: float = 1e-5
) -> BatchNormGradients:
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    planes, grads = as_planes(x), as_planes(grad_y)
    stats = _of_channels(planes, grads)
    rstd = stats.rstd(eps)
    scale = rstd if weight is None else rstd * weight.double()
    slope, level = stats.dot / stats.count * rstd.square(), stats.grad / stats.count
    one = torch.ones_like(rstd)
    differentiate(planes, grads, grad_x, centre=stats.mean, scale=scale, level=level, slope=slope, weight=one)
    for_weight = stats.dot * rstd if x.numel() else torch.zeros_like(rstd)
    return BatchNormGradients(
        grad_x,
        for_weight.to(x.dtype if weight is None else weight.dtype),
        stats.grad.to(x.dtype if bias is None else bias.dtype),
    )


def _of_channels(planes: Tensor, grads: Tensor | None) -> Stats:
    """Return the statistics of every channel; of nothing they are nan, and the sums zero."""
    stats = (column_stats if planes.shape[2] == 1 else plane_stats)(planes, grads)
    if planes.numel():
        return stats.joined(0)
    nan, zero = (
        torch.full((planes.shape[1],), v, dtype=torch.float64, device=planes.device) for v in (torch.nan, 0.0)
    )
    return Stats(nan, nan, zero, zero, zero)
