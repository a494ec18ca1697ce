"""What a registered meta function promises is held in every call, and the shape line's checks stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")

T = torch.arange(6.0).reshape(2, 3)


def op_with(reference, meta, shapes=None, returns=Tensor):
    def f(x):
        return reference(x)

    f.__annotations__ = {"x": Tensor, "return": returns}
    op = opkit.op("t::f", shapes=shapes)(f)
    op.register_fake(meta)
    return op


@pytest.mark.parametrize(
    ("reference", "field"),
    [(lambda x: x.double(), "dtype torch.float64"), (lambda x: x[:1] * 1, r"shape \(1, 3\)")],
    ids=["dtype", "shape"],
)
def test_output_other_than_the_meta_function_says_is_refused(reference, field):
    op = op_with(reference, torch.empty_like)
    for _ in range(2):  # found out, then remembered
        with pytest.raises(
            opkit.OutputError, match=f"t::f: the reference kernel returned out with the {field}"
        ):
            op(T)
    with pytest.raises(opkit.OutputError, match="by the meta function. Change one of them"):
        op(T)


def test_output_gets_the_strides_of_the_meta_function():
    op = op_with(lambda x: x * 2, lambda x: x.new_empty(x.shape[::-1]).t())
    assert op(T).stride() == (1, 2)
    assert torch.equal(op(T), T * 2)
    compiled = torch.compile(lambda x: op(x) + 1, fullgraph=True)
    assert torch.equal(compiled(T), T * 2 + 1)


def test_list_output_is_held_to_the_meta_function():
    op = op_with(
        lambda x: list(x.clone().double()), lambda x: [torch.empty_like(r) for r in x], returns=list[Tensor]
    )
    with pytest.raises(opkit.OutputError, match=r"storage with another output"):
        op(T)
    opkit._registry.remove("t::f")
    op = op_with(lambda x: [x + 1], lambda x: [torch.empty_like(x)] * 2, returns=list[Tensor])
    with pytest.raises(
        opkit.OutputError, match=r"returned 1 tensors as out; expected 2 by its meta function"
    ):
        op(T)


def test_shape_line_checks_inputs_also_with_a_meta_function():
    op = op_with(lambda x: x[0] * 1, lambda x: x.new_empty(x.shape[0]), shapes="n n -> n")
    assert op(torch.ones(3, 3)).shape == (3,)
    for call in (op, torch.compile(op, backend="eager"), lambda x: op(x.to("meta"))):
        with pytest.raises(Exception, match="dimension 1 of x"):
            call(T)


def test_shape_line_checks_inputs_of_a_native_kernel_with_a_meta_function():
    op = op_with(lambda x: x[0] * 1, lambda x: x.new_empty(x.shape[0]), shapes="n n -> n")
    source = "#include <opkit/kernel.h>\nvoid f(opkit::Tensor, opkit::Tensor y) { y.data<float>()[0] = 7; }"
    op.register_kernel("cpu", opkit.cpp.kernel(source))
    assert op(torch.ones(1, 1)).tolist() == [7]
    with pytest.raises(opkit.ShapeError, match="dimension 1 of x"):
        op(T)


def test_meta_function_that_needs_a_tracer_is_not_held_against_outputs():
    def meta(x):
        size = torch.library.get_ctx().new_dynamic_size()
        return x.new_empty(size)

    op = op_with(lambda x: x[x > 2], meta)
    assert op(T).tolist() == [3, 4, 5]


def test_declared_dtype_holds_under_autocast():
    def f(a, b):
        return a @ b

    f.__annotations__ = {"a": Tensor, "b": Tensor, "return": Tensor}
    op = opkit.op("t::mm", shapes="n k, k m -> n m")(f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(T, T.t()).dtype == torch.float32
        assert (T @ T.t()).dtype == torch.bfloat16
