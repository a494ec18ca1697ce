"""What a light kernel's glue refuses, whatever the arguments; and what its library may use of the system."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import Tensor

import opkit
from opkit.cpp import _glue, compilers
from opkit.errors import BuildError

pytestmark = pytest.mark.skipif(compilers.find_cxx() is None, reason="needs a C++ compiler")


def light(name: str, line: str, signature, source: str, **kwargs) -> opkit.Op:
    """An op with a native kernel alone."""
    op = opkit.op(f"t::{name}", shapes=line)(signature)
    op.register_kernel("cpu", opkit.cpp.kernel(source, **kwargs), backend="native")
    return op


# ---------------------------------------------------------------- devices

DEVICES = """
#include <opkit/glue.h>
void devices(opkit::Tensor x, opkit::Tensor y) {
  using namespace opkit;
  const int64_t size = 1;
  float value = 0;
  const Tensor none("a"), cpu("b", &value, &size, &size, 1, DType::float32, {0, -1}, nullptr),
      first("c", &value, &size, &size, 1, DType::float32, {1, 0}, nullptr),
      second("d", &value, &size, &size, 1, DType::float32, {1, 1}, nullptr);
  const Tensor views[] = {none, first, CASE};
  glue::CallDevice device;
  device.take(none);
  device.take_all(Span<Tensor>(views, 3));
  y.data<float>()[0] = device.tensor().device().type * 10 + device.tensor().device().index;
}
"""


@pytest.mark.parametrize(("case", "other"), [("first", None), ("none", None), ("cpu", "b"), ("second", "d")])
def test_tensors_of_lists_and_optional_ones_are_compared_too(registry, case, other):
    def devices(x: Tensor) -> Tensor: ...

    op = light("devices", "n -> 1", devices, DEVICES.replace("CASE", case))
    if other is None:
        assert op(torch.ones(1)).item() == 10.0  # type 1, index 0: the first that is not None
    else:
        with pytest.raises(
            RuntimeError, match=f"t::devices: arguments c and {other} are on different devices"
        ):
            op(torch.ones(1))


def test_the_guard_is_for_the_first_tensor_there_is(registry):
    def f(a: Tensor | None, b: Tensor, c: list[Tensor]) -> None: ...

    f.__annotations__ = {"a": Tensor | None, "b": Tensor, "c": list[Tensor], "return": None}
    op = opkit.op("t::f")(f)
    text = _glue.unit_source("", "f", op.schema, None, guard="DeviceGuard device_guard({tensor});")
    order = ["call_device.take(t_a);", "call_device.take(t_b);", "call_device.take_all(v_c.span());"]
    assert [line.strip() for line in text.splitlines() if "call_device.take" in line] == order
    assert "DeviceGuard device_guard(call_device.tensor());" in text


# ---------------------------------------------------------------- sizes

NOTHING = "#include <opkit/kernel.h>\nvoid sized(opkit::Tensor, int64_t, int64_t, opkit::Tensor) {}\n"


@pytest.mark.parametrize(
    ("line", "k", "j"),
    [
        ("n -> k//j", -(2**63), -1),
        ("n -> n*k*j", 2**32, 2**32),
        ("n -> k+j", 2**62, 2**62),
        ("n -> k-j", -(2**63), 1),
    ],
)
def test_a_size_beyond_64_bits_is_an_error(registry, line, k, j):
    def sized(x: Tensor, k: int, j: int) -> Tensor: ...

    op = light("sized", line, sized, NOTHING)
    bound = op.native_kernels()[0].function.bind(op.schema, op._runner.native_plan, "cpu", None, "native")
    with pytest.raises(
        RuntimeError, match="t::sized: a size in the shape line is beyond 64 bits; pass smaller"
    ):
        bound.call(torch.ones(3), k, j)


def test_a_remainder_by_minus_one_is_zero(registry):
    def sized(x: Tensor, k: int, j: int) -> Tensor: ...

    assert light("sized", "n -> k%j", sized, NOTHING)(torch.ones(3), -(2**63), -1).shape == (0,)


# ---------------------------------------------------------------- texts


@pytest.mark.parametrize(
    ("thrown", "text"),
    [
        (r'opkit::fail("é\xff!")', "t::said: é?!"),
        (r'throw std::runtime_error("\xc3(\xed\xa0\x80 ok")', "t::said: ?(??? ok"),
        ('throw std::runtime_error("grüße, мир, 世界, 🌍")', "t::said: grüße, мир, 世界, 🌍"),
    ],
)
def test_a_text_that_is_no_utf8_arrives_all_the_same(registry, thrown, text):
    def said(x: Tensor) -> Tensor: ...

    source = f"#include <opkit/kernel.h>\n#include <stdexcept>\nvoid said(opkit::Tensor, opkit::Tensor) {{ {thrown}; }}"
    with pytest.raises(RuntimeError) as caught:
        light("said", "n -> n", said, source)(torch.ones(1))
    assert str(caught.value).splitlines()[0] == text


def test_a_long_text_is_cut_between_letters(registry):
    def said(x: Tensor) -> Tensor: ...

    source = f'#include <opkit/kernel.h>\nvoid said(opkit::Tensor, opkit::Tensor) {{ opkit::fail("x{"é" * 700}"); }}'
    with pytest.raises(RuntimeError, match="t::said: xé{400,}"):
        light("said", "n -> n", said, source)(torch.ones(1))


# ---------------------------------------------------------------- the system's libraries

SYSTEM = """
#include <opkit/kernel.h>
#include <stdlib.h>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
static void nothing() {}
void system_calls(opkit::Tensor x, opkit::Tensor y) {
  char* path = realpath("/tmp", nullptr);  // NULL in the oldest version of this symbol
  y.data<float>()[0] = path != nullptr && atexit(nothing) == 0;
  free(path);
  std::mutex mutex;
  std::condition_variable heard;
  bool said = false;
  std::thread other([&] { std::lock_guard<std::mutex> hold(mutex); said = true; heard.notify_all(); });
  {
    std::unique_lock<std::mutex> lock(mutex);
    y.data<float>()[1] = heard.wait_until(
        lock, std::chrono::system_clock::now() + std::chrono::seconds(20), [&] { return said; });
  }
  other.join();
}
"""


def test_functions_of_the_system_are_those_of_today(registry):
    def system_calls(x: Tensor) -> Tensor: ...

    assert light("system_calls", "n -> 2", system_calls, SYSTEM)(torch.ones(1)).tolist() == [1.0, 1.0]


def test_flags_may_need_libraries_of_the_compiler(registry):
    def fast(x: Tensor) -> Tensor: ...

    source = """
    #include <opkit/kernel.h>
    #include <cmath>
    void fast(opkit::Tensor x, opkit::Tensor y) {
      for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = std::exp(x.data<float>()[i]);
    }
    """
    op = light("fast", "n -> n", fast, source, extra_cflags=["-ffast-math"])
    torch.testing.assert_close(op(torch.ones(8)), torch.ones(8).exp())


STUB = """
#include <stdint.h>
extern "C" {
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) { *stream = nullptr; return 0; }
int32_t aoti_torch_create_cuda_guard(int32_t, void** guard) { *guard = nullptr; return 0; }
int32_t aoti_torch_delete_cuda_guard(void*) { return 0; }
}
"""


@pytest.mark.skipif(compilers.find_nvcc() is None, reason="needs nvcc")
@pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA: the tests on a device show it")
def test_a_cuda_library_loads_and_registers_without_a_device(registry, tmp_path, monkeypatch):
    from opkit_kernels import vector_add

    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    (library,) = vector_add.build("cuda")
    (tmp_path / "stub.cpp").write_text(STUB)
    stub = tmp_path / "libtorch_cuda.so"
    command = ["g++", "-shared", "-fPIC", "-Wl,-soname,libtorch_cuda.so", tmp_path / "stub.cpp", "-o", stub]
    subprocess.run(command, check=True)
    code = f"""
        import ctypes, pathlib, torch
        ctypes.CDLL({str(stub)!r})  # what a torch with CUDA would have loaded
        from opkit.cpp import _native
        from opkit_kernels import vector_add
        loaded = _native.register(pathlib.Path({str(library)!r}), vector_add.schema, "cuda", with_outputs=False)
        print(torch._C._dispatch_has_kernel_for_dispatch_key(loaded.name, "CUDA"))
    """
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "True", done.stderr


# ---------------------------------------------------------------- naming


def test_a_tier_that_is_too_small_is_refused(registry):
    def f(x: Tensor) -> Tensor: ...

    op = light("f", "n -> n", f, "#include <ATen/core/Tensor.h>\nvoid f();\n", tier="light")
    with pytest.raises(BuildError, match=(
        r"building t::f \[native\]: it is said to be of the light tier and includes headers of the aten tier; "
        r"expected only headers of its own\. Leave tier= out\."
    )):  # fmt: skip
        op.build()


@pytest.mark.parametrize("name", ['a"b.cpp', "a\nb.cpp", os.fsdecode(b"\xff.cpp")])
def test_a_path_that_no_include_takes_is_refused(tmp_path, name):
    path = tmp_path / name
    path.write_text("void f();\n")
    with pytest.raises(
        BuildError, match=r"naming a kernel: the path .* has letters that no #include takes; .*Rename"
    ):
        opkit.cpp.kernel(path)
