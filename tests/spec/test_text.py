from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

import opkit
from opkit.spec import text

pytestmark = pytest.mark.usefixtures("registry")

T = torch.arange(3.0)
EVERYTHING = (
    "demo::f(Tensor x, SymInt[2] k, Dict(str, Tensor) d, str[] s, Tensor(a!)[] b, Tensor(b!) c, int[][] n, int q=3, *, "
    "ScalarType? t=None, ScalarType u=float32, float[] w=[0.5, 1.0], MemoryFormat? m=contiguous_format, "
    'Device v="cpu", str r="me,\\"an)", Layout l=strided, complex z=1j, Tensor?[]? o=None, int[] i=[1, 2], '
    "bool[2] e=[True, False], "
    'Scalar sc=0.5, float fl=1e-06, str rr="") -> (Tensor, Tensor? y, SymInt, Tensor[])'
)


def test_schema_text_is_read_and_written_again():
    schema = text.from_text(EVERYTHING, "reading")
    again = text.from_text(str(schema), "reading")
    assert (again.params, str(again)) == (schema.params, str(schema))
    by_name = {p.name: p for p in schema.params}
    assert [p.name for p in schema.params if p.mutated] == ["b", "c"]
    assert [p.name for p in schema.keyword_only] == list("tuwmvrlzoie") + ["sc", "fl", "rr"]
    assert str(by_name["d"].type) == "Dict(str, Tensor)"
    assert by_name["k"].type.length == 2
    assert by_name["o"].type.optional
    assert by_name["o"].type.optional_elements
    assert by_name["u"].default is torch.float32
    assert by_name["l"].default is torch.strided
    assert by_name["m"].default is torch.contiguous_format
    assert by_name["v"].default == torch.device("cpu")
    assert by_name["r"].default == 'me,"an)'
    assert [r.name for r in schema.results] == ["out0", "y", "out2", "out3"]
    torch._C.parse_schema(str(schema))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "bool", "complex64"])
def test_default_dtype_is_the_one_that_the_text_names(dtype):
    schema = text.from_text(f"t::f(ScalarType d={dtype}) -> ()", "reading")
    assert schema.params[0].default is getattr(torch, dtype)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ("t::f(Tensor x", r"reading 't::f\(Tensor x': torch cannot parse it: .* Expected a schema such as"),
        ("t::f(float a=1e400) -> ()", "torch cannot parse it"),
        ("t::f.over(Tensor x) -> Tensor", "it has the overload name 'over'; expected one overload"),
        ("f(Tensor x) -> Tensor", "the name 'f' has no namespace"),
        ("aten::f(Tensor x) -> Tensor", "a namespace of torch itself"),
        (
            "t::f(Tensor(a) x) -> Tensor(a)",
            r"its result out is Tensor\(a\), which shares storage with an argument",
        ),
        ("t::f(Tensor(a!) x) -> Tensor(a!)", r"its result out is Tensor\(a!\), which shares storage"),
        ("t::f(Tensor(a!)? x) -> ()", r"its argument x is Tensor\(a!\)\? x; only a Tensor .* can be mutated"),
        ("t::f(Tensor x) -> Scalar", r"its result out is Scalar; expected Tensor, Optional\[Tensor\]"),
        ("t::f(Tensor x) -> (Tensor, str)", r"its result out1 is str; expected Tensor"),
    ],
)
def test_schema_that_no_op_can_have_is_refused(schema, text):
    with pytest.raises(opkit.SchemaError, match=text):
        opkit.spec.text.from_text(schema, "reading")


# ---------------------------------------------------------------- schema=


