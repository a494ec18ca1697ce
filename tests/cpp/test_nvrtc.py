from __future__ import annotations

import ctypes
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import opkit
from opkit.cpp import _cuda_split, _nvrtc, compilers, diagnostics, nvrtc
from opkit.cpp.toolchain import Options

ROOT = Path(opkit.__file__).parents[1]
INCLUDE = ROOT / "opkit" / "cpp" / "include"
WHY_NONE = nvrtc.TOOLCHAIN.find() is None and nvrtc.TOOLCHAIN.why_none()
needs_nvrtc = pytest.mark.skipif(bool(WHY_NONE), reason=WHY_NONE or "")
# Without optimisation: what is compiled counts here, not how.
QUICK = ("-G",)


def build(unit: str, folder: Path, *, sources=(), architectures=("8.0",), own=QUICK, cflags=()) -> Path:
    """The library of a unit that includes opkit/kernel.h; nothing of torch is linked."""

    def execute(command):
        return subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    folder.mkdir(exist_ok=True)
    (folder / "unit.cu").write_text(unit)
    cxx = compilers.get_cxx()
    options = Options(
        compiler=nvrtc.TOOLCHAIN.find(),
        cxx=cxx,
        include_paths=(INCLUDE, ROOT / "kernels" / "include"),
        system_paths=(),
        defines=(),
        cflags=("-O1", *cflags),
        own_flags=own,
        architectures=architectures,
    )
    done = nvrtc.compile_unit(
        folder / "unit.cu",
        folder / "unit.o",
        options=options,
        label="demo::k [cuda]",
        op="demo::k",
        execute=execute,
    )
    if done.returncode:
        (folder / "command").write_text("\0".join(done.args))
        raise diagnostics.failure(done.stdout, label="demo::k [cuda]", op="demo::k", sources=sources)
    link = nvrtc.TOOLCHAIN.link_flags(options.compiler)
    done = execute([*cxx.command, "-shared", "unit.o", "-o", "k.so", *link])
    assert done.returncode == 0, done.stdout
    return folder / "k.so"


def symbols(library: Path) -> dict[str, str]:
    """The kernels of a library: how the source calls them, and their symbols."""
    names = library.with_name("names")
    command = ["objcopy", "-O", "binary", "-j", ".rodata.opkit_kernels", library.with_name("unit.o"), names]
    subprocess.run(command, check=True)
    words = names.read_text().split("\0")[:-1]
    names.unlink()
    return {name: symbol for symbol, name in zip(words[::2], words[1::2], strict=True)}


# ---------------------------------------------------------------- the split


def host(text: str) -> str:
    return _cuda_split.host(text, ())


def device(text: str) -> str:
    return _cuda_split.device(text, ())


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        ("f<<<1, 2>>>(x, y);", "f(::opkit::rtc::Config(1, 2),x, y);"),
        ("f<<<1, 2>>>();", "f(::opkit::rtc::Config(1, 2));"),
        ("a::f<T, B<C, 3>><<<g(1, 2), dim3{1, 2}, n >> 2, s>>>(x);", None),
        ("f<A<B<C>>><<<X<Y<Z<int>>>::value, 1>>>(x);", None),
        ("auto l = [&](auto z) { f<decltype(z)><<<1, 2>>>(z, [=] { return 1; }()); };", None),
        ("table[i]<<<1, 2>>>(x); (p)<<<1, 2>>>(x);", None),
    ],
)
def test_launches_become_calls_with_the_shape_first(launch, expected):
    text = host(f"template <class T> void run(T t) {{ {launch} }}")
    expected = expected or re.sub(
        r"<<<(.*?)>>>\((?=[^:])", r"(::opkit::rtc::Config(\1),", launch.replace("Z<int>>>::", "Z<int>> >::")
    ).replace("Z<int>> >::", "Z<int>>>::")
    assert expected in text


