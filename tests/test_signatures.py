"""One op for each type that an argument or a result can have, and what torch does with it.

Every op goes through opcheck, torch.compile, torch.export with saving and loading, and where it can be
differentiated, first and second derivatives in reverse mode and the first in forward mode.
"""

# ruff: noqa: UP006, UP007, UP035, UP045  (the older spellings are what is tested)
from __future__ import annotations

import enum
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, List, Literal, NamedTuple, NewType, Optional, Tuple, Union

import pytest
import torch
import torch.utils.flop_counter
from torch import Tensor

import opkit

pytestmark = pytest.mark.usefixtures("registry")


class Mode(enum.Enum):
    ADD = "add"
    MUL = "mul"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


class Color(enum.Enum):
    RED = (1, 0)
    BLUE = 0.5


class Bits(enum.Flag):
    ONE = 1
    TWO = 2


Width = NewType("Width", int)


class Pair(NamedTuple):
    low: Tensor
    high: Tensor


class Mixed(NamedTuple):
    parts: list[Tensor]
    none: Optional[Tensor]
    rest: Tensor


class One(NamedTuple):
    only: Tensor


@dataclass(frozen=True)
class Moments:
    mean: Tensor
    square: Tensor


@dataclass(frozen=True, kw_only=True)
class Lists:
    parts: list[Tensor]
    rest: Optional[Tensor] = None


@dataclass
class Open:
    y: Tensor


def vector(k: int = 3) -> Tensor:
    return torch.linspace(0.5, 1.5, k, dtype=torch.float64)


def number(value: Any) -> float:
    """Turn an argument of any plain type into a number that depends on it."""
    if value is None:
        return 3.0
    if isinstance(value, enum.Enum):
        return 1.0 + number(value.value)
    if isinstance(value, complex):
        return value.real + 2 * value.imag
    if isinstance(value, (int, float, torch.SymInt)):
        return value
    if isinstance(value, (list, tuple)):
        return sum((i + 1) * number(v) for i, v in enumerate(value))
    if isinstance(value, torch.Generator):
        return value.initial_seed() % 7
    return float(len(str(value)))


def total(value: Any) -> Any:
    """Turn tensors in any form into one that depends on all of them."""
    if isinstance(value, Tensor):
        return value.sum() + 0.5 * (value * value).sum()
    if isinstance(value, (list, tuple)):
        return sum((i + 1) * total(v) for i, v in enumerate(value))
    return 2.0


def with_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """Return a value with the given tensors, in order, in the place of its own."""
    if isinstance(value, Tensor):
        return tensors.pop(0)
    if isinstance(value, (list, tuple)):
        return type(value)(with_tensors(v, tensors) for v in value)
    return value


@dataclass
class Case:
    annotation: Any
    value: Any
    default: Any = ...
    saved: bool = True  # whether torch.export.save has a form for it
    compiled: bool = True
    checked: tuple[str, ...] = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )


