# ruff: noqa: UP007, UP045  (the older spellings are what is tested)
from __future__ import annotations

import ctypes
import re
import subprocess
from pathlib import Path
from typing import NamedTuple, Optional

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import opkit
from opkit.cpp import _native, compilers
from opkit.cpp._glue import signature

pytestmark = [
    pytest.mark.usefixtures("registry"),
    pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler"),
]

INCLUDE = Path(opkit.__file__).parent / "cpp" / "include"
T = torch.ones


def kernel(body: str, **kwargs):
    """A kernel from its text without the include."""
    return opkit.cpp.kernel(f"#include <opkit/kernel.h>\nusing namespace opkit;\n{body}\n", **kwargs)


def text_of(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).rstrip(b"\0").decode()


# Writes what an argument looks like from C++ into a tensor of bytes.
SHOW = r"""
struct Out {
  uint8_t* at; int64_t left;
  explicit Out(Tensor t) : at(t.data<uint8_t>()), left(t.numel()) { for (int64_t i = 0; i < left; ++i) at[i] = 0; }
  void put(const char* s, int64_t n) { for (int64_t i = 0; i < n && left > 1; ++i, --left) *at++ = s[i]; }
  void put(const Text& t) { int64_t n = 0; while (t.c_str()[n]) ++n; put(t.c_str(), n); }
};
template <class V> void show(Out& o, const V& v) { Text t; t << v; o.put(t); }
inline void show(Out& o, const StringView& v) { o.put(v.begin(), v.size()); }
inline void show(Out& o, const DType& v) { Text t; t << name(v); o.put(t); }
inline void show(Out& o, const Device& v) { Text t; t << v.type << ":" << v.index; o.put(t); }
inline void show(Out& o, const Tensor& v) {
  Text t; if (!v) t << "None"; else t << name(v.dtype()) << " " << v.dim() << " " << v.numel(); o.put(t);
}
template <class V> void show(Out& o, const Optional<V>& v) { if (v) show(o, *v); else o.put("None", 4); }
template <class V> void show(Out& o, const Span<V>& v) {
  o.put("[", 1); for (const V& one : v) { show(o, one); o.put(",", 1); } o.put("]", 1);
}
"""
F = torch.zeros(2, 3)
H = torch.zeros((), dtype=torch.float16)
ARGUMENTS = {
    "Tensor": (Tensor, [(F, "float32 2 6"), (H, "float16 0 1"), (F[:0].bool(), "bool 2 0")]),
    "Tensor?": (Optional[Tensor], [(F, "float32 2 6"), (None, "None")]),
    "Tensor[]": (list[Tensor], [([F, H], "[float32 2 6,float16 0 1,]"), ([], "[]")]),
    "Tensor?[]": (list[Optional[Tensor]], [([F, None], "[float32 2 6,None,]")]),
    "Tensor[]?": (Optional[list[Tensor]], [([F], "[float32 2 6,]"), (None, "None")]),
    "int": (int, [(-5, "-5"), (2**62, str(2**62)), (-(2**63), str(-(2**63)))]),
    "float": (float, [(0.5, "0.5"), (float("inf"), "inf"), (2, "2")]),
    "bool": (bool, [(True, "true"), (False, "false")]),
    "str": (str, [("hé", "hé"), ("", "")]),
    "dtype": (
        torch.dtype,
        [(torch.bfloat16, "bfloat16"), (torch.complex64, "complex64"), (torch.uint64, "uint64")],
    ),
    "device": (torch.device, [(torch.device("cpu"), "0:-1"), (torch.device("cuda", 3), "1:3")]),
    "int?": (Optional[int], [(7, "7"), (None, "None")]),
    "float?": (Optional[float], [(0.25, "0.25"), (None, "None")]),
    "bool?": (Optional[bool], [(False, "false"), (None, "None")]),
    "str?": (Optional[str], [("x", "x"), (None, "None")]),
    "dtype?": (Optional[torch.dtype], [(torch.int8, "int8"), (None, "None")]),
    "device?": (Optional[torch.device], [(torch.device("cuda:1"), "1:1"), (None, "None")]),
    "int[]": (list[int], [([1, -2], "[1,-2,]"), ([], "[]")]),
    "float[]": (list[float], [([0.5], "[0.5,]")]),
    "bool[]": (list[bool], [([True, False], "[true,false,]")]),
    "int[]?": (Optional[list[int]], [([4], "[4,]"), (None, "None")]),
}


