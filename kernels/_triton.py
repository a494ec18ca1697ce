"""What opkit's Triton kernels share: how a launch over rows is laid out. Imports triton, so only they import it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor


def wide_type(dtype: torch.dtype) -> tl.dtype:
    """Return the type that kernels compute in: float32, or float64 for float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


class RowLaunch(NamedTuple):
    """A program for a row, or for some rows in turn: how many columns it holds at once, in how many warps."""

    BLOCK: int
    num_warps: int


def row_launch(n: int) -> RowLaunch:
    """Return how to launch programs over rows of n elements: whole rows in registers, up to 8192 elements of them."""
    block = min(triton.next_power_of_2(max(n, 1)), 8192)
    return RowLaunch(block, min(max(block // 512, 1), 16))


def as_rows(x: Tensor) -> Tensor:
    """Return x as a matrix of its last dimension, copied where its strides do not allow it otherwise."""
    return x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[:-1].numel(), x.shape[-1])


class RowBlocks(NamedTuple):
    """Rows in blocks that sum into memory of their own; the number of rows alone decides, not the device."""

    count: int
    rows_each: int


def row_blocks(rows: int) -> RowBlocks:
    """Return the blocks for a sum over rows."""
    rows_each = max(triton.cdiv(rows, 512), 1)
    return RowBlocks(triton.cdiv(rows, rows_each), rows_each)


@triton.jit
def largest_magnitude(values):
    """Return the bits of the largest magnitude along the last axis, as integers, in which nan is the largest of all."""
    return tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, len(values.shape) - 1)


@triton.jit
def fp8_scale(largest):
    """Return the scale for float8_e4m3fn and a largest magnitude: not below the smallest normal float."""
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), tl.full(largest.shape, 448.0, tl.float32))
    return tl.where(scale < 1.1754943508222875e-38, 1.1754943508222875e-38, scale)


@triton.jit
def to_fp8(values):
    """Return the bits of float8_e4m3fn: rounded to nearest even, the largest for what is too large.

    With integers, as devices before compute capability 8.9 and Triton's interpreter do not convert.
    """
    bits = values.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude - (120 << 23) + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20
    # The sum leaves a subnormal in the low bits, rounded to even by the addition.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - (141 << 23)
    finite = tl.minimum(tl.where(magnitude < (121 << 23), subnormal, normal), 0x7E)
    finite = tl.where(magnitude > 0x7F800000, 0x7F, finite)
    return (finite | ((bits >> 24) & 0x80)).to(tl.uint8)
