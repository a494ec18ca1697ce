"""A kernel for somebody else's op: the distribution opkit-fast, named in pyproject.toml as a plugin of opkit."""

from __future__ import annotations

import torch
from torch import Tensor

import opkit


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute demo::rms_norm with one temporary tensor instead of three."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (x * scale).mul_(weight)


def register(registry: opkit.plugins.Registry) -> None:
    """Say what the plugin brings. The op need not exist yet; a native kernel is an opkit.cpp.kernel(...) here."""
    registry.register_kernel("demo::rms_norm", "cpu", rms_norm, backend="fast", dtypes=(torch.float32,))
