"""What this teaches: a Triton kernel.

A Triton kernel is a Python function, so it is registered as one: what launches it takes the op's arguments and returns
its results. opkit chooses it like any other kernel, keeps it out of the way where it does not fit (dtypes=, when=), and
torch.compile sees one opaque call.

Without a GPU this file runs the kernel in Triton's interpreter, which shows that it computes the right thing and says
nothing about speed. Without Triton it says so, and the reference alone is left.
"""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

import opkit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined

HAS_TRITON = importlib.util.find_spec("triton") is not None


@opkit.op("demo::bias_gelu", shapes="*b n, n -> *b n")
def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Add a bias to each row, and take the GELU (the form with tanh) of the sum."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return torch.nn.functional.gelu(x.to(wide) + bias, approximate="tanh").to(x.dtype)


bias_gelu.register_autograd(opkit.from_reference)

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def rows(x: Any, bias: Any, y: Any, n: Any, BLOCK: tl.constexpr) -> None:
        """One program for each row, which holds the whole row at once."""
        column = tl.arange(0, BLOCK)
        exists = column < n
        at = tl.program_id(0) * n + column
        value = tl.load(x + at, mask=exists).to(tl.float32) + tl.load(bias + column, mask=exists).to(
            tl.float32
        )
        inner = 0.7978845608028654 * (value + 0.044715 * value * value * value)  # sqrt(2 / pi)
        tanh = 1 - 2 / (tl.exp(2 * inner) + 1)
        tl.store(y + at, (0.5 * value * (1 + tanh)).to(y.dtype.element_ty), mask=exists)

    @bias_gelu.register_kernel(
        DEVICE,
        backend="triton",
        dtypes=(torch.float32, torch.float16, torch.bfloat16),
        when=lambda x, bias: (x.is_contiguous() and bias.is_contiguous()) or "it reads contiguous rows",
    )
    def bias_gelu_triton(x: Tensor, bias: Tensor) -> Tensor:
        """Launch a program for each row."""
        y, n = torch.empty_like(x), x.shape[-1]
        if x.numel():
            rows[(x.numel() // n,)](x, bias, y, n, BLOCK=triton.next_power_of_2(n))
        return y


def check() -> None:
    """Compare the op with torch in float64, forward and backward."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x, bias = (
            torch.randn(3, 4, 100, device=DEVICE, dtype=dtype),
            torch.randn(100, device=DEVICE, dtype=dtype),
        )
        exact = bias_gelu.reference(x.double(), bias.double())
        torch.testing.assert_close(bias_gelu(x, bias), exact.to(dtype))
        assert bias_gelu(x[:0], bias).shape == (0, 4, 100)
    x = torch.randn(2, 5, device=DEVICE, requires_grad=True)
    bias = torch.randn(5, device=DEVICE)
    (gradient,) = torch.autograd.grad(bias_gelu(x, bias).sum(), x)
    (exact,) = torch.autograd.grad(bias_gelu.reference(x.double(), bias.double()).sum(), x)
    torch.testing.assert_close(gradient, exact)


def main() -> None:
    """Run the kernel, as far as this machine goes."""
    x, bias = torch.ones(4, 100, device=DEVICE), torch.ones(100, device=DEVICE)
    check()
    if not HAS_TRITON:
        print("skipped: Triton is not installed, so the reference ran")
        return
    print(bias_gelu.explain(x, bias))
    print(bias_gelu.explain(torch.ones(100, 4, device=DEVICE).t(), bias))
    assert bias_gelu.explain(x, bias).selected == "triton"
    where = "on the GPU" if DEVICE == "cuda" else "in Triton's interpreter"
    print(f"the kernel ran {where} and agrees with float64, its gradient too")


if __name__ == "__main__":
    main()