@pytest.mark.parametrize(
    "line",
    [
        'const char* s = "f<<<1, 2>>>(x) __global__";',
        "// f<<<1, 2>>>(x)",
        "/* f<<<1, 2>>>(x) \n */",
        'auto s = R"x(f<<<1, 2>>>(x) )" )x";',
        "char c = '\"'; char d = '\\'';",
        "std::cout << a << b; x <<= 3; y >>= 1; z = a < b;",
        "int n = 1'000'000;",
        "return operator<<<T>(a, b);",
    ],
)
def test_what_only_looks_like_a_launch_stays(line):
    text = f"void run() {{\n{line}\n}}\n"
    assert host(text) == text


@pytest.mark.parametrize(
    ("parameters", "names"),
    [
        ("float* x, const int n", ["x", "n"]),
        ("const Pair<int, T>* __restrict__ p, typename T::q r = {1, 2}", ["p", "r"]),
        ("T*, int, const T, typename T::q", ["opkit_0", "opkit_1", "opkit_2", "opkit_3"]),
        (
            "unsigned n, unsigned long, int k = f<a, b>(1, 2), bool = (1 > 0)",
            ["n", "opkit_1", "k", "opkit_3"],
        ),
        ("Ts... xs", ["xs)..."]),
        ("const __grid_constant__ Map map, int last[3]", ["map", "last"]),
        ("void", []),
        ("", []),
    ],
)
def test_a_kernel_passes_every_parameter_on(parameters, names):
    text = host(
        "template <class T, class = X<(3>2), int>>\n"
        f"__global__ void __launch_bounds__(N, 2) f({parameters}) {{\n  g();\n}}\n"
    )
    arguments = text.split("opkit_arguments[] = {")[1].split("};")[0]
    passed = [part.strip().removeprefix("(void*)__builtin_addressof(") for part in arguments.split(",")]
    assert [name.rstrip(")") if "..." not in name else name for name in passed] == [*names, "nullptr"]
    assert "__launch_bounds__" not in text
    assert "g()" not in text
    assert text.count("\n") == 4


SPACES = """struct Foo : Base<sizeof(int)> {
 int a, b{3}; void (*fp)(int);
 explicit Foo(int q) : a(q), b{q} { on_host(); }
 __device__ Foo(float q) : a(q), b{q} { on_device(); }
 __host__ __device__ operator float() const { return on_both(); }
 __device__ bool operator()(int i) const {
   return on_device();
 }
 Foo operator<<(int) { return on_host(); }
 Foo() = default;
 constexpr static int twice(int i) { return on_both(i); }
};
namespace a { inline namespace b { extern "C" {
template <class T> requires (sizeof(T) == 2) __device__ auto f(T v) -> decltype(v) { return on_device(); }
static struct Foo g(int) noexcept { return on_host(); }
}}}
static int counter = 0; const int kept = 3; void declared(std::vector<int>);
"""


def test_each_side_has_the_functions_of_its_own():
    for text, absent in ((host(SPACES), "on_device"), (device(SPACES), "on_host")):
        assert absent not in text
        assert text.count("on_both") == 2
        assert text.count("\n") == SPACES.count("\n")
        for kept in ("int a, b{3}; void (*fp)(int);", "Foo() = default;", "kept = 3"):
            assert kept in text
    assert "on_host" in host(SPACES)
    assert "on_device" in device(SPACES)
    assert "__device__" not in host(SPACES)
    assert "counter" not in device(SPACES)
    assert "std::vector" not in device(SPACES)


def test_brackets_that_do_not_match_are_left_to_the_compilers():
    text = "void f() { g(1; }\nvoid h() { k<<<1, 2>>>(x); }\n"
    assert host(text) == text
    assert device(text) == text


