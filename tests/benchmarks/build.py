"""How long a kernel takes to build: opkit's light tier against torch's load_inline, both cold."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable

import torch
from _measure import report

LIGHT = """
#include <opkit/kernel.h>
void scale(opkit::Tensor x, double by, opkit::Tensor y) {
  const float* in = x.data<float>();
  float* out = y.data<float>();
  for (int64_t i = 0; i < x.numel(); ++i) out[i] = in[i] * float(by);
}
"""
FULL = """
at::Tensor scale(const at::Tensor& x, double by) {
  auto y = at::empty_like(x);
  const float* in = x.const_data_ptr<float>();
  float* out = y.mutable_data_ptr<float>();
  for (int64_t i = 0; i < x.numel(); ++i) out[i] = in[i] * float(by);
  return y;
}
"""


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    folder = tempfile.TemporaryDirectory()
    os.environ["OPKIT_CACHE_DIR"] = folder.name
    import opkit

    @opkit.op("bench::scale", shapes="*b -> *b")
    def scale(x: torch.Tensor, by: float) -> torch.Tensor:
        return x * by

    scale.register_kernel("cpu", opkit.cpp.kernel(LIGHT))
    x = torch.randn(16)
    times = {"opkit light": timed(lambda: scale(x, 2.0))}
    times["opkit load_inline"] = timed(
        lambda: opkit.cpp.load_inline("opkit_scale", FULL, functions=["scale"])
    )
    from torch.utils.cpp_extension import load_inline

    times["torch load_inline"] = timed(
        lambda: load_inline("torch_scale", FULL, functions=["scale"], build_directory=folder.name)
    )
    report("first call of a new kernel, wall seconds", {"cold": times}, unit=1, name="s")
    folder.cleanup()


if __name__ == "__main__":
    main()
