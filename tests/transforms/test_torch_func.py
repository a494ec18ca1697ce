"""The transforms of torch.func over ops with gradients, and each inside of each, against torch's own operations."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, func
from torch.autograd import gradcheck, gradgradcheck

import opkit

pytestmark = pytest.mark.usefixtures("registry")


def reference(x: Tensor, w: Tensor) -> Tensor:
    return torch.exp(x.sin() * w)


@pytest.fixture(params=["function", "op", "from_reference"])
def op(request):
    """An op whose gradient is given in each form, and whose formula uses the output."""
    op = opkit.op("t::f", shapes="*b, *b -> *b")(reference)

    @opkit.op("t::f_backward", shapes="*b, *b, *b, *b -> *b, *b")
    def f_backward(g: Tensor, x: Tensor, w: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return g * y * x.cos() * w, g * y * x.sin()

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)

    def backward(ctx, g):
        x, w, y = ctx.saved_tensors
        return g * y * x.cos() * w, g * y * x.sin()

    def jvp(ctx, dx, dw):
        x, w, y = ctx.saved_tensors
        return y * (dx * x.cos() * w + dw * x.sin())

    if request.param == "function":
        op.register_autograd(backward, setup_context=save)
        op.register_jvp(jvp)
    elif request.param == "op":
        f_backward.register_autograd(opkit.from_reference)
        op.register_autograd(f_backward, saves=("x", "w", "out"))
        op.register_jvp(jvp)
    else:
        op.register_autograd(opkit.from_reference)
    return op


torch.manual_seed(0)
X, W, V = (torch.randn(4, dtype=torch.float64) for _ in range(3))

TRANSFORMS = {
    "grad": func.grad,
    "vjp": lambda f: lambda x: func.vjp(f, x)[1](torch.tensor(1.5, dtype=torch.float64))[0],
    "jvp": lambda f: lambda x: func.jvp(f, (x,), (V,))[1],
    "jacrev": func.jacrev,
    "jacfwd": func.jacfwd,
    "hessian": func.hessian,
    "vmap": lambda f: lambda x: func.vmap(f)(torch.stack([x, x * 2])),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform_is_that_of_torchs_own_operations(op, name):
    transform = TRANSFORMS[name]
    found = transform(lambda x: op(x, W).pow(2).sum())(X)
    torch.testing.assert_close(found, transform(lambda x: reference(x, W).pow(2).sum())(X))


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(TRANSFORMS, TRANSFORMS)), ids="-of-".join)
def test_nested_transforms_are_those_of_torchs_own_operations(op, outer, inner):
    def derive(f):
        within = TRANSFORMS[inner](lambda x: f(x, W).pow(2).sum())
        return TRANSFORMS[outer](lambda x: within(x).sin().sum())(X)

    torch.testing.assert_close(derive(op), derive(reference))


@pytest.mark.parametrize(
    "nesting",
    ["grad grad grad", "jacfwd jacfwd jacfwd", "grad vmap grad", "vmap jacfwd jacrev", "jacrev jvp grad"],
)
def test_three_levels_are_those_of_torchs_own_operations(op, nesting):
    def derive(f):
        made = lambda x: f(x, W).sum()  # noqa: E731
        for name in reversed(nesting.split()):
            made = lambda x, t=TRANSFORMS[name](made): t(x).sin().sum()  # noqa: E731
        return made(X)

    torch.testing.assert_close(derive(op), derive(reference))


def test_torch_autograd_checks_pass_in_both_modes(op):
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    assert gradcheck(
        op, (x, w), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(
        op, (x, w), check_fwd_over_rev=True, check_rev_over_rev=True, check_batched_grad=True
    )


def test_value_inside_of_a_gradient_keeps_its_own_derivative(op):
    """The forward call of an inner level is differentiated by the outer one."""

    def f(g):
        def inner(x):
            value, pull = func.vjp(lambda x: g(x, W), x)
            return (value * pull(value)[0]).sum()

        return func.grad(inner)(X)

    torch.testing.assert_close(f(op), f(reference))


def test_no_grad_inside_of_a_transform_is_respected(op):
    def f(g):
        def inner(x):
            with torch.no_grad():
                held = g(x, W)
            return (held * g(x, W)).sum()

        return func.grad(inner)(X)

    torch.testing.assert_close(f(op), f(reference))


def test_transforms_inside_of_torch_autograd_keep_its_graph(op):
    def f(g):
        x = X.clone().requires_grad_()
        held, pull = func.vjp(lambda x: g(x, W), x)
        (found,) = pull(torch.ones_like(held))
        return torch.autograd.grad(found.sum() + held.sum(), x)[0]

    torch.testing.assert_close(f(op), f(reference))


@pytest.mark.parametrize("name", ["grad", "vjp", "jvp", "jacrev", "hessian", "vmap"])
def test_transform_inside_of_a_compiled_function_is_right(op, name):
    transform = TRANSFORMS[name]

    def derive(f):
        return transform(lambda x: f(x * 2, W).pow(2).sum())

    compiled = torch.compile(lambda x: derive(op)(x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), derive(reference)(X))


def test_vectorised_jacobians_of_torch_autograd_are_right(op):
    for strategy in ("reverse-mode", "forward-mode"):
        found = torch.autograd.functional.jacobian(lambda x: op(x, W), X, vectorize=True, strategy=strategy)
        torch.testing.assert_close(found.diagonal(), reference(X, W) * X.cos() * W)


class Result(NamedTuple):
    total: Tensor
    parts: list[Tensor]
    count: Tensor


@pytest.mark.parametrize("form", ["function", "from_reference"])
def test_lists_optionals_keywords_and_constant_outputs_go_through_every_level(form):
    @opkit.op("t::g")
    def g(xs: list[Tensor], k: int, bias: Tensor | None = None, *, w: Tensor) -> Result:
        total = (xs[0] * xs[1]).sin() * w + (0 if bias is None else bias)
        return Result(total, [x * k for x in xs], torch.ones_like(total, dtype=torch.int64))

    g.register_fake(lambda xs, k, bias=None, *, w: Result(
        torch.empty_like(w), [torch.empty_like(x) for x in xs], torch.empty_like(w, dtype=torch.int64)))  # fmt: skip
    g.register_vmap("sequential")

    def save(ctx, inputs, output):
        (a, b), ctx.k, _, w = inputs
        ctx.save_for_backward(a, b, w)

    def backward(ctx, dtotal, dparts, dcount):
        a, b, w = ctx.saved_tensors
        inner = dtotal * (a * b).cos() * w
        lists = [inner * b + dparts[0] * ctx.k, inner * a + dparts[1] * ctx.k]
        return lists, None, dtotal if ctx.needs_input_grad[2] else None, dtotal * (a * b).sin()

    def jvp(ctx, dxs, dk, dbias, dw):
        a, b, w = ctx.saved_tensors
        dtotal = (dxs[0] * b + a * dxs[1]) * (a * b).cos() * w + (a * b).sin() * dw
        return Result(dtotal if dbias is None else dtotal + dbias, [d * ctx.k for d in dxs], None)

    if form == "function":
        g.register_autograd(backward, setup_context=save)
        g.register_jvp(jvp)
    else:
        g.register_autograd(opkit.from_reference)

    def scalar(f, a, b, w, bias=None):
        found = f([a, b], 3, bias, w=w)
        return (found.total * found.parts[1]).sum() + found.parts[0].pow(2).sum()

    inputs = (X, V, W, X * V)
    for count in (3, 4):
        places = tuple(range(count))
        for derive in (
            lambda f, p=places: func.grad(f, p),
            lambda f, p=places: func.jacfwd(f, p),
            lambda f: func.hessian(f),
            lambda f: func.jacrev(func.grad(f)),
            lambda f: func.jacfwd(func.jacfwd(f)),
        ):
            found = derive(lambda *args: scalar(g, *args))(*inputs[:count])
            expected = derive(lambda *args: scalar(g.reference, *args))(*inputs[:count])
            torch.testing.assert_close(found, expected)


def test_without_a_formula_every_reverse_mode_transform_raises():
    f = opkit.op("t::f", shapes="*b, *b -> *b")(reference)
    for transform in (func.grad, func.jacrev, func.hessian):
        with pytest.raises(opkit.GradientError, match="differentiating t::f"):
            transform(lambda x: f(x, W).sum())(X)
    torch.testing.assert_close(func.vmap(lambda x: f(x, W))(X[None]), reference(X, W)[None])