def test_headers_are_told_apart_by_who_wrote_them():
    text = (
        '# 1 "u.cu"\n# 1 "/usr/include/x.h" 1 3\nvoid system(){ f<<<1,2>>>(x); }\n# 2 "u.cu" 2\nconst int y[] = {\n'
        '# 2 "u.cu" 3 4\n(__builtin_inff())\n# 2 "u.cu"\n};\n'
        '# 1 "/cuda/fp16.h" 1\n__host__ __device__ int cuda();\n# 3 "u.cu" 2\nconst int z = 1;\n'
    )
    there = _cuda_split.device(text, [Path("/cuda")])
    assert "system" not in there
    assert "__builtin_inff" in there
    assert "__device__ int cuda()" in there
    here = _cuda_split.host(text, [Path("/cuda")])
    assert "f<<<1,2>>>(x)" in here
    assert "__builtin_inff" in here
    assert "__device__" not in here


# ---------------------------------------------------------------- finding it


def test_find_tells_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr(_nvrtc, "_found", {})
    monkeypatch.setattr(_nvrtc, "_libraries", lambda homes: iter(()))
    assert _nvrtc.find() is None
    assert "NVRTC was not found (pip install nvidia-cuda-nvrtc" in _nvrtc.why_none()

    library = tmp_path / "lib" / "libnvrtc.so.99"
    monkeypatch.setattr(_nvrtc, "_libraries", lambda homes: iter([library]))
    monkeypatch.setattr(torch.version, "cuda", None)
    assert _nvrtc.find() is None
    assert f"{library} has no headers of CUDA's runtime (pip install nvidia-cuda-runtime" in _nvrtc.why_none()

    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert f"{library} is not of CUDA 12, which torch is built for" in _nvrtc.why_none()
    assert "nvidia-cuda-nvrtc-cu12" in _nvrtc.why_none()


