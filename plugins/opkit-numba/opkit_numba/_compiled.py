"""The loops, compiled by numba on their first call with a dtype. Importing this imports numba.

- They run on the calling thread, without the GIL. numba's `parallel=True` is left alone: with GNU OpenMP, the layer
  it finds next to torch, it kills forked children (numba/np/ufunc/omppool.cpp), and its `workqueue` layer aborts the
  process when two threads call at once.
- Compiled code is not kept on disk (`cache=True`): numba tells sources apart by time and size alone, and raises at
  import where it finds no folder to write to.
- `fastmath` holds only what lets a loop be vectorised; nan and inf keep their meaning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
from numba.extending import overload

if TYPE_CHECKING:
    from numpy import ndarray

_compile = numba.njit(nogil=True, error_model="numpy", fastmath={"contract"})
_compile_sums = numba.njit(nogil=True, error_model="numpy", fastmath={"contract", "reassoc"})


@_compile_sums
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


@_compile_sums
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


# numba calls libm for exp, one element at a time; this is vectorised with the loop around it, and six times as fast
# (the same steps as fast_exp in opkit's own kernels). Within 1 ulp, subnormal results, inf and nan included:
# e^x = 2^k e^r with x = k ln 2 + r; adding 1.5 * 2^23 rounds to the integer k and leaves it in the low bits;
# 2^k is applied in two halves, as it alone may overflow. Not with reassoc, which would cancel what rounds.
@_compile
def _exp_single(x: Any) -> Any:
    single = np.float32
    x = single(100) if x > single(100) else x
    x = single(-110) if x < single(-110) else x
    shifted = x * single(1.44269504089) + single(12582912)
    k = shifted - single(12582912)
    power = np.int32(single(shifted).view(np.int32) - np.int32(0x4B400000))
    r = x - k * single(0.693359375)
    r = r - k * single(-2.12194440e-4)
    p = single(1.9875691500e-4)  # Cephes expf, Moshier 1984
    p = p * r + single(1.3981999507e-3)
    p = p * r + single(8.3334519073e-3)
    p = p * r + single(4.1665795894e-2)
    p = p * r + single(1.6666665459e-1)
    p = p * r + single(5.0000001201e-1)
    p = p * (r * r) + r + single(1)
    half = power >> np.int32(1)
    first = np.int32((half + np.int32(127)) << np.int32(23)).view(np.float32)
    second = np.int32((power - half + np.int32(127)) << np.int32(23)).view(np.float32)
    return p * first * second


def _exp(x: float) -> float:
    return math.exp(x)


@overload(_exp, strict=False)  # strict takes annotations for part of the parameters' names
def _exp_of(x: numba.types.Type) -> Callable[[float], float]:
    if x == numba.float32:
        return lambda x: _exp_single(x)
    return lambda x: math.exp(x)


@_compile
def swiglu(gate: ndarray, up: ndarray, y: ndarray) -> None:
    one = gate.dtype.type(1)
    for i in range(y.size):
        y[i] = gate[i] / (one + _exp(-gate[i])) * up[i]


@_compile
def swiglu_backward(
    grad_y: ndarray, gate: ndarray, up: ndarray, grad_gate: ndarray, grad_up: ndarray
) -> None:
    one = gate.dtype.type(1)
    for i in range(gate.size):
        s = one / (one + _exp(-gate[i]))
        grad_gate[i] = grad_y[i] * up[i] * s * (one + gate[i] * (one - s))
        grad_up[i] = grad_y[i] * gate[i] * s
