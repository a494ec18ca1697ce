"""The kernels of geglu in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._map_triton import launch_map, places, sigmoid
from opkit_kernels.geglu.geglu import GEGLUGradients


@triton.jit
def _scaled(x):
    """Return sigmoid(2 u), with u = sqrt(2 / pi) (x + 0.044715 x^3)."""
    scale, cubic = tl.full((), 1.5957691216057308, x.dtype), tl.full((), 0.044715, x.dtype)
    return sigmoid(scale * (x + cubic * x * x * x))


@triton.jit
def _forward(gate, up, y, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at, exists = places(n, BLOCK)
    x, u = tl.load(gate + at, mask=exists).to(WIDE), tl.load(up + at, mask=exists).to(WIDE)
    tl.store(y + at, (x * _scaled(x) * u).to(y.dtype.element_ty), mask=exists)


@triton.jit
def _backward(grad_y, gate, up, grad_gate, grad_up, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at, exists = places(n, BLOCK)
    g, x = tl.load(grad_y + at, mask=exists).to(WIDE), tl.load(gate + at, mask=exists).to(WIDE)
    u = tl.load(up + at, mask=exists).to(WIDE)
    s = _scaled(x)
    steep, bend = tl.full((), 1.5957691216057308, WIDE), tl.full((), 3 * 0.044715 * 1.5957691216057308, WIDE)
    slope = s + x * s * (1 - s) * (steep + bend * x * x)
    tl.store(grad_gate + at, (g * u * slope).to(grad_gate.dtype.element_ty), mask=exists)
    tl.store(grad_up + at, (g * x * s).to(grad_up.dtype.element_ty), mask=exists)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    (y,) = launch_map(_forward, (gate, up), 1)
    return y


def geglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> GEGLUGradients:
    return GEGLUGradients(*launch_map(_backward, (grad_y, gate, up), 2))
