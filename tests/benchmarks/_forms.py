"""The kernel that build.py measures, in every form, and one process's measurement of each."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import opkit

BODY = """
  for (int64_t i = 0; i < m; ++i) {
    float sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const float v = in[i * n + j], value = v * by + v * v;
      out[i * n + j] = value;
      sum += value;
    }
    total[i] = sum;
  }
"""
BARE = f"""
#include <stdint.h>
extern "C" void fused(const float* in, float by, float* out, float* total, int64_t m, int64_t n) {{{BODY}}}
"""
LIGHT = f"""
#include <opkit/kernel.h>
void fused(opkit::Tensor x, double factor, opkit::Tensor y, opkit::Tensor rows) {{
  OPKIT_CHECK(x.is_contiguous(), "x is not contiguous");
  const int64_t m = x.size(0), n = x.size(1);
  const float *in = x.data<float>(), by = float(factor);
  float *out = y.data<float>(), *total = rows.data<float>();
{BODY}}}
"""
STABLE = f"""
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <tuple>
std::tuple<torch::stable::Tensor, torch::stable::Tensor> fused(const torch::stable::Tensor& x, double factor) {{
  const int64_t m = x.size(0), n = x.size(1);
  auto y = torch::stable::empty_like(x);
  auto rows = torch::stable::new_empty(x, {{m}});
  const float *in = x.const_data_ptr<float>(), by = float(factor);
  float *out = y.mutable_data_ptr<float>(), *total = rows.mutable_data_ptr<float>();
{BODY}
  return {{y, rows}};
}}
"""
ATEN = f"""
std::tuple<at::Tensor, at::Tensor> fused(const at::Tensor& x, double factor) {{
  const int64_t m = x.size(0), n = x.size(1);
  auto y = at::empty({{m, n}}, x.options()), rows = at::empty({{m}}, x.options());
  const float *in = x.const_data_ptr<float>(), by = float(factor);
  float *out = y.mutable_data_ptr<float>(), *total = rows.mutable_data_ptr<float>();
{BODY}
  return {{y, rows}};
}}
"""
LIBRARY = f"""
#include <ATen/ops/empty.h>
#include <torch/library.h>
#include <tuple>
{ATEN}
TORCH_LIBRARY(opkit_bench, m) {{ m.def("fused(Tensor x, float factor) -> (Tensor, Tensor)"); }}
TORCH_LIBRARY_IMPL(opkit_bench, CPU, m) {{ m.impl("fused", &fused); }}
"""
TVM = f"""
void fused(tvm::ffi::TensorView x, double factor, tvm::ffi::TensorView y, tvm::ffi::TensorView rows) {{
  const int64_t m = x.size(0), n = x.size(1);
  const float *in = static_cast<const float*>(x.data_ptr()), by = float(factor);
  float *out = static_cast<float*>(y.data_ptr()), *total = static_cast<float*>(rows.data_ptr());
{BODY}}}
"""


_kept: list[Any] = []


class Fused(NamedTuple):
    y: Tensor
    rows: Tensor


def declare(name: str) -> Any:
    @opkit.op(name, shapes="m n -> m n, m")
    def fused(x: Tensor, factor: float) -> Fused:
        y = x * factor + x * x
        return Fused(y, y.sum(-1))

    return fused


def check(returned: Any, x: Tensor, factor: float) -> None:
    expected = x.double() * factor + x.double() ** 2
    torch.testing.assert_close(returned[0].double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(returned[1].double(), expected.sum(-1), atol=1e-4, rtol=1e-4)


def tvm_ffi_is_here() -> bool:
    return importlib.util.find_spec("tvm_ffi") is not None


def bare(folder: Path) -> None:
    from opkit.cpp.toolchain import CPP

    (folder / "k.cpp").write_text(BARE)
    command = ["g++", "-std=c++20", *CPP.flags, "-shared", "k.cpp", "-o", "k.so"]
    subprocess.run(command, cwd=folder, check=True)


def light_entry() -> Callable[..., Any]:
    """Return the op's kernel as torch's dispatcher calls it."""
    op = declare("bench::entry")
    source = opkit.cpp.kernel(LIGHT, symbol="fused")
    bound = source.bind(op.schema, op._runner.native_plan, "cpu", op._runner.meta.of_registered, "cpp")
    _kept.append(bound)
    return bound.call


def library_entry() -> Callable[..., Any]:
    opkit.cpp.load("opkit_bench", LIBRARY, is_python_module=False)
    return torch.ops.opkit_bench.fused.default


def _native(source: str) -> Callable[[], Any]:
    op = declare("bench::fused")
    op(torch.ones(2, 2), 1.0)  # plugins are asked, as they are once in every process

    def ready() -> Any:
        kernel = op.register_kernel("cpu", opkit.cpp.kernel(source), backend="native")
        bound = kernel.bind(op.schema, op._runner.native_plan, "cpu", op._runner.meta.of_registered, "native")
        _kept.append(bound)  # the op finds the library loaded
        return op

    return ready


def _again(source: str, others: int) -> Callable[[], Any]:
    """A kernel on a machine that has compiled others."""
    for i in range(others):
        other = declare(f"bench::other{i}")
        other.register_kernel("cpu", opkit.cpp.kernel(source.replace(" fused(", f" other{i}(")))
        other.build()
    return _native(source)


def _aten() -> Callable[[], Any]:
    opkit.cpp  # noqa: B018  imports are done before
    return lambda: opkit.cpp.load_inline("fused", ATEN, functions=["fused"]).fused


def _torch() -> Callable[[], Any]:
    from torch.utils.cpp_extension import load_inline

    return lambda: load_inline("fused", ATEN, functions=["fused"]).fused


def _tvm() -> Callable[[], Any]:
    import tvm_ffi.cpp

    def ready() -> Any:
        module = tvm_ffi.cpp.load_inline("fused", cpp_sources=TVM, functions=["fused"])

        def call(x: Tensor, factor: float) -> tuple[Tensor, Tensor]:
            y, rows = torch.empty_like(x), x.new_empty(x.size(0))
            module.fused(*map(tvm_ffi.from_dlpack, (x,)), factor, *map(tvm_ffi.from_dlpack, (y, rows)))
            return y, rows

        return call

    return ready


def _two_hundred() -> Callable[[], Any]:
    ops = [declare(f"bench::fused{i}") for i in range(200)]
    ops[0](torch.ones(2, 2), 1.0)
    for i, op in enumerate(ops):
        text = LIGHT.replace("void fused", f"void fused{i}")
        op.register_kernel("cpu", opkit.cpp.kernel(text), backend="native")
    x = torch.ones(1, 1)

    def ready() -> Any:
        for op in ops:
            op(x, 1.0)
        return ops[-1]

    return ready


def _headers() -> Callable[[], Any]:
    from opkit.cpp import _pch

    _pch.prepare()
    return lambda: None


FORMS: dict[str, Callable[[], Callable[[], Any]]] = {
    "light": lambda: _native(LIGHT),
    "light again": lambda: _again(LIGHT, 1),
    "stable": lambda: _native(STABLE),
    "stable second": lambda: _again(STABLE, 1),  # precompiles torch's headers
    "stable again": lambda: _again(STABLE, 2),
    "aten": _aten,
    "torch": _torch,
    "tvm": _tvm,
    "200": _two_hundred,
    "headers": _headers,
}


def _builder(barrier: Any, times: Any) -> None:
    ready = _native(STABLE)
    barrier.wait()
    start = time.perf_counter()
    op = ready()
    times.put(time.perf_counter() - start)
    check(op(torch.ones(2, 3), 2.0), torch.ones(2, 3), 2.0)


def at_once(count: int, folder: Path) -> tuple[float, int]:
    """Return the wall seconds until `count` fresh processes all have the kernel, and how many compiled it."""
    os.environ["OPKIT_CACHE_DIR"] = str(folder)
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(count), context.Queue()
    processes = [context.Process(target=_builder, args=(barrier, times)) for _ in range(count)]
    for process in processes:
        process.start()
    slowest = max(times.get(timeout=240) for _ in processes)
    for process in processes:
        process.join()
    built = [path for path in (folder / "lib").rglob("*.so") if "native" in path.name]
    return slowest, len(built)


def main() -> None:
    ready = FORMS[sys.argv[1]]()

    def cpu() -> float:
        usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(u.ru_utime + u.ru_stime for u in usage)

    before, start = cpu(), time.perf_counter()
    call = ready()
    measured = {"wall": time.perf_counter() - start, "cpu": cpu() - before}
    if call is not None:
        x = torch.randn(4, 8)
        result = call(x, 2.0)
        measured["first call"] = time.perf_counter() - start
        check(result, x, 2.0)
    print(json.dumps(measured))


if __name__ == "__main__":
    main()
