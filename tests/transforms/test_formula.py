# ruff: noqa: UP007, UP045  (the older spellings are what is tested)
from __future__ import annotations

from typing import NamedTuple, Optional

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import opkit

pytestmark = pytest.mark.usefixtures("registry")


class RMSNorm(NamedTuple):
    y: Tensor
    rstd: Tensor


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> RMSNorm:
    rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return RMSNorm(x * rstd * weight, rstd)


def formula(g, x, w, rstd):
    h = g * w
    return h * rstd - x * rstd**3 * (h * x).mean(-1, keepdim=True), (g * x * rstd).sum(0)


@pytest.fixture(params=["function", "function as decorator", "op", "from_reference"])
def rms_norm(request):
    """An op with a non-differentiable second output, whose gradient is given in each form."""
    op = opkit.op("t::rms_norm", shapes="m n, n -> m n, m 1")(rms_norm_reference)
    constant = {"non_differentiable": ("rstd",)}

    def save(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight, output.rstd)

    def backward(ctx, grad_y, grad_rstd):
        return *formula(grad_y, *ctx.saved_tensors), None

    if request.param == "function":
        assert op.register_autograd(backward, setup_context=save, **constant) is backward
    elif request.param == "function as decorator":
        assert op.register_autograd(setup_context=save, **constant)(backward) is backward
    elif request.param == "from_reference":
        op.register_autograd(opkit.from_reference, **constant)
    else:

        @opkit.op("t::rms_norm_backward", shapes="m n, m n, n, m 1 -> m n, n")
        def rms_norm_backward(g: Tensor, x: Tensor, w: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
            return formula(g, x, w, rstd)

        rms_norm_backward.register_autograd(opkit.from_reference)
        op.register_autograd(rms_norm_backward, saves=("x", "weight", "rstd"), **constant)
    return op


def inputs():
    torch.manual_seed(0)
    return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((3, 4), (4,))]


def test_gradients_are_those_of_the_reference_in_every_form(rms_norm):
    x, w = inputs()
    found = torch.autograd.grad(rms_norm(x, w).y.sin().sum(), (x, w))
    expected = torch.autograd.grad(rms_norm_reference(x, w).y.sin().sum(), (x, w))
    torch.testing.assert_close(found, expected)
    assert gradcheck(lambda x, w: rms_norm(x, w).y, (x, w))


