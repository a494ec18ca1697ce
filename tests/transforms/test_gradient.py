from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import opkit

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture(params=["eager", "compile"])
def wrap(request):
    """How a function is called: as it is, or compiled."""
    if request.param == "eager":
        return lambda function: function
    return lambda function: torch.compile(function, fullgraph=True, backend="aot_eager")


@pytest.fixture(params=[False, True], ids=["no formula", "formula"])
def square(request):
    @opkit.op("t::square", shapes="*b -> *b")
    def square(x: Tensor) -> Tensor:
        return x * x

    if request.param:
        square.register_autograd(opkit.from_reference)
    return square


def leaf(*values):
    return torch.tensor(values or [3.0], requires_grad=True)


# ---------------------------------------------------------------- without a formula


def test_backward_without_a_formula_raises_and_names_the_op():
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x * x

    y = f(leaf())
    assert y.requires_grad
    assert type(y.grad_fn).__name__ == "fBackward"
    with pytest.raises(
        opkit.GradientError, match=r"differentiating t::f: it has no gradient formula. Register one"
    ) as caught:
        y.sum().backward()
    assert caught.value.op == "t::f"


def test_compiled_backward_without_a_formula_raises_and_names_the_op():
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x * x

    with pytest.raises(Exception, match="differentiating t::f: it has no gradient formula"):
        torch.compile(lambda x: f(x), fullgraph=True, backend="aot_eager")(leaf()).sum().backward()


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_nothing_is_recorded_where_gradients_are_off(square, guard):
    with guard():
        y = square(leaf())
    assert not y.requires_grad
    assert y.tolist() == [9]


def test_formula_registered_later_replaces_the_earlier_one():
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x * x

    for factor in (2, 3):
        f.register_autograd(lambda ctx, g: g * factor)
        x = leaf()
        f(x).sum().backward()
        assert x.grad.item() == factor


# ---------------------------------------------------------------- forward mode


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad])
def test_forward_mode_raises_instead_of_giving_zeros(square, guard):
    x = leaf().detach()
    with forward_ad.dual_level(), guard():
        with pytest.raises(
            opkit.GradientError, match="differentiating t::square in forward mode: an argument has a tangent"
        ):
            square(forward_ad.make_dual(x, x))
        assert square(x).item() == 9


@pytest.mark.parametrize(
    "transform", [torch.func.jacfwd, torch.func.hessian, torch.func.jvp], ids=lambda t: t.__name__
)
def test_forward_mode_transforms_raise(square, transform):
    x = leaf().detach()
    args = (square, (x,), (x,)) if transform is torch.func.jvp else (lambda x: square(x).sum(),)
    with pytest.raises((opkit.GradientError, RuntimeError), match="forward mode|with torch.func"):
        found = transform(*args)
        found(x)


def test_forward_mode_of_keyword_only_tensors_and_lists_raises():
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


# ---------------------------------------------------------------- torch.func: right or loud


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.func.grad(lambda x: f(x).sum())(x),
        lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
        lambda f, x: torch.func.jacrev(f)(x).diagonal(),
        lambda f, x: torch.vmap(torch.func.grad(lambda x: f(x)))(x),
        lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True).diagonal(),
    ],
    ids=["grad", "vjp", "jacrev", "vmap of grad", "vectorised jacobian"],
)
def test_reverse_mode_transforms_are_right_or_raise(square, transform):
    x = torch.tensor([2.0, 3.0])
    try:
        found = transform(square, x)
    except (RuntimeError, opkit.GradientError):
        return
    torch.testing.assert_close(found, 2 * x)


def test_vmap_is_right(square):
    x = torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.vmap(square, in_dims=1, out_dims=1)(x), x * x)


# ---------------------------------------------------------------- mutation


@pytest.fixture(params=["python kernel", "native kernel"])
def add_one(request):
    @opkit.op("t::add_one", shapes="n -> ", mutates_args=["b"])
    def add_one(b: Tensor) -> None:
        b.add_(1)

    if request.param == "native kernel":
        add_one.register_kernel(
            "cpu",
            opkit.cpp.kernel("""#include <opkit/kernel.h>
            void add_one(opkit::Tensor b) { for (int64_t i = 0; i < b.numel(); ++i) b.data<float>()[i] += 1; }"""),
        )
    return add_one


def test_mutation_is_seen_and_bumps_the_version(add_one, wrap):
    def f(b):
        add_one(b)
        return b * 2

    b = torch.ones(2)
    assert wrap(f)(b).tolist() == [4, 4]
    assert b.tolist() == [2, 2]
    version = b._version
    add_one(b)
    assert b._version > version


