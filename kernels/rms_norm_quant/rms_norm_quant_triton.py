"""The kernel of rms_norm_quant in Triton. A program holds BLOCK columns of a row and reads only others again."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._triton import as_rows, fp8_scale, largest_magnitude, row_launch, to_fp8
from opkit_kernels.rms_norm_quant.rms_norm_quant import RMSNormQuant


@triton.jit
def _kernel(x, weight, q, scales, rstd, n, x_row, x_step, w_step, EPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.arange(0, BLOCK).to(tl.int64)
    x += row * x_row
    q += row * n
    held = tl.load(x + first * x_step, mask=first < n, other=0).to(tl.float32)
    squares = held * held
    for start in range(BLOCK, n, BLOCK):
        at = start + first
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(tl.float32)
        squares += value * value
    factor = 1 / tl.sqrt(tl.sum(squares) / n + tl.full((), EPS, tl.float32))
    tl.store(rstd + row, factor)
    held = held * factor * tl.load(weight + first * w_step, mask=first < n, other=0).to(tl.float32)
    largest = largest_magnitude(tl.where(first < n, held, 0.0))
    for start in range(BLOCK, n, BLOCK):
        at = start + first
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(tl.float32)
        value = value * factor * tl.load(weight + at * w_step, mask=at < n, other=0).to(tl.float32)
        largest = tl.maximum(largest, largest_magnitude(tl.where(at < n, value, 0.0)))
    scale = fp8_scale(largest)
    tl.store(scales + row, scale)
    tl.store(q + first, to_fp8(held * (1 / scale)), mask=first < n)
    for start in range(BLOCK, n, BLOCK):
        at = start + first
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(tl.float32)
        value = value * factor * tl.load(weight + at * w_step, mask=at < n, other=0).to(tl.float32)
        tl.store(q + at, to_fp8(value * (1 / scale)), mask=at < n)


def rms_norm_quant(x: Tensor, weight: Tensor, eps: float = 1e-6) -> RMSNormQuant:
    n, rows = x.shape[-1], as_rows(x)
    q = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    scale, rstd = (x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(2))
    if len(rows):
        _kernel[(len(rows),)](
            rows, weight, q.view(torch.uint8), scale, rstd, n, *rows.stride(), weight.stride(0),
            EPS=eps, **row_launch(n)._asdict(),
        )  # fmt: skip
    return RMSNormQuant(q, scale, rstd)
