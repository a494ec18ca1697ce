"""The kernels of quant_fp8 in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._triton import as_rows, fp8_scale, largest_magnitude, to_fp8
from opkit_kernels.quant_fp8.quant_fp8 import QuantFP8


@triton.jit
def _grouped(x, q, scales, count, n, each, per_row, x_row, x_step, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Quantise GROUPS groups, of which BLOCK columns are held and others read twice."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    row, start = group // per_row, group % per_row * each
    columns = tl.arange(0, BLOCK).to(tl.int64)
    width = tl.where(group < count, tl.minimum(each, n - start), 0)[:, None]
    source = x + (row * x_row + start * x_step)[:, None]
    to = q + (row * n + start)[:, None]
    at = columns[None, :]
    held = tl.load(source + at * x_step, mask=at < width, other=0).to(tl.float32)
    largest = largest_magnitude(held)
    for begin in range(BLOCK, each, BLOCK):
        at = begin + columns[None, :]
        value = tl.load(source + at * x_step, mask=at < width, other=0).to(tl.float32)
        largest = tl.maximum(largest, largest_magnitude(value))
    scale = fp8_scale(largest)
    tl.store(scales + group, scale, mask=group < count)
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)[:, None]
    at = columns[None, :]
    tl.store(to + at, to_fp8(held * inverse), mask=at < width)
    for begin in range(BLOCK, each, BLOCK):
        at = begin + columns[None, :]
        value = tl.load(source + at * x_step, mask=at < width, other=0).to(tl.float32)
        tl.store(to + at, to_fp8(value * inverse), mask=at < width)


@triton.jit
def _largest(x, found, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0).to(tl.float32)
    tl.store(found + tl.program_id(0), largest_magnitude(value))


@triton.jit
def _quantise(x, q, found, scales, n, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    scale = fp8_scale(tl.load(found + tl.arange(0, 1)))
    if tl.program_id(0) == 0:
        tl.store(scales + tl.arange(0, 1), scale)
    inverse = tl.div_rn(tl.full((1,), 1.0, tl.float32), scale)
    value = tl.load(x + at, mask=at < n, other=0).to(tl.float32)
    tl.store(q + at, to_fp8(value * inverse), mask=at < n)


def quant_fp8(x: Tensor, group: int | None = None) -> QuantFP8:
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    if group is None:
        flat, block = x.contiguous().view(-1), 4096
        parts = max(triton.cdiv(flat.numel(), block), 1)
        found, scale = x.new_empty(parts, dtype=torch.int32), x.new_empty((), dtype=torch.float32)
        _largest[(parts,)](flat, found, flat.numel(), BLOCK=block)
        _quantise[(parts,)](flat, q.view(torch.uint8), found.max().view(1), scale, flat.numel(), BLOCK=block)
        return QuantFP8(q, scale)
    n = x.shape[-1]
    each = max(n if group == -1 else min(group, n), 1)
    per_row = 1 if group == -1 else -(-n // group)
    scale = x.new_empty((*x.shape[:-1], per_row), dtype=torch.float32)
    if scale.numel():
        rows, block = as_rows(x), min(triton.next_power_of_2(each), 4096)
        groups = max(1024 // block, 1)
        _grouped[(triton.cdiv(scale.numel(), groups),)](
            rows, q.view(torch.uint8), scale, scale.numel(), n, each, per_row, *rows.stride(),
            GROUPS=groups, BLOCK=block,
        )  # fmt: skip
    return QuantFP8(q, scale)