def test_find_takes_a_library_with_the_headers_of_its_version(monkeypatch, tmp_path):
    monkeypatch.setattr(_nvrtc, "_found", {})
    monkeypatch.setattr(torch.version, "cuda", None)
    folder = tmp_path / "nvidia" / "cuda_nvrtc" / "lib"
    folder.mkdir(parents=True)
    for name in ("libnvrtc.so.12", "libnvrtc-builtins.so.12.9"):
        (folder / name).write_bytes(b"elf")
    for package, version in (("cu13", 13000), ("cuda_runtime", 12090)):
        header = tmp_path / "nvidia" / package / "include" / "cuda_runtime_api.h"
        header.parent.mkdir(parents=True)
        header.write_text(f"#define CUDART_VERSION  {version}\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(_nvrtc, "_loaded", list)
    found = _nvrtc.find()
    assert found
    assert (found.library.parent, found.major, found.minor) == (folder, 12, 9)
    assert found.include == (tmp_path / "nvidia" / "cuda_runtime" / "include",)
    assert found.version.startswith("NVRTC 12.9")


def test_a_library_that_does_not_load_is_named(tmp_path):
    broken = tmp_path / "libnvrtc.so.13"
    broken.write_bytes(b"not ELF")
    found = _nvrtc.Nvrtc(broken, (), "NVRTC 13.0", 13, 0)
    with pytest.raises(opkit.errors.BuildError, match=r"loading NVRTC.*libnvrtc\.so\.13.*Reinstall"):
        _nvrtc.supported(found)


# ---------------------------------------------------------------- building


@needs_nvrtc
@pytest.mark.parametrize(
    "source",
    [
        "vector_add/vector_add.cu",
        "rms_norm/rms_norm.cu",
        "swiglu/swiglu.cu",
        "cross_entropy/cross_entropy.cu",
        "",
    ],
)
def test_shipped_sources_build_and_every_kernel_is_there(tmp_path, source):
    path = ROOT / "kernels" / source if source else ROOT / "examples" / "03_cuda_kernel.cu"
    library = build(f'#define OPKIT_OP "a::b"\n#include "{path}"\n', tmp_path, sources=[path])
    compiled, content = symbols(library), library.read_bytes()
    kernel = r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s+)?(\w+)\("
    written = set(re.findall(kernel, path.read_text()))
    assert compiled  # one source has them in a header
    types = ("float", "opkit::BFloat16", "opkit::Half", *(("double",) if source else ()))
    for name in written:
        of_name = [full for full in compiled if full.split("<")[0] == name]
        assert of_name
        if "<" in of_name[0]:
            assert all(any(t in full for full in of_name) for t in types)
    for symbol in compiled.values():
        assert content.count(symbol.encode()) >= 2  # in the table and in the image
    assert {file.name for file in tmp_path.iterdir()} == {"unit.cu", "unit.cu.d", "unit.o", "k.so"}
    assert str(path) in (tmp_path / "unit.cu.d").read_text().split()


ODD = r"""
#include <opkit/kernel.h>
#include <vector>
#include <string>
#include <algorithm>
#include <cfloat>
#include <limits>
#include "part.h"
#define LAUNCH(kernel, ...) kernel<<<1, 32, 0, 0>>>(__VA_ARGS__)
#define DEFINE(T) __global__ void set_##T(T* y) { y[threadIdx.x] = T(INFINITY) * LARGE; }
constexpr float LARGE = 2;
DEFINE(float)
DEFINE(double)
namespace outer { namespace {
enum class Mode { a, b };
template <class T, int N, bool B, Mode M, class... Rest>
__global__ void mixed(T* y, Rest... rest) { if (B) y[0] = T(N + int(M)); }
struct Local { int at; };
__global__ void hidden(Local* p) { p->at = twice(4); }
} }
extern "C" __global__ void plain(uint8_t* y) { assert(y != nullptr); *y = UINT8_MAX; }
static __global__ void internal() {}
template <class T> struct Run {
  std::vector<T> values;
  void operator()(T* y) const {
    outer::mixed<T, -3, true, outer::Mode::b, int, opkit::Half><<<1, 1>>>(y, 1, opkit::Half(1));
  }
};
static std::string text(int n) { return std::string(n, 'x'); }
void run() {
  float* y = nullptr;
  LAUNCH(set_float, y);
  LAUNCH(internal);
  set_double<<<1, 1>>>(nullptr);
  Run<opkit::BFloat16>()(nullptr);
  auto generic = [](auto* z) {
    outer::mixed<std::remove_pointer_t<decltype(z)>, 7, false, outer::Mode::a><<<1, 1>>>(z);
  };
  generic(y);
  outer::hidden<<<1, 1>>>(nullptr);
  plain<<<text(3).size(), 1>>>(nullptr);
  part<unsigned char><<<1, 1>>>(nullptr);
  if (false) throw 1;
}
"""
PART = """#pragma once
__host__ __device__ constexpr int twice(int i) { return 2 * i; }
template <class T> __global__ void part(T* y) {
  static_assert(std::numeric_limits<T>::max() == 255 && std::numeric_limits<float>::infinity() > FLT_MAX);
  *y = T(twice(3)) + T(std::is_same_v<T, float>) + std::max<T>(*y, 3);
  static_assert(std::is_same_v<decltype(std::sqrt(1.0f)), float> && std::is_same_v<decltype(std::pow(1., 2.)), double>);
  if (std::isinf(std::exp(1.0f))) *y = std::abs(-3);
}
"""


@needs_nvrtc
def test_names_survive_namespaces_macros_and_all_kinds_of_template_arguments(tmp_path):
    (tmp_path / "odd.cu").write_text(ODD)
    (tmp_path / "part.h").write_text(PART)
    unit = f'#include "{tmp_path / "odd.cu"}"\n'
    compiled = symbols(build(unit, tmp_path / "w", architectures=("8.0", "9.0a", "9.0+PTX")))
    assert set(compiled) == {
        "set_float",
        "set_double",
        "internal",
        "plain",
        "outer::hidden",
        "outer::mixed<opkit::BFloat16, -3, true, (outer::Mode)1, int, opkit::Half>",
        "outer::mixed<float, 7, false, (outer::Mode)0>",
        "part<unsigned char>",
    }
    assert compiled["plain"] == "plain"


@needs_nvrtc
@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("__global__ void f(int* y) {\n  *y = missing;\n}\nvoid g() { f<<<1, 1>>>(nullptr); }", 3, "missing"),
        ("__global__ void f(int* y) {}\nvoid g() {\n  int unused = absent;\n}", 4, "absent"),
        ("__device__ int h() {\n  return nowhere;\n}", 3, "nowhere"),
        ("__global__ void f(int* y) {}\nvoid g() {\n  f<<<1, 1>>>(1.5, 2);\n}", 4, "cannot convert"),
        ("void g() {\n  f<<<1, 1>>>(1);\n}", 3, "was not declared"),
        ("void g() {\n  int a = 1;\n  a = (2;\n}\n", 4, "expected"),
    ],
)
def test_errors_are_on_the_users_line(tmp_path, text, line, message):
    path = tmp_path / "k.cu"
    path.write_text(f"#include <opkit/kernel.h>\n{text}\n")
    with pytest.raises(opkit.errors.BuildError, match=f"building demo::k.*{message}") as caught:
        build(f'#include "{path}"\n', tmp_path / "w", sources=[path])
    first = caught.value.diagnostics[0]
    assert (first.file, first.line) == (str(path), line)
    assert caught.value.op == "demo::k"