ARGUMENTS = {
    "Tensor": Case(Tensor, vector()),
    "Parameter": Case(torch.nn.Parameter, torch.nn.Parameter(vector())),
    "Optional[Tensor]": Case(Optional[Tensor], vector()),
    "Optional[Tensor] None": Case(Optional[Tensor], None),
    "Tensor | None default": Case(Tensor | None, vector(), None),
    "list[Tensor]": Case(list[Tensor], [vector(), vector(2)]),
    "List[Tensor]": Case(List[Tensor], [vector()]),
    "list[Tensor] empty": Case(list[Tensor], []),
    "Sequence[Tensor]": Case(Sequence[Tensor], [vector()]),
    "tuple[Tensor, ...]": Case(tuple[Tensor, ...], [vector(), vector()]),
    "tuple[Tensor, Tensor]": Case(tuple[Tensor, Tensor], (vector(), vector(2))),
    "list[Optional[Tensor]]": Case(list[Optional[Tensor]], [vector(), None]),
    "Optional[list[Tensor]]": Case(Optional[list[Tensor]], [vector()]),
    "Optional[list[Tensor]] None": Case(Optional[list[Tensor]], None, None),
    "Optional[list[Optional[Tensor]]]": Case(Optional[list[Optional[Tensor]]], [None, vector()]),
    "int": Case(int, 3),
    "int default": Case(int, 3, 2),
    "float": Case(float, 0.5),
    "float default inf": Case(float, 0.5, float("inf")),
    "bool": Case(bool, True),
    "str": Case(str, "é 'x'"),
    "str default": Case(str, "ab", "é"),
    "complex": Case(complex, 1 + 2j),
    "complex default": Case(complex, 1 + 2j, 3 - 1j),
    "int | float with int": Case(int | float, 3),
    "int | float with float": Case(Union[int, float], 2.5, 1),
    "Optional[int | float]": Case(Optional[int | float], None),
    "torch.dtype": Case(torch.dtype, torch.bfloat16),
    "torch.dtype default": Case(torch.dtype, torch.int8, torch.float64),
    "torch.device": Case(torch.device, torch.device("cpu")),
    "torch.layout": Case(torch.layout, torch.strided),
    "torch.layout default": Case(torch.layout, torch.strided, torch.sparse_coo),
    "torch.memory_format": Case(torch.memory_format, torch.channels_last),
    "torch.memory_format default": Case(torch.memory_format, torch.channels_last, torch.contiguous_format),
    "torch.Generator": Case(torch.Generator, torch.Generator().manual_seed(5), compiled=False),
    "Optional[torch.Generator]": Case(Optional[torch.Generator], None, None),
    "Optional[int]": Case(Optional[int], 4),
    "Optional[float]": Case(Optional[float], None, 0.25),
    "Optional[bool]": Case(Optional[bool], True),
    "Optional[str]": Case(Optional[str], "ab"),
    "Optional[complex]": Case(Optional[complex], 1j),
    "Optional[torch.dtype]": Case(Optional[torch.dtype], torch.int8),
    "Optional[torch.layout]": Case(Optional[torch.layout], torch.strided, None),
    "Optional[torch.memory_format]": Case(Optional[torch.memory_format], torch.channels_last),
    "list[int]": Case(list[int], [1, 2]),
    "list[int] default": Case(list[int], [1, 2], (3, 4)),
    "torch.Size": Case(torch.Size, [1, 2]),
    "list[float]": Case(list[float], [0.5, 2.0]),
    "list[float] default": Case(list[float], [0.5], [1.5, 2.5]),
    "list[bool]": Case(list[bool], [True, False]),
    "list[bool] default": Case(list[bool], [True], [False, True]),
    "list[str]": Case(list[str], ["a", "bc"]),
    "list[str] default": Case(list[str], ["a"], ["b", "cd"]),
    "list[complex]": Case(list[complex], [1j, 2 + 0j], saved=False),
    # opcheck's test_schema has no form for it
    "list[torch.dtype]": Case(
        list[torch.dtype],
        [torch.int8],
        saved=False,
        checked=("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"),
    ),
    "list[torch.device]": Case(list[torch.device], [torch.device("cpu")], saved=False),
    "list[list[int]]": Case(list[list[int]], [[1, 2], [3]], saved=False),
    "list[list[float]] default": Case(list[list[float]], [[0.5]], [[1.5], [2.0]], saved=False),
    "Optional[list[int]]": Case(Optional[list[int]], [1], [2, 3]),
    "Optional[list[str]]": Case(Optional[list[str]], ["a"]),
    "tuple[int, int]": Case(tuple[int, int], (2, 5)),
    "tuple[int, int] default": Case(Tuple[int, int], (2, 5), (1, 1)),
    "tuple[float, float, float]": Case(tuple[float, float, float], (0.5, 1.5, 2.5)),
    "tuple[bool, bool]": Case(tuple[bool, bool], (True, False)),
    "Optional[tuple[int, int]]": Case(Optional[tuple[int, int]], (1, 2), None),
    "Enum of str": Case(Mode, Mode.MUL),
    "Enum of str default": Case(Mode, Mode.MUL, Mode.ADD),
    "Enum of int": Case(Level, Level.HIGH),
    "Enum of others": Case(Color, Color.BLUE, Color.RED),
    "Flag": Case(Bits, Bits.ONE | Bits.TWO),
    "Optional[Enum]": Case(Optional[Mode], Mode.ADD, None),
    "list[Enum]": Case(list[Mode], [Mode.ADD, Mode.MUL]),
    "tuple[Enum, Enum]": Case(tuple[Mode, Mode], (Mode.MUL, Mode.ADD)),
    "Literal of str": Case(Literal["a", "bc"], "bc", "a"),
    "Literal of int": Case(Literal[1, 2], 2),
    "Literal with None": Case(Literal["a", None], None),
    "Annotated": Case(Annotated[int, {"unhashable": 1}], 3),
    "NewType": Case(Width, 3),
}

