"""The kernels of group_norm in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from opkit_kernels._planes_triton import Stats, as_planes, differentiate, normalise, plane_stats
from opkit_kernels.group_norm.group_norm import GroupNorm, GroupNormGradients, require_groups


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> GroupNorm:
    require_groups("opkit::group_norm", x, groups)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    planes = as_planes(x)
    stats = _grouped(plane_stats(planes, None), groups).joined(-1)
    rstd = stats.rstd(eps)
    scale = rstd.unsqueeze(-1) * _of_groups(weight, 1.0, x, groups)
    level = _of_groups(bias, 0.0, x, groups)
    normalise(planes, y, centre=stats.mean.unsqueeze(-1), scale=scale, level=level)
    return GroupNorm(y, stats.mean.float(), rstd.float())


def group_norm_backward(
    grad_y: Tensor, x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> GroupNormGradients:
    require_groups("opkit::group_norm_backward", x, groups)
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    planes, grads = as_planes(x), as_planes(grad_y)
    channels = _grouped(plane_stats(planes, grads), groups)
    w = _of_groups(weight, 1.0, x, groups)
    stats = channels._replace(grad=channels.grad * w, dot=channels.dot * w).joined(-1)
    rstd, mean = stats.rstd(eps).unsqueeze(-1), stats.mean.unsqueeze(-1)
    slope = (stats.dot / stats.count).unsqueeze(-1) * rstd.square()
    level = (stats.grad / stats.count).unsqueeze(-1)
    differentiate(planes, grads, grad_x, centre=mean, scale=rstd, level=level, slope=slope, weight=w)
    dot = (channels.dot + channels.grad * (channels.mean - mean)) * rstd
    for_weight, for_bias = (
        v.flatten(1).sum(0) if x.numel() else v.new_zeros(x.shape[1]) for v in (dot, channels.grad)
    )
    return GroupNormGradients(
        grad_x,
        for_weight.to(x.dtype if weight is None else weight.dtype),
        for_bias.to(x.dtype if bias is None else bias.dtype),
    )


def _grouped(stats: Stats, groups: int) -> Stats:
    """Return the statistics of planes as [samples, groups, channels of a group]."""
    each = stats.mean.shape[1] // groups
    return Stats(*(s.unflatten(1, (groups, each)) for s in stats[:4]), stats.count)


def _of_groups(values: Tensor | None, absent: float, x: Tensor, groups: int) -> Tensor:
    """Return one value per channel as [groups, channels of a group]."""
    shape = groups, x.shape[1] // groups
    if values is None:
        return torch.full(shape, absent, dtype=torch.float64, device=x.device)
    return values.double().reshape(shape)
