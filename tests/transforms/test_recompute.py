from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

TEXT = (
    r"differentiating t::scale by its reference: the reference reads a tensor of shape \(3,\) that requires grad "
    r"and is no argument of the op, so its gradient would be lost; expected .* Make the tensor an argument, or detach"
)


def scale_by(factor):
    """An op whose reference has a tensor from around it."""

    @opkit.op("t::scale", shapes="n -> n")
    def scale(x: Tensor) -> Tensor:
        return x * x * factor()

    scale.register_autograd(opkit.from_reference)
    return scale


def leaf():
    return torch.tensor([1.0, 2, 3], requires_grad=True)


@pytest.mark.parametrize("derived", [False, True], ids=["leaf", "derived"])
@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
def test_gradient_of_what_is_no_argument_is_refused(derived, twice):
    w = leaf()
    op = scale_by((lambda: w * 2) if derived else (lambda: w))
    y = op(leaf()).sum()
    with pytest.raises(opkit.GradientError, match=TEXT):
        y.backward(create_graph=twice)
    assert w.grad is None


def test_output_that_is_no_argument_itself_is_refused():
    w = leaf()

    @opkit.op("t::scale", shapes="n -> n, n")
    def scale(x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 2, w if torch.is_grad_enabled() else w.clone()

    scale.register_autograd(opkit.from_reference)
    with torch.no_grad():
        scale(leaf())
    y, other = scale(leaf())
    with pytest.raises(opkit.GradientError, match=TEXT):
        (y + other).sum().backward()


def test_constants_of_the_reference_are_fine():
    w, x = leaf(), leaf()
    op = scale_by(lambda: w.detach())
    (first,) = torch.autograd.grad(op(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    assert torch.equal(first, 2 * x * w)
    assert torch.equal(second, 2 * w.detach())


def test_argument_that_is_given_a_gradient_after_the_call_is_a_constant():
    @opkit.op("t::product", shapes="n, n -> n")
    def product(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    product.register_autograd(opkit.from_reference)
    x, w = leaf(), torch.ones(3)
    y = product(x, w)
    w.requires_grad_()
    y.sum().backward()
    assert (x.grad.tolist(), w.grad) == ([1, 1, 1], None)


def test_mixed_second_derivative_goes_through_the_other_argument():
    @opkit.op("t::product", shapes="n, n -> n")
    def product(x: Tensor, w: Tensor) -> Tensor:
        return x * x * w

    product.register_autograd(opkit.from_reference)
    x, w = leaf().detach().double(), torch.full((3,), 5.0, dtype=torch.float64)
    for order in ((0, 1), (1, 0)):
        inner = torch.func.grad(lambda *a: product(*a).sum(), argnums=order[0])
        mixed = torch.func.jacrev(inner, argnums=order[1])(x, w)
        assert torch.equal(mixed, torch.diag(2 * x)), order
