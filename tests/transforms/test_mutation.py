from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")


@pytest.fixture(params=["eager", "aot_eager", "inductor"])
def wrap(request):
    """How a function is called: as it is, or compiled."""
    if request.param == "eager":
        return lambda function: function
    return lambda function: torch.compile(function, fullgraph=True, backend=request.param)


def leaf(*values):
    return torch.tensor(values or [3.0], requires_grad=True)


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


@pytest.mark.parametrize("buffer", ["argument", "intermediate", "view"])
def test_mutating_what_backward_needs_raises_also_when_compiled(add_one, wrap, buffer):
    def f(w, b):
        b = b * 1 if buffer == "intermediate" else b
        y = w * b
        add_one(b[0:1] if buffer == "view" else b)
        return y + b

    with pytest.raises(Exception, match="modified by an inplace operation"):
        wrap(f)(leaf(), torch.ones(1)).sum().backward()


def test_mutating_before_it_is_saved_is_right(add_one, wrap):
    def f(w, b):
        add_one(b)
        return w * b

    w = leaf()
    wrap(f)(w, torch.ones(1)).sum().backward()
    assert w.grad.item() == 2


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


def test_formula_does_not_hide_that_an_argument_flows_into_a_mutated_one(copy_into, wrap):
    copy_into.register_autograd(lambda ctx, g: (g * 2, None))
    text = (
        "argument x requires grad and flows into b; the op mutates b, .* or name b in non_differentiable= of "
        "register_autograd, where what is written there is not to be differentiated"
    )
    with pytest.raises(Exception, match=text):
        wrap(lambda x, b: copy_into(x, b))(leaf(), torch.zeros(1))


def test_mutated_argument_without_gradients_needs_no_word():
    @opkit.op("t::counted", shapes="n, () -> n", mutates_args=["calls"])
    def counted(x: Tensor, calls: Tensor) -> Tensor:
        calls.add_(1)
        return x * 2

    counted.register_autograd(lambda ctx, g: (g * 2, None))
    x, calls = leaf(), torch.tensor(0)
    counted(x, calls).sum().backward()
    assert (x.grad.item(), calls.item()) == (2, 1)


def test_op_that_mutates_may_have_a_formula(copy_into, wrap):
    copy_into.register_autograd(lambda ctx, g: (g * 2, None), non_differentiable=["b"])
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


# ---------------------------------------------------------------- torch.func


@pytest.mark.parametrize(
    "transform",
    [
        torch.func.grad,
        torch.func.jacrev,
        lambda f: lambda w: torch.func.vjp(f, w),
        lambda f: torch.vmap(torch.func.grad(f)),
    ],
    ids=["grad", "jacrev", "vjp", "vmap of grad"],
)
def test_mutation_that_torch_func_cannot_see_raises(add_one, transform):
    b = torch.ones(1)

    def f(w):
        y = w * b
        add_one(b)
        return y.sum()

    text = r"calling t::add_one inside a gradient of torch.func \(grad, vjp, jacrev\): the op mutates b"
    with pytest.raises(opkit.GradientError, match=text):
        transform(f)(torch.ones(1, 1))


def test_mutation_inside_a_forward_mode_transform_is_right(add_one):
    b = torch.ones(1)

    def f(w):
        y = w * b
        add_one(b)
        return y, w * b

    w = torch.tensor([3.0])
    values, tangents = torch.func.jvp(f, (w,), (torch.ones(1),))
    assert [v.item() for v in (*values, *tangents)] == [3, 6, 1, 2]


def test_mutated_argument_with_a_tangent_raises(add_one):
    def f(w):
        b = w * 1
        add_one(b)
        return b

    with pytest.raises(
        opkit.GradientError, match="in forward mode: .* and the op mutates b; torch would go on"
    ):
        torch.func.jvp(f, (torch.ones(1),), (torch.ones(1),))
