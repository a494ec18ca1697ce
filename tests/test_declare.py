from __future__ import annotations

import importlib
import inspect

import pytest
import torch

import opkit

pytestmark = pytest.mark.usefixtures("registry")

T = torch.arange(3.0)


def triple() -> opkit.Op:
    return opkit.declare("t::triple(Tensor x, *, float by=3.) -> Tensor", shapes="n -> n")


def test_declared_op_runs_its_kernels():
    op = triple()
    op.register_kernel("cpu", lambda x, *, by: x * by)
    assert opkit.get("t::triple") is op
    for call in (op, torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")):
        assert torch.equal(call(T), T * 3)
    assert torch.equal(op(T, by=2.0), T * 2)
    assert op(T.to("meta")).shape == (3,)
    torch.library.opcheck(op.overload, (T,))
    assert str(inspect.signature(op)) == "(x, *, by=3.0)"


def test_call_without_a_kernel_says_what_to_do():
    op = triple()
    with pytest.raises(
        opkit.NoKernelError, match="t::triple on cpu: the op is declared without a reference"
    ) as caught:
        op(T)
    assert "It has no kernel." in str(caught.value)
    assert "Register one with register_kernel('cpu', ...) on opkit.get('t::triple')" in str(caught.value)
    assert caught.value.op == "t::triple"
    op.register_kernel("cpu", lambda x, *, by: x, dtypes=(torch.float64,))
    with pytest.raises(opkit.NoKernelError, match="python: dtype float32 is not among float64"):
        op(T)
    other = opkit.declare("t::other(Tensor x) -> Tensor", shapes="n -> n")
    other.register_kernel("cuda", lambda x: x)
    with pytest.raises(opkit.NoKernelError, match="It has kernels for cuda"):
        other(T)


def test_explain_shows_no_reference():
    op = triple()
    assert op.explain(T).candidates == ()
    assert str(op.explain(T)) == "t::triple on cpu:"
    assert op.kernels == ()
    assert repr(op) == "<opkit.Op t::triple (no reference)>"
    op.register_kernel("cpu", lambda x, *, by: x * by)
    assert [c.backend for c in op.explain(T).candidates] == ["python"]
    assert op.explain(T).selected == "python"


def test_there_is_nothing_to_differentiate_or_to_fuse():
    op = triple()
    with pytest.raises(
        opkit.RegistrationError, match="found from_reference; expected a formula, as the op is declared"
    ):
        op.register_autograd(opkit.from_reference)
    with pytest.raises(
        opkit.NoKernelError, match="calling the reference of t::triple: the op is declared without one"
    ):
        op.reference(T)
    assert op.overload not in opkit.decompositions()
    op.register_kernel("cpu", lambda x, *, by: x * by)
    op.register_autograd(lambda ctx, grad: (grad * 3, None))
    x = T.clone().requires_grad_()
    op(x).sum().backward()
    assert x.grad.tolist() == [3, 3, 3]


def test_declared_again_at_the_same_place_replaces():
    first = triple()
    second = triple()
    assert first is second


def test_declared_again_elsewhere_names_both_places(tmp_path, monkeypatch):
    triple()
    (tmp_path / "opkit_declares.py").write_text(
        "import opkit\nop = opkit.declare('t::triple(Tensor x) -> Tensor')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    places = (
        r"declare\(t::triple\) \(.*test_declare.py:\d+\) and declare\(t::triple\) \(.*opkit_declares.py:2\)"
    )
    with pytest.raises(opkit.DuplicateOpError, match=places):
        importlib.import_module("opkit_declares")


@pytest.mark.parametrize(
    "schema", ["t::f(Tensor x)", "f(Tensor x) -> Tensor", "t::f(Tensor(a) x) -> Tensor(a)"]
)
def test_schema_that_no_op_can_have_is_refused(schema):
    with pytest.raises(opkit.SchemaError):
        opkit.declare(schema)
    assert opkit.find("t::f") is None


def test_shape_line_must_fit():
    with pytest.raises(opkit.ShapeError, match="2 entries for inputs"):
        opkit.declare("t::f(Tensor x) -> Tensor", shapes="n, n -> n")


def test_declare_as_a_decorator_says_what_to_write():
    with pytest.raises(
        opkit.SchemaError,
        match=r"declaring an op from .*triple \(.*test_declare.py:\d+\): @opkit.declare was used as a decorator; "
        r'expected the text of a schema.* Write @opkit.op\("mylib::triple"\)',
    ):

        @opkit.declare
        def triple(x: torch.Tensor) -> torch.Tensor:
            return 3 * x

    with pytest.raises(
        opkit.ArgumentError, match="argument x is <function .*; expected a Tensor.*decorate it with @opkit.op"
    ):

        @opkit.declare("t::triple(Tensor x) -> Tensor")
        def triple(x: torch.Tensor) -> torch.Tensor:
            return 3 * x
