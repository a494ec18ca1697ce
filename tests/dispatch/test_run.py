from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

T = torch.ones(2, 3)


def test_kernel_sees_all_arguments_with_their_defaults():
    seen = []

    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor, k: int = 2, *, s: str = "a", flag: bool = True) -> Tensor:
        seen.append((k, s, flag))
        return x + k

    f(T)
    f(T, 2, s="a", flag=False)
    f.overload(T, flag=True, s="b")
    assert seen == [(2, "a", True), (2, "a", False), (2, "b", True)]


def test_arguments_are_checked_before_a_python_kernel_runs():
    @opkit.op("t::f", shapes="n n -> n")
    def f(x: Tensor) -> Tensor:
        pytest.fail("ran")

    with pytest.raises(opkit.ShapeError, match="dimension 1 of x"):
        f(T)


def test_error_of_a_python_kernel_arrives_as_it_is():
    class Mine(Exception): ...

    @opkit.op("t::f", shapes="*b -> *b")
    def f(x: Tensor) -> Tensor:
        raise Mine("here")

    with pytest.raises(Mine, match="here"):
        f(T)


def test_lazy_bits_of_an_input_are_resolved():
    @opkit.op("t::f", shapes="n -> n:bool")
    def f(x: Tensor) -> Tensor:
        return torch.full(x.shape, x.is_neg() or x.is_conj())

    x = torch.tensor([1 + 2j]).conj()
    assert not f(x).item()
    assert not f(x.imag).item()


def test_fake_tensors_never_reach_a_kernel():
    from torch._subclasses import FakeTensorMode

    @opkit.op("t::f", shapes="n m -> m")
    def f(x: Tensor) -> Tensor:
        pytest.fail("ran")

    with FakeTensorMode() as mode:
        assert f(mode.from_tensor(T)).shape == (3,)
    assert f(T.to("meta")).shape == (3,)


@pytest.mark.parametrize("dynamic", [True, None])
def test_one_graph_serves_several_sizes(dynamic):
    @opkit.op("t::f", shapes="*b n, n -> *b 2*n+k")
    def f(x: Tensor, w: Tensor, k: int) -> Tensor:
        return x.new_ones(*x.shape[:-1], 2 * x.shape[-1] + k)

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda x, w, k: f(x * 2, w, k) + 1, fullgraph=True, backend=backend, dynamic=dynamic
    )
    for n, k in ((3, 4), (5, 6), (7, 8), (9, 11)):
        assert compiled(torch.ones(2, n), torch.ones(n), k).shape == (2, 2 * n + k)
    assert len(graphs) == (1 if dynamic else 2)


def test_export_holds_the_op_and_runs():
    @opkit.op("t::f", shapes="*b n -> *b n")
    def f(x: Tensor, k: int = 2) -> Tensor:
        return x * k

    class Module(torch.nn.Module):
        def forward(self, x):
            return f(x, 3) + f(x)

    batch = torch.export.Dim("batch")
    program = torch.export.export(Module(), (T,), dynamic_shapes={"x": {0: batch}})
    assert "torch.ops.t.f.default" in str(program.graph)
    torch.testing.assert_close(program.module()(torch.ones(5, 3)), torch.full((5, 3), 5.0))


def test_op_runs_in_compiled_code_with_inductor_and_gradients():
    @opkit.op("t::f", shapes="*b n -> *b n")
    def f(x: Tensor) -> Tensor:
        return x.sin()

    f.register_autograd(opkit.from_reference)
    x = torch.randn(4, 3).t().requires_grad_()
    for call in (lambda x: f(x * 2) + 1, torch.compile(lambda x: f(x * 2) + 1, fullgraph=True)):
        x.grad = None
        call(x).sum().backward()
        torch.testing.assert_close(x.grad, 2 * torch.cos(2 * x.detach()))
