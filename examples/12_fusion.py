"""What this teaches: what torch.compile makes of an op, and when to let it fuse.

By default an op is opaque to the compiler: the compiled code calls the kernel that fits at run time, and Inductor fuses
what is before and what is after. Inside `with opkit.inline(op)`, or for good with @opkit.op(..., inline=True), Inductor
takes the reference instead, and may fuse through it: right for what is small and elementwise, wrong for what a kernel
does better.
"""

import torch
from torch import Tensor
from torch._inductor import metrics

import opkit


@opkit.op("demo::soft_clip", shapes="*b -> *b")
def soft_clip(x: Tensor, limit: float) -> Tensor:
    """Bend x smoothly so that it stays between -limit and limit."""
    return limit * torch.tanh(x / limit)


soft_clip.register_autograd(opkit.from_reference)


@soft_clip.register_kernel("cpu", backend="by_hand")
def soft_clip_by_hand(x: Tensor, limit: float) -> Tensor:
    """Do the same in one buffer."""
    return x.div(limit).tanh_().mul_(limit)


def model(x: Tensor) -> Tensor:
    """Surround the op with what Inductor fuses."""
    return soft_clip(x.cos() + 1, 2.0).square() - x


def loops_of(compiled: object, x: Tensor) -> int:
    """Return how many loops Inductor generated for a function, and check the function's result."""
    metrics.reset()
    with torch._inductor.config.patch(fx_graph_cache=False):  # what is found there is not generated
        result = compiled(x)  # type: ignore[operator]
    torch.testing.assert_close(result, 4 * torch.tanh((x.cos() + 1) / 2).square() - x)
    return metrics.generated_kernel_count


def main() -> None:
    """Compile the same function with the op opaque, and inlined."""
    x = torch.randn(1000)
    opaque = loops_of(torch.compile(model, fullgraph=True), x)
    print(f"opaque: {opaque} loops, and the {soft_clip.explain(x, 2.0).selected} kernel between them")
    assert opaque == 2

    torch.compiler.reset()
    with opkit.inline(soft_clip):
        fused = loops_of(torch.compile(model, fullgraph=True), x)
    print(f"inlined: {fused} loop for everything")
    assert fused == 1

    # Which is faster is a matter of measuring: see 09_benchmarking.py.


if __name__ == "__main__":
    main()