@needs_nvrtc
def test_the_depfile_has_what_is_included_and_not_where_text_is_from(tmp_path):
    header, origin = tmp_path / "with space.h", tmp_path / "notebook.py"
    header.write_text("__device__ int helper() { return 1; }\n")
    origin.write_text("")
    text = f'#include <opkit/kernel.h>\n#include "{header}"\n#line 7 "{origin}"\n__global__ void f() {{ wrong; }}\n'
    with pytest.raises(opkit.errors.BuildError) as caught:
        build(text, tmp_path / "w")
    assert (caught.value.diagnostics[0].file, caught.value.diagnostics[0].line) == (str(origin), 7)
    build(text.replace("wrong;", "helper();"), tmp_path / "w")
    listed = (tmp_path / "w" / "unit.cu.d").read_text()
    assert str(header).replace(" ", "\\ ") in listed
    assert str(INCLUDE / "opkit" / "kernel.h") in listed
    assert origin.name not in listed


@needs_nvrtc
def test_kernels_without_a_name_are_refused(tmp_path):
    text = "template <class F> __global__ void f(F g) { g(1); }\nvoid h() { f<<<1, 1>>>([](int) {}); }\n"
    with pytest.raises(
        opkit.errors.BuildError, match=r"building demo::k \[cuda\]: the kernel f<.*lambda.*nvcc"
    ):
        build(f"#include <opkit/kernel.h>\n{text}", tmp_path)


@needs_nvrtc
def test_architectures_that_nvrtc_does_not_know_are_named(tmp_path):
    text = "#include <opkit/kernel.h>\n__global__ void f() {}\n"
    with pytest.raises(
        opkit.errors.BuildError, match=r"NVRTC \d+\.\d+ does not compile for the architecture 3\.0"
    ) as caught:
        build(text, tmp_path, architectures=("3.0",))
    assert "9.0, " in str(caught.value)
    assert "TORCH_CUDA_ARCH_LIST" in str(caught.value)


@needs_nvrtc
def test_a_failed_step_can_be_repeated(tmp_path, monkeypatch, capsys):
    with pytest.raises(opkit.errors.BuildError):
        build("#include <opkit/kernel.h>\n__global__ void f() { wrong; }\n", tmp_path)
    command = (tmp_path / "command").read_text().split("\0")
    assert command[:3] == [sys.executable, "-m", _nvrtc.__name__]
    monkeypatch.chdir(tmp_path)
    assert _nvrtc._main(*command[3:]) == 1
    assert 'identifier "wrong" is undefined' in capsys.readouterr().err


