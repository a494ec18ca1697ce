from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

import opkit

pytestmark = pytest.mark.usefixtures("registry")


class Pair(NamedTuple):
    y: Tensor
    count: Tensor
    scale: Tensor


def doubles(*shape, grad=False):
    return torch.randn(shape, dtype=torch.float64, requires_grad=grad)


@pytest.fixture
def square():
    @opkit.op("t::square", shapes="*b -> *b")
    def square(x: Tensor) -> Tensor:
        return x * x

    return square


def save(ctx, inputs, output):
    ctx.save_for_forward(*inputs)
    ctx.save_for_backward(*inputs)


# ---------------------------------------------------------------- without a formula


@pytest.mark.parametrize("backward", [False, True], ids=["no formula", "backward formula"])
@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad])
def test_forward_mode_raises_instead_of_giving_zeros(square, guard, backward):
    if backward:
        square.register_autograd(lambda ctx, g: 2 * g * ctx.saved_tensors[0], save)
    x = torch.tensor([3.0])
    text = (
        "differentiating t::square in forward mode: an argument has a tangent, and the op has no forward-mode"
    )
    with forward_ad.dual_level(), guard():
        with pytest.raises(opkit.GradientError, match=text) as caught:
            square(forward_ad.make_dual(x, x))
        assert square(x).item() == 9
    assert caught.value.op == "t::square"
    assert "register_jvp(opkit.from_reference)" in str(caught.value)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f: lambda x: torch.func.jvp(f, (x,), (x,)),
        torch.func.jacfwd,
        lambda f: torch.func.hessian(lambda x: f(x).sum()),
    ],
    ids=["jvp", "jacfwd", "hessian"],
)
def test_forward_mode_transforms_raise_without_a_formula(square, transform):
    square.register_autograd(lambda ctx, g: 2 * g * ctx.saved_tensors[0], save)
    with pytest.raises(opkit.GradientError, match="differentiating t::square in forward mode"):
        transform(square)(torch.ones(2))


def test_tangents_of_keyword_only_tensors_and_in_lists_are_seen():
    @opkit.op("t::f")
    def f(xs: list[Tensor], k: int = 2, *, y: Tensor) -> Tensor:
        return xs[0] * k + y

    one = torch.ones(1)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(one, one)
        with pytest.raises(opkit.GradientError, match="an argument has a tangent"):
            f([one], y=dual)
        with pytest.raises(opkit.GradientError, match="an argument has a tangent"):
            f([one, dual], y=one)


# ---------------------------------------------------------------- with one


@pytest.mark.parametrize("form", ["function", "from_reference", "with its gradient"])
def test_every_argument_and_output_has_its_tangent(form):
    @opkit.op("t::f")
    def f(x: Tensor, k: float, rest: list[Tensor], bias: Tensor | None = None, *, w: Tensor) -> Pair:
        y = x * k * rest[0] + rest[1] * w + (0 if bias is None else bias)
        return Pair(y, torch.zeros_like(x, dtype=torch.int64), w * w)

    f.register_fake(lambda x, k, rest, bias=None, *, w: Pair(
        torch.empty_like(x), torch.empty_like(x, dtype=torch.int64), torch.empty_like(w)))  # fmt: skip
    seen = []

    def setup(ctx, inputs, output):
        assert isinstance(output, Pair)
        x, ctx.k, rest, _, w = inputs
        ctx.save_for_forward(x, *rest, w)

    @f.register_jvp(setup_context=setup)
    def jvp(ctx, dx, dk, drest, dbias, dw):
        x, first, second, w = ctx.saved_tensors
        seen.append((dk, dbias is None, ctx.needs_input_grad))
        dy = dx * ctx.k * first + x * ctx.k * drest[0] + drest[1] * w + second * dw
        return Pair(dy if dbias is None else dy + dbias, None, 2 * w * dw)

    if form == "from_reference":
        assert f.register_jvp(opkit.from_reference) is opkit.from_reference
    elif form == "with its gradient":
        f._tangents = None
        f.register_autograd(opkit.from_reference)
    x, a, b, w, bias = (doubles(3) for _ in range(5))
    for args in ((x, a, b, w), (x, a, b, w, bias)):

        def call(f, x, a, b, w, bias=None):
            found = f(x, 2.0, [a, b], bias, w=w)
            return found.y, found.scale

        tangents = tuple(doubles(3) for _ in args)
        found = torch.func.jvp(lambda *args: call(f, *args), args, tangents)
        expected = torch.func.jvp(lambda *args: call(f.reference, *args), args, tangents)
        torch.testing.assert_close(found, expected)
    only_x = torch.func.jvp(lambda x: call(f, x, a, b, w)[0], (x,), (x,))[1]
    torch.testing.assert_close(only_x, x * 2 * a)
    if form == "function":
        given = (True, False, [True, True], False, True)
        assert seen == [
            (None, True, given),
            (None, False, (*given[:3], True, True)),
            (None, True, (True, False, [False, False], False, False)),
        ]


