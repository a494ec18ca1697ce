"""Chains of random ops: the same values and gradients in eager, under aot_eager and under Inductor."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import opkit
from opkit.cpp import compilers

pytestmark = pytest.mark.usefixtures("registry")
LENGTH = 20


class Split(NamedTuple):
    low: Tensor
    high: Tensor


def links(native: bool) -> list[opkit.Op]:
    """Ops of one shape, each with another kind of gradient or kernel."""

    @opkit.op("t::wave", shapes="*b n -> *b n")
    def wave(x: Tensor) -> Tensor:
        return x.sin() + 0.5 * x

    wave.register_autograd(opkit.from_reference)

    @opkit.op("t::damp", shapes="*b n -> *b n", inline=True)
    def damp(x: Tensor) -> Tensor:
        return x / (1 + x.square())

    damp.register_autograd(opkit.from_reference)

    @opkit.op("t::mix_backward", shapes="*b n, *b n, *b n -> *b n, *b n")
    def mix_backward(grad: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return grad * y.cos(), -grad * x * y.sin()

    @opkit.op("t::mix", shapes="*b n, *b n -> *b n")
    def mix(x: Tensor, y: Tensor) -> Tensor:
        return x * y.cos()

    mix.register_autograd(mix_backward, saves=("x", "y"))
    if native:
        mix.register_kernel(
            "cpu",
            opkit.cpp.kernel("""
            #include <opkit/kernel.h>
            void mix(opkit::Tensor x, opkit::Tensor y, opkit::Tensor out) {
              const opkit::Elements<const double> a(x), b(y);
              for (int64_t i = 0; i < x.numel(); ++i) out.data<double>()[i] = a[i] * __builtin_cos(b[i]);
            }"""),
        )

    @opkit.op("t::split", shapes="*b n -> *b n, *b n")
    def split(x: Tensor) -> Split:
        return Split(x.clamp(max=0), x.clamp(min=0))

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @split.register_autograd(setup_context=save)
    def split_backward(ctx, low, high):
        (x,) = ctx.saved_tensors
        return torch.where(x < 0, low, high)

    @opkit.op("t::shift", shapes="*b n -> *b n")
    def shift(x: Tensor, by: float = 0.25, *, sign: int = 1) -> Tensor:
        return x + sign * by

    shift.register_autograd(lambda ctx, grad: (grad, None, None))
    shift.register_kernel("cpu", lambda x, by, sign: x.add_(sign * by), backend="over", inplace=["x"])
    return [wave, damp, mix, split, shift]


def chain(seed: int, ops: list[opkit.Op], call) -> Callable[[Tensor, Tensor], Tensor]:
    """Twenty random calls on two running values; `call` makes each."""
    wave, damp, mix, split, shift = ops
    rng = random.Random(seed)
    drawn = [(rng.choice(ops), rng.choice([-1, 1])) for _ in range(LENGTH)]

    def run(x: Tensor, y: Tensor) -> Tensor:
        for op, sign in drawn:
            if op is mix:
                x, y = call(mix, x, y), x
            elif op is split:
                low, high = call(split, y)
                y = low - 2 * high
            elif op is shift:
                x = call(shift, x.mT.contiguous().mT, sign=sign)
            else:
                x, y = y, call(op, x)
        return x * y

    return run


def outcome(function, inputs) -> list[Tensor]:
    given = [t.detach().clone().requires_grad_() for t in inputs]
    out = function(*given)
    out.square().sum().backward()
    return [out.detach(), *(t.grad for t in given)]


@pytest.mark.parametrize("seed", range(3))
def test_random_chain_is_the_same_however_it_runs(seed):
    torch._dynamo.reset()
    ops = links(native=compilers.find_cxx() is not None)
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2)]

    def by_op(op, *args, **kwargs):
        return op(*args, **kwargs)

    def by_reference(op, *args, **kwargs):
        return op.reference(*args, **kwargs)

    expected = outcome(chain(seed, ops, by_reference), inputs)
    runs = {"eager": chain(seed, ops, by_op)}
    for backend in ("aot_eager", "inductor"):
        runs[backend] = torch.compile(chain(seed, ops, by_op), backend=backend, fullgraph=True)
    for name, run in runs.items():
        for found, wanted in zip(outcome(run, inputs), expected, strict=True):
            torch.testing.assert_close(
                found, wanted, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}"
            )
