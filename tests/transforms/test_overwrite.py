from __future__ import annotations

import re
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import opkit

pytestmark = [
    pytest.mark.usefixtures("registry"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
]

X = torch.linspace(-1, 1, 12).reshape(3, 4)
W = torch.linspace(1, 2, 4)


@pytest.fixture(autouse=True)
def without_caches():
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


class Normed(NamedTuple):
    y: Tensor
    residual: Tensor


def scale(**options):
    @opkit.op("t::scale", shapes="*b n, n -> *b n")
    def op(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    options = {"inplace": ["x"], "backend": "fast", **options}
    op.register_kernel("cpu", lambda x, w: x.mul_(w), **options)
    return op


def add_norm():
    """The case of inference engines: two arguments become the two results."""

    @opkit.op("t::add_norm", shapes="*b n, *b n, n -> *b n, *b n:residual")
    def op(x: Tensor, residual: Tensor, w: Tensor) -> Normed:
        total = x + residual
        return Normed(total / total.abs().amax(-1, keepdim=True) * w, total)

    @op.register_kernel("cpu", backend="fast", inplace=["x", "residual"])
    def _(x, residual, w):
        residual.add_(x)
        torch.div(residual, residual.abs().amax(-1, keepdim=True), out=x)
        return x.mul_(w), residual

    return op


def generated(function, *args):
    """Return the result of a compiled function and the code of its body; a copy shows as a buffer in it."""
    with torch.no_grad():
        result, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    return result, codes[0][codes[0].index("def call") :]


def buffers(code):
    return len(re.findall(r"= empty_strided", code))


# ---------------------------------------------------------------- eager


def test_plain_call_leaves_the_argument_alone():
    op, x = scale(), X.clone()
    assert torch.equal(op(x, W), X * W)
    assert torch.equal(x, X)


def test_maybe_inplace_gives_the_kernel_the_buffer():
    op, x = scale(), X.clone()
    result = op.maybe_inplace(x, W)
    assert result is x
    assert torch.equal(result, X * W)


def test_maybe_inplace_returns_the_declared_form():
    op, x, r = add_norm(), X.clone(), X.flip(0).contiguous()
    wanted = op(x, r, W)
    found = op.maybe_inplace(x, r, w=W)
    assert isinstance(found, Normed)
    assert found.y is x
    assert found.residual is r
    torch.testing.assert_close(found, wanted)


def test_maybe_inplace_without_such_a_kernel_is_the_plain_call():
    op, x = scale(), X.clone()
    with opkit.use_backend("reference"):
        assert torch.equal(op.maybe_inplace(x, W), X * W)
    assert torch.equal(x, X)


def test_maybe_inplace_keeps_what_autograd_needs():
    op = scale()
    op.register_autograd(opkit.from_reference)
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    h = x * 1
    op.maybe_inplace(h, w).sum().backward()
    assert torch.equal(h, X)
    torch.testing.assert_close(x.grad, W.expand(3, 4))
    torch.testing.assert_close(w.grad, X.sum(0))


def test_maybe_inplace_of_a_tensor_that_autograd_has_saved_raises_in_backward():
    op = scale()
    p = torch.ones(3, 4, requires_grad=True)
    h = X.clone()
    y = (p * h).sum()
    op.maybe_inplace(h, W)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_buffer_that_is_shared_is_not_overwritten_while_it_is_read():
    @opkit.op("t::add", shapes="n, n -> n")
    def add(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    @add.register_kernel("cpu", backend="fast", inplace=["x"])
    def _(x, y):
        return x.zero_().add_(y).add_(1)

    x = torch.arange(4.0)
    assert add.maybe_inplace(x, x).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "overlapping", [lambda x: x[:, :1].expand(3, 4), lambda x: x[0].unfold(0, 2, 1)], ids=["expand", "unfold"]
)
def test_buffer_whose_elements_lie_on_each_other_is_not_overwritten(overlapping):
    @opkit.op("t::double", shapes="*b -> *b")
    def double(x: Tensor) -> Tensor:
        return x * 2

    double.register_kernel("cpu", lambda x: x.mul_(2), backend="fast", inplace=["x"])
    expected = overlapping(X * 1) * 2
    assert torch.equal(double.maybe_inplace(overlapping(X * 1)), expected)
    for call in (double, double.maybe_inplace):
        compiled = torch.compile(lambda x, call=call: call(overlapping(x * 1)), fullgraph=True)
        assert torch.equal(compiled(X), expected)


def test_compiled_call_that_no_kernel_may_overwrite_runs_another():
    op = scale()
    op.register_kernel("cpu", lambda x, w: x.mul_(w), backend="fast", inplace=["x"], dtypes=[torch.float32])
    x, w = X.double(), W.double()
    with opkit.use_backend("reference"):
        assert torch.equal(torch.compile(lambda x: op(x * 2, w), fullgraph=True)(x), x * 2 * w)


def test_maybe_inplace_under_vmap_and_grad_of_torch_func_is_the_plain_call():
    op = scale()
    op.register_autograd(opkit.from_reference)
    x = X.clone()
    assert torch.equal(torch.vmap(op.maybe_inplace, (0, None))(x, W), X * W)
    assert torch.equal(x, X)


def test_argument_that_is_only_destroyed_leaves_a_fresh_result():
    op = scale(inplace={"x": None})
    op.register_kernel("cpu", lambda x, w: (x * w, x.zero_())[0], backend="fast", inplace={"x": None})
    x = X.clone()
    result = op.maybe_inplace(x, W)
    assert torch.equal(result, X * W)
    assert not x.any()
    assert result is not x


def test_result_may_be_left_elsewhere_than_said():
    op = scale()
    op.register_kernel("cpu", lambda x, w: x * w, backend="fast", inplace=["x"])
    x = X.clone()
    assert op.maybe_inplace(x, W) is x
    assert torch.equal(x, X * W)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("inplace", "text"),
    [
        (
            ["z"],
            r"registering a fast kernel for t::scale: inplace=\['z'\] names 'z'; expected Tensor arguments that ",
        ),
        ({"x": "z"}, r"has the result 'z' in x; expected one of out, each once, or None. Say which result"),
        ({"x": "out", "w": "out"}, "has the result 'out' in x; expected one of out, each once"),
    ],
    ids=["argument", "result", "twice"],
)
def test_inplace_that_does_not_fit_raises(inplace, text):
    with pytest.raises(opkit.RegistrationError, match=text):
        scale(inplace=inplace)


def test_result_in_an_argument_that_is_not_said_to_hold_it_raises():
    op = scale(inplace={"x": None})
    with pytest.raises(
        opkit.OutputError,
        match=r"kernel returned as out a tensor that shares storage with x; .* Write inplace=\{'x': 'out'\} where",
    ):
        op(X, W)


def test_argument_of_another_shape_than_its_result_raises():
    @opkit.op("t::total", shapes="a b -> b")
    def total(x: Tensor) -> Tensor:
        return x.sum(0)

    total.register_kernel("cpu", lambda x: x.sum(0), backend="fast", inplace={"x": "out"})
    assert torch.equal(total(X), X.sum(0))
    assert torch.equal(total.maybe_inplace(X), X.sum(0))  # not chosen, as the sizes differ
    with pytest.raises(
        opkit.OutputError, match=r"t::total: out is torch.float32 of shape \(4,\), the argument x .* \(3, 4\)"
    ):
        torch.compile(lambda x: total.maybe_inplace(x), backend="aot_eager")(X.clone())


# ---------------------------------------------------------------- compiled graphs


def test_compiled_graph_makes_no_copy_of_what_is_dead():
    op = scale()
    result, code = generated(lambda x: op(op(x.sin(), W), W), X)
    torch.testing.assert_close(result, X.sin() * W * W)
    assert buffers(code) == 1
    assert code.count("__opkit_into_0_as_0.default(") == 2
    assert "copy_" not in code


def test_compiled_graph_copies_what_is_used_again():
    op = scale()

    def f(x):
        y = x.sin()
        return op(y, W) - y

    result, code = generated(f, X)
    torch.testing.assert_close(result, X.sin() * W - X.sin())
    assert buffers(code) == 2


def test_compiled_graph_copies_its_inputs():
    op, x = scale(), X.clone()
    result, code = generated(lambda x: op(x, W) + 1, x)
    torch.testing.assert_close(result, X * W + 1)
    assert torch.equal(x, X)
    assert buffers(code) == 2


def test_compiled_graph_overwrites_an_input_that_is_given_away():
    op, x = scale(), X.clone()
    result, code = generated(lambda x: op.maybe_inplace(x, W), x)
    assert result is x
    assert torch.equal(x, X * W)
    assert buffers(code) == 0


def test_compiled_graph_overwrites_both_arguments_of_vllms_case():
    op = add_norm()
    result, code = generated(lambda x, r: op(x * 2, r * 3, W), X, X.flip(0))
    torch.testing.assert_close(tuple(result), tuple(op(X * 2, X.flip(0) * 3, W)))
    assert buffers(code) == 2
    assert "copy_" not in code


def test_compiled_graph_holds_when_another_kernel_runs():
    op = scale()
    f = torch.compile(lambda x: op(x.sin(), W) + 0, fullgraph=True)
    wanted = X.sin() * W
    torch.testing.assert_close(f(X), wanted)
    with opkit.use_backend("reference"):
        torch.testing.assert_close(f(X), wanted)


def test_kernel_that_overwrites_registered_after_compiling_is_used():
    @opkit.op("t::scale", shapes="*b n, n -> *b n")
    def op(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    f = torch.compile(lambda x: op(x.sin(), W), fullgraph=True)
    wanted = X.sin() * W
    torch.testing.assert_close(f(X), wanted)
    seen = []
    op.register_kernel("cpu", lambda x, w: seen.append(x) or x.mul_(w), backend="fast", inplace=["x"])
    assert not op._compiled.codes  # it is compiled anew
    result = f(X)
    torch.testing.assert_close(result, wanted)
    assert result.data_ptr() == seen[0].data_ptr()


def test_gradients_of_a_compiled_graph_are_those_of_the_formula():
    op = scale()
    op.register_autograd(opkit.from_reference)
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    torch.compile(lambda x, w: op(x.sin(), w).cos())(x, w).sum().backward()
    x64, w64 = X.double().requires_grad_(), W.double().requires_grad_()
    (x64.sin() * w64).cos().sum().backward()
    torch.testing.assert_close(x.grad.double(), x64.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), w64.grad, rtol=1e-5, atol=1e-5)


def test_exported_program_has_the_op_itself():
    op = scale()

    class Model(torch.nn.Module):
        def forward(self, x):
            return op(x.sin(), W)

    program = torch.export.export(Model(), (X,))
    assert "t.scale.default" in [str(n.target) for n in program.graph.nodes]


def test_op_with_such_a_kernel_can_be_defined_anew():
    for _ in range(3):
        op = scale()
        x = X.clone()
        assert op.maybe_inplace(x, W) is x
        opkit._registry.remove("t::scale")
