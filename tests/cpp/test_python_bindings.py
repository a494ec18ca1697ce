from __future__ import annotations

import contextlib
import gc
import inspect
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from opkit import _config
from opkit.cpp import _bindings, _link, _ninja, _pch, compilers
from opkit.cpp.extension import load_inline
from opkit.errors import BuildError

pytestmark = pytest.mark.skipif(
    compilers.find_cxx() is None or compilers.find_ninja() is None, reason="needs a C++ compiler and ninja"
)

SOURCE = """
at::Tensor twice(const at::Tensor& x) { return x * 2; }
at::Tensor& fill(at::Tensor& x) { return x.fill_(3); }
std::optional<at::Tensor> maybe(std::optional<at::Tensor> x) { return x; }
std::vector<at::Tensor> all(std::vector<at::Tensor> x) { return x; }
std::tuple<at::Tensor, int64_t> pair(at::Tensor x) { return {x, x.dim()}; }
std::pair<bool, std::string> two(bool a, const std::string& b) { return {a, b}; }
int8_t small(int8_t x) { return x; }
uint8_t byte(uint8_t x) { return x; }
int normal(int x) { return x; }
int64_t wide(int64_t x) { return x; }
uint64_t natural(uint64_t x) { return x; }
float half_of(float x) { return x / 2; }
double third(double x) { return x / 3; }
std::vector<int64_t> sizes(at::IntArrayRef x) { return x.vec(); }
std::vector<std::vector<double>> table(const std::vector<std::vector<double>>& x) { return x; }
std::optional<double> perhaps(std::optional<double> x) { return x; }
at::ScalarType kind(at::ScalarType x) { return x; }
at::Device place(at::Device x) { return x; }
at::Layout layout(at::Layout x) { return x; }
void nothing() {}
int64_t count = 0;
void step(int64_t by) { count += by; }
int64_t counted() { return count; }
void fails(int64_t how) {
  TORCH_CHECK(how != 0, "checked");
  TORCH_CHECK_INDEX(how != 1, "index");
  TORCH_CHECK_VALUE(how != 2, "value");
  TORCH_CHECK_TYPE(how != 3, "type");
  TORCH_CHECK_NOT_IMPLEMENTED(how != 4, "not implemented");
  if (how == 5) throw std::invalid_argument("standard");
  if (how == 6) throw 6;
  TORCH_WARN("a warning");
  if (how == 7) throw std::runtime_error("after a warning");
}
"""
NAMES = re.findall(r"^\w.*? (\w+)\(", SOURCE, re.MULTILINE)
FLAGS = {"functions": dict.fromkeys(NAMES, "What it does."), "extra_cflags": ["-O0"]}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The functions bound without pybind11, and each way in which they were compiled."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OPKIT_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
    _config.refresh()
    ways = []
    place = _ninja.Build._place_headers
    patch.setattr(_ninja.Build, "_place_headers", lambda self, way: ways.append(way) or place(self, way))
    module = load_inline("bound", SOURCE, **FLAGS)
    patch.undo()
    _config.refresh()
    return module, ways


@pytest.fixture
def module(built):
    return built[0]


def test_it_is_compiled_once_without_pybind11(built):
    module, ways = built
    assert [way.ours for way in ways] == [_pch.DIRECT]
    assert module.__name__ == "bound"
    assert inspect.isbuiltin(module.twice)
    assert (module.twice.__name__, module.twice.__module__) == ("twice", "bound")
    assert module.twice.__doc__ == "twice(arg0: torch.Tensor) -> torch.Tensor\n\nWhat it does.\n"
    assert module.table.__doc__.startswith("table(arg0: list[list[float]]) -> list[list[float]]\n")
    assert module.two.__doc__.startswith("two(arg0: bool, arg1: str) -> tuple[bool, str]\n")


def test_tensors_go_both_ways(module):
    x = torch.ones(3, requires_grad=True)
    module.twice(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
    y = torch.zeros(2)
    assert module.fill(y) is y
    assert y.tolist() == [3, 3]
    assert module.maybe(y) is y
    assert module.maybe(None) is None
    assert module.all([y, x])[1] is x
    assert module.all((y,))[0] is y
    assert module.pair(torch.nn.Parameter(y))[1] == 1
    with pytest.raises(TypeError):
        module.twice(None)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("small", -128, -128),
        ("byte", 255, 255),
        ("normal", torch.tensor(7), 7),
        ("wide", -(2**63), -(2**63)),
        ("wide", True, 1),
        ("natural", 2**64 - 1, 2**64 - 1),
        ("half_of", 3, 1.5),
        ("third", torch.tensor(6.0), 2.0),
        ("sizes", (1, 2), [1, 2]),
        ("sizes", torch.Size([4]), [4]),
        ("table", ([1, 2.5], (x for x in (3,))), [[1.0, 2.5], [3.0]]),
        ("perhaps", None, None),
        ("perhaps", 1, 1.0),
        ("kind", torch.bfloat16, torch.bfloat16),
        ("place", torch.device("cuda", 1), torch.device("cuda", 1)),
        ("layout", torch.sparse_coo, torch.sparse_coo),
    ],
)
def test_values_go_both_ways(module, name, value, expected):
    found = getattr(module, name)(value)
    assert found == expected
    assert type(found) is type(expected)


