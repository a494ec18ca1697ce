"""The kernels of layer_norm in Triton. A program holds the first BLOCK columns of a row and reads only others again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._triton import as_rows, row_blocks, row_launch, wide_type
from opkit_kernels.layer_norm.layer_norm import LayerNorm, LayerNormGradients


@triton.jit
def _column(values, at, n, absent: tl.constexpr, THERE: tl.constexpr, WIDE: tl.constexpr):
    """Return one value per column, `absent` for each where there are none."""
    if THERE:
        return tl.load(values + at, mask=at < n, other=0).to(WIDE)
    return tl.full([at.shape[0]], absent, WIDE)


@triton.jit
def _forward(
    x, weight, bias, y, mean, rstd, n, x_row, x_step,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, BLOCK).to(tl.int64)
    x += row * x_row
    y += row * n
    held = tl.load(x + first * x_step, mask=first < n, other=0).to(WIDE)
    sums = held
    for start in range(BLOCK, n, BLOCK):
        at = start + first
        sums += tl.load(x + at * x_step, mask=at < n, other=0).to(WIDE)
    centre = tl.sum(sums) / n
    held = tl.where(first < n, held - centre, 0)
    squares = held * held
    for start in range(BLOCK, n, BLOCK):
        at = start + first
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(WIDE)
        value = tl.where(at < n, value - centre, 0)
        squares += value * value
    scale = 1 / tl.sqrt(tl.sum(squares) / n + tl.full((), EPS, WIDE))
    tl.store(mean + row, centre.to(tl.float32))
    tl.store(rstd + row, scale.to(tl.float32))
    w = _column(weight, first, n, 1, WEIGHT, WIDE)
    b = _column(bias, first, n, 0, BIAS, WIDE)
    tl.store(y + first, (held * scale * w + b).to(y.dtype.element_ty), mask=first < n)
    for start in range(BLOCK, n, BLOCK):
        at = start + first
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(WIDE) - centre
        w = _column(weight, at, n, 1, WEIGHT, WIDE)
        b = _column(bias, at, n, 0, BIAS, WIDE)
        tl.store(y + at, (value * scale * w + b).to(y.dtype.element_ty), mask=at < n)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> LayerNorm:
    n, rows = x.shape[-1], as_rows(x)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    mean, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2))
    if len(rows):
        _forward[(len(rows),)](
            rows, _side_by_side(weight), _side_by_side(bias), y, mean, rstd, n, *rows.stride(), EPS=eps,
            WEIGHT=weight is not None, BIAS=bias is not None, WIDE=wide_type(x.dtype), **row_launch(n)._asdict(),
        )  # fmt: skip
    return LayerNorm(y, mean, rstd)


@triton.jit
def _backward(
    grad_y, x, weight, grad_x, for_weight, for_bias, rows, rows_each, n, g_row, g_step, x_row, x_step,
    EPS: tl.constexpr, WEIGHT: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, BLOCK).to(tl.int64)
    for_weight += block * n
    for_bias += block * n
    w_held = _column(weight, first, n, 1, WEIGHT, WIDE)
    weight_sums = tl.zeros([BLOCK], WIDE)
    bias_sums = tl.zeros([BLOCK], WIDE)
    for start in range(BLOCK, n, BLOCK):  # the sums of further columns stay in memory
        tl.store(for_weight + start + first, weight_sums, mask=start + first < n)
        tl.store(for_bias + start + first, weight_sums, mask=start + first < n)
    for row in range(block * rows_each, tl.minimum(rows, (block + 1) * rows_each)):
        held = tl.load(x + row * x_row + first * x_step, mask=first < n, other=0).to(WIDE)
        g_held = tl.load(grad_y + row * g_row + first * g_step, mask=first < n, other=0).to(WIDE)
        sums, g_sums = held, g_held * w_held
        for start in range(BLOCK, n, BLOCK):
            at = start + first
            sums += tl.load(x + row * x_row + at * x_step, mask=at < n, other=0).to(WIDE)
            grad = tl.load(grad_y + row * g_row + at * g_step, mask=at < n, other=0).to(WIDE)
            g_sums += grad * _column(weight, at, n, 1, WEIGHT, WIDE)
        centre, level = tl.sum(sums) / n, tl.sum(g_sums) / n
        held = tl.where(first < n, held - centre, 0)
        squares, dots = held * held, g_held * w_held * held
        for start in range(BLOCK, n, BLOCK):
            at = start + first
            value = tl.load(x + row * x_row + at * x_step, mask=at < n, other=0).to(WIDE)
            value = tl.where(at < n, value - centre, 0)
            grad = tl.load(grad_y + row * g_row + at * g_step, mask=at < n, other=0).to(WIDE)
            squares += value * value
            dots += grad * _column(weight, at, n, 1, WEIGHT, WIDE) * value
        scale = 1 / tl.sqrt(tl.sum(squares) / n + tl.full((), EPS, WIDE))
        scale = tl.where(n > 1, scale, 0.0).to(WIDE)  # one element is its bias
        slope = tl.sum(dots) * scale * scale / n
        out = grad_x + row * n
        result = scale * (g_held * w_held - level - held * slope)
        tl.store(out + first, result.to(grad_x.dtype.element_ty), mask=first < n)
        weight_sums += g_held * (held * scale)
        bias_sums += g_held
        for start in range(BLOCK, n, BLOCK):
            at = start + first
            value = tl.load(x + row * x_row + at * x_step, mask=at < n, other=0).to(WIDE) - centre
            grad = tl.load(grad_y + row * g_row + at * g_step, mask=at < n, other=0).to(WIDE)
            result = scale * (grad * _column(weight, at, n, 1, WEIGHT, WIDE) - level - value * slope)
            tl.store(out + at, result.to(grad_x.dtype.element_ty), mask=at < n)
            others = tl.load(for_weight + at, mask=at < n, other=0)
            tl.store(for_weight + at, others + grad * (value * scale), mask=at < n)
            others = tl.load(for_bias + at, mask=at < n, other=0)
            tl.store(for_bias + at, others + grad, mask=at < n)
    tl.store(for_weight + first, weight_sums, mask=first < n)
    tl.store(for_bias + first, bias_sums, mask=first < n)


def layer_norm_backward(
    grad_y: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5
) -> LayerNormGradients:
    n, rows, grads = x.shape[-1], as_rows(x), as_rows(grad_y)
    blocks = row_blocks(len(rows))
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    for_weight, for_bias = x.new_empty(2, blocks.count, n, dtype=torch.promote_types(x.dtype, torch.float32))
    if x.numel():
        _backward[(blocks.count,)](
            grads, rows, _side_by_side(weight), grad_x, for_weight, for_bias, len(rows), blocks.rows_each, n,
            *grads.stride(), *rows.stride(),
            EPS=eps, WEIGHT=weight is not None, WIDE=wide_type(x.dtype), **row_launch(n)._asdict(),
        )  # fmt: skip
    return LayerNormGradients(
        grad_x,
        for_weight.sum(0).to(x.dtype if weight is None else weight.dtype),
        for_bias.sum(0).to(x.dtype if bias is None else bias.dtype),
    )


def _side_by_side(values: Tensor | None) -> Tensor | None:
    return None if values is None else values.contiguous()