@needs_nvrtc
def test_flags_reach_the_side_that_they_are_for(tmp_path):
    folder = tmp_path / "with space"
    folder.mkdir()
    (folder / "own.h").write_text("constexpr int kOwn = 3;\n__device__ inline int own() { return kOwn; }\n")
    text = """#include <opkit/kernel.h>
    #include <own.h>
    static_assert(BOTH == 1 && FOUR == 4 && __cplusplus < 202002L);
    #if defined(__CUDA_ARCH__)
    static_assert(__CUDA_ARCH__ == 800);
    #elif HOST != 2
    #error no
    #endif
    __global__ void f(int* y) { *y = own(); }
    void g() { f<<<1, 1>>>(nullptr); }
    """
    flags = (
        "-D",
        "BOTH=1",
        "-Xcompiler",
        "-DHOST=2",
        "-std=c++17",
        "--expt-relaxed-constexpr",
        "-isystem",
        str(folder),
    )
    library = build(text, tmp_path, own=(*flags, "-maxrregcount=32"), cflags=("-DFOUR=4",))
    assert set(symbols(library)) == {"f"}


HALVES = """
#include <cuda_fp16.h>
extern "C" void widen(const unsigned short* x, float* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = __half2float(__ushort_as_half(x[i]));
}
extern "C" void round(const float* x, unsigned short* y, int n) {
  for (int i = 0; i < n; ++i) y[i] = __half_as_ushort(__float2half_rn(x[i]));
}
"""


@pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")
def test_halves_convert_as_torchs_where_cuda_s_header_cannot_be_used(tmp_path):
    flags = [
        "-D__host__=",
        "-D__device__=",
        f"-I{INCLUDE / 'opkit' / 'nvrtc'}",
        "-fPIC",
        "-shared",
        "-x",
        "c++",
        "-",
    ]
    library = tmp_path / "halves.so"
    subprocess.run([*compilers.get_cxx().command, *flags, "-o", library], input=HALVES, text=True, check=True)
    call = ctypes.CDLL(str(library))
    halves = torch.arange(65536).to(torch.uint16).view(torch.float16)
    floats = torch.empty(65536)
    call.widen(ctypes.c_void_p(halves.data_ptr()), ctypes.c_void_p(floats.data_ptr()), 65536)
    torch.testing.assert_close(floats, halves.float(), rtol=0, atol=0, equal_nan=True)
    # every half, what lies between it and the next one, and next to that
    between = floats[floats.isfinite()]
    step = torch.nextafter(between.half(), torch.tensor(torch.inf).half()).float() - between
    middle = between + step / 2
    values = torch.cat([between, middle, torch.nextafter(middle, between), middle * 1.0001, between * 70000])
    rounded = torch.empty(len(values), dtype=torch.float16)
    call.round(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(rounded.data_ptr()), len(values))
    torch.testing.assert_close(rounded, values.half(), rtol=0, atol=0, equal_nan=True)


# ---------------------------------------------------------------- launching