def test_bools_texts_and_nothing(module):
    assert module.two(0, "\u00e9\0") == (False, "\u00e9\0")
    assert module.two(None, b"bytes") == (False, "bytes")
    assert module.nothing() is None
    with pytest.raises(UnicodeDecodeError):
        module.two(True, b"\xff")


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        (
            "twice",
            (3,),
            "calling twice: argument 1 is 3, of type int; expected torch.Tensor: "
            "twice(arg0: torch.Tensor) -> torch.Tensor.",
        ),
        (
            "twice",
            (),
            "calling twice: it was given 0 arguments; expected 1: twice(arg0: torch.Tensor) -> torch.Tensor.",
        ),
        ("nothing", (1,), "calling nothing: it was given 1 argument; expected 0: nothing() -> None."),
        ("two", (True, 2.5), "argument 2 is 2.5, of type float; expected str: two("),
        ("small", (128,), "argument 1 is 128, of type int; expected int from -128 to 127: small("),
        ("byte", (-1,), "argument 1 is -1, of type int; expected int from 0 to 255: byte("),
        ("natural", (-1,), "expected int from 0 to 18446744073709551615"),
        ("wide", (1.0,), "argument 1 is 1.0, of type float; expected int: wide("),
        ("wide", (2**63,), "expected int from -9223372036854775808 to 9223372036854775807"),
        ("third", ("x",), "argument 1 is of type str; expected float: third("),
        ("table", ([[1], ["x"]],), "argument 1 is of type list; expected list[list[float]]: table("),
        ("table", ("text",), "argument 1 is of type str; expected list[list[float]]"),
        ("kind", ("float32",), "expected torch.dtype"),
        ("all", (torch.eye(2),), "argument 1 is of type Tensor; expected list[torch.Tensor]"),
        ("sizes", ("text",), "argument 1 is of type str; expected tuple[int, ...]"),
        ("sizes", ([1, "text"],), ""),
        ("perhaps", ([],), "argument 1 is of type list; expected float | None"),
    ],
)
def test_wrong_arguments_are_named(module, name, arguments, text):
    with pytest.raises(TypeError) as caught:
        getattr(module, name)(*arguments)
    assert text in str(caught.value)
    with pytest.raises(TypeError, match="keyword"):
        module.wide(arg0=1)


def test_an_error_of_an_argument_itself_is_raised(module):
    with pytest.raises(ZeroDivisionError):
        module.table(1 / (1 - i) for i in range(3))


def test_exceptions_are_those_of_torch(module):
    errors = (
        RuntimeError,
        IndexError,
        ValueError,
        TypeError,
        NotImplementedError,
        RuntimeError,
        RuntimeError,
    )
    texts = ("checked", "index", "value", "type", "not implemented", "standard", "no std::exception")
    for how, (error, text) in enumerate(zip(errors, texts, strict=True)):
        with pytest.raises(error, match=text) as caught:
            module.fails(how)
        assert caught.type is error


def test_warnings_are_pythons(module):
    with pytest.warns(UserWarning, match="a warning"):
        module.fails(8)
    with pytest.warns(UserWarning, match="a warning"), pytest.raises(RuntimeError, match="after a warning"):
        module.fails(7)


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_is_raised(module):
    with pytest.raises(UserWarning, match="a warning"):
        module.fails(8)
    with pytest.raises(RuntimeError, match="after a warning"):
        module.fails(7)


def test_nothing_leaks(module):
    held = torch.ones(1), "a text" * 9, 12345.5, torch.float64
    x, text, value, kind = held
    before = [sys.getrefcount(item) for item in held]
    for _ in range(20_000):
        module.all([x, x])
        module.two(True, text)
        module.table([[value]])
        module.kind(kind)
        with contextlib.suppress(TypeError):
            module.small(value)
    gc.collect()
    assert [sys.getrefcount(item) for item in held] == before


def test_calls_hold_the_lock_as_those_through_pybind11_do(module):
    # torch::wrap_pybind_function holds it, and sources with a state count on it.
    import threading

    threads = [threading.Thread(target=lambda: [module.step(1) for _ in range(5000)]) for _ in range(4)]
    before = module.counted()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert module.counted() == before + 20_000