@pytest.fixture(scope="module")
def every_type():
    """One op with an argument of each type, compiled once, and a function that shows what C++ saw."""
    names = [f"a{i}" for i in range(len(ARGUMENTS))]
    scope: dict = {}
    exec(f"def every(x, {', '.join(names[:-1])}, *, {names[-1]}): ...", scope)
    hints = {name: annotation for name, (annotation, _) in zip(names, ARGUMENTS.values(), strict=True)}
    scope["every"].__annotations__ = {"x": Tensor, **hints, "return": Tensor}
    op = opkit.op("t::every")(scope["every"])
    op.register_fake(lambda x, *args, **kwargs: x.new_empty(len(names), 60, dtype=torch.uint8))
    form = signature("every", op.schema).rstrip(";")
    calls = "\n".join(f"  {{ Out o(row(out, {i})); show(o, {name}); }}" for i, name in enumerate(names))
    row = """Tensor row(Tensor out, int64_t i) {
      uint8_t* at = out.data<uint8_t>() + 60 * i;
      return Tensor("row", at, out.sizes() + 1, out.strides() + 1, 1, out.dtype(), out.device());
    }"""
    op.register_kernel("cpu", kernel(f"{SHOW}\n{row}\n{form} {{\n{calls}\n}}"))

    def seen(**kwargs):
        values = {name: cases[0][0] for name, (_, cases) in zip(names, ARGUMENTS.values(), strict=True)}
        return [text_of(r) for r in op(F, **{**values, **kwargs})]

    yield names, seen
    opkit._registry.remove("t::every")


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_argument_arrives_in_cpp(every_type, kind):
    names, seen = every_type
    place = list(ARGUMENTS).index(kind)
    for value, shown in ARGUMENTS[kind][1]:
        found = seen(**{names[place]: value})
        assert found[place] == shown
        assert [f for i, f in enumerate(found) if i != place] == [
            cases[0][1] for i, (_, cases) in enumerate(ARGUMENTS.values()) if i != place
        ]


def test_list_of_str_is_refused():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor, names: list[str]) -> Tensor: ...

    f.register_kernel("cpu", kernel("void f();"))
    with pytest.raises(opkit.BuildError, match="argument names is a list of str, which it cannot take"):
        f(T(1), ["a"])


# ---------------------------------------------------------------- errors

CHECKED = r"""
#include <stdexcept>
void f(Tensor x, int64_t how, Tensor y) {
  OPKIT_CHECK(how != 1, "how is ", how, " and n is ", x.size(-1), true, 0.5);
  if (how == 2) throw std::runtime_error("a C++ exception");
  if (how == 3) parallel_for(0, 1 << 20, 1, [&](int64_t b, int64_t) { OPKIT_CHECK(b < 0, "in a thread"); });
  if (how == 4) parallel_for(0, 1 << 20, 1, [&](int64_t, int64_t) { throw std::runtime_error("std in a thread"); });
  if (how == 5) x.data<double>();
  if (how == 6) x.size(3);
  if (how == 7) throw 7;
  if (how == 8) Tensor().data<float>();
  if (how == 9) dispatch<double, BFloat16>(x.dtype(), [](auto) {});
  y.data<float>()[0] = 1;
}
"""


@pytest.mark.parametrize(
    ("how", "text"),
    [
        (1, "t::f: how is 1 and n is 1true0.5"),
        (2, "t::f: a C[+][+] exception"),
        (3, "t::f: in a thread"),
        (4, "t::f: std in a thread"),
        (5, "t::f: argument x is float32, the kernel reads it as float64"),
        (6, "t::f: argument x has 1 dimensions, the kernel asks for dimension 3"),
        (7, "t::f|torch_call_dispatcher|unknown"),
        (8, "t::f: argument .* is None, the kernel reads it"),
        (9, "t::f: this kernel has no code for float32; it takes: float64 bfloat16"),
    ],
    ids=["OPKIT_CHECK", "exception", "check in parallel_for", "exception in parallel_for", "dtype", "dimension", "int",
         "None", "dispatch"],
)  # fmt: skip
def test_error_in_a_kernel_arrives_with_the_ops_name(how, text):
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor, how: int) -> Tensor: ...

    f.register_kernel("cpu", kernel(CHECKED))
    assert f(T(1), 0).item() == 1
    with pytest.raises(RuntimeError, match=text):
        f(T(1), how)
    assert f(T(1), 0).item() == 1


@pytest.mark.parametrize(
    "body",
    ["void g(Tensor x, Tensor y) {}", "void f(Tensor x) {}", "void f(Tensor x, int64_t k, Tensor y, Tensor z) {}",
     "void f(int64_t k, Tensor x, Tensor y) {}"],
    ids=["missing", "too few", "too many", "another order"],
)  # fmt: skip
def test_kernel_of_another_form_raises_with_the_expected_declaration(body):
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor, k: int) -> Tensor: ...

    f.register_kernel("cpu", kernel(body))
    with pytest.raises(opkit.BuildError) as caught:
        f(T(1), 1)
    assert (
        "The kernel must be a function of this form:\n    void f(opkit::Tensor x, int64_t k, opkit::Tensor out);"
        in str(caught.value)
    )
    assert caught.value.op == "t::f"
    assert caught.value.diagnostics
    assert caught.value.log_path.is_file()
    assert caught.value.command