FAKE = r"""
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
extern "C" {
extern int fake_capability, fake_device, fake_context;
void say(const char*, ...);
#if defined(RUNTIME)
int fake_capability = 80, fake_device = 0, fake_context = 1;
char fake_log[100000];
void say(const char* form, ...) {
  va_list rest; va_start(rest, form);
  vsnprintf(fake_log + strlen(fake_log), 1000, form, rest);
}
int cudaGetDevice(int* d) { *d = fake_device; return 0; }
int cudaDeviceGetAttribute(int* v, int which, int) {
  *v = which == 75 ? fake_capability / 10 : fake_capability % 10;
  return 0;
}
int cudaFree(void*) { fake_context = 1; return 0; }
int cudaGetLastError() { return 0; }
int cudaThreadExchangeStreamCaptureMode(int* mode) {
  static int now = 0;
  const int old = now;
  now = *mode;
  *mode = old;
  return 0;
}
const char* cudaGetErrorString(int) { return "text of the runtime"; }
int aoti_torch_get_current_cuda_stream(int, void** s) { *s = (void*)7; return 0; }
int torch_parallel_for(long, long, long, void*, void*) { return 1; }
int aoti_torch_empty_strided(...) { return 1; }
int aoti_torch_get_data_ptr(...) { return 1; }
int aoti_torch_delete_tensor_object(...) { return 1; }
#else
int cuLibraryLoadData(void** l, const void* code, int*, void**, unsigned, int*, void**, unsigned) {
  const char* text = (const char*)code;
  *l = (void*)code;
  say("load %s;", strncmp(text, "\x7f" "ELF", 4) ? "PTX" : "ELF");
  return 0;
}
int cuLibraryGetKernel(void** k, void* l, const char* name) { say("kernel %s;", name); *k = (void*)name; return 0; }
int cuKernelGetFunction(void** f, void* k) { *f = k; return 0; }
int cuFuncSetAttribute(void* f, int a, int v) { say("attribute %d=%d;", a, v); return v > 200000 ? 1 : 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int* n, void*, int threads, size_t) { *n = 2048 / threads; return 0; }
int cuGetErrorName(int, const char** t) { *t = "CUDA_ERROR_FAKE"; return 0; }
int cuGetErrorString(int, const char** t) { *t = "text of the driver"; return 0; }
int cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** a, void**) {
  if (!fake_context) return 201;
  say("launch %s (%u,%u,%u) (%u,%u,%u) %u %p", (char*)f, gx, gy, gz, bx, by, bz, shared, stream);
  if (strstr((char*)f, "scale"))
    say(" y=%p n=%d h=%x b=%d", *(void**)a[0], *(int*)a[1], *(unsigned short*)a[2], *(bool*)a[3]);
  say(";");
  return gx > 1000 ? 1 : 0;
}
#endif
}
"""
LAUNCHES = r"""
#define OPKIT_OP "demo::k"
#include <opkit/kernel.h>
template <class T> __global__ void scale(T* y, int n, opkit::Half h, bool) { y[threadIdx.x] = T(float(h) * n); }
__global__ void empty() {}
extern "C" __attribute__((visibility("default"))) void test(int what, char* said) {
  float* y = (float*)16;
  const char* text = "";
  opkit::Text copy;
  try {
    if (what == 0) scale<<<dim3(1, 2, 3), 64, 16, opkit::stream()>>>(y, 5, opkit::Half(1.0f), true);
    if (what == 1) empty<<<1, 1>>>();
    if (what == 2) empty<<<1, 32, 100000>>>();
    if (what == 3) empty<<<2000, 32>>>();
    const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
    if (what == 4) OPKIT_CUDA_CHECK(cudaFuncSetAttribute(scale<double>, most, 70000));
    if (what == 5) empty<<<1, 32, 300000>>>();
    if (what == 6) {
      int blocks = 0;
      OPKIT_CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, scale<float>, 256, 0));
      OPKIT_CHECK(blocks != 8, blocks, " blocks");
    }
    if (what == 7) OPKIT_CUDA_CHECK(cudaFuncSetAttribute(scale<float>, most, 300000));
  } catch (const opkit::Error& error) { copy << error.what(); text = copy.c_str(); }
  while ((*said++ = *text++)) {}
}
"""
RUN = r"""
import ctypes, sys
runtime, driver, library = (ctypes.CDLL(path, ctypes.RTLD_GLOBAL) for path in sys.argv[1:])
log = (ctypes.c_char * 100000).in_dll(runtime, "fake_log")
number = {n: ctypes.c_int.in_dll(runtime, "fake_" + n) for n in ("capability", "device", "context")}
def call(what, **state):
    for name, value in state.items():
        number[name].value = value
    log[0] = 0
    said = ctypes.create_string_buffer(2000)
    library.test(what, said)
    print(log.value.decode() + "|" + said.value.decode())
call(0); call(0); call(0, context=0)
call(1, device=1, capability=86); call(1, device=2, capability=90); call(1, device=3, capability=103)
call(1, device=4, capability=75); call(2, device=0); call(3); call(4); call(5); call(6); call(7)
"""


