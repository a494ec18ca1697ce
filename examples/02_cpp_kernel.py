"""What this teaches: a C++ kernel, compiled on first use.

The exponential moving average is a recurrence: in Python it is a loop of small tensor operations, in C++ a few
lines. 02_cpp_kernel.cpp has them. Its source is hashed, compiled once for all processes and found again after;
the shape line becomes C++ that checks the arguments and allocates y.

A kernel needs only <opkit/kernel.h>. For sources with torch's headers or pybind11 there is opkit.cpp.load.
"""

import timeit
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import opkit


@opkit.op("demo::ema", shapes="*b t -> *b t")
def ema(x: Tensor, decay: float) -> Tensor:
    """Return the exponential moving average along the last dimension, which starts from zero."""
    state = torch.zeros_like(x[..., 0])
    steps = []
    for step in x.unbind(-1):
        state = decay * state + (1 - decay) * step
        steps.append(state)
    return torch.stack(steps, -1)


def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    """Return the gradient of x, which is the same average backwards in time; decay has none."""
    return ema(grad.flip(-1), ctx.decay).flip(-1), None


def save(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
    """Keep decay."""
    ctx.decay = inputs[1]


ema.register_autograd(backward, setup_context=save)
ema.register_kernel("cpu", opkit.cpp.kernel("02_cpp_kernel.cpp"))  # the path is relative to this file

# z is declared nowhere: what does the error look like
BROKEN = """\
#include <opkit/kernel.h>
void ema(opkit::Tensor x, double decay, opkit::Tensor y) { y = z; }
"""


def seconds(function: Callable[[], Any]) -> float:
    """Return how long a call takes, the best of five."""
    return min(timeit.repeat(function, number=1, repeat=5))


def main() -> None:
    """Run the kernel, and hold it against the reference in float64."""
    torch.manual_seed(0)
    x = torch.randn(64, 1000)
    print(ema.explain(x, 0.9))
    ema(x, 0.9)  # compiled here, or found in the cache

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so that other work on this machine changes the figures less
    kernel, reference = seconds(lambda: ema(x, 0.9)), seconds(lambda: ema.reference(x, 0.9))
    torch.set_num_threads(threads)
    print(f"one thread: {1e6 * kernel:.0f} us a call, the reference takes {1e6 * reference:.0f} us")

    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        for case in (x.to(dtype), x.to(dtype).T):  # the second is not contiguous
            exact = ema.reference(case.double(), 0.9)
            torch.testing.assert_close(ema(case, 0.9), exact.to(dtype))
    assert torch.autograd.gradcheck(ema, (torch.randn(3, 7, dtype=torch.float64, requires_grad=True), 0.9))
    print("float64, float32, float16 and bfloat16 agree with the reference in float64, the gradient too")

    try:
        ema(x, 1.5)
    except RuntimeError as error:
        print(f"OPKIT_CHECK in C++: {error}")
    else:
        raise AssertionError("the kernel checks decay")

    ema.register_kernel("cpu", opkit.cpp.kernel(BROKEN), backend="broken", priority=-1)
    try:
        ema.build("broken")  # compiles and loads nothing; ema(x, 0.9) would run the good kernel
    except opkit.BuildError as error:
        print(f"a mistake in C++:\n{error}")
    else:
        raise AssertionError("z is not declared")


if __name__ == "__main__":
    main()