def test_error_in_the_users_source_is_on_the_users_line(tmp_path):
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor: ...

    path = tmp_path / "mine.cpp"
    path.write_text(
        "#include <opkit/kernel.h>\nvoid f(opkit::Tensor x, opkit::Tensor y) {\n  undefined_thing();\n}\n"
    )
    f.register_kernel("cpu", opkit.cpp.kernel(path))
    with pytest.raises(opkit.BuildError, match="undefined_thing") as caught:
        f(T(1))
    found = caught.value.diagnostics[0]
    assert (Path(found.file).name, found.line, found.column) == ("mine.cpp", 3, 3)
    assert "must be a function of this form" not in str(caught.value)


INLINE = """\
import opkit
from torch import Tensor

@opkit.op("t::inline", shapes="n -> n")
def inline(x: Tensor) -> Tensor: ...

inline.register_kernel("cpu", opkit.cpp.kernel({prefix}\"\"\"
#include <opkit/kernel.h>
void inline_(opkit::Tensor x, opkit::Tensor y) {{
  {statement} // \\t
}}
\"\"\", symbol="inline_"{options}))
"""


def written(path: Path, statement: str, prefix: str = "r", options: str = "", before: str = "") -> opkit.Op:
    """Run a file with an inline kernel, as it would run by itself, and return its op."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(before + INLINE.format(statement=statement, prefix=prefix, options=options))
    scope: dict = {"__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    return scope["inline"]


@pytest.mark.parametrize("name", ["mine.py", "with space.py"])
def test_error_in_inline_source_is_on_the_line_of_the_python_file(tmp_path, name):
    with pytest.raises(opkit.BuildError) as caught:
        written(tmp_path / name, "undefined_thing();").build()
    found = caught.value.diagnostics[0]
    assert (found.file, found.line, found.column) == (str(tmp_path / name), 10, 3)
    assert f"at {tmp_path / name}:10: 'undefined_thing' was not declared" in str(caught.value)
    assert "   10 |   undefined_thing(); // \\t\n" in str(caught.value)


def test_error_in_a_header_is_shown_on_the_line_of_the_python_file(tmp_path):
    with pytest.raises(opkit.BuildError) as caught:
        written(tmp_path / "mine.py", "x.data<int*>();").build()
    assert (caught.value.diagnostics[0].file, caught.value.diagnostics[0].line) == (
        str(tmp_path / "mine.py"),
        10,
    )


@pytest.mark.skipif(compilers.find_nvcc() is None, reason="needs nvcc")
def test_error_in_inline_cuda_source_is_on_the_line_of_the_python_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    with pytest.raises(opkit.BuildError) as caught:
        written(tmp_path / "mine.py", "undefined_thing();", options=", cuda=True").build()
    found = caught.value.diagnostics[0]
    assert (found.file, found.line) == (str(tmp_path / "mine.py"), 10)
    assert "undefined_thing();" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("odd:(name).py", "r"), ("mine.py", "")],
    ids=["a name that messages cannot have", "a text that the file has in another form"],
)
def test_inline_source_that_cannot_be_placed_has_a_readable_name(tmp_path, name, prefix):
    with pytest.raises(opkit.BuildError) as caught:
        written(tmp_path / name, "undefined_thing();", prefix).build()
    found = caught.value.diagnostics[0]
    shown = {"odd:(name).py": "odd  name .py", "mine.py": "mine.py"}[name]
    assert (found.file, found.line) == (f"{shown}, kernel at line 7", 4)


def test_inline_source_at_a_prompt_has_a_readable_name():
    scope: dict = {}
    exec(compile('import opkit\nk = opkit.cpp.kernel("void f();\\n")', "<stdin>", "exec"), scope)
    assert (scope["k"].place, scope["k"].line) == ("<stdin>, kernel at line 2", 1)


def test_inline_source_that_is_written_twice_is_placed_at_the_call(tmp_path):
    path = tmp_path / "twice.py"
    path.write_text(
        "import opkit\n"
        + 'k = opkit.cpp.kernel("""\nvoid f();\n""")\nfirst = globals().get("first", k)\n' * 2
    )
    scope: dict = {"__file__": str(path)}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    assert (scope["first"].line, scope["k"].line) == (2, 6)


@pytest.mark.parametrize("options", ["", pytest.param(", cuda=True", marks=pytest.mark.skipif(
    compilers.find_nvcc() is None, reason="needs nvcc"))], ids=["cpp", "cuda"])  # fmt: skip
def test_inline_source_that_moves_is_not_built_again(tmp_path, monkeypatch, options):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    libraries = set()
    statement = "OPKIT_CHECK(x, __FILE__);"
    for folder, before in (("a", ""), ("b", ""), ("a", "\n" * 7), ("a", "# text\n" * 300)):
        libraries.update(
            written(tmp_path / folder / "mine.py", statement, options=options, before=before).build()
        )
        opkit._registry.remove("t::inline")
    assert len(libraries) == 1
    assert str(tmp_path).encode() not in libraries.pop().read_bytes()


@pytest.mark.skipif(compilers.find_nvcc() is None, reason="needs nvcc")
def test_inline_cuda_source_of_every_architecture_is_part_of_the_key(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0;9.0")  # preprocessing alone sees the first
    libraries = set()
    for value in (1, 2):
        only = f"#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900\n*y = {value};\n#endif"
        statement = f"}}\n__global__ void g(int* y) {{\n{only}\n"
        libraries.update(written(tmp_path / "mine.py", statement, options=", cuda=True").build())
        opkit._registry.remove("t::inline")
    assert len(libraries) == 2


@pytest.mark.parametrize("source", [3, b"void f();\n", None, "", " "])
def test_source_of_another_kind_is_refused(source):
    with pytest.raises(
        opkit.BuildError,
        match=rf"^naming a kernel: its source is {re.escape(repr(source))}; expected a path .* Pass one of them",
    ):
        opkit.cpp.kernel(source)


@pytest.mark.parametrize("name", ["extra_cflags", "extra_cuda_cflags", "extra_ldflags"])
def test_flags_in_one_text_are_refused(name):
    with pytest.raises(opkit.BuildError) as caught:
        kernel("void f();", **{name: "-O1 -DX='a b'"})
    assert str(caught.value) == (
        f"naming a kernel: {name} is \"-O1 -DX='a b'\"; expected a list of flags. "
        f"Write {name}=['-O1', '-DX=a b']."
    )
    with pytest.raises(
        opkit.BuildError, match=rf"{name} is 3; expected a list of flags. Write {name}=\[...\]"
    ):
        kernel("void f();", **{name: 3})
    with pytest.raises(
        opkit.BuildError, match=f"{name} has the entry 3, of type int; expected a list of flags. Write each"
    ):
        kernel("void f();", **{name: ["-O1", 3]})


def test_flags_whose_quotes_do_not_close_are_shown_whole():
    with pytest.raises(opkit.BuildError, match=r"Write extra_cflags=\['-DX=\"'\]\.$"):
        kernel("void f();", extra_cflags='-DX="')


@pytest.mark.parametrize("folder", ["include", Path("include")])
def test_one_include_folder_outside_a_list_is_refused(folder):
    with pytest.raises(
        opkit.BuildError,
        match=r"extra_include_paths is .*; expected a list of folders. Write .*=\['include'\]\.",
    ):
        kernel("void f();", extra_include_paths=folder)


@pytest.mark.parametrize(
    ("cuda", "variable", "reason"),
    [
        (False, "CXX", "CXX is '/no/such', which does not run (correct CXX or unset it)"),
        (True, "CXX", "CXX is '/no/such', which does not run (correct CXX or unset it)"),
        (True, "CUDA_HOME", "CUDA_HOME is '/no/such', whose bin/nvcc does not run (correct CUDA_HOME or unset it)"),
        (True, "CUDA_PATH", "CUDA_PATH is '/no/such', whose bin/nvcc does not run (correct CUDA_PATH or unset it)"),
    ],
)  # fmt: skip
def test_wrong_variable_is_why_a_source_is_unavailable(monkeypatch, cuda, variable, reason):
    if cuda and variable == "CXX" and compilers.find_nvcc() is None:
        pytest.skip("needs nvcc")
    monkeypatch.setattr("opkit.cpp._nvrtc.find", lambda: None)
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    source = kernel("void f();", cuda=cuda)
    monkeypatch.setenv(variable, "/no/such")
    assert source.unavailable() == reason


def test_machine_without_compilers_is_why_a_source_is_unavailable(monkeypatch, tmp_path):
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert kernel("void f();").unavailable() == "no C++ compiler was found (install g++ or set CXX)"
    monkeypatch.setattr(compilers, "find_nvcc", lambda: None)  # there may be one in /usr/local/cuda
    monkeypatch.setattr("opkit.cpp._nvrtc.find", lambda: None)
    assert kernel("void f();", cuda=True).unavailable() == (
        "nvcc was not found (set CUDA_HOME, or for light kernels pip install nvidia-cuda-nvrtc nvidia-cuda-runtime)"
    )


def test_missing_file_is_refused_when_it_is_named():
    with pytest.raises(
        opkit.BuildError, match=r"there is no file .*tests/cpp/nothing.cpp; expected C\+\+ or CUDA source"
    ):
        opkit.cpp.kernel("nothing.cpp")


def test_wrong_call_names_dimensions_as_for_a_python_kernel():
    @opkit.op("t::f", shapes="*b n, n:x -> *b")
    def f(x: Tensor, w: Tensor) -> Tensor: ...

    f.register_kernel("cpu", kernel("void f(Tensor x, Tensor w, Tensor y) {}"))
    with pytest.raises(
        opkit.ShapeError, match=r"dimension 0 of w \(n\) is 4, but dimension 1 of x bound n to 3"
    ):
        f(T(2, 3), T(4))
    with pytest.raises(opkit.DtypeError, match="argument w has dtype torch.int64"):
        f(T(2, 3), T(3, dtype=torch.int64))


# ---------------------------------------------------------------- outputs


class Same(NamedTuple):
    x: Tensor
    k: Tensor


def test_outputs_may_be_named_like_inputs():
    @opkit.op("t::f", shapes="n -> n, n")
    def f(x: Tensor, k: int) -> Same: ...

    f.register_kernel(
        "cpu",
        kernel(
            "void f(Tensor a, int64_t k, Tensor b, Tensor c) { b.data<float>()[0] = 1; c.data<float>()[0] = k; }"
        ),
    )
    assert [t.item() for t in f(T(1), 5)] == [1, 5]


def test_symbol_names_another_function():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor: ...

    f.register_kernel("cpu", kernel("void g(Tensor x, Tensor y) { y.data<float>()[0] = 9; }", symbol="g"))
    assert f(T(1)).item() == 9


@pytest.mark.parametrize("line", ["n m -> n m", None], ids=["shape line replaced", "no shape line"])
def test_outputs_come_from_a_registered_fake(line):
    @opkit.op("t::f", shapes=line)
    def f(x: Tensor, device: torch.device) -> Tensor: ...

    f.register_fake(lambda x, device: x.new_empty(x.shape[1], x.shape[0] + 1, dtype=torch.int32).t())
    f.register_kernel(
        "cpu",
        kernel(
            "void f(Tensor x, Device d, Tensor y) { for (int i = 0; i < y.numel(); ++i) y.data<int32_t>()[i] = i; }"
        ),
    )
    found = f(T(2, 3), torch.device("cpu"))
    assert (tuple(found.shape), found.stride(), found.dtype, found.device.type) == (
        (3, 3),
        (1, 3),
        torch.int32,
        "cpu",
    )
    assert found.t().flatten().tolist() == list(range(9))


def test_factory_takes_its_device_from_its_argument():
    @opkit.op("t::f")
    def f(n: int, device: torch.device) -> Tensor: ...

    f.register_fake(lambda n, device: torch.empty(n, device=device))
    f.register_kernel("cpu", kernel("void f(int64_t n, Device d, Tensor y) { y.data<float>()[n - 1] = 3; }"))
    found = f(2, torch.device("cpu"))
    assert (found[1].item(), found.device.type) == (3, "cpu")


def test_mutated_arguments_are_written_in_place():
    @opkit.op("t::f", shapes="n, n -> ", mutates_args=["y"])
    def f(x: Tensor, y: Tensor) -> None: ...

    f.register_kernel(
        "cpu", kernel("void f(Tensor x, Tensor y) { y.data<float>()[0] += x.data<float>()[0]; }")
    )
    y = T(1)
    assert f(T(1), y) is None
    assert y.item() == 2


def test_lazy_bits_of_an_input_are_resolved():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor: ...

    f.register_kernel(
        "cpu", kernel("void f(Tensor x, Tensor y) { y.data<float>()[0] = x.data<float>()[0]; }")
    )
    x = torch.tensor([1 + 2j]).conj().imag
    assert x.is_neg()
    assert f(x).item() == -2


def test_compiled_code_runs_the_native_kernel():
    @opkit.op("t::f", shapes="*b n -> *b n")
    def f(x: Tensor) -> Tensor: ...

    f.register_kernel(
        "cpu",
        kernel("void f(Tensor x, Tensor y) { for (int i = 0; i < y.numel(); ++i) y.data<float>()[i] = 7; }"),
    )
    found = torch.compile(lambda x: f(x * 2) + 1, fullgraph=True, backend="aot_eager")(T(2, 3))
    assert torch.equal(found, torch.full((2, 3), 8.0))


# ---------------------------------------------------------------- the glue and the plan agree

LINE = "*b n, k n+1, m:a, m*2 *b -> *b n//k, (n-3)%4 m:float64, ():int8"


@pytest.fixture(scope="module")
def expressions():
    """One op with every kind of entry, compiled once; it returns its plan's answer and the kernel's."""

    def f(a, b, c, d, k): ...

    f.__annotations__ = {"a": Tensor, "b": Tensor, "c": Optional[Tensor], "d": Optional[Tensor], "k": int}
    f.__annotations__["return"] = tuple[Tensor, Tensor, Tensor]
    op = opkit.op("t::expressions", shapes=LINE)(f)
    source = kernel("void expressions(Tensor, Tensor, Tensor, Tensor, int64_t, Tensor, Tensor, Tensor) {}")
    call = source.bind(op.schema, op._runner.native_plan, "cpu", None, "cpp")
    yield op._runner.native_plan, call
    opkit._registry.remove("t::expressions")


dims = st.integers(0, 4)
shape = st.lists(st.integers(0, 3), max_size=2)


@st.composite
def expression_inputs(draw):
    """Inputs of `expressions`, most of which fit."""
    b, n, m, k = draw(shape), draw(dims), draw(dims), draw(st.integers(0, 3))
    shapes = [[*b, n], [k, n + 1], [m], [2 * m, *b]]
    wrong = draw(st.sampled_from([None, None, 0, 1, 2, 3]))
    if wrong is not None:
        shapes[wrong] = draw(shape)
    tensors = [torch.empty(s) for s in shapes]
    tensors[2] = draw(st.sampled_from([tensors[2], tensors[2].double(), None, tensors[2]]))
    tensors[3] = draw(st.sampled_from([tensors[3], None]))
    return *tensors, k


@settings(max_examples=300)
@given(expression_inputs())
def test_glue_agrees_with_the_plan(expressions, values):
    plan, bound = expressions
    try:
        metas, device = plan.infer(*values)
    except (opkit.ShapeError, opkit.DtypeError):
        with pytest.raises(RuntimeError, match="t::expressions: "):
            bound.call(*values)
        return
    if any(size < 0 for meta in metas for size in meta.shape):
        return
    found = bound.call(*values)
    assert [(tuple(t.shape), t.dtype, t.device) for t in found] == [(m.shape, m.dtype, device) for m in metas]
    assert all(t.is_contiguous() for t in found)


def test_dtype_that_a_light_kernel_does_not_know_is_refused():
    @opkit.op("t::f", shapes="n -> n:complex32")
    def f(x: Tensor) -> Tensor: ...

    f.register_kernel("cpu", kernel("void f(Tensor, Tensor) {}"))
    with pytest.raises(
        opkit.BuildError,
        match="building t::f: the shape line 'n -> n:complex32' has the dtype complex32, which a light kernel does not "
        "know; expected one of uint8, .* Register a Python kernel",
    ):
        f(T(2))


def test_dtype_argument_that_may_be_none_leaves_the_dtype_to_the_first_tensor():
    @opkit.op("t::f", shapes="n, n:dtype -> n:dtype")
    def f(x: Tensor, y: Tensor, dtype: Optional[torch.dtype] = None) -> Tensor: ...

    f.register_kernel("cpu", kernel("void f(Tensor x, Tensor y, Optional<DType> d, Tensor z) {}"))
    assert f(T(2), T(2).int()).dtype == torch.float32
    assert f(T(2), T(2).int(), torch.int32).dtype == torch.int32
    with pytest.raises(
        opkit.DtypeError, match="argument y has dtype torch.int32, expected torch.int8, the value of"
    ):
        f(T(2), T(2).int(), torch.int8)


def test_int_argument_that_may_be_none_is_a_size_where_it_is_given():
    @opkit.op("t::f", shapes="n ... -> n k")
    def f(x: Tensor, k: Optional[int]) -> Tensor: ...

    @opkit.op("t::g", shapes="n k -> k")
    def g(x: Tensor, k: Optional[int]) -> Tensor: ...

    for op in (f, g):
        name = op.name[3:]
        op.register_kernel("cpu", kernel(f"void {name}(Tensor x, Optional<int64_t> k, Tensor y) {{}}"))
    assert f(T(2), 3).shape == (2, 3)
    assert (g(T(2, 3), None).shape, g(T(2, 3), 3).shape) == ((3,), (3,))
    with pytest.raises(
        opkit.ShapeError, match="the size k of output out is bound only by arguments that are None"
    ):
        f(T(2), None)
    with pytest.raises(
        opkit.ShapeError, match=r"dimension 1 of x \(k\) is 3, but the argument k bound k to 4"
    ):
        g(T(2, 3), 4)


# ---------------------------------------------------------------- the binary contract with torch


def test_dtype_numbers_are_those_of_torch():
    shim = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    header = (INCLUDE / "opkit" / "kernel.h").read_text()
    body = re.search(r"enum class DType : int32_t \{(.*?)\};", header, re.DOTALL).group(1)
    numbers = {name.replace("boolean", "bool"): int(n) for name, n in re.findall(r"(\w+) = (\d+)", body)}
    assert len(numbers) > 12
    assert numbers == _native.DTYPES
    told = {
        n: getattr(shim, f"aoti_torch_dtype_{n}")() for n in numbers if hasattr(shim, f"aoti_torch_dtype_{n}")
    }
    assert told.items() <= numbers.items()
    assert set(numbers) - set(told) <= {"float8_e8m0fnu", "float4_e2m1fn_x2"}  # torch 2.11 cannot tell these


def test_every_dtype_has_a_number_and_a_name_or_is_known_to_lack_one():
    header = (INCLUDE / "opkit" / "kernel.h").read_text()
    named = set(re.findall(r"case DType::(\w+): return", header))
    assert {name.replace("bool", "boolean") for name in _native.DTYPES} == named


def syntax_only(source: Path, *folders: Path) -> subprocess.CompletedProcess[str]:
    """Check a unit against torch's headers."""
    flags = [f"-I{folder}" for folder in (*folders, Path(torch.__file__).parent / "include", INCLUDE)]
    command = [
        *compilers.find_cxx().command,
        "-fsyntax-only",
        "-std=c++20",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ]
    return subprocess.run([*command, *flags, str(source)], capture_output=True, text=True)


