"""The kernels of cross_entropy in Triton: a program reads a row once, some columns at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._triton import as_rows, row_launch, wide_type
from opkit_kernels.cross_entropy.cross_entropy import CrossEntropy, check_smoothing


@triton.jit
def _forward(
    logits, target, loss, lse, n, row_step, step,
    SMOOTHING: tl.constexpr, IGNORED: tl.constexpr, Z_LOSS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_step
    columns = tl.arange(0, BLOCK).to(tl.int64)
    top = tl.full((), float("-inf"), WIDE)
    total, plain = tl.zeros((), WIDE), tl.zeros((), WIDE)
    for start in range(0, n, BLOCK):
        at = start + columns
        x = tl.load(logits + at * step, mask=at < n, other=float("-inf")).to(WIDE)
        higher = tl.maximum(top, tl.max(x, 0))
        shift = tl.where(tl.abs(higher) == float("inf"), 0.0, higher).to(WIDE)  # inf - inf is no number
        total = tl.where(top == float("-inf"), total, total * tl.exp(top - shift)) + tl.sum(
            tl.exp(x - shift), 0
        )
        top = higher
        if SMOOTHING > 0:
            plain += tl.sum(tl.where(at < n, x, 0.0).to(WIDE), 0)
    shift = tl.where(tl.abs(top) == float("inf"), 0.0, top).to(tl.float64)
    result = shift + tl.log(total.to(tl.float64))
    tl.store(lse + row, result)
    label = tl.load(target + row)
    at_target = tl.load(logits + tl.where(label == IGNORED, 0, label) * step).to(tl.float64)
    value = result - at_target
    if SMOOTHING > 0:
        smoothing = tl.full((), SMOOTHING, tl.float64)
        value = (1 - smoothing) * value + smoothing * (result - plain.to(tl.float64) / n)
    if Z_LOSS != 0:
        value += tl.full((), Z_LOSS, tl.float64) * result * result
    tl.store(loss + row, tl.where(label == IGNORED, 0.0, value.to(WIDE)).to(loss.dtype.element_ty))


@triton.jit
def _backward(
    grad_loss, grad_lse, logits, target, lse, grad_logits, n, row_step, step,
    SMOOTHING: tl.constexpr, IGNORED: tl.constexpr, Z_LOSS: tl.constexpr,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    label, own = tl.load(target + row), tl.load(lse + row)
    g = tl.where(label == IGNORED, 0.0, tl.load(grad_loss + row).to(tl.float64))
    of_lse = tl.load(grad_lse + row) + g
    if Z_LOSS != 0:
        of_lse += tl.where(label == IGNORED, 0.0, 2 * tl.full((), Z_LOSS, tl.float64) * g * own)
    smoothing = tl.full((), SMOOTHING, tl.float64)
    high = own.to(WIDE)
    low = tl.where(tl.abs(own) == float("inf"), 0.0, own - high.to(tl.float64)).to(WIDE)
    x = tl.load(logits + row * row_step + at * step, mask=at < n, other=0).to(WIDE)
    apart = x - high
    part = apart - x
    rest = (x - (apart - part)) - (high + part) - low  # what rounding lost (Knuth's two-sum), far below 1
    power = tl.exp(apart)
    power += tl.where(tl.abs(apart) == float("inf"), 0.0, power * rest).to(WIDE)
    grad = of_lse.to(WIDE) * power
    if SMOOTHING > 0:
        grad -= (g * smoothing / n).to(WIDE)
    grad -= tl.where((at == label) & (label != IGNORED), (g * (1 - smoothing)).to(WIDE), 0.0)
    tl.store(grad_logits + row * n + at, grad.to(grad_logits.dtype.element_ty), mask=at < n)


def _check(op: str, logits: Tensor, target: Tensor, label_smoothing: float, ignore_index: int) -> None:
    check_smoothing(op, label_smoothing)
    exists = (target >= 0) & (target < logits.shape[-1])
    torch._assert_async((exists | (target == ignore_index)).all(), f"calling {op}: a target is out of range")


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> CrossEntropy:
    _check("opkit::cross_entropy", logits, target, label_smoothing, ignore_index)
    rows, n = as_rows(logits), logits.shape[-1]
    loss, lse = logits.new_empty(target.shape), logits.new_empty(target.shape, dtype=torch.float64)
    if len(rows):
        _forward[(len(rows),)](
            rows, target.contiguous(), loss, lse, n, *rows.stride(),
            SMOOTHING=label_smoothing, IGNORED=ignore_index, Z_LOSS=z_loss,
            WIDE=wide_type(logits.dtype), **row_launch(n)._asdict(),
        )  # fmt: skip
    return CrossEntropy(loss, lse)


def cross_entropy_backward(
    grad_loss: Tensor,
    grad_lse: Tensor,
    logits: Tensor,
    target: Tensor,
    lse: Tensor,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    z_loss: float = 0.0,
) -> Tensor:
    _check("opkit::cross_entropy_backward", logits, target, label_smoothing, ignore_index)
    rows, n = as_rows(logits), logits.shape[-1]
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if logits.numel():
        launch = row_launch(n)
        _backward[(len(rows), triton.cdiv(n, launch.BLOCK))](
            grad_loss.contiguous(), grad_lse.contiguous(), rows, target.contiguous(), lse.contiguous(),
            grad_logits, n, *rows.stride(),
            SMOOTHING=label_smoothing, IGNORED=ignore_index, Z_LOSS=z_loss,
            WIDE=wide_type(logits.dtype), **launch._asdict(),
        )  # fmt: skip
    return grad_logits
