"""The kernels: a program for each row, which reads it once to sum and once more to write, then mostly from the cache.

Importing this imports triton.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
# Triton's interpreter puts functions of its own into triton.language while a kernel runs: one at a time.
_INTERPRETS = os.environ.get("TRITON_INTERPRET") == "1"
_turn: contextlib.AbstractContextManager[object] = (
    threading.RLock() if _INTERPRETS else contextlib.nullcontext()
)


@triton.jit
def softmax_rows(x, y, n, x_row, x_step, scale, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    x += row * x_row
    y += row * n
    # The largest number so far and the sum of the others' distance to it, for each of BLOCK columns.
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + columns
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(tl.float32) * scale
        value = tl.where(at < n, value, float("-inf"))
        higher = tl.maximum(top, value)
        base = tl.where(higher == float("-inf"), 0.0, higher)  # or it would be taken from itself
        total = total * tl.exp(top - base) + tl.exp(value - base)
        top = higher
    largest = tl.max(top, axis=0)
    base = tl.where(largest == float("-inf"), 0.0, largest)
    whole = tl.sum(total * tl.exp(top - base), axis=0)
    for start in range(0, n, BLOCK):
        at = start + columns
        value = tl.load(x + at * x_step, mask=at < n, other=0).to(tl.float32) * scale
        tl.store(y + at, (tl.exp(value - base) / whole).to(y.dtype.element_ty), mask=at < n)


@triton.jit
def softmax_rows_backward(
    grad_y, y, grad_x, n, g_row, g_step, y_row, y_step, scale, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK).to(tl.int64)
    grad_y += row * g_row
    y += row * y_row
    grad_x += row * n
    products = tl.zeros([BLOCK], tl.float32)
    for start in range(0, n, BLOCK):
        at = start + columns
        g = tl.load(grad_y + at * g_step, mask=at < n, other=0).to(tl.float32)
        products += g * tl.load(y + at * y_step, mask=at < n, other=0).to(tl.float32)
    shift = tl.sum(products, axis=0)
    for start in range(0, n, BLOCK):
        at = start + columns
        g = tl.load(grad_y + at * g_step, mask=at < n, other=0).to(tl.float32)
        part = tl.load(y + at * y_step, mask=at < n, other=0).to(tl.float32)
        tl.store(grad_x + at, (part * (g - shift) * scale).to(grad_x.dtype.element_ty), mask=at < n)


def scaled_softmax() -> Callable[..., Tensor]:
    """Return the kernel of `opkit_triton::scaled_softmax`."""

    def kernel(x: Tensor, scale: float = 1.0) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if x.numel():
            rows = _rows(x)
            with _turn, torch.cuda.device_of(x):  # Triton launches on the current device
                softmax_rows[(len(rows),)](rows, y, rows.shape[1], *rows.stride(), scale, **_launch(rows))
        return y

    return kernel


def scaled_softmax_backward() -> Callable[..., Tensor]:
    """Return the kernel of `opkit_triton::scaled_softmax_backward`."""

    def kernel(grad_y: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        grad_x = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        if y.numel():
            grads, rows = _rows(grad_y), _rows(y)
            strides = (*grads.stride(), *rows.stride())
            with _turn, torch.cuda.device_of(y):
                softmax_rows_backward[(len(rows),)](
                    grads, rows, grad_x, rows.shape[1], *strides, scale, **_launch(rows)
                )
        return grad_x

    return kernel


def _rows(tensor: Tensor) -> Tensor:
    """Return a tensor as a matrix of its last dimension, copied where its strides do not allow that."""
    return tensor.reshape(-1, tensor.shape[-1])


def _launch(rows: Tensor) -> dict[str, Any]:
    block = min(triton.next_power_of_2(rows.shape[1]), _BLOCK)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 8)}
