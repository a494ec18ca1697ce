"""What this teaches: turning a torch.autograd.Function that exists already into an op.

SparsemaxFunction below works, and breaks the graph of torch.compile: its forward loops until nothing
changes, which no tracer can follow. As an op the same lines are opaque to the tracer. Three steps:

    forward                 the body of the decorated function, without ctx
    backward                the formula, as it is
    ctx.save_for_backward   moves from forward into setup_context(ctx, inputs, output)

Sparsemax is softmax with exact zeros: Martins and Astudillo, 2016, arXiv:1602.02068.
"""

from typing import Any

import torch
from torch import Tensor

import opkit


class SparsemaxFunction(torch.autograd.Function):
    """What there was before."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Drop what falls below the threshold that sets the sum to 1, until nothing does."""
        support = torch.ones_like(x, dtype=torch.bool)
        while True:
            total = torch.where(support, x, 0).sum(-1, keepdim=True)
            threshold = (total - 1) / support.sum(-1, keepdim=True)
            smaller = support & (x > threshold)
            if torch.equal(smaller, support):
                break
            support = smaller
        y = (x - threshold).clamp(min=0)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Take the mean off the gradient of what is not zero."""
        (y,) = ctx.saved_tensors
        support = y > 0
        mean = (grad * support).sum(-1, keepdim=True) / support.sum(-1, keepdim=True)
        return torch.where(support, grad - mean, 0)


# Step 1: forward, without ctx. The shape line says what comes out, as the loop cannot be traced for it.
@opkit.op("demo::sparsemax", shapes="*b n -> *b n")
def sparsemax(x: Tensor) -> Tensor:
    """Return the point of the simplex that is nearest to each row."""
    support = torch.ones_like(x, dtype=torch.bool)
    while True:
        total = torch.where(support, x, 0).sum(-1, keepdim=True)
        threshold = (total - 1) / support.sum(-1, keepdim=True)
        smaller = support & (x > threshold)
        if torch.equal(smaller, support):
            break
        support = smaller
    return (x - threshold).clamp(min=0)


# Step 2: what forward kept. `inputs` has every argument, `output` is what the op returned.
def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    """Keep the output."""
    ctx.save_for_backward(output)


# Step 3: the backward that there is.
sparsemax.register_autograd(SparsemaxFunction.backward, setup_context=setup_context)


def compiles(function: Any, x: Tensor) -> bool:
    """Return whether torch.compile takes a function as one graph."""
    try:
        torch.compile(function, fullgraph=True)(x)
    except torch._dynamo.exc.Unsupported:
        return False
    return True


def main() -> None:
    """Compare the two, in eager and compiled."""
    torch.manual_seed(0)
    x = torch.randn(6, 50, dtype=torch.float64, requires_grad=True)
    assert torch.equal(sparsemax(x), SparsemaxFunction.apply(x))
    grad = torch.randn_like(x)
    (before,) = torch.autograd.grad(SparsemaxFunction.apply(x), x, grad)
    (after,) = torch.autograd.grad(sparsemax(x), x, grad)
    assert torch.equal(before, after)
    assert torch.autograd.gradcheck(sparsemax, x)
    print("values and gradients are those of the autograd.Function, and gradcheck agrees")

    assert not compiles(lambda x: SparsemaxFunction.apply(2 * x), x)
    assert compiles(lambda x: sparsemax(2 * x), x)
    print("fullgraph=True: the autograd.Function is refused, the op compiles")

    compiled = torch.compile(lambda x: sparsemax(2 * x), fullgraph=True)
    (gradient,) = torch.autograd.grad(compiled(x), x, grad)
    (expected,) = torch.autograd.grad(SparsemaxFunction.apply(2 * x), x, grad)
    torch.testing.assert_close(gradient, expected)
    print("the gradient of the compiled function agrees too")


if __name__ == "__main__":
    main()
