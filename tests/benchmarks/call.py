"""What a call costs beside its kernel: x.sin() of 16 floats, opkit against the peers.

The body is the same Python function everywhere; the ratios are to calling it directly.
"""

from __future__ import annotations

import torch
from _measure import medians, report
from torch import Tensor

import opkit

torch.set_num_threads(1)


def sine(x: Tensor) -> Tensor:
    return x.sin()


def formula(ctx, grad):
    (x,) = ctx.saved_tensors
    return grad * x.cos()


def save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


class Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        return formula(ctx, grad)


ours = opkit.op("bench::opkit_sine", shapes="*b -> *b")(sine)
ours.register_autograd(formula, setup_context=save)
custom = torch.library.custom_op("bench::custom_sine", sine, mutates_args=())
custom.register_fake(torch.empty_like)
custom.register_autograd(formula, setup_context=save)

CANDIDATES = {"plain function": sine, "opkit": ours, "custom_op": custom, "autograd.Function": Function.apply}


def main() -> None:
    rows = {}
    for title, needs_grad in (("no grad", False), ("forward with grad", True)):
        x = torch.randn(16, requires_grad=needs_grad)
        rows[title] = medians({name: lambda f=f: f(x) for name, f in CANDIDATES.items()})
    x = torch.randn(16, requires_grad=True)
    ones = torch.ones(16)
    rows["forward and backward"] = medians(
        {name: lambda f=f: f(x).backward(ones) for name, f in CANDIDATES.items()}
    )
    report("cost of a call", rows)


if __name__ == "__main__":
    main()