BOTH = """#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <opkit/glue.h>
"""


def test_prototypes_agree_with_torchs_own_headers(tmp_path):
    source = tmp_path / "both.cpp"
    source.write_text(BOTH)
    run = syntax_only(source)
    assert run.returncode == 0, run.stderr


def test_prototype_that_disagrees_would_be_noticed(tmp_path):
    source, folder = tmp_path / "both.cpp", tmp_path / "opkit"
    source.write_text(BOTH)
    folder.mkdir()
    text = (INCLUDE / "opkit" / "glue.h").read_text()
    changed = text.replace(
        "aoti_torch_get_dim(AtenTensorHandle tensor, int64_t*",
        "aoti_torch_get_dim(AtenTensorHandle tensor, int*",
    )
    assert changed != text
    (folder / "glue.h").write_text(changed)
    run = syntax_only(source, tmp_path)
    assert run.returncode != 0
    assert "aoti_torch_get_dim" in run.stderr


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_calls_do_not_leak():
    @opkit.op("t::f", shapes="n, n -> n")
    def f(x: Tensor, o: Optional[Tensor], k: Optional[int], s: Optional[str], li: list[int]) -> Tensor: ...

    @opkit.op("t::g")
    def g(xs: list[Tensor], ys: list[Optional[Tensor]], z: Optional[list[Tensor]], s: str) -> Tensor: ...

    f.register_kernel(
        "cpu", kernel('void f(Tensor, Tensor, Optional<int64_t> k, Optional<StringView>, Span<int64_t>, Tensor) {\n'
                      'OPKIT_CHECK(*k == 1, "no"); }'),
    )  # fmt: skip
    g.register_fake(lambda xs, ys, z, s: torch.empty_like(xs[0]))
    g.register_kernel(
        "cpu", kernel("void g(Span<Tensor>, Span<Tensor>, Optional<Span<Tensor>>, StringView, Tensor) {}")
    )
    x = T(1024)
    many = [x, None] * 100  # 100 optionals on the heap in each call

    def work(count):
        for _ in range(count):
            f(x, x, 1, "some text that is longer than what a string holds inline", [1, 2, 3])
            with pytest.raises(RuntimeError, match="t::f: no"):
                f(x, x, 2, "some text that is longer than what a string holds inline", [1])
            for _ in range(3):
                g([x, x], many, [x], "some text that is longer than what a string holds inline")

    work(200)
    before = resident()
    work(4000)  # 20,000 calls; a tensor lost in each would be 80 MiB, the optionals 38 MiB
    assert resident() - before < 16 * 2**20


