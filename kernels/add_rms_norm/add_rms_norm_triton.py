"""The kernels of add_rms_norm in Triton. A program holds BLOCK columns of a row and reads only others twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._triton import as_rows, row_blocks, row_launch, wide_type
from opkit_kernels.add_rms_norm.add_rms_norm import AddRMSNorm, AddRMSNormGradients


@triton.jit
def _forward(
    x, residual, weight, y, total, rstd, n, x_row, x_step, r_row, r_step, w_step,
    EPS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, BLOCK).to(tl.int64)
    x += row * x_row
    residual += row * r_row
    y += row * n
    total += row * n
    kind = y.dtype.element_ty
    held = tl.load(x + first * x_step, mask=first < n, other=0).to(WIDE)
    held += tl.load(residual + first * r_step, mask=first < n, other=0).to(WIDE)
    tl.store(total + first, held.to(kind), mask=first < n)
    held = held.to(kind).to(WIDE)  # what is normalised is the sum as it was stored
    squares = held * held
    for start in range(BLOCK, n, BLOCK):
        at = start + first
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(WIDE)
        value += tl.load(residual + at * r_step, mask=at < n, other=0).to(WIDE)
        tl.store(total + at, value.to(kind), mask=at < n)
        value = value.to(kind).to(WIDE)
        squares += value * value
    scale = 1 / tl.sqrt(tl.sum(squares) / n + tl.full((), EPS, WIDE))
    tl.store(rstd + row, scale.to(tl.float32))
    w = tl.load(weight + first * w_step, mask=first < n, other=0).to(WIDE)
    tl.store(y + first, (held * scale * w).to(kind), mask=first < n)
    for start in range(BLOCK, n, BLOCK):
        at = start + first
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(WIDE)
        value += tl.load(residual + at * r_step, mask=at < n, other=0).to(WIDE)
        w = tl.load(weight + at * w_step, mask=at < n, other=0).to(WIDE)
        tl.store(y + at, (value.to(kind).to(WIDE) * scale * w).to(kind), mask=at < n)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-6) -> AddRMSNorm:
    n, rows, others = x.shape[-1], as_rows(x), as_rows(residual)
    y, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if len(rows):
        _forward[(len(rows),)](
            rows, others, weight, y, total, rstd, n, *rows.stride(), *others.stride(), weight.stride(0),
            EPS=eps, WIDE=wide_type(x.dtype), **row_launch(n)._asdict(),
        )  # fmt: skip
    return AddRMSNorm(y, total, rstd)


@triton.jit
def _backward(
    grad_y, grad_sum, x, weight, grad, partial, rows, rows_each, n,
    g_row, g_step, s_row, s_step, x_row, x_step, w_step,
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
        s_held = tl.load(grad_sum + row * s_row + first * s_step, mask=first < n, other=0).to(WIDE)
        squares, dots = held * held, g_held * w_held * held
        for start in range(BLOCK, n, BLOCK):
            at = start + first
            value = tl.load(x + row * x_row + at * x_step, mask=at < n, other=0).to(WIDE)
            g = tl.load(grad_y + row * g_row + at * g_step, mask=at < n, other=0).to(WIDE)
            w = tl.load(weight + at * w_step, mask=at < n, other=0).to(WIDE)
            squares += value * value
            dots += g * w * value
        scale = 1 / tl.sqrt(tl.sum(squares) / n + tl.full((), EPS, WIDE))
        shift = tl.sum(dots) * scale * scale / n
        out = grad + row * n
        result = s_held + scale * (g_held * w_held - held * shift)
        tl.store(out + first, result.to(grad.dtype.element_ty), mask=first < n)
        sums += g_held * (held * scale)
        for start in range(BLOCK, n, BLOCK):
            at = start + first
            value = tl.load(x + row * x_row + at * x_step, mask=at < n, other=0).to(WIDE)
            g = tl.load(grad_y + row * g_row + at * g_step, mask=at < n, other=0).to(WIDE)
            s = tl.load(grad_sum + row * s_row + at * s_step, mask=at < n, other=0).to(WIDE)
            w = tl.load(weight + at * w_step, mask=at < n, other=0).to(WIDE)
            tl.store(out + at, (s + scale * (g * w - value * shift)).to(grad.dtype.element_ty), mask=at < n)
            others = tl.load(partial + at, mask=at < n, other=0)
            tl.store(partial + at, others + g * (value * scale), mask=at < n)
    tl.store(partial + first, sums, mask=first < n)


def add_rms_norm_backward(
    grad_y: Tensor, grad_sum: Tensor, sum: Tensor, weight: Tensor, eps: float = 1e-6
) -> AddRMSNormGradients:
    n, rows, grads, others = sum.shape[-1], as_rows(sum), as_rows(grad_y), as_rows(grad_sum)
    blocks = row_blocks(len(rows))
    grad = torch.empty_like(sum, memory_format=torch.contiguous_format)
    partial = sum.new_empty(blocks.count, n, dtype=torch.promote_types(sum.dtype, torch.float32))
    if sum.numel():
        _backward[(blocks.count,)](
            grads, others, rows, weight, grad, partial, len(rows), blocks.rows_each, n,
            *grads.stride(), *others.stride(), *rows.stride(), weight.stride(0),
            EPS=eps, WIDE=wide_type(sum.dtype), **row_launch(n)._asdict(),
        )  # fmt: skip
    return AddRMSNormGradients(grad, partial.sum(0).to(weight.dtype))