@needs_nvrtc
def test_launches_reach_the_driver_with_the_image_for_the_device(tmp_path):
    """With libraries in place of CUDA's that write down how they are called."""
    cxx, found = compilers.get_cxx(), _nvrtc.find()
    library = build(LAUNCHES, tmp_path, architectures=("8.0", "9.0+PTX"))
    paths = []
    for name, define in ((f"libcudart.so.{found.major}", "-DRUNTIME"), ("libcuda.so.1", "-DDRIVER")):
        paths.append(str(tmp_path / name))
        flags = ["-shared", "-fPIC", define, f"-Wl,-soname,{name}", "-x", "c++", "-", "-o", paths[-1]]
        subprocess.run([*cxx.command, *flags], input=FAKE, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", RUN, *paths, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = symbols(library)
    scale, empty = names["scale<float>"], names["empty"]
    launched = f"launch {scale} (1,2,3) (64,1,1) 16 0x7 y=0x10 n=5 h=3c00 b=1;|"
    lines = done.stdout.splitlines()
    assert lines[:3] == [f"load ELF;kernel {scale};{launched}", launched, launched]
    once = f"launch {empty} (1,1,1) (1,1,1) 0 (nil);|"
    assert lines[3] == f"kernel {empty};{once}"  # 8.6 runs what is compiled for 8.0, which is loaded
    assert lines[4] == f"load ELF;kernel {empty};{once}"
    assert lines[5] == f"load PTX;kernel {empty};{once}"
    assert lines[6] == (
        "|demo::k: launching a kernel: device 4 has the architecture 7.5, the kernel is compiled for 8.0 9.0 9.0+PTX. "
        "Add 7.5 to TORCH_CUDA_ARCH_LIST, or unset it"
    )
    assert lines[7] == f"attribute 8=100000;launch {empty} (1,1,1) (32,1,1) 100000 (nil);|"
    assert lines[8].split("|")[1] == (
        "demo::k: launching empty with 2000 x 1 x 1 blocks of 32 x 1 x 1 threads and 0 bytes of shared memory: "
        "text of the driver (CUDA_ERROR_FAKE)"
    )
    assert lines[9] == f"kernel {names['scale<double>']};attribute 8=70000;|"
    assert lines[10].split("|")[1] == (
        "demo::k: giving empty 300000 bytes of shared memory: text of the driver (CUDA_ERROR_FAKE)"
    )
    assert lines[11].split("|")[1] == "demo::k: 8 blocks"
    assert "cudaFuncSetAttribute" in lines[12]
    assert "text of the runtime" in lines[12]


@pytest.mark.cuda
@needs_nvrtc
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA device")
def test_launches_run_on_a_device_and_in_a_graph(tmp_path):
    text = """
    #include <opkit/kernel.h>
    template <class T> __global__ void add(T* y, T value, int n) {
      extern __shared__ char shared[];
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i < n) y[i] = y[i] + value;
    }
    extern "C" __attribute__((visibility("default"))) void test(float* y, int n, size_t shared, void* stream) {
      add<<<(n + 255) / 256, 256, shared, static_cast<cudaStream_t>(stream)>>>(y, 1.0f, n);
    }
    """
    major, minor = torch.cuda.get_device_capability()
    library = build(text, tmp_path, architectures=(f"{major}.{minor}",))
    test = ctypes.CDLL(str(library)).test
    test.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t, ctypes.c_void_p]
    y = torch.zeros(1000, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    for shared in (0, 64 * 1024):
        test(y.data_ptr(), 1000, shared, stream)
    assert (y == 2).all()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        test(y.data_ptr(), 1000, 0, torch.cuda.current_stream().cuda_stream)
    for _ in range(3):
        graph.replay()
    assert (y == 5).all()
