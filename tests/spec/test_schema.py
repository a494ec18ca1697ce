# ruff: noqa: UP007, UP045  (the older spellings are what is tested)
from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Literal, NamedTuple, Optional, Union

import pytest
import torch
from torch import Tensor

import opkit
from opkit.spec import signature

pytestmark = pytest.mark.usefixtures("registry")

T = torch.arange(3.0)
CASES = {
    "Tensor": (Tensor, "Tensor", [T]),
    "Optional[Tensor]": (Optional[Tensor], "Tensor?", [T, None]),
    "Tensor | None": (Tensor | None, "Tensor?", [T, None]),
    "list[Tensor]": (list[Tensor], "Tensor[]", [[T, T + 1]]),
    "Sequence[Tensor]": (Sequence[Tensor], "Tensor[]", [[T]]),
    "tuple[Tensor, ...]": (tuple[Tensor, ...], "Tensor[]", [[T]]),
    "list[Optional[Tensor]]": (list[Tensor | None], "Tensor?[]", [[T, None]]),
    "Optional[list[Tensor]]": (Optional[list[Tensor]], "Tensor[]?", [[T], None]),
    "int": (int, "SymInt", [3, -1]),
    "float": (float, "float", [0.5]),
    "bool": (bool, "bool", [True, False]),
    "str": (str, "str", ["é 'x'", ""]),
    "torch.dtype": (torch.dtype, "ScalarType", [torch.bfloat16]),
    "torch.device": (torch.device, "Device", [torch.device("cuda", 1)]),
    "Optional[int]": (Optional[int], "SymInt?", [3, None]),
    "Union[float, None]": (Union[float, None], "float?", [0.5, None]),
    "Optional[bool]": (Optional[bool], "bool?", [False, None]),
    "Optional[str]": (Optional[str], "str?", ["x", None]),
    "Optional[torch.dtype]": (Optional[torch.dtype], "ScalarType?", [torch.int8, None]),
    "Optional[torch.device]": (Optional[torch.device], "Device?", [torch.device("cpu"), None]),
    "list[int]": (list[int], "SymInt[]", [[1, 2], []]),
    "list[float]": (list[float], "float[]", [[0.5]]),
    "list[bool]": (list[bool], "bool[]", [[True, False]]),
    "list[str]": (list[str], "str[]", [["a", "b"]]),
    "Optional[list[int]]": (Optional[list[int]], "SymInt[]?", [[1], None]),
}


def op_with(annotation, default=..., *, keyword=False):
    """An op whose second argument has `annotation`, and the list of what its reference was given."""
    seen = []
    if keyword:

        def f(x, *, a):
            seen.append(a)
            return x.clone()
    else:

        def f(x, a):
            seen.append(a)
            return x.clone()

    if default is not ...:
        if keyword:
            f.__kwdefaults__ = {"a": default}
        else:
            f.__defaults__ = (default,)
    f.__annotations__ = {"x": Tensor, "a": annotation, "return": Tensor}
    op = opkit.op("t::f")(f)
    op.register_fake(lambda x, a=None: torch.empty_like(x))
    return op, seen


def same(found, wanted):
    if isinstance(wanted, Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, list):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return type(found) is type(wanted) and found == wanted


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword-only"])
@pytest.mark.parametrize(("annotation", "text", "values"), CASES.values(), ids=list(CASES))
def test_annotation_becomes_its_schema_type_and_carries_values(annotation, text, values, keyword):
    op, seen = op_with(annotation, keyword=keyword)
    assert str(op.schema) == f"t::f(Tensor x, {'*, ' if keyword else ''}{text} a) -> (Tensor)"
    for value in values:
        assert torch.equal(op(T, a=value), T)
        assert same(seen.pop(), value)
        compiled = torch.compile(lambda x: op(x, a=value), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(T), T)
        assert same(seen.pop(), value)
        torch._dynamo.reset()


