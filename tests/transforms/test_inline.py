from __future__ import annotations

import re
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import opkit
from opkit.dispatch import preference

pytestmark = [
    pytest.mark.usefixtures("registry"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
]

X = torch.linspace(-1, 1, 12).reshape(3, 4)


@pytest.fixture(autouse=True)
def without_caches():
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


def affine(**options):
    @opkit.op("t::affine", shapes="*b -> *b", **options)
    def op(x: Tensor, k: float = 2.0) -> Tensor:
        y = x * k
        y.add_(1)  # of its own: the compiler must not see it
        return y

    return op


def generated(function, *args):
    """Return the result of a compiled function, how many fused kernels its code calls, and whether it calls the op."""
    result, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    body = codes[0][codes[0].index("def call") :]
    return result, len(re.findall(r"^ +\w*cpp_fused\w*\(", body, re.MULTILINE)), "torch.ops.t." in body


def test_inline_op_is_fused_with_what_is_around_it():
    op = affine(inline=True)
    result, kernels, called = generated(lambda x: op(x.sin()).cos(), X)
    assert (kernels, called) == (1, False)
    torch.testing.assert_close(result, (X.sin() * 2 + 1).cos())


def test_op_is_a_call_of_its_own_by_default():
    op = affine()
    result, kernels, called = generated(lambda x: op(x.sin()).cos(), X)
    assert (kernels, called) == (2, True)
    torch.testing.assert_close(result, (X.sin() * 2 + 1).cos())


def test_inline_switches_calls_on_and_off_in_one_graph():
    op, other = affine(), opkit.op("t::other", shapes="n -> n", inline=True)(lambda_of_tensor)

    def f(x):
        with opkit.inline("t::affine"):
            a = op(x)
            with opkit.inline(op, other, enabled=False):
                b, c = op(x), other(x)
                with opkit.inline():
                    d = op(x)
        return a, b, c, d

    with torch.compiler.config.patch(force_disable_caches=True):
        result, codes = run_and_get_code(torch.compile(f, fullgraph=True), torch.ones(2))
    calls = re.findall(r"= torch\.ops\.t\.(\w+)", codes[0])
    assert sorted(calls) == ["affine", "other"]
    assert [r[0].item() for r in result] == [3, 3, 5, 3]
    assert not preference.contexts


def lambda_of_tensor(x: Tensor) -> Tensor:
    return x * 5


def test_inline_around_a_compiled_function_compiles_it_anew_and_back():
    op = affine(inline=True)
    seen = []

    def backend(graph, inputs):
        seen.append([str(n.target) for n in graph.graph.nodes if "affine" in str(n.target)])
        return graph

    f = torch.compile(lambda x: op(x) + 0, backend=backend, fullgraph=True)
    f(X)
    with opkit.inline("t::affine", enabled=False):
        f(X)
        f(X)
    f(X)
    assert seen == [["t.affine.default"], ["t.affine.opkit_using"]]
    assert preference.inline_around() == ""


def test_inline_has_no_effect_on_eager_calls():
    op = affine(inline=True)
    op.register_kernel("cpu", lambda x, k: x + 100, backend="fast")
    with opkit.inline():
        assert torch.equal(op(X), X + 100)


def test_inline_with_use_backend_inside():
    op = affine()
    op.register_kernel("cpu", lambda x, k: x + 100, backend="fast")
    opkit.op("t::other", shapes="n -> n")(lambda_of_tensor)

    def f(x):
        with opkit.use_backend("reference"), opkit.inline("t::other"):
            return op(x)

    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(X), X * 2 + 1)


def test_gradient_of_an_inlined_op_follows_its_formula():
    op = affine(inline=True)
    op.register_autograd(lambda ctx, grad: (grad * 7, None))
    x = X.clone().requires_grad_()
    result, _, called = generated(lambda x: op(x.sin()).cos(), x)
    assert not called
    result.sum().backward()
    wanted = -(X.double().sin() * 2 + 1).sin() * 7 * X.double().cos()
    torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_gradient_of_an_inlined_op_without_a_formula_raises():
    op = affine(inline=True)
    with pytest.raises(
        Exception, match="GradientError: differentiating t::affine: it has no gradient formula"
    ):
        torch.compile(lambda x: op(x))(X.clone().requires_grad_()).sum().backward()


def test_inlined_output_has_the_declared_layout():
    @opkit.op("t::turn", shapes="a b -> b a", inline=True)
    def turn(x: Tensor) -> Tensor:
        return (x + 0).t()

    result, _, called = generated(lambda x: turn(x), X)
    assert not called
    assert result.is_contiguous()
    assert torch.equal(result, X.t())


def test_inlined_reference_that_breaks_the_declaration_raises_as_in_eager():
    @opkit.op("t::alias", shapes="n -> n", inline=True)
    def alias(x: Tensor) -> Tensor:
        return x

    with pytest.raises(Exception, match="a tensor that shares storage with argument x"):
        torch.compile(lambda x: alias(x) + 1)(torch.ones(2))


def test_inlined_reference_runs_without_autocast_as_in_eager():
    @opkit.op("t::product", shapes="a b, b c -> a c", inline=True)
    def product(x: Tensor, y: Tensor) -> Tensor:
        return x @ y

    with torch.autocast("cpu", torch.bfloat16):
        result = torch.compile(lambda x: product(x, x.t()))(X)
    assert result.dtype == torch.float32


def test_inlined_op_with_dynamic_sizes_compiles_once():
    op = affine(inline=True)
    f = torch.compile(lambda x: op(x), dynamic=True, fullgraph=True)
    f(torch.ones(3, 4))
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(f(torch.ones(5, 6)), torch.full((5, 6), 3.0))


