"""What defining an op costs: 1,000 ops with a meta function and a gradient, opkit against torch.library.

A library with hundreds of ops pays this when it is imported.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import torch
from _measure import table
from torch import Tensor

import opkit

COUNT = 1000
ROUNDS = 5
_numbers = itertools.count()


def formula(ctx, grad):
    (x,) = ctx.saved_tensors
    return grad * x.cos(), None, None


def save(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def describe(x, weight, eps=1e-6):
    return torch.empty_like(x)


def function() -> Callable[..., Tensor]:
    def scale(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        return x * weight + eps

    return scale


def with_shape_line() -> Callable[..., Tensor]:
    op = opkit.op(f"define::opkit_{next(_numbers)}", shapes="*b n, n -> *b n")(function())
    op.register_autograd(formula, setup_context=save)
    return op


def with_meta_function() -> Callable[..., Tensor]:
    op = opkit.op(f"define::opkit_{next(_numbers)}")(function())
    op.register_fake(describe)
    op.register_autograd(formula, setup_context=save)
    return op


def with_custom_op() -> Callable[..., Tensor]:
    op = torch.library.custom_op(f"define::custom_{next(_numbers)}", function(), mutates_args=())
    op.register_fake(describe)
    op.register_autograd(formula, setup_context=save)
    return op


def with_library() -> Callable[..., Tensor]:
    """The floor: what torch itself takes to define an op with a kernel, without autograd."""
    name = f"library_{next(_numbers)}"
    _library.define(f"{name}(Tensor x, Tensor weight, float eps=1e-06) -> Tensor")
    _library.impl(name, function(), "CompositeExplicitAutograd")
    return getattr(torch.ops.define, name).default


_library = torch.library.Library("define", "FRAGMENT")
CANDIDATES = {
    "opkit, shape line": with_shape_line,
    "opkit, meta function": with_meta_function,
    "torch.library.custom_op": with_custom_op,
    "Library.define and impl": with_library,
}


def main() -> None:
    """Define in turns, and print milliseconds per op."""
    best: dict[str, float] = {name: float("inf") for name in CANDIDATES}
    for define in CANDIDATES.values():
        define()  # imports
    for _ in range(ROUNDS):
        for name, define in CANDIDATES.items():
            start = time.perf_counter()
            for _ in range(COUNT // ROUNDS):
                define()
            best[name] = min(best[name], (time.perf_counter() - start) / (COUNT // ROUNDS))
    first = best["opkit, shape line"]
    rows = [(name, f"{ms * 1e3:.3f}", f"{ms / first:.2f}x") for name, ms in best.items()]
    table(f"defining {COUNT} ops", ("", "ms per op", "to opkit"), rows)


if __name__ == "__main__":
    main()