RESULTS: dict[str, tuple[Any, Callable[[Tensor], Any]]] = {
    "Tensor": (Tensor, lambda x: x * x),
    "Optional[Tensor]": (Optional[Tensor], lambda x: x * x),
    "Optional[Tensor] None": (Optional[Tensor], lambda x: None),
    "list": (list[Tensor], lambda x: [x * x, x[:1] * 3]),
    "list[Optional[Tensor]]": (list[Optional[Tensor]], lambda x: [x * x, None, x + 1]),
    "list of none": (list[Tensor], lambda x: []),
    "tuple": (tuple[Tensor, Tensor], lambda x: (x * x, x + 1)),
    "tuple of one": (tuple[Tensor], lambda x: (x * x,)),
    "tutorials' tuple": ((Tensor, Tensor), lambda x: (x * x, x + 1)),
    "tuple with list and None": (
        tuple[list[Tensor], Optional[Tensor]],
        lambda x: ([x * x, x + 1], None),
    ),
    "NamedTuple": (Pair, lambda x: Pair(x * x, x + 1)),
    "NamedTuple of one": (One, lambda x: One(x * x)),
    "NamedTuple with list and None": (Mixed, lambda x: Mixed([x * x, x + 1], None, x * 2)),
    "dataclass": (Moments, lambda x: Moments(x * x, x + 1)),
    "dataclass with keywords": (Lists, lambda x: Lists(parts=[x * x], rest=None)),
    "dataclass not frozen": (Open, lambda x: Open(x * x)),
    "None": (None, lambda x: None),
    "integers": (tuple[Tensor, Tensor], lambda x: (x * x, x.long())),
}


def op_over(annotation: Any, default: Any, keyword: bool) -> tuple[opkit.Op, list[Any]]:
    """Return an op `f(x, a)` whose result depends on `a`, and the list of what its kernel was given."""
    seen: list[Any] = []

    def body(x: Tensor, a: Any) -> Tensor:
        seen.append(a)
        of_tensors = "Tensor" in str(annotation) or annotation is torch.nn.Parameter
        return x * x * (total(a) if of_tensors else number(a))

    if keyword:

        def f(x, *, a):
            return body(x, a)

        f.__kwdefaults__ = {} if default is ... else {"a": default}
    else:

        def f(x, a):
            return body(x, a)

        f.__defaults__ = () if default is ... else (default,)
    f.__annotations__ = {"x": Tensor, "a": annotation, "return": Tensor}
    op = opkit.op("t::f")(f)
    op.register_fake(lambda x, a=None: torch.empty_like(x))
    op.register_autograd(opkit.from_reference)
    return op, seen


def is_same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, (list, tuple)):
        return type(found) is type(wanted) and len(found) == len(wanted) and all(map(is_same, found, wanted))
    if isinstance(wanted, torch.Generator):  # another object over the same state
        return found.get_state().equal(wanted.get_state())
    return type(found) is type(wanted) and found == wanted


class Module(torch.nn.Module):
    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


def exported(call: Callable[..., Any], args: tuple[Any, ...], *, saved: bool = True) -> Callable[..., Any]:
    program = torch.export.export(Module(call), args)
    if saved:
        stream = io.BytesIO()
        torch.export.save(program, stream)
        stream.seek(0)
        program = torch.export.load(stream)
    return program.module()


def check_gradients(call: Callable[..., Any], *inputs: Tensor) -> None:
    leaves = tuple(x.detach().clone().requires_grad_() for x in inputs)
    torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize("keyword", [False, True], ids=["positional", "keyword-only"])
