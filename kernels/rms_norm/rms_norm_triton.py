"""The kernels of rms_norm in Triton. A program holds the first BLOCK columns of a row and reads only others twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._triton import as_rows, row_blocks, row_launch, wide_type
from opkit_kernels.rms_norm.rms_norm import RMSNorm, RMSNormGradients


@triton.jit
def _forward(
    x, weight, y, rstd, n, x_row, x_step, w_step,
    EPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, BLOCK).to(tl.int64)
    x += row * x_row
    y += row * n
    held = tl.load(x + first * x_step, mask=first < n, other=0).to(WIDE)
    squares = held * held
    for start in range(BLOCK, n, BLOCK):
        at = start + first
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(WIDE)
        squares += value * value
    scale = 1 / tl.sqrt(tl.sum(squares) / n + tl.full((), EPS, WIDE))
    tl.store(rstd + row, scale.to(tl.float32))
    w = tl.load(weight + first * w_step, mask=first < n, other=0).to(WIDE)
    tl.store(y + first, (held * scale * w).to(y.dtype.element_ty), mask=first < n)
    for start in range(BLOCK, n, BLOCK):
        at = start + first
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(WIDE)
        w = tl.load(weight + at * w_step, mask=at < n, other=0).to(WIDE)
        tl.store(y + at, (value * scale * w).to(y.dtype.element_ty), mask=at < n)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> RMSNorm:
    n, rows = x.shape[-1], as_rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if len(rows):
        _forward[(len(rows),)](
            rows, weight, y, rstd, n, *rows.stride(), weight.stride(0),
            EPS=eps, WIDE=wide_type(x.dtype), **row_launch(n)._asdict(),
        )  # fmt: skip
    return RMSNorm(y, rstd)


@triton.jit
def _backward(
    grad_y, x, weight, grad_x, partial, rows, rows_each, n, g_row, g_step, x_row, x_step, w_step,
    EPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, BLOCK).to(tl.int64)
    partial += block * n
    w_held = tl.load(weight + first * w_step, mask=first < n, other=0).to(WIDE)
    sums = tl.zeros([BLOCK], WIDE)
    for start in range(BLOCK, n, BLOCK):  # the sums of further columns stay in memory
        tl.store(partial + start + first, sums, mask=start + first < n)
    for row in range(block * rows_each, tl.minimum(rows, (block + 1) * rows_each)):
        held = tl.load(x + row * x_row + first * x_step, mask=first < n, other=0).to(WIDE)
        g_held = tl.load(grad_y + row * g_row + first * g_step, mask=first < n, other=0).to(WIDE)
        squares, dots = held * held, g_held * w_held * held
        for start in range(BLOCK, n, BLOCK):
            at = start + first
            value = tl.load(x + row * x_row + at * x_step, mask=at < n, other=0).to(WIDE)
            grad = tl.load(grad_y + row * g_row + at * g_step, mask=at < n, other=0).to(WIDE)
            w = tl.load(weight + at * w_step, mask=at < n, other=0).to(WIDE)
            squares += value * value
            dots += grad * w * value
        scale = 1 / tl.sqrt(tl.sum(squares) / n + tl.full((), EPS, WIDE))
        shift = tl.sum(dots) * scale * scale / n
        out = grad_x + row * n
        result = scale * (g_held * w_held - held * shift)
        tl.store(out + first, result.to(grad_x.dtype.element_ty), mask=first < n)
        sums += g_held * (held * scale)
        for start in range(BLOCK, n, BLOCK):
            at = start + first
            value = tl.load(x + row * x_row + at * x_step, mask=at < n, other=0).to(WIDE)
            grad = tl.load(grad_y + row * g_row + at * g_step, mask=at < n, other=0).to(WIDE)
            w = tl.load(weight + at * w_step, mask=at < n, other=0).to(WIDE)
            result = scale * (grad * w - value * shift)
            tl.store(out + at, result.to(grad_x.dtype.element_ty), mask=at < n)
            others = tl.load(partial + at, mask=at < n, other=0)
            tl.store(partial + at, others + grad * (value * scale), mask=at < n)
    tl.store(partial + first, sums, mask=first < n)


def rms_norm_backward(grad_y: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-6) -> RMSNormGradients:
    n, rows, grads = x.shape[-1], as_rows(x), as_rows(grad_y)
    blocks = row_blocks(len(rows))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    partial = x.new_empty(blocks.count, n, dtype=torch.promote_types(x.dtype, torch.float32))
    if x.numel():
        _backward[(blocks.count,)](
            grads, rows, weight, grad_x, partial, len(rows), blocks.rows_each, n,
            *grads.stride(), *rows.stride(), weight.stride(0),
            EPS=eps, WIDE=wide_type(x.dtype), **row_launch(n)._asdict(),
        )  # fmt: skip
    return RMSNormGradients(grad_x, partial.sum(0).to(weight.dtype))
