"""The kernels of swiglu in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._map_triton import launch_map, places, sigmoid
from opkit_kernels.swiglu.swiglu import SwiGLUGradients


@triton.jit
def _forward(gate, up, y, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at, exists = places(n, BLOCK)
    x, u = tl.load(gate + at, mask=exists).to(WIDE), tl.load(up + at, mask=exists).to(WIDE)
    tl.store(y + at, (x * sigmoid(x) * u).to(y.dtype.element_ty), mask=exists)


@triton.jit
def _backward(grad_y, gate, up, grad_gate, grad_up, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at, exists = places(n, BLOCK)
    g, x = tl.load(grad_y + at, mask=exists).to(WIDE), tl.load(gate + at, mask=exists).to(WIDE)
    u = tl.load(up + at, mask=exists).to(WIDE)
    s = sigmoid(x)
    tl.store(grad_gate + at, (g * u * s * (1 + x * (1 - s))).to(grad_gate.dtype.element_ty), mask=exists)
    tl.store(grad_up + at, (g * x * s).to(grad_up.dtype.element_ty), mask=exists)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    (y,) = launch_map(_forward, (gate, up), 1)
    return y


def swiglu_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> SwiGLUGradients:
    return SwiGLUGradients(*launch_map(_backward, (grad_y, gate, up), 2))
