from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import opkit

pytestmark = pytest.mark.usefixtures("registry")

A, B = torch.randn(2, 3), torch.randn(3, 4)


def declare(flops, name="t::product"):
    @opkit.op(name, shapes="m k, k n -> m n", flops=flops)
    def product(a: Tensor, b: Tensor, times: int = 1, *, bias: Tensor | None = None) -> Tensor:
        return a @ b * times

    return product


def product(a: Tensor, b: Tensor, times: int = 1) -> Tensor:
    return a @ b * times


@pytest.fixture
def op():
    return opkit.op(
        "t::product", shapes="m k, k n -> m n", flops=lambda a, b, times: 2 * a.numel() * b[1] * times
    )(product)


def counted(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_formula_gets_shapes_and_defaults(op):
    assert counted(lambda: op(A, B)) == 48
    assert counted(lambda: op(A, B, times=3)) == 144
    assert counted(lambda: [torch.mm(A, B), op(A, B)]) == 96


def test_formula_counts_in_backward_too(op):
    op.register_autograd(opkit.from_reference)
    a = A.clone().requires_grad_()
    assert (
        counted(lambda: op(a, B).sum().backward()) == 48 + 48 * 2
    )  # the reference again, and one product back


def test_formula_counts_under_a_preference_and_vmap(op):
    op.register_vmap("sequential")
    op.register_kernel("cpu", product, backend="b")
    with opkit.use_backend("b"):
        assert counted(lambda: op(A, B)) == 48
    assert counted(lambda: torch.vmap(op, (0, None))(torch.stack([A, A]), B)) == 96


def test_formula_counts_in_a_graph_with_a_preference(op):
    graphs = []

    @torch.compile(fullgraph=True, backend=lambda graph, inputs: graphs.append(graph) or graph)
    def run(a, b):
        with opkit.use_backend("reference"):
            return op(a, b)

    run(A, B)
    assert counted(lambda: torch.fx.Interpreter(graphs[0]).run(A, B)) == 48


def test_formula_counts_fake_tensors(op):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        assert counted(lambda: op(torch.empty(2, 3), torch.empty(3, 4))) == 48


def test_formula_may_ask_for_the_shapes_of_results_lists_and_keywords():
    seen = []

    def flops(items, *, other, out_shape):
        seen.append((items, other, out_shape))
        return 7

    @opkit.op("t::f", flops=flops)
    def f(items: list[Tensor], *, other: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        return items[0] * 1, [i * 2 for i in items]

    assert counted(lambda: f([A, B])) == 7
    assert counted(lambda: f([A], other=B)) == 7
    assert seen == [(([2, 3]), None, ())] or seen[0] == (
        [A.shape, B.shape],
        None,
        (A.shape, [A.shape, B.shape]),
    )
    assert seen[1] == ([A.shape], B.shape, (A.shape, [A.shape]))


def test_one_result_has_one_shape():
    @opkit.op("t::f", flops=lambda x, out_shape: out_shape.numel())
    def f(x: Tensor) -> Tensor:
        return x.sum(0)

    assert counted(lambda: f(A)) == 3


def test_redefinition_replaces_and_removal_leaves_nothing():
    for factor in (1, 2):

        def flops(x, factor=factor):
            return factor

        @opkit.op("t::f", flops=flops)
        def f(x: Tensor) -> Tensor:
            return x * 1

    assert counted(lambda: f(A)) == 2
    from opkit import _registry

    packet = f.overload.overloadpacket
    assert packet in flop_registry
    _registry.remove("t::f")
    assert packet not in flop_registry


@pytest.mark.parametrize(
    ("flops", "text"),
    [
        (
            3,
            "found flops=3; expected a function of the op's arguments .x, k., and of out_shape where it wants it",
        ),
        (
            lambda x: 1,
            r"found flops=.*lambda.* with the signature \(x\); expected a function.*Change its parameters",
        ),
    ],
)
def test_formula_that_does_not_fit_is_refused(flops, text):
    def f(x: Tensor, k: int) -> Tensor:
        return x * k

    with pytest.raises(opkit.RegistrationError, match=f"declaring t::f: {text}"):
        opkit.op("t::f", flops=flops)(f)
    assert opkit.op("t::f")(f)(A, 2).shape == A.shape  # nothing of it is left


def test_formula_that_returns_no_number_is_reported():
    @opkit.op("t::f", flops=lambda x: "many")
    def f(x: Tensor) -> Tensor:
        return x * 1

    with pytest.raises(
        opkit.RegistrationError, match="counting the operations of t::f: its formula .* returned 'many'"
    ):
        counted(lambda: f(A))