# ---------------------------------------------------------------- CUDA


@pytest.mark.skipif(compilers.find_nvcc() is None, reason="needs nvcc")
def flags_at(address: int) -> set[str]:
    """Return what the system says of the memory at an address of this process."""
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        span = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", block)
        if span and int(span[1], 16) <= address < int(span[2], 16):
            return set(re.findall(r"(?m)^VmFlags: (.*)$", block)[0].split())
    return set()


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="needs Linux with large pages"
)
def test_large_output_lies_on_large_pages():
    @opkit.op("lt::filled", shapes=" -> n:float32")
    def filled(n: int, device: torch.device) -> Tensor: ...

    body = (
        "void filled(int64_t n, Device device, Tensor y) { for (auto i = n; i--;) y.data<float>()[i] = 1; }"
    )
    filled.register_kernel("cpu", kernel(body))
    y = filled(64 << 18, torch.device("cpu"))
    assert y.min() == y.max() == 1
    page = 2 << 20
    first = -(-y.data_ptr() // page) * page
    assert "hg" in flags_at(first)
    assert "hg" in flags_at(first + y.nbytes - 2 * page)


def test_cuda_unit_compiles_without_a_device():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor, k: float) -> Tensor: ...

    source = kernel(
        """__global__ void scale(const float* x, float k, float* y, int64_t n) {
          int64_t i = blockIdx.x * int64_t(blockDim.x) + threadIdx.x; if (i < n) y[i] = float(Half(x[i] * k));
        }
        void f(Tensor x, double k, Tensor y) {
          scale<<<(x.numel() + 255) / 256, 256, 0, stream()>>>(x.data<float>(), k, y.data<float>(), x.numel());
          OPKIT_CUDA_CHECK(cudaGetLastError());
        }""",
        cuda=True,
    )
    f.register_kernel("cuda", source)
    assert f.kernels[0][:2] == ("cuda", "cuda")
    (library,) = f.build()
    assert library.suffix == ".so"
    assert b"opkit_call" in library.read_bytes()


