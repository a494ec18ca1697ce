"""The shipped ops on the CPU against what a user would otherwise run: torch eager and torch.compile.

x is [4096, 1024]; vectors of 4 million elements are past the caches, as activations are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from _measure import medians, report

from opkit_kernels import cross_entropy, rms_norm, swiglu, vector_add

ROWS, N = 4096, 1024
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def cases(dtype: torch.dtype) -> dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]]:
    """Return for each op: torch's function, opkit's, and the arguments."""
    x, y = torch.randn(2, ROWS, N).to(dtype)
    weight = torch.rand(N).to(dtype)
    target = torch.randint(N, (ROWS,))
    return {
        "vector_add": (torch.add, vector_add, (x, y)),
        "rms_norm": (lambda x, w: F.rms_norm(x, (N,), w, 1e-6), lambda x, w: rms_norm(x, w).y, (x, weight)),
        "swiglu": (lambda g, u: F.silu(g) * u, swiglu, (x, y)),
        "cross_entropy": (
            lambda x, t: F.cross_entropy(x, t, reduction="none"),
            lambda x, t: cross_entropy(x, t).loss,
            (x, target),
        ),
    }


def with_backward(function: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], object]:
    leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in args]
    grad = torch.randn_like(function(*args))
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return lambda: torch.autograd.grad(function(*leaves), wanted, grad)


def main() -> None:
    for dtype in DTYPES:
        rows = {}
        for name, (torch_function, ours, args) in cases(dtype).items():
            torch._dynamo.reset()
            compiled = torch.compile(torch_function)
            for title, make in (
                ("forward", lambda f, a: lambda: f(*a)),
                ("forward + backward", with_backward),
            ):
                functions = {"torch eager": torch_function, "torch compiled": compiled, "opkit": ours}
                rows[f"{name} {title}"] = medians({k: make(f, args) for k, f in functions.items()})
        report(f"{str(dtype).removeprefix('torch.')}, [{ROWS}, {N}]", rows, unit=1e3, name="ms")


if __name__ == "__main__":
    main()