@pytest.mark.parametrize("guard", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_mutating_what_backward_needs_raises(add_one, guard):
    w, b = leaf(), torch.ones(1)
    y = w * b
    with guard():
        add_one(b)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_mutating_what_backward_needs_raises_when_compiled(add_one):
    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(w, b):
        y = w * b
        add_one(b)
        return y

    with pytest.raises(Exception, match="modified by an inplace operation"):
        f(leaf(), torch.ones(1)).sum().backward()


def test_mutated_argument_that_requires_grad_raises(add_one, wrap):
    def f(w):
        b = w * 1
        add_one(b)
        return b * b

    with pytest.raises(
        Exception, match="calling t::add_one with gradients: argument b requires grad and is overwritten"
    ):
        wrap(f)(leaf()).sum().backward()
    with pytest.raises(Exception, match="argument b requires grad and is overwritten"):
        wrap(lambda w: add_one(w))(leaf())


@pytest.fixture
def copy_into():
    @opkit.op("t::copy_into", shapes="n, n -> n", mutates_args=["b"])
    def copy_into(x: Tensor, b: Tensor) -> Tensor:
        b.copy_(x)
        return x * 2

    return copy_into


def test_gradient_that_would_be_lost_in_a_mutated_argument_raises(copy_into, wrap):
    with pytest.raises(
        Exception, match="argument x requires grad and flows into b; .* or register a formula"
    ):
        wrap(lambda x, b: copy_into(x, b))(leaf(), torch.zeros(1))
    with torch.no_grad():
        assert copy_into(leaf(), torch.zeros(1)).item() == 6


def test_op_that_mutates_may_have_a_formula(copy_into, wrap):
    copy_into.register_autograd(lambda ctx, g: (g * 2, None))
    x, b = leaf(), torch.zeros(1)
    wrap(lambda x, b: copy_into(x, b))(x, b).sum().backward()
    assert (x.grad.item(), b.item()) == (2, 3)


def test_op_without_results_has_no_gradient_to_give_even_with_a_formula():
    @opkit.op("t::store", shapes="n, n -> ", mutates_args=["b"])
    def store(x: Tensor, b: Tensor) -> None:
        b.copy_(x)

    store.register_autograd(lambda ctx: (None, None))
    with pytest.raises(
        opkit.GradientError, match="argument x requires grad and flows into b.*without mutation\\.$"
    ):
        store(leaf(), torch.zeros(1))


def test_mutated_list_is_seen_and_bumps_every_version(wrap):
    @opkit.op("t::add_all", mutates_args="bs")
    def add_all(bs: list[Tensor], *, k: Tensor) -> None:
        for b in bs:
            b.add_(k)

    add_all.register_fake(lambda bs, *, k: None)
    bs = [torch.ones(1), torch.ones(2)]
    wrap(lambda bs: add_all(bs, k=torch.ones(1)))(bs)
    assert [b[0].item() for b in bs] == [2, 2]
    versions = [b._version for b in bs]
    add_all(bs, k=torch.ones(1))
    assert all(b._version > v for b, v in zip(bs, versions, strict=True))


def test_mutating_op_passes_opcheck(copy_into):
    torch.library.opcheck(copy_into.overload, (torch.ones(2), torch.zeros(2)))


def test_vmap_of_a_mutating_op_raises(add_one):
    with pytest.raises(RuntimeError, match="t::add_one"):
        torch.vmap(lambda b: (add_one(b), b.clone())[1])(torch.zeros(2, 3))


# ---------------------------------------------------------------- several kinds of autograd


def test_gradients_flow_with_checkpoint_hooks_and_threads():
    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        return x.sin()

    f.register_autograd(opkit.from_reference)
    x = leaf()
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(1) or t, lambda t: t):
        y = f(x)
    torch.utils.checkpoint.checkpoint(f, y, use_reentrant=False).sum().backward()
    assert packed
    torch.testing.assert_close(x.grad, torch.cos(torch.sin(x)).detach() * torch.cos(x).detach())


def test_retained_graph_can_be_walked_twice(square):
    square.register_autograd(opkit.from_reference)
    x = leaf()
    y = square(x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert x.grad.item() == 12


def test_argument_used_twice_gets_both_gradients():
    @opkit.op("t::mul", shapes="*b, *b -> *b")
    def mul(x: Tensor, y: Tensor) -> Tensor:
        return x * y

    mul.register_autograd(opkit.from_reference)
    x = leaf()
    mul(x, x).sum().backward()
    assert x.grad.item() == 6
