from __future__ import annotations

import gc
import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import opkit

pytestmark = pytest.mark.usefixtures("registry")

TEXT = "differentiating t::sine twice: its formula saves a tensor that depends on the arguments but has no history"


def save_tensor(ctx, inputs, output):
    ctx.save_for_backward(inputs[0].cos())


def save_attribute(ctx, inputs, output):
    ctx.cosine = inputs[0].cos()


def save_copy(ctx, inputs, output):
    ctx.save_for_backward(inputs[0].detach())


FORMULAS = {
    "saved": (save_tensor, lambda ctx, g: g * ctx.saved_tensors[0]),
    "attribute": (save_attribute, lambda ctx, g: g * ctx.cosine),
    "detached": (save_copy, lambda ctx, g: g * ctx.saved_tensors[0].cos()),
}


@pytest.fixture(params=FORMULAS)
def sine(request):
    """An op whose formula saves what torch would take for a constant in the second derivative."""

    @opkit.op("t::sine", shapes="*b -> *b")
    def sine(x: Tensor) -> Tensor:
        return x.sin()

    save, backward = FORMULAS[request.param]
    sine.register_autograd(backward, setup_context=save)
    return sine


@pytest.fixture
def x():
    torch.manual_seed(0)
    return torch.randn(3, dtype=torch.float64, requires_grad=True)


def test_first_derivative_through_an_intermediate_is_right(sine, x):
    assert gradcheck(sine, (x,), check_batched_grad=True)
    (g,) = torch.autograd.grad(sine(x).sum(), x, create_graph=True)
    torch.testing.assert_close(g, x.cos())
    for transform in (torch.func.grad, torch.func.jacrev):
        torch.testing.assert_close(transform(lambda x: sine(x).sum())(x.detach()), x.cos().detach())
    batched = torch.vmap(torch.func.grad(lambda x: sine(x).sum()))(torch.stack([x.detach()] * 2))
    torch.testing.assert_close(batched, torch.stack([x.cos().detach()] * 2))


def test_second_derivative_through_an_intermediate_raises(sine, x):
    (g,) = torch.autograd.grad(sine(x).sum(), x, create_graph=True)
    with pytest.raises(opkit.GradientError, match=TEXT) as caught:
        torch.autograd.grad(g.sum(), x)
    assert caught.value.op == "t::sine"
    assert "Save the arguments (or a differentiable output) and compute it in the formula." in str(
        caught.value
    )
    with pytest.raises(opkit.GradientError, match=TEXT):
        gradgradcheck(sine, (x,))


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: torch.func.grad(lambda x: torch.func.grad(f)(x).sum()),
        lambda f: torch.func.jacrev(torch.func.jacrev(f)),
        lambda f: torch.vmap(torch.func.jacrev(torch.func.grad(f))),
    ],
    ids=["grad of grad", "jacrev of jacrev", "vmap"],
)
def test_second_derivative_by_torch_func_raises(sine, x, transform):
    x = x.detach()
    with pytest.raises(opkit.GradientError, match=TEXT):
        transform(lambda x: sine(x).sum())(torch.stack([x, x]))


def test_forward_over_reverse_through_an_intermediate_raises(sine, x):
    sine.register_jvp(opkit.from_reference)
    with pytest.raises(opkit.GradientError, match=TEXT):
        torch.func.hessian(lambda x: sine(x).sum())(x.detach())


def test_derivative_by_the_incoming_gradient_alone_is_right(sine, x):
    v = torch.ones_like(x, requires_grad=True)
    (g,) = torch.autograd.grad(sine(x), x, v, create_graph=True)
    (found,) = torch.autograd.grad(g, v, torch.ones_like(v))
    torch.testing.assert_close(found, x.cos().detach())


def test_intermediate_keeps_no_argument_alive():
    @opkit.op("t::sine", shapes="*b -> *b")
    def sine(x: Tensor) -> Tensor:
        return x.sin()

    sine.register_autograd(FORMULAS["saved"][1], setup_context=save_tensor)
    leaf = torch.ones(3, requires_grad=True)
    x = leaf * 2
    storage = weakref.ref(x.untyped_storage())
    y = sine(x)
    del x
    gc.collect()
    assert storage() is None
    y.sum().backward()
    torch.testing.assert_close(leaf.grad, 2 * torch.full((3,), 2.0).cos())


def test_saved_numbers_masks_and_arguments_are_not_suspected(x):
    @opkit.op("t::relu", shapes="*b -> *b")
    def relu(x: Tensor, k: float) -> Tensor:
        return x.clamp(min=0) * k

    def save(ctx, inputs, output):
        x, ctx.k = inputs
        ctx.mask = x > 0
        ctx.save_for_backward(x, x > 0)

    relu.register_autograd(lambda ctx, g: (g * ctx.mask * ctx.k, None), setup_context=save)
    assert gradgradcheck(lambda x: relu(x, 2.0), (x,))


# ---------------------------------------------------------------- outputs declared non-differentiable


@pytest.fixture
def norm():
    """An op that saves its second output, which depends on x and is declared without a gradient."""

    @opkit.op("t::norm", shapes="*b n -> *b n, *b")
    def norm(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.pow(2).sum(-1)
        return x * total[..., None], total

    norm.register_autograd(norm_backward(), saves=("x", "out1"), non_differentiable=("out1",))
    return norm


def norm_backward():
    @opkit.op("t::norm_backward", shapes="*b n, *b n, *b -> *b n")
    def norm_backward(g: Tensor, x: Tensor, total: Tensor) -> Tensor:
        return g * total[..., None] + 2 * x * (g * x).sum(-1, keepdim=True)

    norm_backward.register_autograd(opkit.from_reference)
    return norm_backward


def test_saved_output_without_a_gradient_raises_in_the_second_derivative(norm, x):
    assert gradcheck(lambda x: norm(x)[0], (x,))
    with pytest.raises(
        opkit.GradientError, match="differentiating t::norm twice: .*declared non-differentiable"
    ):
        gradgradcheck(lambda x: norm(x)[0], (x,))


def test_formula_that_accounts_for_such_an_output_is_right(norm, x):
    def backward(ctx, gg):
        g, x, _ = ctx.saved_tensors
        with torch.enable_grad():
            g, x = g.detach().requires_grad_(), x.detach().requires_grad_()
            y = g * x.pow(2).sum(-1, keepdim=True) + 2 * x * (g * x).sum(-1, keepdim=True)
            return *torch.autograd.grad(y, (g, x), gg), None

    opkit.get("t::norm_backward").register_autograd(
        backward, lambda ctx, inputs, output: ctx.save_for_backward(*inputs), non_differentiable=("total",)
    )
    assert gradgradcheck(lambda x: norm(x)[0], (x,))


class Kept(NamedTuple):
    x: Tensor
    cosine: Tensor


@pytest.mark.parametrize(
    "keep", [lambda *t: list(t), Kept, lambda *t: {"all": t}], ids=["list", "named", "nested"]
)
def test_tensor_computed_in_setup_context_and_kept_in_a_container_raises(keep, x):
    @opkit.op("t::sine", shapes="*b -> *b")
    def sine(x: Tensor) -> Tensor:
        return x.sin()

    @sine.register_autograd(
        setup_context=lambda ctx, inputs, output: vars(ctx).update(k=keep(*inputs, inputs[0].cos()))
    )
    def _(ctx, grad):
        kept = ctx.k["all"] if isinstance(ctx.k, dict) else ctx.k
        return grad * kept[1]

    assert gradcheck(sine, (x,))
    with pytest.raises(opkit.GradientError, match=TEXT):
        gradgradcheck(sine, (x,))