def test_schema_stands_in_the_place_of_annotations():
    @opkit.op("t::f", schema="(Tensor x, int[2] k=1, *, float eps=0.5) -> (Tensor, Tensor?)")
    def f(x, k=(1, 1), *, eps=0.5):
        return x * k[0] + k[1] * eps, None

    f.register_fake(lambda x, k=None, *, eps=0: (torch.empty_like(x), None))
    assert str(f.schema) == "t::f(Tensor x, int[2] k=[1, 1], *, float eps=0.5) -> (Tensor, Tensor?)"
    compiled = torch.compile(lambda x: f(x, 3), fullgraph=True, backend="aot_eager")
    for call in (lambda x: f(x, 3), lambda x: f(x, [3, 3]), lambda x: f.overload(x, 3, eps=0.5), compiled):
        assert torch.equal(call(T)[0], T * 3 + 1.5)
        assert call(T)[1] is None
    torch.library.opcheck(f.overload, (T, 3))


@pytest.mark.parametrize("head", ["", "f", "t::f"])
def test_name_in_schema_may_be_left_out(head):
    op = opkit.op("t::f", schema=f"{head}(Tensor x) -> Tensor")(lambda x: x + 1)
    assert torch.equal(op(T), T + 1)


def test_mutation_is_written_in_the_schema():
    @opkit.op("t::f", schema="(Tensor(a!) x) -> ()")
    def f(x):
        x.add_(1)

    x = torch.zeros(2)
    version = x._version
    f(x)
    assert x.tolist() == [1, 1]
    assert x._version > version
    torch.library.opcheck(f.overload, (torch.zeros(2),))


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Two:
    one: Tensor
    two: Tensor


@pytest.mark.parametrize("container", [Pair, Two])
def test_results_come_in_the_container_that_the_function_names(container):
    def f(x):
        return container(x + 1, x + 2)

    f.__annotations__ = {"return": container, "x": "something unreadable"}
    op = opkit.op("t::f", schema="(Tensor x) -> (Tensor, Tensor)", shapes="n -> n, n")(f)
    assert type(op(T)) is container
    assert type(torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")(T)) is container


def test_default_of_the_function_alone_is_filled_in():
    @opkit.op("t::f", schema="(Tensor x, float a) -> Tensor")
    def f(x, a=float("inf")):
        return x + a

    assert f(T).tolist() == [float("inf")] * 3
    assert str(f.schema) == "t::f(Tensor x, float a) -> (Tensor)"


@pytest.mark.parametrize(
    ("schema", "mutates", "text"),
    [
        (
            "(Tensor y, int k=2) -> Tensor",
            (),
            r"schema= has the arguments \(y, k\); expected those of .*, \(x, k\)",
        ),
        ("(Tensor x) -> Tensor", (), r"schema= has the arguments \(x\); expected"),
        (
            "(Tensor x, *, int k=2) -> Tensor",
            (),
            r"schema= has the arguments \(x, \*, k\); expected .*\(x, k\)",
        ),
        ("(Tensor x, int k=3) -> Tensor", (), r"parameter 'k' has the default 2; .*, in schema= it is 3"),
        ("(Tensor x, str k) -> Tensor", (), r"parameter 'k' has the default 2; expected one of the type str"),
        ("t::g(Tensor x, int k) -> Tensor", (), r"schema= is for 't::g'; expected t::f"),
        ("(Tensor(a!) x, int k=2) -> ()", ("k",), r"mutates_args names k, schema= marks x as written to"),
        ("(Tensor x, int k=2 -> Tensor", (), r"reading schema= .*torch cannot parse it"),
    ],
)
def test_schema_that_does_not_fit_the_function_is_refused(schema, mutates, text):
    with pytest.raises(opkit.SchemaError, match=rf"declaring t::f from .*{text}"):

        @opkit.op("t::f", schema=schema, mutates_args=mutates)
        def f(x, k=2): ...


def test_container_with_another_number_of_fields_is_refused():
    with pytest.raises(opkit.SchemaError, match="schema= has 1 results, Pair has 2 fields"):

        @opkit.op("t::f", schema="(Tensor x) -> Tensor")
        def f(x) -> Pair: ...