def test_reference_that_cannot_be_traced_raises_with_the_op():
    @opkit.op("t::data", shapes="n -> n", inline=True)
    def data(x: Tensor) -> Tensor:
        return x + 1 if bool(x.sum() > 0) else x - 1

    with pytest.raises(
        Exception, match=r"inlining t::data: its reference cannot be traced.*\n*.*Declare the op"
    ):
        torch.compile(lambda x: data(x))(torch.ones(2))


def test_inline_refuses_an_op_that_mutates():
    with pytest.raises(
        opkit.RegistrationError, match=r"inlining t::m: it mutates x; expected an op that mutates n"
    ):

        @opkit.op("t::m", shapes="n ->", mutates_args=["x"], inline=True)
        def m(x: Tensor) -> None:
            x.add_(1)

    assert opkit.find("t::m") is None


def test_inline_context_refuses_an_op_that_mutates_where_it_is_called():
    @opkit.op("t::m", shapes="n ->", mutates_args=["x"])
    def m(x: Tensor) -> None:
        x.add_(1)

    def f(x):
        x = x.clone()
        with opkit.inline("t::m"):
            m(x)
        return x

    with pytest.raises(Exception, match="inlining t::m: it mutates x"):
        torch.compile(f, backend="aot_eager")(torch.ones(2))


def test_inline_of_all_ops_leaves_those_that_mutate():
    @opkit.op("t::m", shapes="n ->", mutates_args=["x"])
    def m(x: Tensor) -> None:
        x.add_(1)

    def f(x):
        x = x.clone()
        m(x)
        return x

    with opkit.inline():
        assert torch.compile(f, fullgraph=True)(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize("how", ["declared", "around"])
def test_op_that_is_the_formula_is_inlined_too(how):
    @opkit.op("t::affine_backward", shapes="*b -> *b", inline=how == "declared")
    def affine_backward(grad: Tensor) -> Tensor:
        return grad * 7

    op = affine(inline=how == "declared")
    op.register_autograd(affine_backward, non_differentiable=["k"])
    x = X.clone().requires_grad_()

    def forward_and_backward():
        torch.compile(lambda x: op(x.sin()).cos(), fullgraph=True)(x).sum().backward()

    with opkit.inline() if how == "around" else nullcontext():
        _, codes = run_and_get_code(forward_and_backward)
    assert len(codes) == 2
    assert not any("torch.ops.t." in code for code in codes)
    wanted = -(X.double().sin() * 2 + 1).sin() * 7 * X.double().cos()
    torch.testing.assert_close(x.grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_inline_refuses_what_is_not_the_name_of_an_op():
    with pytest.raises(
        opkit.SchemaError, match="choosing what to inline: the name 'affine' has no namespace"
    ):
        opkit.inline("affine")


def test_inline_refuses_an_op_that_nobody_defined():
    affine()
    text = r"inlining t::afine: no op has that name; defined are .*t::affine.* Did you mean 't::affine'\?"
    for enabled in (True, False):
        with pytest.raises(opkit.OpNotFoundError, match=text):
            opkit.inline("t::afine", enabled=enabled)


def test_inline_in_a_compiled_function_refuses_an_op_that_nobody_defined():
    op = affine()

    def f(x):
        with opkit.inline("t::afine"):
            return op(x)

    with pytest.raises(
        Exception, match=r"\A\w*OpNotFoundError: inlining t::afine: no op has that name; defined"
    ):
        torch.compile(f, fullgraph=True, backend="eager")(X)


# ---------------------------------------------------------------- decompositions


class Model(torch.nn.Module):
    def __init__(self, op):
        super().__init__()
        self.op = op

    def forward(self, x):
        return self.op(x.sin()).cos()


def targets(program):
    return [str(n.target) for n in program.graph.nodes if n.op == "call_function"]


def test_exported_program_decomposes_into_operations_of_torch():
    op = affine()
    program = torch.export.export(Model(op), (X,), dynamic_shapes={"x": {0: torch.export.Dim("n")}})
    assert "t.affine.default" in targets(program)
    plain = program.run_decompositions(opkit.decompositions())
    assert all(t.startswith(("aten.", "<built-in")) for t in targets(plain))
    assert not any(t.endswith("_.Tensor") for t in targets(plain))
    for x in (X, X.repeat(3, 1)):
        torch.testing.assert_close(plain.module()(x), (x.sin() * 2 + 1).cos())


def test_exported_call_inside_use_backend_decomposes_too():
    op = affine()

    class Inside(torch.nn.Module):
        def forward(self, x):
            with opkit.use_backend("reference"):
                return op(x)

    program = torch.export.export(Inside(), (X,))
    assert targets(program) == ["t.affine.opkit_using"]
    plain = program.run_decompositions(opkit.decompositions())
    assert all(t.startswith("aten.") for t in targets(plain))


def test_decompositions_of_some_ops_leave_the_others():
    op = affine()
    table = opkit.decompositions(op)
    assert list(table) == [op.overload]
    assert opkit.get("opkit::vector_add").overload in opkit.decompositions()


def test_decompositions_leave_out_ops_that_mutate():
    @opkit.op("t::m", shapes="n ->", mutates_args=["x"])
    def m(x: Tensor) -> None:
        x.add_(1)

    assert m.overload not in opkit.decompositions()


def test_op_exports_to_onnx_by_its_reference():
    pytest.importorskip("onnxscript", reason="torch.onnx.export needs onnx and onnxscript")
    op = affine()
    program = torch.export.export(Model(op), (X,)).run_decompositions(opkit.decompositions())
    model = torch.onnx.export(program, dynamo=True, verbose=False).model_proto
    assert {node.domain for node in model.graph.node} == {""}
    assert {"Sin", "Mul", "Add", "Cos"} <= {node.op_type for node in model.graph.node}
