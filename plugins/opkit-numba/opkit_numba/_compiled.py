"""The loops, compiled by numba on their first call with a dtype. Importing this imports numba.

- They run on the calling thread, without the GIL. numba's `parallel=True` is left alone: with GNU OpenMP, the layer
  it finds next to torch, it kills forked children (numba/np/ufunc/omppool.cpp), and its `workqueue` layer aborts the
  process when two threads call at once.
- Compiled code is not kept on disk (`cache=True`): numba tells sources apart by time and size alone, and raises at
  import where it finds no folder to write to.
- `fastmath` holds only what lets a sum be vectorised; nan and inf keep their meaning.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numba

if TYPE_CHECKING:
    from numpy import ndarray

_compile = numba.njit(nogil=True, error_model="numpy", fastmath={"reassoc", "contract"})


@_compile
def rms_norm(x: ndarray, weight: ndarray, eps: float, y: ndarray, rstd: ndarray) -> None:
    rows, n = x.shape
    number = x.dtype.type
    for r in range(rows):
        squares = number(0)
        for i in range(n):
            squares += x[r, i] * x[r, i]
        scale = number(1 / math.sqrt(squares / n + eps))
        rstd[r] = scale
        for i in range(n):
            y[r, i] = x[r, i] * scale * weight[i]


@_compile
def rms_norm_backward(
    grad_y: ndarray, x: ndarray, weight: ndarray, eps: float, grad_x: ndarray, grad_weight: ndarray
) -> None:
    rows, n = x.shape
    number = x.dtype.type
    for r in range(rows):
        squares = number(0)
        dot = number(0)
        for i in range(n):
            squares += x[r, i] * x[r, i]
            dot += grad_y[r, i] * weight[i] * x[r, i]
        scale = number(1 / math.sqrt(squares / n + eps))
        shift = number(dot * scale * scale / n)
        for i in range(n):
            grad_x[r, i] = scale * (grad_y[r, i] * weight[i] - x[r, i] * shift)
            grad_weight[i] += grad_y[r, i] * (x[r, i] * scale)


@_compile
def swiglu(gate: ndarray, up: ndarray, y: ndarray) -> None:
    one = gate.dtype.type(1)
    for i in range(y.size):
        y[i] = gate[i] / (one + math.exp(-gate[i])) * up[i]


@_compile
def swiglu_backward(
    grad_y: ndarray, gate: ndarray, up: ndarray, grad_gate: ndarray, grad_up: ndarray
) -> None:
    one = gate.dtype.type(1)
    for i in range(gate.size):
        s = one / (one + math.exp(-gate[i]))
        grad_gate[i] = grad_y[i] * up[i] * s * (one + gate[i] * (one - s))
        grad_up[i] = grad_y[i] * gate[i] * s