def test_build_of_an_unknown_backend_lists_the_native_ones():
    @opkit.op("t::f", shapes="n -> n")
    def f(x: Tensor) -> Tensor: ...

    f.register_kernel("cpu", kernel("void f(Tensor x, Tensor y) {}"))
    with pytest.raises(
        opkit.BackendError, match="no native kernel has the backend 'cp'; .*: cpp. Did you mean 'cpp'"
    ):
        f.build("cp")


# ---------------------------------------------------------------- loading


def schema_of_a_scale():
    @opkit.op("t::scale", shapes="n -> n")
    def scale(x: Tensor) -> Tensor: ...

    return scale.schema


def test_library_that_does_not_load_says_what_to_remove(tmp_path):
    library = tmp_path / "broken.so"
    library.write_bytes(b"no library")
    with pytest.raises(
        opkit.BuildError, match=rf"loading the kernel of t::scale from {library}: .*Remove the folder"
    ):
        _native.register(library, schema_of_a_scale(), "cpu", with_outputs=False)


def test_cuda_library_for_a_torch_without_cuda_says_so(monkeypatch, tmp_path):
    def fail(path, mode):
        raise OSError("libtorch_cuda.so: cannot open shared object file: No such file or directory")

    schema = schema_of_a_scale()
    monkeypatch.setattr(_native._ctypes, "dlopen", fail)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(opkit.BuildError) as caught:
        _native.register(tmp_path / "scale.so", schema, "cpu", with_outputs=False)
    assert str(caught.value) == (
        f"loading the kernel of t::scale from {tmp_path / 'scale.so'}: it is compiled with nvcc and needs "
        f"libtorch_cuda.so, but torch {torch.__version__} is built without CUDA. Expected a torch with CUDA for "
        "CUDA source. Install one (https://pytorch.org/get-started), or write the kernel in C++, without cuda=True "
        "and the suffix .cu."
    )
    assert caught.value.op == "t::scale"


