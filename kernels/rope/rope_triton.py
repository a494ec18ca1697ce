"""The kernels of rope in Triton: a program turns some heads of one element of a sequence."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._triton import wide_type
from opkit_kernels.rope.rope import RoPE, RoPEGradients, check_tables

_HEADS = 4


@triton.jit
def _turn(
    x, y, cos, sin, positions, length, heads, d, pairs,
    x_element, x_head, x_step, cos_row, cos_step, sin_row, sin_step,
    SIGN: tl.constexpr, GIVEN: tl.constexpr, INTERLEAVED: tl.constexpr,
    WIDE: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    element = tl.program_id(0).to(tl.int64)
    if GIVEN:
        row = tl.load(positions + element)
    else:
        row = element % length
    pair = tl.arange(0, PAIRS).to(tl.int64)
    c = tl.load(cos + row * cos_row + pair * cos_step, mask=pair < pairs, other=0).to(WIDE)[None, :]
    s = SIGN * tl.load(sin + row * sin_row + pair * sin_step, mask=pair < pairs, other=0).to(WIDE)[None, :]
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)).to(tl.int64)[:, None]
    source = x + element * x_element + head * x_head
    to = y + (element * heads + head) * d
    first, second = pair[None, :], pairs + pair[None, :]
    if INTERLEAVED:
        first, second = 2 * pair[None, :], 2 * pair[None, :] + 1
    exists = (head < heads) & (pair < pairs)[None, :]
    a = tl.load(source + first * x_step, mask=exists, other=0).to(WIDE)
    b = tl.load(source + second * x_step, mask=exists, other=0).to(WIDE)
    tl.store(to + first, (a * c - b * s).to(y.dtype.element_ty), mask=exists)
    tl.store(to + second, (b * c + a * s).to(y.dtype.element_ty), mask=exists)
    if REST > 0:
        at = 2 * pairs + tl.arange(0, REST).to(tl.int64)[None, :]
        exists = (head < heads) & (at < d)
        tl.store(to + at, tl.load(source + at * x_step, mask=exists, other=0), mask=exists)


def _turned(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, interleaved: bool, sign: int
) -> Tensor:
    """Return q or k, turned by the angles or, where sign is -1, by their negatives."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    length, heads, d = x.shape[-3:]
    pairs = cos.shape[1]
    if y.numel():
        elements = x.flatten(0, -3)
        places = elements if positions is None else positions.contiguous()  # not read where there are none
        _turn[(len(elements), triton.cdiv(heads, _HEADS))](
            elements, y, cos, sin, places, length, heads, d, pairs,
            *elements.stride(), *cos.stride(), *sin.stride(),
            SIGN=sign, GIVEN=positions is not None, INTERLEAVED=interleaved, WIDE=wide_type(x.dtype),
            HEADS=_HEADS, PAIRS=triton.next_power_of_2(max(pairs, 1)),
            REST=triton.next_power_of_2(d - 2 * pairs) if d > 2 * pairs else 0,
        )  # fmt: skip
    return y


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None, interleaved: bool = False
) -> RoPE:
    check_tables("opkit::rope", q, cos, positions)
    return RoPE(*(_turned(x, cos, sin, positions, interleaved, 1) for x in (q, k)))


def rope_backward(
    grad_q: Tensor,
    grad_k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    interleaved: bool = False,
) -> RoPEGradients:
    check_tables("opkit::rope_backward", grad_q, cos, positions)
    return RoPEGradients(*(_turned(x, cos, sin, positions, interleaved, -1) for x in (grad_q, grad_k)))
