"""A package with one op. Nothing in it says that its kernels come compiled: setup.py does."""

from __future__ import annotations

import torch
from torch import Tensor

import opkit


@opkit.op("scan::linear", shapes="*b t, *b t -> *b t")
def linear_scan(a: Tensor, x: Tensor) -> Tensor:
    """Return y with y[t] = a[t] * y[t - 1] + x[t] along the last dimension, from y[-1] = 0."""
    y = torch.zeros_like(x[..., 0])
    steps = []
    for factor, step in zip(a.unbind(-1), x.unbind(-1), strict=True):
        y = factor * y + step
        steps.append(y)
    return torch.stack(steps, -1) if steps else torch.empty_like(x)


linear_scan.register_autograd(opkit.from_reference)
linear_scan.register_kernel(
    "cpu", opkit.cpp.kernel("linear_scan.cpp", symbol="linear_scan"), dtypes=(torch.float32, torch.float64)
)
linear_scan.register_kernel(
    "cuda", opkit.cpp.kernel("linear_scan.cu", symbol="linear_scan"), dtypes=(torch.float32, torch.float64)
)