@pytest.mark.parametrize("case", ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_argument_of_every_type(case: Case, keyword: bool):
    op, seen = op_over(case.annotation, case.default, keyword)
    x, value = vector(), case.value
    wanted = op.reference(x, a=value)

    def call(x: Tensor) -> Tensor:
        return op(x, a=value) if keyword else op(x, value)

    def is_right(call: Callable[..., Any]) -> bool:
        seen.clear()
        return torch.equal(call(x), wanted) and is_same(seen[-1], value)

    assert is_right(call)
    carried = op.schema.fill(*op.schema.carry((x,), {"a": value}))
    args, kwargs = op.schema.split(carried)
    assert is_right(lambda x: op.overload(*args, **kwargs))
    if case.compiled:
        assert is_right(torch.compile(call, fullgraph=True, backend="aot_eager"))
        assert is_right(exported(call, (x,), saved=case.saved))
        torch.library.opcheck(op.overload, args, kwargs, test_utils=case.checked)
        leaf = x.detach().clone().requires_grad_()  # with a gradient to trace, and one to give to each tensor
        torch.library.opcheck(op.overload, (leaf, *args[1:]), kwargs, test_utils=case.checked)
    if case.default is not ...:
        default = op.reference(x)
        assert torch.equal(op(x), default)
        assert torch.equal(torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")(x), default)
    tensors = [v for v in torch.utils._pytree.tree_leaves(value) if isinstance(v, Tensor)]
    check_gradients(lambda x, *given: op(x, a=with_tensors(value, list(given))), x, *tensors)


@pytest.mark.parametrize(("annotation", "make"), RESULTS.values(), ids=list(RESULTS))
def test_result_of_every_form(annotation, make):
    def f(x):
        return make(x)

    f.__annotations__ = {"x": Tensor, "return": annotation}
    op = opkit.op("t::f")(f)
    op.register_fake(f)
    op.register_autograd(opkit.from_reference)
    x = vector()
    wanted = make(x)

    def call(x: Tensor) -> Any:
        return op(x)

    leaves, spec = torch.utils._pytree.tree_flatten(wanted)
    # torch.export.save knows neither programs without outputs nor lists with holes
    saved = leaves != [] and annotation != list[Optional[Tensor]]
    forms = (
        call,
        torch.compile(call, fullgraph=True, backend="aot_eager"),
        exported(call, (x,), saved=saved),
    )
    for form in forms:
        found = form(x)
        assert type(found) is type(wanted)
        found_leaves, found_spec = torch.utils._pytree.tree_flatten(found)
        assert found_spec == spec
        assert all(map(is_same, found_leaves, leaves))
    torch.library.opcheck(op.overload, (x,))
    torch.library.opcheck(op.overload, (x.clone().requires_grad_(),))

    def differentiable(x: Tensor) -> tuple[Tensor, ...]:
        outputs = torch.utils._pytree.tree_leaves(op(x))
        return tuple(o for o in outputs if isinstance(o, Tensor) and o.is_floating_point())

    if differentiable(x):
        check_gradients(differentiable, x)


FOR_INDUCTOR = (
    "Tensor", "Optional[Tensor] None", "list[Tensor]", "tuple[Tensor, Tensor]", "int", "complex", "list[str]",
    "tuple[int, int]", "torch.dtype", "Enum of str", "Literal of int", "list[bool] default",
)  # fmt: skip


@pytest.mark.parametrize("name", FOR_INDUCTOR)
def test_argument_of_the_type_goes_through_inductor(name):
    case = ARGUMENTS[name]
    op, seen = op_over(case.annotation, case.default, keyword=False)
    x = vector()
    wanted = op.reference(x * 2, case.value) + 1
    assert torch.equal(torch.compile(lambda x: op(x * 2, case.value) + 1, fullgraph=True)(x), wanted)
    assert is_same(seen[-1], case.value)


@pytest.mark.parametrize("name", ["tuple", "NamedTuple with list and None", "dataclass"])
def test_result_of_the_form_goes_through_inductor(name):
    annotation, make = RESULTS[name]

    def f(x):
        return make(x)

    f.__annotations__ = {"x": Tensor, "return": annotation}
    op = opkit.op("t::f")(f)
    op.register_fake(f)
    x = vector()
    found = torch.compile(lambda x: op(x * 2), fullgraph=True)(x)
    wanted = make(x * 2)
    assert type(found) is type(wanted)
    pairs = zip(*(torch.utils._pytree.tree_leaves(v) for v in (found, wanted)), strict=True)
    assert all(is_same(one, other) for one, other in pairs)


# ---------------------------------------------------------------- generators


@pytest.fixture
def noise():
    @opkit.op("t::noise", shapes="n -> n", tags=[torch.Tag.nondeterministic_seeded])
    def noise(x: Tensor, generator: Optional[torch.Generator] = None) -> Tensor:
        return x + torch.rand(x.shape, generator=generator)

    return noise


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_generator_is_drawn_from_and_moves_on(noise):
    x = torch.zeros(3)
    generator, twin = seeded(), seeded()
    assert torch.equal(noise(x, generator), torch.rand(3, generator=twin))
    assert torch.equal(noise(x, generator=generator), torch.rand(3, generator=twin))
    noise.register_kernel("cpu", lambda x, generator: x + torch.rand(3, generator=generator))
    assert torch.equal(noise(x, generator), torch.rand(3, generator=twin))
    torch.library.opcheck(
        noise.overload, (x, seeded()), test_utils=("test_autograd_registration", "test_faketensor")
    )


@pytest.mark.parametrize("given", ["argument", "closure"])
def test_generator_is_refused_in_one_graph_and_breaks_several(noise, given):
    """Dynamo puts no generator into a graph: pytorch#88576, #92633."""
    x, generator = torch.zeros(3), seeded()
    call = (
        (lambda x, g: noise(x * 1, g) + 0)
        if given == "argument"
        else lambda x, _: noise(x * 1, generator) + 0
    )
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Generator"):
        torch.compile(call, fullgraph=True, backend="aot_eager")(x, generator)
    torch._dynamo.reset()
    broken = torch.compile(call, backend="aot_eager")
    twin = seeded()
    for _ in range(2):
        assert torch.equal(broken(x, generator), torch.rand(3, generator=twin))
    absent = torch.compile(lambda x: noise(x * 1) * 1, fullgraph=True, backend="aot_eager")
    assert ((absent(x) >= 0) & (absent(x) < 1)).all()


# ---------------------------------------------------------------- results that are numbers


class Counted(NamedTuple):
    kept: Tensor
    count: int


def new_size(*_: Any) -> torch.SymInt:
    return torch.library.get_ctx().new_dynamic_size()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_int_result_is_a_size_that_depends_on_data(backend):
    @opkit.op("t::count")
    def count(x: Tensor) -> int:
        return int((x > 0).sum())

    count.register_fake(new_size)
    assert count(torch.tensor([1.0, -1.0, 2.0])) == 2
    calls = 0

    def compiler(graph, inputs):
        nonlocal calls
        calls += 1
        return torch._dynamo.lookup_backend(backend)(graph, inputs)

    call = torch.compile(lambda x: torch.zeros(count(x) + 1), fullgraph=True, backend=compiler)
    assert call(torch.tensor([1.0, -1.0, 2.0])).shape == (3,)
    assert call(torch.tensor([1.0, -1.0, -2.0])).shape == (2,)
    assert calls == 1
    program = exported(lambda x: torch.zeros(count(x) + 1), (torch.ones(3),))
    assert program(torch.tensor([-1.0, 1.0, 1.0])).shape == (3,)
    torch.library.opcheck(count.overload, (torch.ones(3),))


def test_int_result_beside_a_tensor_keeps_its_name():
    @opkit.op("t::count")
    def count(x: Tensor) -> Counted:
        return Counted(x * 2, int((x > 0).sum()))

    count.register_fake(lambda x: Counted(torch.empty_like(x), new_size()))
    count.register_autograd(opkit.from_reference)
    x = vector()
    for call in (count, torch.compile(lambda x: count(x), fullgraph=True, backend="aot_eager")):
        found = call(x)
        assert type(found) is Counted
        assert torch.equal(found.kept, x * 2)
        assert found.count == 3
        assert type(found.count) is int
    check_gradients(lambda x: count(x).kept, x)


@pytest.mark.parametrize(("kind", "wanted"), [(float, 3.0), (bool, True)])
def test_float_and_bool_results_are_for_eager_calls(kind, wanted):
    def f(x):
        return kind(x.sum())

    f.__annotations__ = {"x": Tensor, "return": kind}
    op = opkit.op("t::f")(f)
    op.register_fake(lambda x: kind(1))
    assert op(torch.ones(3)) == wanted
    assert type(op(torch.ones(3))) is kind
    text = f"tracing t::f: its result out is a {kind.__name__}, which only a kernel can compute"
    with pytest.raises(Exception, match=text):
        torch.compile(lambda x: op(x), fullgraph=True, backend="aot_eager")(torch.ones(3))
    with pytest.raises(opkit.RegistrationError, match=text):
        torch.export.export(Module(op), (torch.ones(3),))
    with pytest.raises(opkit.RegistrationError, match=text):
        op(torch.ones(3, device="meta"))


@pytest.mark.parametrize(
    ("kind", "value", "text"),
    [
        (int, 2.5, "returned float as out; expected an int"),
        (int, True, "returned bool as out; expected an int"),
        (float, "x", "returned str as out; expected a float"),
        (bool, 1, "returned int as out; expected a bool"),
        (Tensor, None, "returned NoneType as out; expected a Tensor"),
        (Optional[Tensor], 3, "returned int as out; expected a Tensor"),
    ],
    ids=str,
)
def test_kernel_that_returns_another_type_is_refused(kind, value, text):
    def f(x):
        return value

    f.__annotations__ = {"x": Tensor, "return": kind}
    with pytest.raises(opkit.OutputError, match=text):
        opkit.op("t::f")(f)(torch.ones(2))


@pytest.mark.parametrize(
    ("real", "described", "text"),
    [
        (lambda x: None, torch.empty_like, "returned None as out; expected a Tensor by its meta function"),
        (lambda x: x + 1, lambda x: None, "returned a Tensor as out; expected None by its meta function"),
    ],
)
def test_optional_result_is_there_where_the_meta_function_says_so(real, described, text):
    @opkit.op("t::f")
    def f(x: Tensor) -> Optional[Tensor]:
        return real(x)

    f.register_fake(described)
    with pytest.raises(opkit.OutputError, match=text):
        f(torch.ones(2))


# ---------------------------------------------------------------- factories: ops without tensors


@pytest.fixture
def arange():
    @opkit.op("t::arange", shapes="-> n:dtype")
    def arange(n: int, dtype: torch.dtype = torch.float32, device: Optional[torch.device] = None) -> Tensor:
        return torch.arange(n, dtype=dtype, device=device)

    return arange


def test_factory_runs_on_the_device_it_is_asked_for(arange):
    seen = []
    arange.register_kernel("cpu", lambda n, dtype, device: seen.append(device) or torch.arange(n).to(dtype))
    assert torch.equal(arange(3), torch.arange(3.0))
    assert seen == [torch.device("cpu")]
    made = arange(3, torch.int8, torch.device("meta"))
    assert (made.device.type, made.shape, made.dtype) == ("meta", (3,), torch.int8)
    assert len(seen) == 1
    with torch.device("meta"):
        assert arange(3).device.type == "meta"
    assert arange.explain(3).device == "cpu"
    assert arange.explain(3, device=torch.device("meta")).device == "meta"


def test_factory_goes_through_compile_and_export(arange):
    for backend in ("aot_eager", "inductor"):
        torch._dynamo.reset()
        call = torch.compile(
            lambda n: arange(n, device=torch.device("cpu")) * 2, fullgraph=True, backend=backend
        )
        assert torch.equal(call(3), torch.arange(3.0) * 2)
        assert torch.equal(call(5), torch.arange(5.0) * 2)
    call = torch.compile(lambda x: x + arange(3), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(torch.ones(3)), torch.arange(3.0) + 1)
    assert torch.equal(
        exported(lambda x: x + arange(3), (torch.ones(3),))(torch.ones(3)), torch.arange(3.0) + 1
    )
    torch.library.opcheck(arange.overload, (3, torch.float32, torch.device("cpu")))


# ---------------------------------------------------------------- values that a call may not have


@pytest.mark.parametrize(
    ("annotation", "value", "text"),
    [
        (Mode, "max", r"argument a is 'max'; expected one of Mode.ADD, Mode.MUL\. Pass one"),
        (Mode, 3, r"argument a is 3; expected one of Mode.ADD"),
        (Mode, Level.LOW, r"argument a is <Level.LOW: 1>; expected one of Mode.ADD"),
        (Optional[Mode], "max", r"expected one of Mode.ADD, Mode.MUL or None\. Pass one"),
        (Level, 3, r"expected one of Level.LOW, Level.HIGH"),
        (Level, True, r"argument a is True; expected one of Level.LOW"),
        (Literal["a", "b"], "c", r"argument a is 'c'; expected one of 'a', 'b'"),
        (Literal[1, 2], True, r"argument a is True; expected one of 1, 2"),
        (list[Mode], [Mode.ADD, None], r"expected one of Mode.ADD"),
        (tuple[int, int], (1, 2, 3), r"argument a is \(1, 2, 3\); expected a tuple of 2 values"),
        (tuple[int, int], 3, r"argument a is 3; expected a tuple of 2 values"),
    ],
    ids=str,
)
def test_value_that_the_annotation_excludes_is_refused(annotation, value, text):
    op, seen = op_over(annotation, ..., keyword=False)
    for call in (op, lambda x, a: op(x, a=a), op.explain):
        with pytest.raises(opkit.ArgumentError, match=f"calling t::f: .*{text}") as caught:
            call(vector(), value)
        assert caught.value.op == "t::f"
    with pytest.raises(Exception, match=text):
        torch.compile(lambda x: op(x, value), backend="aot_eager")(vector())
    assert seen == []


def test_value_is_checked_too_where_the_overload_is_called():
    op, seen = op_over(Literal["a", "b"], ..., keyword=False)
    with pytest.raises(opkit.ArgumentError, match=r"argument a is 'c'; expected one of 'a', 'b'"):
        op.overload(vector(), "c")
    assert seen == []


def test_value_may_be_given_as_torch_carries_it():
    op, seen = op_over(Mode, ..., keyword=False)
    op(vector(), "mul")
    assert seen == [Mode.MUL]


def test_formula_condition_and_meta_get_what_python_code_sees():
    seen = []

    @opkit.op("t::f")
    def f(x: Tensor, mode: Mode, size: tuple[int, int]) -> Tensor:
        return x * 2

    @f.register_fake
    def _(x, mode, size):
        seen.append(("meta", mode, size))
        return torch.empty_like(x)

    def save(ctx, inputs, output):
        seen.append(("formula", *inputs[1:]))

    f.register_autograd(lambda ctx, grad: (grad * 2, None, None), setup_context=save)
    f.register_kernel(
        "cpu", lambda x, mode, size: x * 2, when=lambda *a: seen.append(("when", *a[1:])) or True
    )
    f(vector().requires_grad_(), Mode.ADD, (1, 2))
    assert {kind for kind, *_ in seen} == {"meta", "formula", "when"}
    assert all(rest == [Mode.ADD, (1, 2)] for _, *rest in seen)


def test_rules_of_vmap_and_flops_get_what_python_code_sees():
    seen = []

    @opkit.op("t::f", shapes="*b n -> *b n", flops=lambda x, mode, size: seen.append((mode, size)) or x[-1])
    def f(x: Tensor, mode: Mode, size: tuple[int, int]) -> Tensor:
        return x * size[0] if mode is Mode.MUL else x + size[1]

    @f.register_vmap
    def batched(info, in_dims, x, mode, size):
        seen.append((mode, size))
        return f(x, mode, size), in_dims[0]

    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        f(vector(), Mode.MUL, (2, 3))
    assert counter.get_total_flops() == 3
    assert torch.equal(
        torch.vmap(lambda x: f(x, Mode.MUL, (2, 3)))(vector().expand(2, 3)), vector().expand(2, 3) * 2
    )
    assert seen[-2:] == [(Mode.MUL, (2, 3))] * 2