def test_lists_of_outputs_have_lists_of_tangents():
    @opkit.op("t::split")
    def split(xs: list[Tensor], k: float) -> list[Tensor]:
        return [x * k for x in xs]

    split.register_fake(lambda xs, k: [torch.empty_like(x) for x in xs])
    split.register_jvp(lambda ctx, dxs, dk: [dxs[0] * 2, None])
    a, b = doubles(2), doubles(3)
    found = torch.func.jvp(lambda a, b: split([a, b], 2.0), (a, b), (a, b))[1]
    torch.testing.assert_close(found, [a * 2, b * 0])
    split.register_jvp(lambda ctx, dxs, dk: [dxs[0]])
    with pytest.raises(
        opkit.GradientError, match="returned list as the tangent of out; expected a list of 2 tan"
    ):
        torch.func.jvp(lambda a, b: split([a, b], 2.0), (a, b), (a, b))


def test_context_is_that_of_the_gradient_formula(square):
    square.register_autograd(lambda ctx, g: 2 * g * ctx.saved_tensors[0], save)
    square.register_jvp(lambda ctx, dx: 2 * ctx.saved_tensors[0] * dx)
    x = doubles(3, grad=True)
    assert gradcheck(
        square, (x,), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(square, (x,), check_fwd_over_rev=True, check_rev_over_rev=True)

    @opkit.op("t::square_backward", shapes="*b, *b -> *b")
    def square_backward(g: Tensor, y: Tensor) -> Tensor:
        return 2 * g * y

    square_backward.register_autograd(opkit.from_reference)
    square.register_autograd(square_backward, saves=("x",))
    assert gradcheck(square, (x,), check_forward_ad=True)
    assert gradgradcheck(square, (x,), check_fwd_over_rev=True)


def test_formula_in_forward_mode_may_use_the_output():
    @opkit.op("t::exp", shapes="*b -> *b")
    def exp(x: Tensor) -> Tensor:
        return x.exp()

    def setup(ctx, inputs, output):
        ctx.save_for_backward(output)

    exp.register_autograd(lambda ctx, g: g * ctx.saved_tensors[0], setup)
    exp.register_jvp(lambda ctx, dx: dx * ctx.saved_tensors[0])
    x = doubles(3, grad=True)
    assert gradcheck(exp, (x,), check_forward_ad=True)
    assert gradgradcheck(exp, (x,), check_fwd_over_rev=True)
    f = torch.func.jacfwd(torch.func.jacfwd(torch.func.jacfwd(exp)))
    torch.testing.assert_close(f(x.detach()).sum(), x.exp().sum().detach())


def test_forward_over_reverse_with_dual_numbers_sees_the_gradient(square):
    square.register_autograd(opkit.from_reference)
    x = doubles(3, grad=True)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangent = forward_ad.unpack_dual(square(dual)).tangent
        (found,) = torch.autograd.grad(tangent.sum(), x)
    torch.testing.assert_close(found, torch.full_like(x, 2))


def test_complex_and_broadcast_arguments_have_their_tangents():
    @opkit.op("t::mul", shapes="n, n -> n")
    def mul(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    mul.register_jvp(opkit.from_reference)
    x, y = torch.randn(2, 3, dtype=torch.complex128), torch.randn(1, dtype=torch.complex128)
    found = torch.func.jvp(lambda x, y: mul(x, y.expand(3)), (x[0], y), (x[1], y * 2))[1]
    torch.testing.assert_close(found, x[1] * y + x[0] * y * 2)
    jacobian = torch.func.jacfwd(lambda y: mul(x[0].real, y.expand(3)))(y.real)
    torch.testing.assert_close(jacobian[:, 0], x[0].real)


def test_tangents_under_autocast_are_exact_or_refused():
    @opkit.op("t::mm", shapes="n k, k m -> n m")
    def mm(a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    mm.register_jvp(opkit.from_reference)
    a, b = torch.rand(8, 8), torch.rand(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with forward_ad.dual_level():
            found = forward_ad.unpack_dual(mm(forward_ad.make_dual(a, a), b)).tangent
        torch.testing.assert_close(found, mm(a, b))
        text = "differentiating t::mm in forward mode by its reference: .* under the autocast that is on"
        with pytest.raises(opkit.GradientError, match=text):
            torch.func.jvp(lambda a: mm(a, b), (a,), (a,))


@pytest.mark.parametrize("form", ["function", "from_reference"])
def test_forward_mode_inside_a_compiled_function_is_right(square, form):
    square.register_autograd(opkit.from_reference)
    if form == "function":
        square.register_jvp(lambda ctx, dx: 2 * ctx.saved_tensors[0] * dx)
    x, v = doubles(3), doubles(3)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def f(x, v):
        return torch.func.jvp(lambda x: square(x * 3), (x,), (v,))

    torch.testing.assert_close(f(x, v), (9 * x * x, 18 * x * v))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("tangents", "text"),
    [
        (
            lambda d: (d, d),
            "its jvp returned 2 tangents; expected 1, one per output in order: out. Return None",
        ),
        (
            lambda d: d[:1],
            r"returned the shape \(1,\) as the tangent of out; expected \(2,\), that of the output",
        ),
        (
            lambda d: d.half(),
            "returned the dtype torch.float16 as the tangent of out; expected torch.float64",
        ),
        (lambda d: d.to("meta"), "returned the device meta as the tangent of out; expected cpu"),
        (lambda d: 1.0, "returned float as the tangent of out; expected a Tensor or None"),
    ],
    ids=["count", "shape", "dtype", "device", "number"],
)
def test_tangent_that_cannot_be_is_reported_by_name(square, tangents, text):
    square.register_jvp(lambda ctx, dx: tangents(dx))
    with pytest.raises(opkit.GradientError, match=f"differentiating t::square in forward mode: .*{text}"):
        torch.func.jvp(square, (doubles(2),), (doubles(2),))


def jvp_of(f, x):
    return torch.func.jvp(f, (x,), (x,))


def dual_of(f, x):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("derive", [jvp_of, dual_of], ids=["torch.func", "dual number"])
@pytest.mark.parametrize(
    "draw",
    [torch.rand_like, lambda x: torch.empty_like(x).normal_(), torch.nn.functional.dropout],
    ids=["function", "method", "dropout"],
)
def test_reference_that_draws_random_numbers_raises(derive, draw):
    @opkit.op("t::drop", shapes="*b -> *b")
    def drop(x: Tensor) -> Tensor:
        return x * draw(x)

    drop.register_jvp(opkit.from_reference)
    with pytest.raises(
        opkit.GradientError, match="differentiating t::drop by its reference: .*random numbers"
    ):
        derive(drop, doubles(2))


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ((3,), "found 3; expected a function or opkit.from_reference. Pass one of these"),
        ((lambda ctx: None,), r"found jvp .*expected 2 arguments: ctx, tangent of x. Change its parameters"),
        (
            (opkit.from_reference, save),
            "found setup_context with from_reference; expected it with a function only",
        ),
    ],
    ids=["number", "signature", "setup_context"],
)
def test_forward_mode_formula_that_cannot_work_is_refused(square, args, text):
    with pytest.raises(
        opkit.RegistrationError, match=f"registering the forward-mode formula of t::square: {text}"
    ):
        square.register_jvp(*args)


def test_forward_mode_formula_of_a_mutating_op_is_refused():
    @opkit.op("t::add_one", shapes="n -> ", mutates_args=["b"])
    def add_one(b: Tensor) -> None:
        b.add_(1)

    with pytest.raises(
        opkit.RegistrationError, match="found an op that mutates b; expected one that mutates noth"
    ):
        add_one.register_jvp(opkit.from_reference)


def test_op_without_results_has_no_tangent_to_give():
    @opkit.op("t::look", shapes="n -> ")
    def look(x: Tensor) -> None:
        return None

    with pytest.raises(opkit.GradientError, match="in forward mode: .* and the op has no results"):
        torch.func.jvp(lambda x: (look(x), x)[1], (doubles(2),), (doubles(2),))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_dual_numbers_inside_of_a_compiled_function_are_right(square, backend):
    square.register_jvp(opkit.from_reference)

    @torch.compile(backend=backend, fullgraph=True)
    def f(x):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            return forward_ad.unpack_dual(square(dual) * dual).tangent

    x = doubles(3)
    torch.testing.assert_close(f(x), 3 * x * x)
    torch.testing.assert_close(f(2 * x), 12 * x * x)


def test_dual_numbers_inside_of_a_compiled_function_raise_without_a_formula(square):
    def f(x):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            return forward_ad.unpack_dual(square(dual) * dual).tangent

    try:
        with pytest.raises(Exception, match="differentiating t::square in forward mode"):
            torch.compile(f, backend="eager")(doubles(3))
    finally:
        while forward_ad._current_level >= 0:  # Dynamo leaves it open where a call raises
            forward_ad.exit_dual_level()


def test_forward_mode_in_one_compiled_function_is_not_in_the_next():
    """Looking for tangents is an operation of torch; a graph without forward mode must not have it (Inductor fails)."""

    @opkit.op("t::seen", shapes="n -> n")
    def seen(x: Tensor) -> Tensor:
        return x.sin()

    seen.register_autograd(opkit.from_reference)
    x = torch.rand(3)
    torch.compile(lambda x: torch.func.jvp(seen, (x,), (x,))[1], backend="aot_eager")(x)
    with torch.no_grad():
        graph = make_fx(lambda x: seen(x))(x)
    assert [node.target for node in graph.graph.nodes if node.op == "call_function"] == [seen.overload]


def test_setup_context_may_ask_which_arguments_have_a_tangent():
    @opkit.op("t::times", shapes="*b, *b -> *b")
    def times(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    def needed(ctx, inputs, output):
        x, w = inputs
        ctx.save_for_forward(w if ctx.needs_input_grad[0] else None, x if ctx.needs_input_grad[1] else None)

    @times.register_jvp(setup_context=needed)
    def _(ctx, dx, dw):
        w, x = ctx.saved_tensors
        assert x is None
        return dx * w

    x, w = doubles(3), doubles(3)
    assert torch.equal(torch.func.jvp(lambda x: times(x, w), (x,), (torch.ones_like(x),))[1], w)