def test_gradients_survive_compilation_in_every_form(rms_norm):
    x, w = inputs()
    call = torch.compile(lambda x, w: rms_norm(x * 2, w).y * 3, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(call(x, w).sin().sum(), (x, w))
    expected = torch.autograd.grad((rms_norm_reference(x * 2, w).y * 3).sin().sum(), (x, w))
    torch.testing.assert_close(found, expected)


def test_non_differentiable_output_does_not_require_grad(rms_norm):
    y, rstd = rms_norm(*inputs())
    assert (y.requires_grad, rstd.requires_grad) == (True, False)


def test_only_the_wanted_gradients_are_returned(rms_norm):
    x, w = inputs()
    rms_norm(x.detach(), w).y.sum().backward()
    assert w.grad is not None
    assert x.grad is None


def test_ops_pass_opcheck_with_gradients(rms_norm):
    torch.library.opcheck(rms_norm.overload, tuple(inputs()))


def test_double_backward_of_from_reference_and_of_differentiable_formulas():
    @opkit.op("t::cube", shapes="*b -> *b")
    def cube(x: Tensor) -> Tensor:
        return x**3

    @opkit.op("t::cube_backward", shapes="*b, *b -> *b")
    def cube_backward(g: Tensor, x: Tensor) -> Tensor:
        return 3 * g * x**2

    cube_backward.register_autograd(opkit.from_reference)
    x = torch.tensor([1.5, -2.0], dtype=torch.float64, requires_grad=True)
    for form, options in (
        (opkit.from_reference, {}),
        (cube_backward, {"saves": ["x"]}),
        (lambda ctx, g: 3 * g * ctx.saved_tensors[0] ** 2,
         {"setup_context": lambda ctx, inputs, output: ctx.save_for_backward(*inputs)}),
    ):  # fmt: skip
        cube.register_autograd(form, **options)
        assert gradgradcheck(cube, (x,))
        (g,) = torch.autograd.grad(cube(x).sum(), x, create_graph=True)
        (gg,) = torch.autograd.grad(g.sum(), x, create_graph=True)
        torch.testing.assert_close(gg, 6 * x)


def test_double_backward_through_a_saved_output():
    @opkit.op("t::exp", shapes="*b -> *b")
    def exp(x: Tensor) -> Tensor:
        return x.exp()

    @opkit.op("t::exp_backward", shapes="*b, *b -> *b")
    def exp_backward(g: Tensor, y: Tensor) -> Tensor:
        return g * y

    exp_backward.register_autograd(opkit.from_reference)
    exp.register_autograd(exp_backward, saves=("out",))
    assert gradgradcheck(exp, (torch.randn(3, dtype=torch.float64, requires_grad=True),))


def test_double_backward_without_a_formula_for_the_formula_raises():
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x**2

    @opkit.op("t::f_backward", shapes="*b, *b -> *b")
    def f_backward(g: Tensor, x: Tensor) -> Tensor:
        return 2 * g * x

    f.register_autograd(f_backward, saves=("x",))
    x = torch.ones(2, requires_grad=True)
    (g,) = torch.autograd.grad(f(x).sum(), x, create_graph=True)
    with pytest.raises(
        opkit.GradientError, match="differentiating t::f_backward: it has no gradient formula"
    ):
        g.sum().backward()


def test_missing_gradients_arrive_as_zeros_and_integer_outputs_have_none():
    seen = []

    @opkit.op("t::f", shapes="n -> n, n, n:int64")
    def f(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return x * 2, x * 3, torch.arange(len(x))

    @opkit.op("t::f_backward", shapes="n, n -> n")
    def f_backward(a: Tensor, b: Tensor) -> Tensor:
        seen.append((a.tolist(), b.tolist()))
        return a * 2 + b * 3

    f.register_autograd(f_backward)
    x = torch.ones(2, requires_grad=True)
    *_, index = f(x)
    assert not index.requires_grad
    f(x)[1].sum().backward()
    assert seen == [([0, 0], [1, 1])]
    assert x.grad.tolist() == [3, 3]


def test_needs_input_grad_is_in_schema_order():
    seen = []

    @opkit.op("t::f", shapes="n, n, n -> n")
    def f(x: Tensor, k: float, y: Tensor, *, z: Tensor) -> Tensor:
        return x * k + y + z

    def backward(ctx, g):
        seen.append(ctx.needs_input_grad)
        return g * 2, None, g, g

    f.register_autograd(backward)
    x, y = torch.ones(1, requires_grad=True), torch.ones(1)
    f(x, 2.0, y, z=x).sum().backward()
    assert seen == [(True, False, False, True)]
    assert x.grad.tolist() == [3]


@pytest.mark.parametrize("compile_", [False, True], ids=["eager", "compile"])
@pytest.mark.parametrize("form", ["function", "op", "from_reference"])
def test_lists_of_tensors_go_in_and_out(form, compile_):
    @opkit.op("t::split")
    def split(xs: list[Tensor], k: float) -> list[Tensor]:
        return [x * k for x in xs]

    split.register_fake(lambda xs, k: [torch.empty_like(x) for x in xs])

    @opkit.op("t::split_backward")
    def split_backward(gs: list[Tensor], k: float) -> list[Tensor]:
        return [g * k for g in gs]

    split_backward.register_fake(lambda gs, k: [torch.empty_like(g) for g in gs])

    def save(ctx, inputs, output):
        assert isinstance(output, list)
        ctx.k = inputs[1]

    if form == "function":
        split.register_autograd(lambda ctx, gs: ([g * ctx.k for g in gs], None), save)
    elif form == "op":
        split.register_autograd(split_backward, saves=("k",))
    else:
        split.register_autograd(opkit.from_reference)
    a, b, c = (torch.ones(n, requires_grad=n != 2) for n in (1, 2, 3))

    def call(a, b, c):
        found = split([a, b, c], 3.0)
        return found[0].sum() + found[2].sum() * 2

    call = torch.compile(call, fullgraph=True, backend="aot_eager") if compile_ else call
    call(a, b, c).backward()
    assert (a.grad.tolist(), b.grad, c.grad.tolist()) == ([3], None, [6, 6, 6])


def test_only_argument_being_a_list_may_return_it_bare():
    @opkit.op("t::total")
    def total(xs: list[Tensor]) -> Tensor:
        return torch.stack(xs).sum()

    total.register_autograd(
        lambda ctx, g: [g.expand(s) for s in ctx.shapes],
        lambda ctx, inputs, output: setattr(ctx, "shapes", [x.shape for x in inputs[0]]),
    )
    xs = [torch.ones(2, requires_grad=True) for _ in range(2)]
    total(xs).backward()
    assert [x.grad.tolist() for x in xs] == [[1, 1]] * 2


@pytest.mark.parametrize("form", ["function", "op", "from_reference"])
@pytest.mark.parametrize("given", [True, False], ids=["given", "absent"])
def test_optional_tensors_may_be_absent(form, given):
    @opkit.op("t::add", shapes="n, n -> n")
    def add(x: Tensor, bias: Optional[Tensor] = None) -> Tensor:
        return x * 2 if bias is None else x * 2 + bias * 3

    @opkit.op("t::add_backward", shapes="n -> n, n")
    def add_backward(g: Tensor) -> tuple[Tensor, Tensor]:
        return g * 2, g * 3

    if form == "function":
        add.register_autograd(lambda ctx, g: (g * 2, g * 3 if ctx.needs_input_grad[1] else None))
    else:
        add.register_autograd(add_backward if form == "op" else opkit.from_reference)
    x, bias = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    (add(x, bias) if given else add(x)).sum().backward()
    assert x.grad.tolist() == [2, 2]
    assert bias.grad is None if not given else bias.grad.tolist() == [3, 3]


@pytest.mark.parametrize("form", ["function", "op", "from_reference"])
def test_keyword_only_tensors_have_gradients(form):
    @opkit.op("t::scale", shapes="n, n -> n")
    def scale(x: Tensor, *, k: Tensor, power: int = 1) -> Tensor:
        return x * k**power

    @opkit.op("t::scale_backward", shapes="n, n, n -> n, n")
    def scale_backward(g: Tensor, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return g * k, g * x

    def save(ctx, inputs, output):
        x, k, power = inputs
        assert power == 1
        ctx.save_for_backward(x, k)

    def backward(ctx, g):
        x, k = ctx.saved_tensors
        return g * k, g * x, None

    if form == "function":
        scale.register_autograd(backward, save)
    else:
        scale.register_autograd(*([scale_backward] if form == "op" else [opkit.from_reference]),
                                **({"saves": ("x", "k")} if form == "op" else {}))  # fmt: skip
    x, k = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (3.0, 4.0))
    for call in (scale, torch.compile(lambda x, *, k: scale(x, k=k), fullgraph=True, backend="aot_eager")):
        assert torch.autograd.grad(call(x, k=k).sum(), (x, k)) == (4, 3)
    assert gradcheck(lambda x, k: scale(x, k=k), (x, k))


def test_from_reference_leaves_unused_and_integer_arguments_without_gradient():
    @opkit.op("t::take", shapes="n, m:int64, n -> m")
    def take(x: Tensor, index: Tensor, unused: Tensor) -> Tensor:
        return x[index]

    take.register_autograd(opkit.from_reference)
    x, unused = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    take(x, torch.tensor([0, 0]), unused).sum().backward()
    assert x.grad.tolist() == [2, 0, 0]
    assert unused.grad is None or unused.grad.tolist() == [0, 0, 0]


def test_from_reference_of_a_complex_op():
    @opkit.op("t::square", shapes="*b -> *b")
    def square(x: Tensor) -> Tensor:
        return x * x

    square.register_autograd(opkit.from_reference)
    assert gradcheck(square, (torch.randn(3, dtype=torch.complex128, requires_grad=True),))


def test_formula_of_a_saved_value_that_changed_raises():
    @opkit.op("t::square", shapes="*b -> *b")
    def square(x: Tensor) -> Tensor:
        return x * x

    square.register_autograd(opkit.from_reference)
    x = torch.ones(2, requires_grad=True)
    w = x * 1
    y = square(w)
    with torch.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


# ---------------------------------------------------------------- errors


@pytest.fixture
def op():
    @opkit.op("t::f", shapes="n, n -> n")
    def f(x: Tensor, y: Tensor, k: float = 1.0) -> Tensor:
        return x * y * k

    return f


@pytest.mark.parametrize(("grads", "count"), [((1,), 1), ((1, 2), 2), ((1, 2, 3, 4), 4)])
def test_wrong_number_of_gradients_raises_and_lists_the_arguments(op, grads, count):
    op.register_autograd(lambda ctx, g: grads)
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(
        opkit.GradientError, match=rf"returned {count} gradients; expected 3, .* in order: x, y, k"
    ):
        op(x, x).sum().backward()


def test_wrong_length_of_a_list_of_gradients_raises():
    @opkit.op("t::g")
    def g(xs: list[Tensor]) -> Tensor:
        return xs[0] + xs[1]

    g.register_autograd(lambda ctx, grad: ([grad],))
    x = torch.ones(2, requires_grad=True)
    with pytest.raises(
        opkit.GradientError, match="returned 1 gradients for the list xs; expected 2, one per tensor"
    ):
        g([x, x]).sum().backward()


def backward_op(text, results):
    scope = {"Tensor": Tensor}
    exec(f"def b({text}): ...", scope)
    scope["b"].__annotations__ |= {"return": tuple[(Tensor,) * results]}
    return opkit.op("t::b")(scope["b"])


@pytest.mark.parametrize(
    ("signature", "results", "options", "text"),
    [
        (
            "g: Tensor",
            2,
            {"saves": ["z"]},
            r"saves names 'z'; expected arguments \(x, y, k\) or outputs \(out\)",
        ),
        ("g: Tensor", 2, {"saves": ["x"]}, "takes g; expected 2 arguments: grad of out, x. Change saves="),
        ("g: Tensor, x: Tensor", 2, {}, "takes g, x; expected 1 arguments: grad of out"),
        ("*, g: Tensor", 2, {}, "takes g; expected 1 arguments"),
        ("g: Tensor", 1, {}, "returns 1 gradients; expected 2, one per differentiable argument: x, y. Name"),
        ("g: Tensor", 2, {"non_differentiable": ["y"]}, "returns 2 gradients; expected 1, .*: x"),
        (
            "g: Tensor",
            2,
            {"non_differentiable": ["q"]},
            "non_differentiable names 'q'; expected one of x, y, k, out",
        ),
    ],
    ids=[
        "unknown save",
        "too few",
        "too many",
        "keyword",
        "too few results",
        "too many results",
        "unknown name",
    ],
)
def test_formula_op_that_does_not_fit_is_refused(op, signature, results, options, text):
    with pytest.raises(opkit.RegistrationError, match=text):
        op.register_autograd(backward_op(signature, results), **options)


def test_name_of_an_argument_and_an_output_does_not_say_which_is_constant(registry):
    class Gradients(NamedTuple):
        x: Tensor

    @opkit.op("t::same", shapes="n -> n")
    def same(x: Tensor) -> Gradients:
        return Gradients(x * x)

    with pytest.raises(
        opkit.RegistrationError,
        match="non_differentiable names 'x', an argument and an output; expected a name that says which of them has no "
        "gradient. Rename one of them, or return None for x in a formula of your own",
    ):
        same.register_autograd(opkit.from_reference, non_differentiable=["x"])


@pytest.mark.parametrize(
    ("args", "options", "text"),
    [
        ((3,), {}, "found 3; expected a function, an Op or opkit.from_reference"),
        ((lambda ctx, g: g,), {"saves": ["x"]}, "saves= with a formula that is not an op"),
        ((opkit.from_reference,), {"saves": ["x"]}, "saves= with a formula that is not an op"),
        ((opkit.from_reference, lambda *_: None), {}, "setup_context with a formula that is not a function"),
    ],
    ids=["number", "saves with function", "saves with from_reference", "setup_context with from_reference"],
)
def test_form_that_does_not_exist_is_refused(op, args, options, text):
    with pytest.raises(opkit.RegistrationError, match=text):
        op.register_autograd(*args, **options)


def test_from_reference_is_refused_for_an_op_that_mutates():
    @opkit.op("t::g", shapes="n, n -> n", mutates_args=["y"])
    def g(x: Tensor, y: Tensor) -> Tensor:
        y.add_(1)
        return x * 2

    with pytest.raises(opkit.RegistrationError, match="found from_reference for an op that mutates y"):
        g.register_autograd(opkit.from_reference)


def test_from_reference_prints_its_name():
    assert repr(opkit.from_reference) == "from_reference"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_from_reference_refuses_a_reference_that_draws_random_numbers(compiled):
    @opkit.op("t::noisy", shapes="*b -> *b")
    def noisy(x: Tensor) -> Tensor:
        return x * torch.rand_like(x)

    noisy.register_autograd(opkit.from_reference)
    x = torch.ones(3, requires_grad=True)
    f = torch.compile(noisy, fullgraph=True, backend="aot_eager") if compiled else noisy
    with pytest.raises(
        Exception, match=r"t::noisy by its reference: .*random numbers \(aten.rand_like.default\)"
    ):
        f(x).sum().backward()
