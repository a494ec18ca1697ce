"""The kernel of adamw_step in Triton: a launch for each parameter."""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl
from torch import Tensor

from opkit_kernels._map_triton import places
from opkit_kernels._triton import wide_type
from opkit_kernels.adamw_step.adamw_step import check

_BLOCK = 1024


@triton.jit
def _step(
    param, grad, exp_avg, exp_avg_sq, n,
    decay, size, rest1, beta2, rest2, over_root, eps,
    decay_low, size_low, rest1_low, beta2_low, rest2_low, over_root_low, eps_low,
    WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, exists = places(n, BLOCK)
    p, g = tl.load(param + at, mask=exists).to(WIDE), tl.load(grad + at, mask=exists).to(WIDE)
    m, v = tl.load(exp_avg + at, mask=exists).to(WIDE), tl.load(exp_avg_sq + at, mask=exists).to(WIDE)
    m += _joined(rest1, rest1_low, WIDE) * (g - m)
    v = v * _joined(beta2, beta2_low, WIDE) + _joined(rest2, rest2_low, WIDE) * (g * g)
    root = tl.sqrt(v) * _joined(over_root, over_root_low, WIDE) + _joined(eps, eps_low, WIDE)
    p -= _joined(decay, decay_low, WIDE) * p + _joined(size, size_low, WIDE) * m / root
    tl.store(param + at, p.to(param.dtype.element_ty), mask=exists)
    tl.store(exp_avg + at, m.to(exp_avg.dtype.element_ty), mask=exists)
    tl.store(exp_avg_sq + at, v.to(exp_avg_sq.dtype.element_ty), mask=exists)


@triton.jit
def _joined(high, low, WIDE: tl.constexpr):
    """Return a number of the host: Triton passes floats as float32, so it comes in two."""
    return tl.full((), high, WIDE) + tl.full((), low, WIDE)


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
) -> None:
    check(step, params, exp_avgs)
    beta1, beta2 = betas
    size, over_root = lr / (1 - beta1**step), (1 - beta2**step) ** -0.5
    numbers = (lr * weight_decay, size, 1 - beta1, beta2, 1 - beta2, over_root, eps)
    highs = [ctypes.c_float(x).value for x in numbers]
    lows = [x - high for x, high in zip(numbers, highs, strict=True)]
    for one in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
        param, n = one[0], one[0].numel()
        flat = [x.contiguous() for x in one]
        if n:
            _step[(triton.cdiv(n, _BLOCK),)](
                *flat, n, *highs, *lows, WIDE=wide_type(param.dtype), BLOCK=_BLOCK
            )
        for given, written in zip((one[0], *one[2:]), (flat[0], *flat[2:]), strict=True):
            if written is not given:
                given.copy_(written)
