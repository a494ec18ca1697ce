"""What a registered meta function promises is held in every call, and the shape line's checks stay."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

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
        opkit.OutputError, match=r"returned 1 tensors as out; expected 2 by the meta function"
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


# ---------------------------------------------------------------- sizes that depend on data


def picking(shapes, reference=None):
    """Where x is above 2, and what is there."""

    def pick(x):
        return reference(x) if reference else ((x > 2).nonzero(), x[x > 2])

    pick.__annotations__ = {"x": Tensor, "return": tuple[Tensor, Tensor]}
    return opkit.op("t::pick", shapes=shapes)(pick)


@pytest.mark.parametrize(
    ("shapes", "dynamic"), [("a b -> ?m 2:int64, ?m", False), ("a b -> ?m<=a*b 2:int64, ?m", True)]
)
def test_data_dependent_size_is_a_symbol_under_tracing(shapes, dynamic):
    op = picking(shapes)

    def double(x):
        index, value = op(x)
        return index[:, 1] + value

    compiled = torch.compile(double, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for x in (T, -T, T * 9, T + 3):
        assert torch.equal(compiled(x), double(x))


def test_one_name_is_one_symbol():
    op = picking("a b -> ?m ?k:int64, ?m")
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        index, value = op(mode.from_tensor(T))
    assert str(index.shape[0]) == str(value.shape[0]) != str(index.shape[1])


@pytest.mark.parametrize("dim", [None, torch.export.Dim("a")], ids=["static", "dynamic"])
def test_data_dependent_size_is_exported_with_its_bound(dim):
    op = picking("a b -> ?m<=a*b 2:int64, ?m")

    class Module(torch.nn.Module):
        def forward(self, x):
            return op(x)[1]

    program = torch.export.export(Module(), (T,), dynamic_shapes=({0: dim},) if dim else None)
    assert program.module()(T).tolist() == [3, 4, 5]
    if dim is None:
        assert [str(r) for r in program.range_constraints.values()][0] == "VR[0, 6]"
    else:
        assert "_assert_scalar" in program.graph_module.code  # at most a * b, which only a call knows
        assert program.module()(torch.ones(7, 3) * 3).shape == (21,)


def test_data_dependent_size_is_refused_on_the_meta_device():
    op = picking("a b -> ?m<=a*b 2:int64, ?m")
    text = (
        r"calling t::pick on the meta device: the size \?m<=6 of output out0 depends on data; expected tensors that "
        r"have some, or a tracer .*Move the arguments to another device\."
    )
    with pytest.raises(opkit.ShapeError, match=text) as caught:
        op(T.to("meta"))
    assert caught.value.op == "t::pick"
    with FakeTensorMode() as mode, pytest.raises(DynamicOutputShapeException):  # torch's, which Dynamo knows
        op(mode.from_tensor(T))


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        (lambda x: (x.new_zeros(7, 2).long(), x.new_zeros(7)),
         "returned out0 with 7 in dimension 0, ?m; expected at most 6 by the shape line"),
        (lambda x: (x.new_zeros(3, 2).long(), x.new_zeros(2)),
         "returned out1 with 2 in dimension 0, ?m; expected 3, as in out0"),
        (lambda x: (x.new_zeros(3, 3).long(), x.new_zeros(3)),
         "returned out0 with the shape (3, 3); expected (3, 2) by the shape line"),
        (lambda x: (x.new_zeros(3, 2).long(), x.new_zeros(3, 1)),
         "returned out1 with the shape (3, 1); expected (?m<=6,) by the shape line"),
        (lambda x: (x.new_zeros(3, 2), x.new_zeros(3)),
         "returned out0 with the dtype torch.float32; expected torch.int64 by the shape line"),
    ],
    ids=["bound", "name", "size", "rank", "dtype"],
)  # fmt: skip
def test_output_that_a_data_dependent_size_does_not_allow_is_refused(reference, text):
    op = picking("a b -> ?m<=a*b 2:int64, ?m", reference)
    with pytest.raises(opkit.OutputError, match=f"t::pick: the reference kernel {re.escape(text)}"):
        op(T)


def test_output_of_a_data_dependent_size_is_made_contiguous():
    op = picking("a b -> ?m 2:int64, ?m")
    index, value = op(T)
    assert (T > 2).nonzero().stride() == (1, 3)
    assert (index.tolist(), index.stride()) == ([[1, 0], [1, 1], [1, 2]], (2, 1))
    assert value.tolist() == [3, 4, 5]


def test_declared_dtype_holds_under_autocast():
    def f(a, b):
        return a @ b

    f.__annotations__ = {"a": Tensor, "b": Tensor, "return": Tensor}
    op = opkit.op("t::mm", shapes="n k, k m -> n m")(f)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert op(T, T.t()).dtype == torch.float32
        assert (T @ T.t()).dtype == torch.bfloat16


def test_output_that_is_too_large_is_refused_by_name():
    @opkit.op("t::f", shapes="n -> n k k")
    def f(x: Tensor, k: int) -> Tensor: ...

    with pytest.raises(
        opkit.ShapeError,
        match=r"calling t::f: output out would have the shape \(2, 4294967296, 4294967296\) of torch.float32; expected "
        "one whose bytes 64 bits can count. Pass smaller sizes",
    ):
        f(torch.ones(2, device="meta"), 2**32)


@pytest.mark.parametrize("call", ["eager", "meta", "compile"])
def test_negative_size_is_refused_by_name_wherever_it_is_met(call):
    @opkit.op("t::f", shapes="n -> n-2")
    def f(x: Tensor) -> Tensor:
        return x[2:].clone()

    x = torch.ones(1, device="meta" if call == "meta" else "cpu")
    function = torch.compile(f, fullgraph=True, backend="aot_eager", dynamic=True) if call == "compile" else f
    assert function(x.new_ones(4)).shape == (2,)
    assert function(x.new_ones(2)).shape == (0,)
    with pytest.raises(
        Exception, match=r"the size n-2 of output out would be -1 \(n = 1 by dimension 0 of x\)"
    ):
        function(x)


@pytest.mark.parametrize(
    ("shapes", "both"),
    [
        ("n, n -> n", True),
        ("n, n+1 -> n", True),
        ("*b, *b -> *b", True),
        ("2, _ -> 2", False),
        ("n, n -> n", False),
    ],
)
def test_size_that_only_a_call_knows_is_compared_in_the_call(shapes, both):
    @opkit.op("t::above", shapes="n -> ?m<=n")
    def above(x: Tensor) -> Tensor:
        return x[x > 0]

    @opkit.op("t::first", shapes=shapes)
    def first(x: Tensor, y: Tensor) -> Tensor:
        return x * 2

    def chain(x, y):
        return first(above(x), above(y) if both else y)

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager")
    x = torch.tensor([1.0, -1, 2])
    y = torch.ones(3 if "+1" in shapes else 2)
    assert compiled(x, y).tolist() == [2, 4]
    with pytest.raises(Exception, match=r"t::first|u0|Runtime assertion"):
        compiled(torch.tensor([1.0, 2, 3]), y)


# ---------------------------------------------------------------- lists


def foreach(shapes="[*s], [*s] -> [*s]"):
    @opkit.op("t::add", shapes=shapes)
    def add(xs: list[Tensor], ys: list[Tensor]) -> list[Tensor]:
        return [x + y for x, y in zip(xs, ys, strict=True)]

    return add


XS = [T, T.t(), torch.ones(()), torch.ones(0, 2)]


def test_list_is_described_by_the_shape_line():
    add = foreach()
    assert [y.stride() for y in add(XS, XS)] == [(3, 1), (2, 1), (), (2, 1)]
    assert [tuple(y.shape) for y in add([x.to("meta") for x in XS], [x.to("meta") for x in XS])] == [
        (2, 3), (3, 2), (), (0, 2)
    ]  # fmt: skip
    torch.library.opcheck(add.overload, (XS, XS))
    for backend in ("aot_eager", "inductor"):
        compiled = torch.compile(lambda xs: [y * 2 for y in add(xs, xs)], fullgraph=True, backend=backend)
        for found, x in zip(compiled(XS), XS, strict=True):
            torch.testing.assert_close(found, x * 4)
    with pytest.raises(opkit.ShapeError, match=r"ys has 1 tensors, xs has 2; \*s stands in both"):
        add(XS[:2], XS[:1])


def test_output_list_is_held_to_the_shape_line():
    add = foreach()
    add.register_kernel("cpu", lambda xs, ys: [x + y for x, y in zip(xs, ys)][:1], backend="short")
    with pytest.raises(
        opkit.OutputError, match="short kernel returned 1 tensors as out; expected 2 by the shape line"
    ):
        add(XS[:2], XS[:2])
    add.register_kernel(
        "cpu", lambda xs, ys: [(x + y).double() for x, y in zip(xs, ys)], backend="double", priority=1
    )
    with pytest.raises(
        opkit.OutputError,
        match="returned out with the dtype torch.float64; expected torch.float32 by the shape line",
    ):
        add(XS, XS)


def test_list_of_unknown_length_needs_a_meta_function():
    @opkit.op("t::rows", shapes="n m -> [m]")
    def rows(x: Tensor) -> list[Tensor]:
        return [row.clone() for row in x]

    assert len(rows(T)) == 2
    with pytest.raises(
        opkit.RegistrationError,
        match=r"tracing t::rows: its shape line 'n m -> \[m\]' does not describe all results: nothing says how long "
        "the list out is; expected a meta function that does. Register one with register_fake",
    ):
        rows(T.to("meta"))
    rows.register_fake(lambda x: [torch.empty_like(row) for row in x])
    compiled = torch.compile(lambda x: rows(x)[1] + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(T), T[1] + 1)
    with pytest.raises(opkit.ShapeError, match="argument x has 1 dimensions, its entry 'n m' has 2"):
        rows(T[0])


def test_results_beside_a_number_are_held_to_the_shape_line():
    @opkit.op("t::count", shapes="n m -> m")
    def count(x: Tensor) -> tuple[Tensor, int]:
        return x.sum(0), int((x > 2).sum())

    total, above = count(T)
    assert (total.tolist(), above) == ([3, 5, 7], 3)
    with pytest.raises(opkit.RegistrationError, match="its result out1 is no tensor"):
        count(T.to("meta"))
    count.register_kernel("cpu", lambda x: (x.sum(1), 3), backend="wrong")
    with pytest.raises(opkit.OutputError, match=r"returned out0 with the shape \(2,\); expected \(3,\)"):
        count(T)


# ---------------------------------------------------------------- whatever the shapes and strides

REFERENCES = {
    "*b n -> *b n": lambda x: x * 2,
    "*b n -> *b:int64": lambda x: (
        x.argmin(-1) if x.shape[-1] else x.new_zeros(x.shape[:-1], dtype=torch.int64)
    ),
    "*b n m -> *b m n": lambda x: x.mT.clone(memory_format=torch.preserve_format),
    "*b n -> *b 2*n": lambda x: torch.cat([x, x], -1),
    "*b n -> n *b": lambda x: x.movedim(-1, 0) + 0,
}


@st.composite
def strided(draw, rank):
    """A tensor in any layout: permuted, with gaps, with sizes 0 and 1 among the others."""
    shape = draw(st.lists(st.integers(0, 3), min_size=rank, max_size=rank + 2))
    order = draw(st.permutations(range(len(shape))))
    steps = draw(st.lists(st.integers(1, 2), min_size=len(shape), max_size=len(shape)))
    base = torch.arange(float(torch.Size(s * 2 for s in shape).numel())).reshape(
        [shape[i] * 2 for i in order]
    )
    base = base[tuple(slice(0, shape[i] * k, k) for i, k in zip(order, steps, strict=True))]
    return base.permute([order.index(i) for i in range(len(shape))])


def told_strides(x):
    """The strides that lead anywhere: not those of sizes below 2, nor any of an empty tensor."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1 and x.numel()]


