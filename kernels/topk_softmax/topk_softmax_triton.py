"""The kernels of topk_softmax in Triton: a program holds a row."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._triton import as_rows, wide_type
from opkit_kernels.topk_softmax.topk_softmax import TopKSoftmax, check_k


@triton.jit
def _keys(x, WIDE: tl.constexpr):
    """Return integers in the order of the numbers, with one for 0 and -0, and the greatest for nan."""
    x = tl.where(x == 0, 0.0, x).to(WIDE)
    if tl.float64 == WIDE:
        bits = x.to(tl.int64, bitcast=True)
        return tl.where(x != x, 0x7FFFFFFFFFFFFFFF, bits ^ ((bits >> 63) & 0x7FFFFFFFFFFFFFFF))
    else:
        bits = x.to(tl.int32, bitcast=True)
        return tl.where(x != x, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def _forward(
    logits, weights, indices, n, k, row_step, step,
    NORMALISE: tl.constexpr, WIDE: tl.constexpr, LEAST: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns, slots = tl.arange(0, BLOCK), tl.arange(0, SLOTS)
    exists = columns < n
    at = columns.to(tl.int64)
    x = tl.load(logits + row * row_step + at * step, mask=exists, other=0).to(WIDE)
    keys = tl.where(exists, _keys(x, WIDE), LEAST)
    chosen, places = tl.zeros([SLOTS], WIDE), tl.zeros([SLOTS], tl.int64)
    for i in range(0, k):
        place = tl.min(tl.where(keys == tl.max(keys, 0), columns, BLOCK), 0)
        value = tl.sum(tl.where(columns == place, x, 0.0).to(WIDE), 0)
        chosen = tl.where(slots == i, value, chosen)
        places = tl.where(slots == i, place.to(tl.int64), places)
        keys = tl.where(columns == place, LEAST, keys)
    top = tl.sum(tl.where(slots == 0, chosen, 0.0).to(WIDE), 0)
    powers = tl.exp(chosen.to(tl.float64) - top.to(tl.float64))  # few, and the fast one is 2 ulp off
    if NORMALISE:
        total = tl.sum(tl.where(slots < k, powers, 0.0).to(tl.float64), 0)
    else:
        total = tl.sum(tl.where(exists, tl.exp(x - top), 0.0).to(WIDE), 0).to(tl.float64)
    tl.store(weights + row * k + slots, (powers / total).to(weights.dtype.element_ty), mask=slots < k)
    tl.store(indices + row * k + slots, places, mask=slots < k)


@triton.jit
def _backward(
    grad_weights, logits, indices, grad_logits, n, k, row_step, step,
    NORMALISE: tl.constexpr, WIDE: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns, slots = tl.arange(0, BLOCK).to(tl.int64), tl.arange(0, SLOTS)
    logits += row * row_step
    grad_weights += row * k
    indices += row * k
    exists = columns < n
    x = tl.load(logits + columns * step, mask=exists, other=float("-inf")).to(WIDE)
    places = tl.load(indices + slots, mask=slots < k, other=0)
    chosen = tl.load(logits + places * step, mask=slots < k, other=float("-inf")).to(WIDE)
    grads = tl.load(grad_weights + slots, mask=slots < k, other=0).to(WIDE)
    if NORMALISE:
        top = tl.max(chosen, 0)
        total = tl.sum(tl.where(slots < k, tl.exp(chosen - top), 0.0).to(WIDE), 0)
    else:
        top = tl.max(x, 0)
        total = tl.sum(tl.where(exists, tl.exp(x - top), 0.0).to(WIDE), 0)
    dot = tl.sum(tl.where(slots < k, grads * (tl.exp(chosen - top) / total), 0.0).to(WIDE), 0)
    p = tl.exp(x - top) / total
    grad, less = -dot * p, tl.zeros((), WIDE)
    if NORMALISE:
        grad, less = tl.zeros([BLOCK], WIDE), dot
    for i in range(0, k):
        own = tl.load(grad_weights + i).to(WIDE) - less
        grad += tl.where(columns == tl.load(indices + i), p * own, 0.0).to(WIDE)
    tl.store(grad_logits + row * n + columns, grad.to(grad_logits.dtype.element_ty), mask=exists)


def _launch(logits: Tensor, k: int, normalise: bool) -> dict[str, Any]:
    block = triton.next_power_of_2(logits.shape[-1])
    return {
        "NORMALISE": normalise,
        "WIDE": wide_type(logits.dtype),
        "SLOTS": triton.next_power_of_2(max(k, 1)),
        "BLOCK": block,
        "num_warps": min(max(block // 512, 1), 16),
    }


def topk_softmax(logits: Tensor, k: int, normalise: bool = True) -> TopKSoftmax:
    n, rows = logits.shape[-1], as_rows(logits)
    check_k(k, n)
    shape = (*logits.shape[:-1], k)
    weights, indices = logits.new_empty(shape), logits.new_empty(shape, dtype=torch.int64)
    if weights.numel():
        least = -(2 ** (63 if logits.dtype == torch.float64 else 31))
        _forward[(len(rows),)](
            rows, weights, indices, n, k, *rows.stride(), LEAST=least, **_launch(logits, k, normalise)
        )
    return TopKSoftmax(weights, indices)


def topk_softmax_backward(
    grad_weights: Tensor, logits: Tensor, indices: Tensor, normalise: bool = True
) -> Tensor:
    n, k, rows = logits.shape[-1], indices.shape[-1], as_rows(logits)
    exists = (indices >= 0) & (indices < n)
    torch._assert_async(exists.all(), "calling opkit::topk_softmax_backward: an index is out of range")
    grad_logits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    if logits.numel():
        _backward[(len(rows),)](
            grad_weights.contiguous(), rows, indices.contiguous(), grad_logits, n, k, *rows.stride(),
            **_launch(logits, k, normalise),
        )  # fmt: skip
    return grad_logits