@pytest.mark.parametrize(
    "name", ["Tensor", "list[Optional[Tensor]]", "int", "str", "list[float]", "torch.dtype"]
)
def test_op_passes_opcheck(name):
    annotation, _, values = CASES[name]
    op, _ = op_with(annotation)
    for value in values:
        torch.library.opcheck(op.overload, (T, value))


DEFAULTS = {
    "Tensor?": (Optional[Tensor], None, None),
    "int": (int, -3, 4),
    "big int": (int, 2**63 - 1, 0),
    "float": (float, 1e-6, 2.0),
    "bool": (bool, True, False),
    "str": (str, 'a "b"\n\\', "c"),
    "dtype": (torch.dtype, torch.float8_e4m3fn, torch.float16),
    "device": (torch.device, torch.device("cuda:1"), torch.device("cpu")),
    "int[]": (list[int], [1, -2], [3]),
    "int[]?": (Optional[list[int]], None, [3]),
    "str?": (Optional[str], None, "s"),
}


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword-only"])
@pytest.mark.parametrize(("annotation", "default", "other"), DEFAULTS.values(), ids=list(DEFAULTS))
def test_default_reaches_the_kernel(annotation, default, other, keyword):
    op, seen = op_with(annotation, default, keyword=keyword)
    compiled = torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")
    for call in (op, op.overload, compiled):
        call(T)
        assert same(seen.pop(), default)
    op(T, a=default)
    assert same(seen.pop(), default)
    op(T, a=other)
    assert same(seen.pop(), other)


def test_tuple_default_of_a_list_becomes_a_list():
    op, seen = op_with(list[int], (1, 2))
    op(T)
    assert seen == [[1, 2]]


@pytest.mark.parametrize(
    ("annotation", "default"),
    [
        (float, "x"), (int, True), (int, 2**63), (int, None), (list[int], [2**63]), (list[int], [True]),
        (torch.dtype, "float32"), (Tensor, 1.0), (Literal["a", "b"], "c"), (tuple[int, int], (1,)), (torch.layout, 0),
    ],
    ids=str,
)  # fmt: skip
def test_default_that_does_not_fit_is_refused(annotation, default):
    with pytest.raises(
        opkit.SchemaError, match=r"declaring t::f .*parameter 'a' has the default .*; expected"
    ):
        op_with(annotation, default)


@pytest.mark.parametrize(
    "annotation",
    [dict, list, list[list[Tensor]], list[list[str]], list[int | None], dict[str, int], Union[int, str], 3, [int],
     Tensor | float, Sequence, object(), tuple[int, float], Literal["a", 1], Literal[1.5],
     list[torch.layout], tuple[()], set[int]],
    ids=str,
)  # fmt: skip
def test_annotation_without_a_schema_type_is_refused(annotation):
    with pytest.raises(
        opkit.SchemaError, match=r"parameter 'a' is annotated .*; expected Tensor, int, float"
    ) as caught:
        op_with(annotation)
    assert caught.value.op == "t::f"


def test_parameter_without_annotation_is_refused():
    with pytest.raises(opkit.SchemaError, match=r"parameter 'x' has no annotation; .* Write x: Tensor"):

        @opkit.op("t::f")
        def f(x) -> Tensor: ...


@pytest.mark.parametrize("parameter", ["*xs", "**kw"])
def test_parameters_of_any_number_are_refused(parameter):
    names = {"Tensor": Tensor}
    exec(f"def f({parameter}: Tensor) -> Tensor: ...", names)
    with pytest.raises(opkit.SchemaError, match="takes any number of values, an op has a fixed signature"):
        opkit.op("t::f")(names["f"])


def test_annotation_with_an_unknown_name_says_which():
    with pytest.raises(opkit.SchemaError, match="an annotation uses 'Missing', which is not defined there"):

        @opkit.op("t::f")
        def f(x: Missing) -> Tensor: ...  # noqa: F821


@pytest.mark.parametrize("annotation", ["Tensor?", "torch.Tensr", "int | 'x'"])
def test_annotation_that_cannot_be_evaluated_is_refused(annotation):
    def f(x): ...

    f.__annotations__ = {"x": annotation, "return": "Tensor"}
    with pytest.raises(
        opkit.SchemaError, match=r"declaring t::f from .*: an annotation cannot be read, \w+Error"
    ):
        opkit.op("t::f")(f)