@pytest.mark.parametrize("line", REFERENCES)
def test_meta_is_what_the_op_returns_whatever_the_shape_and_the_strides(line):
    @opkit.op("t::f", shapes=line)
    def f(x: Tensor) -> Tensor:
        return REFERENCES[line](x)

    @settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow])
    @given(x=strided(2 if "m" in line else 1))
    def holds(x):
        real = f(x)
        assert torch.equal(real, f.reference(x))
        with FakeTensorMode() as mode:
            fake = f(mode.from_tensor(x))
        found, told = ((t.shape, t.dtype, told_strides(t), t.device) for t in (real, fake))
        assert found == told

    holds()


@pytest.mark.parametrize(
    ("kind", "shapes", "text"),
    [
        (
            int,
            None,
            r"nothing says what its results \(SymInt\) are; expected a meta function. Register one with",
        ),
        (int, "n ->", "its shape line 'n ->' does not describe all results: its result out is no tensor"),
        (float, None, "its result out is a float, which only a kernel can compute"),
        (bool, "n ->", "its result out is a bool, which only a kernel can compute"),
        (Tensor, None, "nothing says the shapes of its outputs; expected a shape line or a meta function"),
    ],
)
def test_first_line_of_what_dynamo_says_is_why_the_results_are_unknown(kind, shapes, text):
    def f(x):
        return kind(x.sum())

    f.__annotations__ = {"x": Tensor, "return": kind}
    op = opkit.op("t::f", shapes=shapes)(f)
    for fullgraph in (True, False):
        with pytest.raises(Exception, match=rf"\A\w*RegistrationError: tracing t::f: {text}") as caught:
            torch.compile(lambda x: op(x), fullgraph=fullgraph, backend="eager")(torch.ones(3))
    if kind is int:
        advice = "Register one with register_fake; an int that depends on data is torch.library.get_ctx()"
        assert f"{advice}.new_dynamic_size() there." in str(caught.value)
        op.register_fake(lambda x: torch.library.get_ctx().new_dynamic_size())
        assert torch.compile(lambda x: op(x), fullgraph=True, backend="eager")(torch.ones(3)) == 3