def test_undefined_function_is_named_as_in_the_source():
    @opkit.op("t::scale", shapes="n -> n")
    def scale(x: Tensor) -> Tensor: ...

    scale.register_kernel("cpu", kernel("void helper(int); void scale(Tensor x, Tensor y) { helper(3); }"))
    with pytest.raises(opkit.BuildError, match=r"it needs helper\(int\), which no library"):
        scale(T(1))


def test_device_that_the_shim_refuses_is_named(monkeypatch):
    schema = schema_of_a_scale()
    library = kernel("void scale(Tensor x, Tensor y) {}").build(
        schema, opkit.get("t::scale")._runner.native_plan, "cpp"
    )
    monkeypatch.setattr(_native._torch, "dispatch_key", lambda device: "NoSuchKey")
    with pytest.raises(opkit.BuildError, match=r"torch refused it for the device xpu\. Expected"):
        _native.register(library, schema, "xpu", with_outputs=False)


def test_schema_that_torch_does_not_parse_is_named(monkeypatch):
    schema = schema_of_a_scale()
    library = kernel("void scale(Tensor x, Tensor y) {}").build(
        schema, opkit.get("t::scale")._runner.native_plan, "cpp"
    )
    monkeypatch.setattr(_native, "_lowered", lambda schema, with_outputs: "(Tensor")
    with pytest.raises(
        opkit.BuildError, match=r"torch refused the schema \(Tensor\. Expected one that it parses"
    ):
        _native.register(library, schema, "cpu", with_outputs=False)


