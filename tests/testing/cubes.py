"""The op that tests of the checker break: x ** 3 * w."""

from __future__ import annotations

from torch import Tensor, float64

import opkit


def cubing():
    """Return x ** 3 * w, with a formula that is right in each derivative."""

    @opkit.op("t::cube", shapes="*b n, n -> *b n:x")
    def cube(x: Tensor, w: Tensor) -> Tensor:
        return (x.double() ** 3 * w.double()).to(x.dtype) if x.dtype != float64 else x**3 * w

    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return grad * 3 * x**2 * w, (grad * x**3).sum_to_size(w.shape)

    register(cube, backward)
    return cube


def register(op, formula):
    """Have an op be differentiated by a function that finds its arguments in `ctx.saved_tensors`."""
    op.register_autograd(formula, lambda ctx, inputs, output: ctx.save_for_backward(*inputs))
