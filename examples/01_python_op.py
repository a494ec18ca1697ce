"""What this teaches: an op written in Python.

One function, one shape line and one gradient make a complete op: torch.compile keeps it as one node, and one
graph serves every size. It returns two tensors, and both have a gradient.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

import opkit


class Softmax(NamedTuple):
    """Two outputs are a NamedTuple: its fields name them in the schema, in errors and in the result."""

    y: Tensor
    lse: Tensor


# One entry per tensor, inputs left, outputs right. *b is any number of leading dimensions, n is the last one.
# From this line opkit derives what torch.compile needs to know (the "meta" or "fake" function).
@opkit.op("demo::softmax", shapes="*b n -> *b n, *b")
def softmax(x: Tensor) -> Softmax:
    """Return the softmax of each row, and the log of the sum that it was divided by."""
    lse = torch.logsumexp(x, -1)
    return Softmax(torch.exp(x - lse.unsqueeze(-1)), lse)


def save(ctx: Any, inputs: tuple[Tensor], output: Softmax) -> None:
    """Keep what the gradient reads, as in torch.autograd.Function."""
    ctx.save_for_backward(output.y)


def backward(ctx: Any, grad_y: Tensor, grad_lse: Tensor) -> Tensor:
    """Return the gradient of x: one gradient comes in per output, one goes out per argument."""
    (y,) = ctx.saved_tensors
    return y * (grad_y - (grad_y * y).sum(-1, keepdim=True) + grad_lse.unsqueeze(-1))


softmax.register_autograd(backward, setup_context=save)


def entropy(x: Tensor) -> Tensor:
    """Return the entropy of each row's distribution, in which both outputs have a part."""
    y, lse = softmax(x)
    return lse - (y * x).sum(-1)


def main() -> None:
    """Check values and gradients against torch in float64, eager and compiled."""
    torch.manual_seed(0)
    x = torch.randn(4, 8, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    expected = torch.distributions.Categorical(logits=exact).entropy()
    expected.sum().backward()

    h = entropy(x)
    h.sum().backward()
    torch.testing.assert_close(h.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=1e-5, atol=1e-6)
    assert torch.autograd.gradcheck(softmax, torch.randn(3, 5, dtype=torch.float64, requires_grad=True))
    print(f"eager: {softmax!r} agrees with float64, gradients included")

    compiled = torch.compile(entropy, fullgraph=True, dynamic=True)
    (gradient,) = torch.autograd.grad(compiled(x).sum(), x)
    torch.testing.assert_close(gradient, x.grad)
    with torch.compiler.set_stance("fail_on_recompile"):  # a second graph would be an error from here on
        for rows, n in ((2, 3), (16, 100), (7, 1000)):
            z = torch.randn(rows, n, requires_grad=True)
            torch.testing.assert_close(compiled(z), entropy(z))
    print("compiled: no graph break, and one graph for 4 sizes")

    try:
        softmax(torch.tensor(1.0))
    except opkit.ShapeError as error:
        print(f"refused: {error}")
    else:
        raise AssertionError("a tensor without dimensions has no rows")


if __name__ == "__main__":
    main()
