"""What group_norm and batch_norm share in Triton. x is [samples, channels, inner]: planes of `inner` elements.

First the statistics of every plane, then those of what is normalised together are joined, then every element. Imports
triton, so only kernels import it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._triton import row_blocks, wide_type


class Stats(NamedTuple):
    """Of planes: mean and squared deviations of x, sums of g and of g (x - mean), all double; and their count."""

    mean: Tensor
    squares: Tensor
    grad: Tensor
    dot: Tensor
    count: Tensor

    def joined(self, dim: int) -> Stats:
        """Return the statistics of all planes along a dimension together."""
        count = self.count.expand_as(self.mean)
        total = count.sum(dim)
        mean = (self.mean * count).sum(dim) / total
        apart = self.mean - mean.unsqueeze(dim)
        squares = (self.squares + count * apart.square()).sum(dim)
        return Stats(mean, squares, self.grad.sum(dim), (self.dot + self.grad * apart).sum(dim), total)

    def rstd(self, eps: float) -> Tensor:
        return torch.rsqrt(self.squares / self.count + eps)


def as_planes(x: Tensor) -> Tensor:
    """Return x as [samples, channels, inner], copied where its strides do not allow it otherwise."""
    return x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)


@triton.jit
def _plane_stats(
    x, g, out, channels, inner, x_b, x_c, x_i, g_b, g_c, g_i,
    GRADS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    plane = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    x += plane // channels * x_b + plane % channels * x_c
    sums = tl.zeros([BLOCK], WIDE)
    for start in range(0, inner, BLOCK):
        at = start + columns
        sums += tl.load(x + at * x_i, mask=at < inner, other=0).to(WIDE)
    mean = tl.sum(sums) / inner
    squares = tl.zeros([BLOCK], WIDE)
    grads = tl.zeros([BLOCK], WIDE)
    dots = tl.zeros([BLOCK], WIDE)
    for start in range(0, inner, BLOCK):
        at = start + columns
        value = tl.load(x + at * x_i, mask=at < inner, other=0).to(WIDE)
        value = tl.where(at < inner, value - mean, 0)
        squares += value * value
        if GRADS:
            from_g = g + plane // channels * g_b + plane % channels * g_c
            grad = tl.load(from_g + at * g_i, mask=at < inner, other=0).to(WIDE)
            grads += grad
            dots += grad * value
    tl.store(out + plane * 4, mean.to(tl.float64))
    tl.store(out + plane * 4 + 1, tl.sum(squares).to(tl.float64))
    tl.store(out + plane * 4 + 2, tl.sum(grads).to(tl.float64))
    tl.store(out + plane * 4 + 3, tl.sum(dots).to(tl.float64))


@triton.jit
def _column_stats(
    x, g, out, rows, rows_each, n, x_b, x_c, g_b, g_c,
    GRADS: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    there = (column < n)[None, :]
    begin, end = block * rows_each, tl.minimum(rows, (block + 1) * rows_each)
    x += (column * x_c)[None, :]
    sums = tl.zeros([ROWS, COLUMNS], WIDE)
    for start in range(begin, end, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        sums += tl.load(x + row * x_b, mask=(row < end) & there, other=0).to(WIDE)
    mean = tl.sum(sums, 0) / (end - begin).to(WIDE)
    squares = tl.zeros([ROWS, COLUMNS], WIDE)
    grads = tl.zeros([ROWS, COLUMNS], WIDE)
    dots = tl.zeros([ROWS, COLUMNS], WIDE)
    for start in range(begin, end, ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        value = tl.load(x + row * x_b, mask=(row < end) & there, other=0).to(WIDE)
        value = tl.where(row < end, value - mean[None, :], 0)
        squares += value * value
        if GRADS:
            grad = tl.load(g + row * g_b + (column * g_c)[None, :], mask=(row < end) & there, other=0).to(
                WIDE
            )
            grads += grad
            dots += grad * value
    to = out + (block * n + column) * 4
    tl.store(to, mean.to(tl.float64), mask=column < n)
    tl.store(to + 1, tl.sum(squares, 0).to(tl.float64), mask=column < n)
    tl.store(to + 2, tl.sum(grads, 0).to(tl.float64), mask=column < n)
    tl.store(to + 3, tl.sum(dots, 0).to(tl.float64), mask=column < n)


def plane_stats(x: Tensor, grad: Tensor | None) -> Stats:
    """Return the statistics of every plane, [samples, channels]."""
    samples, channels, inner = x.shape
    out = x.new_empty(samples, channels, 4, dtype=torch.float64)
    g = x if grad is None else grad
    if x.numel():
        _plane_stats[(samples * channels,)](
            x, g, out, channels, inner, *x.stride(), *g.stride(),
            GRADS=grad is not None, WIDE=wide_type(x.dtype), BLOCK=min(triton.next_power_of_2(inner), 4096),
        )  # fmt: skip
    return Stats(*out.unbind(-1), out.new_full((), inner))


def column_stats(x: Tensor, grad: Tensor | None) -> Stats:
    """Return the statistics of every channel of planes of one element, in blocks of samples: [blocks, channels]."""
    samples, channels, _ = x.shape
    blocks = row_blocks(samples)
    out = x.new_empty(blocks.count, channels, 4, dtype=torch.float64)
    g = x if grad is None else grad
    if x.numel():
        _column_stats[(triton.cdiv(channels, 32), blocks.count)](
            x, g, out, samples, blocks.rows_each, channels, *x.stride()[:2], *g.stride()[:2],
            GRADS=grad is not None, WIDE=wide_type(x.dtype), ROWS=32, COLUMNS=32,
        )  # fmt: skip
    count = out.new_full((blocks.count, 1), blocks.rows_each)
    count[-1] = samples - (blocks.count - 1) * blocks.rows_each
    return Stats(*out.unbind(-1), count)


@triton.jit
def _apply(
    x, g, y, lines, period, channels, inner, n, x_b, x_c, x_i, g_b, g_c, g_i,
    GRADS: tl.constexpr, INDEX: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(INDEX) * BLOCK + tl.arange(0, BLOCK)
    plane, inside = at // inner, (at % inner).to(tl.int64)
    sample, channel = (plane // channels).to(tl.int64), (plane % channels).to(tl.int64)
    line = lines + plane % period * 5
    there = at < n
    value = tl.load(x + sample * x_b + channel * x_c + inside * x_i, mask=there, other=0).to(WIDE)
    value -= tl.load(line, mask=there, other=0)
    scale, level = tl.load(line + 1, mask=there, other=0), tl.load(line + 2, mask=there, other=0)
    if GRADS:
        grad = tl.load(g + sample * g_b + channel * g_c + inside * g_i, mask=there, other=0).to(WIDE)
        grad *= tl.load(line + 4, mask=there, other=0)
        value = (grad - level - value * tl.load(line + 3, mask=there, other=0)) * scale
    else:
        value = value * scale + level
    tl.store(y + at, value.to(y.dtype.element_ty), mask=there)


def normalise(x: Tensor, y: Tensor, *, centre: Tensor, scale: Tensor, level: Tensor) -> None:
    """Set y to (x - centre) scale + level, with one of each for every channel, or for every plane."""
    _launch(x, None, y, centre, scale, level, centre, centre)


def differentiate(
    x: Tensor,
    grad: Tensor,
    y: Tensor,
    *,
    centre: Tensor,
    scale: Tensor,
    level: Tensor,
    slope: Tensor,
    weight: Tensor,
) -> None:
    """Set y to (grad weight - level - (x - centre) slope) scale, likewise."""
    _launch(x, grad, y, centre, scale, level, slope, weight)


def _launch(x: Tensor, grad: Tensor | None, y: Tensor, *values: Tensor) -> None:
    n, (_, channels, inner) = y.numel(), x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    lines = torch.stack([v.to(wide).reshape(-1) for v in torch.broadcast_tensors(*values)], -1)
    g = x if grad is None else grad
    if n:
        _apply[(triton.cdiv(n, 1024),)](
            x, g, y, lines, len(lines), channels, inner, n, *x.stride(), *g.stride(), GRADS=grad is not None,
            INDEX=tl.int64 if n + 1024 > 2**31 else tl.int32, WIDE=wide_type(x.dtype), BLOCK=1024,
        )  # fmt: skip