def direct(text, cuda=(), functions=("f",)):
    return _bindings.without_pybind(dict.fromkeys(functions, ""), {"f_0.cpp": text}, cuda)


def test_texts_that_pybind11_has_to_bind():
    assert direct("int f() { return 1; }")
    assert "#include <torch/autograd.h>" in direct("torch::autograd::Function<F>")
    assert direct("#include <torch/extension.h>\n")
    for text in ("py::object f();", "PyObject* f();", "torch::nn::Linear f();", "#include <torch/torch.h>"):
        assert direct(text) is None
    assert direct("", ["#include <torch/extension.h>"]) is None


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """The ways in which a build was tried; nothing is compiled, each says what is in `logs`."""
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path / "cache"))
    _config.refresh()
    tried, logs = [], []

    def place(self, way):
        tried.append("direct" if way.main else "narrow" if way.ours else "whole")

    def run(self, *args):
        log = logs.pop(0) if logs else None
        return (1, log) if log else (1, "error: end")

    monkeypatch.setattr(_ninja.Build, "_place_headers", place)
    monkeypatch.setattr(_ninja.Build, "_run_ninja", run)
    yield tried, logs
    _config.refresh()


def test_an_error_in_the_binding_is_tried_with_pybind11(runs):
    tried, logs = runs
    logs += [
        "python.h:300:5: error: incomplete type\n",
        "x.h:1:1: error: more\n",
        "f_0.cpp:1:1: error: this one\n",
    ]
    with pytest.raises(BuildError, match="this one"):
        load_inline("f", "std::map<int, int> f();", functions=["f"])
    assert tried == ["direct", "narrow", "whole"]


def test_an_error_in_the_users_text_is_tried_once_more(runs):
    tried, logs = runs
    logs += ["f_0.cpp:1:1: error: 'fo' was not declared\n", "f_0.cpp:1:1: error: this one\n"]
    with pytest.raises(BuildError, match="this one"):
        load_inline("f", "int f() { return fo; }", functions=["f"])
    assert tried == ["direct", "whole"]


def test_a_torch_without_the_symbols_gets_pybind11(runs, monkeypatch):
    tried, logs = runs
    monkeypatch.setattr(_bindings, "is_supported", lambda: False)
    with pytest.raises(BuildError):
        load_inline("f", "int f();", functions=["f"])
    assert tried == ["narrow", "whole"]


def test_this_torch_has_the_symbols():
    assert _bindings.is_supported()


@pytest.mark.slow
def test_both_ways_give_the_same(module, monkeypatch, tmp_path):
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(_bindings, "is_supported", lambda: False)
    _config.refresh()
    other = load_inline("bound", SOURCE, **FLAGS)
    values = [(torch.ones(2),), ([torch.ones(1)],), ([1.5],), ({1: 2},), ({1}, {2}), (), (1, 2), (True, "x")]
    values += [
        ("x",),
        (b"x",),
        (bytearray(b"x"), "x"),
        (-1,),
        (300,),
        (2**64,),
        (1.5,),
        (None,),
        (None, "x"),
        (range(3),),
    ]
    values += [
        (torch.tensor(2.5),),
        (torch.tensor([1, 2]),),
        (({}.keys()),),
        ("text", "text"),
        ([[], ()],),
        (1j,),
    ]

    def outcome(function, arguments):
        try:
            found = function(*arguments)
        except Exception as error:
            return type(error)
        return repr(found)

    for name in sorted({*NAMES} - {"counted"}):  # which the tests before have called
        for arguments in values:
            found, expected = (outcome(getattr(bound, name), arguments) for bound in (module, other))
            assert found == expected, (name, arguments)


@pytest.mark.slow
def test_a_type_without_a_caster_gets_pybind11(monkeypatch, tmp_path):
    monkeypatch.setenv("OPKIT_CACHE_DIR", str(tmp_path))
    _config.refresh()
    text = "std::map<std::string, int64_t> f(std::map<std::string, int64_t> x) { return x; }"
    assert load_inline("mapped", text, functions=["f"], extra_cflags=["-O0"]).f({"a": 1}) == {"a": 1}


@pytest.mark.slow
def test_the_header_is_cpp17_as_torch_2_11_compiles():
    folder = Path(torch.__file__).parent / "include"
    flags = ["-std=c++17", "-fsyntax-only", "-x", "c++", f"-I{_link.INCLUDE}", f"-isystem{folder}"]
    flags += [f"-isystem{folder}/torch/csrc/api/include", f"-isystem{sysconfig.get_path('include')}"]
    command = [*compilers.get_cxx().command, *flags, "-"]
    done = subprocess.run(command, input="#include <opkit/python.h>\n", capture_output=True, text=True)
    own = [line for line in done.stderr.splitlines() if "opkit/python.h" in line and "error" in line]
    assert own == []