def test_torch_with_other_dtype_numbers_is_refused(monkeypatch):
    assert _native._find_other_number(_native._SHIM) is None
    monkeypatch.setattr(_native, "DTYPES", {"float16": 5, "float32": 99})
    assert _native._find_other_number(_native._SHIM) == "float32"
    monkeypatch.setattr(_native, "_other", "float32")
    with pytest.raises(
        opkit.BuildError, match="another number for float32 than opkit/kernel.h. Expected torch 2"
    ):
        _native.register(Path("scale.so"), schema_of_a_scale(), "cpu", with_outputs=False)


def test_the_source_key_is_that_of_the_source_not_of_the_glue(registry, monkeypatch):
    from opkit.cpp import _glue

    @opkit.op("t::keyed", shapes="n -> n")
    def keyed(x: Tensor) -> Tensor:
        return x

    def keys(text: str = "void keyed(opkit::Tensor, opkit::Tensor) {}\n") -> tuple[str, str]:
        job = kernel(text).job(keyed.schema, keyed._runner.native_plan, "cpp")
        return job.source_key(), job.key()

    before = keys()
    assert keys() == before
    assert all(
        one != other for one, other in zip(keys("void keyed(opkit::Tensor, opkit::Tensor);\n"), before)
    )
    generate = _glue.unit_source
    monkeypatch.setattr(_glue, "unit_source", lambda *args, **kw: generate(*args, **kw) + "// worded anew\n")
    assert keys()[0] == before[0]
    assert keys()[1] != before[1]
