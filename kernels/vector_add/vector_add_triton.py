"""The kernel of vector_add in Triton."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._map_triton import launch_map, places


@triton.jit
def _add(a, b, y, n, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    at, exists = places(n, BLOCK)
    total = tl.load(a + at, mask=exists).to(WIDE) + tl.load(b + at, mask=exists).to(WIDE)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=exists)


def vector_add(a: Tensor, b: Tensor) -> Tensor:
    (y,) = launch_map(_add, (a, b), 1)
    return y
