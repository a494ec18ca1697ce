"""Triton kernels of functions of single elements, of tensors of one shape: several inputs, several outputs."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._triton import wide_type

_BLOCK = 2048


def launch_map(kernel: Any, inputs: tuple[Tensor, ...], outputs: int) -> list[Tensor]:
    """Return what `kernel(*inputs, *outputs, n, WIDE, BLOCK)` writes, contiguous and like the first input."""
    first = inputs[0]
    results = [torch.empty_like(first, memory_format=torch.contiguous_format) for _ in range(outputs)]
    n = first.numel()
    if n:
        flat = (x.contiguous() for x in inputs)
        kernel[(triton.cdiv(n, _BLOCK),)](*flat, *results, n, WIDE=wide_type(first.dtype), BLOCK=_BLOCK)
    return results


@triton.jit
def places(n, BLOCK: tl.constexpr):
    """Return which elements this program computes, and which of them exist."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return at, at < n


@triton.jit
def sigmoid(x):
    """Return 1 / (1 + exp(-x)), also in double."""
    return 1 / (1 + tl.exp(-x))