# ---------------------------------------------------------------- results


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


class One(NamedTuple):
    only: Tensor


class Parts(NamedTuple):
    parts: list[Tensor]
    rest: Tensor


def values(x, k):
    return tuple(x + i for i in range(k))


RESULTS = {
    "Tensor": (Tensor, "Tensor", lambda x: x + 0),
    "tuple": (tuple[Tensor, Tensor], "Tensor, Tensor", lambda x: values(x, 2)),
    "tutorial": ((Tensor, Tensor), "Tensor, Tensor", lambda x: values(x, 2)),
    "1-tuple": (tuple[Tensor], "Tensor", lambda x: values(x, 1)),
    "NamedTuple": (Pair, "Tensor low, Tensor high", lambda x: Pair(*values(x, 2))),
    "NamedTuple of one": (One, "Tensor only", lambda x: One(x + 0)),
    "list": (list[Tensor], "Tensor[]", lambda x: list(values(x, 3))),
    "NamedTuple with list": (
        Parts,
        "Tensor[] parts, Tensor rest",
        lambda x: Parts(list(values(x, 2)), x + 5),
    ),
    "None": (None, "", lambda x: None),
}


@pytest.mark.parametrize(("annotation", "text", "make"), RESULTS.values(), ids=list(RESULTS))
def test_results_come_in_the_declared_form(annotation, text, make):
    def f(x):
        return make(x)

    f.__annotations__ = {"x": Tensor, "return": annotation}
    op = opkit.op("t::f")(f)
    op.register_fake(f)
    assert str(op.schema) == f"t::f(Tensor x) -> ({text})"
    wanted = make(T)
    for call in (op, torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")):
        found = call(T)
        assert type(found) is type(wanted)
        torch.testing.assert_close(found, wanted) if wanted is not None else None


def test_tutorial_spelling_of_a_tuple_works_as_text():
    @opkit.op("t::f", shapes="n -> n, n")
    def f(x: Tensor) -> (Tensor, Tensor):
        return x + 1, x + 2

    assert [t.tolist() for t in f(T)] == [[1, 2, 3], [2, 3, 4]]


@pytest.mark.parametrize("postponed", [True, False], ids=["postponed annotations", "evaluated annotations"])
def test_named_tuple_local_to_a_function_is_found(postponed, tmp_path, monkeypatch):
    head = "from __future__ import annotations\n" if postponed else ""
    text = """
import opkit
from torch import Tensor
from typing import NamedTuple
def make():
    class Local(NamedTuple):
        y: Tensor
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Local:
        return Local(x + 1)
    return f
"""
    name = f"opkit_local_{postponed}"
    (tmp_path / f"{name}.py").write_text(head + text)
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.import_module(name).make()(T).y.tolist() == [1, 2, 3]


def test_named_tuple_may_have_methods_and_defaults():
    class Out(NamedTuple):
        y: Tensor
        z: Tensor = None  # type: ignore[assignment]

        def total(self):
            return (self.y + self.z).sum()

    @opkit.op("t::f", shapes="n -> n, n")
    def f(x: Tensor) -> Out:
        return Out(x + 1, x + 2)

    assert f(T).total() == 15


@pytest.mark.parametrize(
    "annotation",
    [dict, str, complex, list[int], Optional[int], Optional[list[Tensor]], tuple[()],
     tuple[Tensor, ...], tuple[tuple[Tensor, Tensor], Tensor], Literal["a"]],
    ids=str,
)  # fmt: skip
def test_result_that_an_op_cannot_have_is_refused(annotation):
    def f(x): ...

    f.__annotations__ = {"x": Tensor, "return": annotation}
    with pytest.raises(opkit.SchemaError, match=r"expected Tensor, Optional\[Tensor\], list\[Tensor\], list"):
        opkit.op("t::f")(f)


def test_missing_return_annotation_is_refused():
    with pytest.raises(opkit.SchemaError, match="there is no return annotation"):

        @opkit.op("t::f")
        def f(x: Tensor): ...


def test_named_tuple_field_with_an_unknown_name_says_which():
    class Out(NamedTuple):
        y: Missing  # noqa: F821

    with pytest.raises(opkit.SchemaError, match="a field of Out uses 'Missing'"):

        @opkit.op("t::f")
        def f(x: Tensor) -> Out: ...


# ---------------------------------------------------------------- names, mutation, arguments


@pytest.mark.parametrize("name", ["f", "a::b::c", "::f", "a::", "a::1f", "a.b::f", "a::f ", "a:f", ""])
def test_name_without_a_namespace_is_refused(name):
    with pytest.raises(opkit.SchemaError, match=r"declaring an op: the name .*; expected namespace::name"):
        opkit.op(name)(lambda x: x)


def test_name_without_a_namespace_suggests_one():
    with pytest.raises(opkit.SchemaError, match="Write 'mylib::f'"):
        opkit.op("f")


def test_decorator_without_a_call_says_how_to_write_it():
    with pytest.raises(opkit.SchemaError, match=r'Write @opkit.op\("mylib::scale"\)'):

        @opkit.op
        def scale(x: Tensor) -> Tensor: ...


def test_mutates_args_must_name_arguments():
    with pytest.raises(opkit.SchemaError, match="mutates_args names 'z', the arguments are x, y"):

        @opkit.op("t::f", mutates_args=["z"])
        def f(x: Tensor, y: Tensor) -> None: ...


@pytest.mark.parametrize("annotation", [int, Optional[Tensor], list[Tensor | None]], ids=str)
def test_only_tensors_that_are_always_given_can_be_mutated(annotation):
    def f(x): ...

    f.__annotations__ = {"x": annotation, "return": None}
    with pytest.raises(opkit.SchemaError, match="mutates_args names 'x'.* always given can be mutated"):
        opkit.op("t::f", mutates_args=["x"])(f)


def test_mutated_arguments_are_marked_in_the_schema():
    @opkit.op("t::f", mutates_args=["x", "ys", "k"])
    def f(x: Tensor, n: int, ys: list[Tensor], *, k: Tensor) -> None: ...

    assert str(f.schema) == "t::f(Tensor(a0!) x, SymInt n, Tensor(a2!)[] ys, *, Tensor(k0!) k) -> ()"
    assert torch._C.parse_schema(str(f.overload._schema)) == f.overload._schema


def test_arguments_are_filled_in_schema_order():
    schema = signature.from_function("t::f", _fill_example)
    assert schema.fill((1,), {"k": 4}) == (1, 2, 4, 3)
    assert schema.split((1, 2, 4, 3)) == ((1, 2), {"k": 4, "m": 3})


def _fill_example(x: int, y: int = 2, *, k: int, m: int = 3) -> None: ...


@pytest.mark.parametrize(
    ("args", "kwargs", "text"),
    [
        ((), {"k": 1}, "argument 'x' is missing; it takes t::f"),
        ((1,), {}, "argument 'k' is missing"),
        ((1, 2, 3), {}, "3 positional arguments, it takes 2"),
        ((1,), {"k": 1, "z": 1}, "unexpected argument 'z'"),
    ],
    ids=["missing", "missing keyword-only", "too many", "unknown"],
)
def test_wrong_arguments_raise_type_error(args, kwargs, text):
    with pytest.raises(TypeError, match=text):
        signature.from_function("t::f", _fill_example).fill(args, kwargs)


def test_argument_called_mode_of_an_op_that_mutates_is_refused():
    with pytest.raises(
        opkit.SchemaError, match="t::f from .*: an op that mutates has the argument 'mode'; .*Rename it"
    ):

        @opkit.op("t::f", mutates_args=("x",))
        def f(x: Tensor, mode: str) -> None: ...

    with pytest.raises(opkit.SchemaError, match="t::f: an op that mutates has the argument 'mode'"):
        opkit.declare("t::f(Tensor(a!) x, str mode) -> ()")
