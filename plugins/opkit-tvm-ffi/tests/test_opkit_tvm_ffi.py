"""The kernels against the references in float64, their library in a process without torch, and the plugin by the suite.

opkit-tvm-ffi must be installed, and tvm-ffi.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.autograd import gradcheck

import opkit
import opkit.testing.plugin
from opkit_kernels import rms_norm, rms_norm_backward, swiglu, swiglu_backward

pytest.importorskip("tvm_ffi", reason="tvm-ffi is not installed: pip install apache-tvm-ffi")

OPS = {op.name.removeprefix("opkit::"): op for op in (rms_norm, rms_norm_backward, swiglu, swiglu_backward)}


class TestPlugin(opkit.testing.plugin.Suite):
    name = "tvm-ffi"


@pytest.fixture(autouse=True)
def tvm_ffi_only(request):
    if request.cls is not None:  # the suite prefers backends itself
        yield
        return
    torch.manual_seed(0)
    with opkit.use_backend("tvm-ffi", strict=True):
        yield


def arguments(name, shape, dtype):
    count = 1 + name.endswith("backward") + name.startswith("swiglu")
    tensors = [torch.randn(shape).to(dtype) for _ in range(count)]
    return tensors if name.startswith("swiglu") else [*tensors, torch.randn(shape[-1:]).to(dtype)]


def results(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_a_kernel_is_the_reference_in_float64_rounded_once(name, dtype):
    for shape in [(1,), (7,), (5, 8), (2, 3, 33), (4, 1000), (0, 5), (2, 0, 3)]:
        args = arguments(name, shape, dtype)
        exact = OPS[name].reference(*(a.double() for a in args))
        for found, expected in zip(results(OPS[name](*args)), results(exact), strict=True):
            rounding = torch.finfo(found.dtype).eps / 2
            torch.testing.assert_close(
                found.double(), expected.double(), rtol=1.01 * rounding + 1e-14, atol=1e-14, equal_nan=True
            )


def test_rounding_to_bfloat16_is_to_the_nearest():
    x = torch.randn(100_000).bfloat16()
    wide = x.double()
    expected = (wide / (1 + (-wide).exp()) * wide).to(torch.bfloat16)
    assert (swiglu(x, x) != expected).sum() <= 1  # torch rounds twice, by way of float
    odd = torch.tensor([float("nan"), float("inf"), 3e38, 1e-39], dtype=torch.bfloat16)
    torch.testing.assert_close(swiglu(odd, odd), swiglu.reference(odd, odd), equal_nan=True)


@pytest.mark.parametrize("weight", [torch.float64, torch.bfloat16])
def test_weight_may_have_another_dtype(weight):
    x, w = torch.randn(4, 16), torch.randn(16).to(weight)
    torch.testing.assert_close(rms_norm(x, w).y, rms_norm.reference(x, w).y)
    assert rms_norm_backward(x, x, w).weight.dtype == weight


def test_tensors_that_are_more_than_memory():
    x = torch._neg_view(torch.randn(4, 8))
    up = torch.randn(8, 4, requires_grad=True).t()
    from opkit_tvm_ffi import kernels

    torch.testing.assert_close(kernels.swiglu()(x, up), swiglu.reference(x, up.detach()))


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_gradients(name):
    args = [a.requires_grad_() for a in arguments(name, (3, 5), torch.float64)]
    assert gradcheck(lambda *a: results(OPS[name](*a))[0], args)


@pytest.mark.slow
def test_compiled_with_gradients():
    x, weight, up = torch.randn(4, 32, requires_grad=True), torch.randn(32), torch.randn(4, 32)

    def f(x):
        return swiglu(rms_norm(x, weight).y + 1, up).sum()

    torch.compile(f, fullgraph=True)(x).backward()
    compiled, x.grad = x.grad, None
    with opkit.use_backend("reference"):
        f(x).backward()
    torch.testing.assert_close(compiled, x.grad, rtol=1e-5, atol=1e-5)


def test_the_libraries_link_neither_torch_nor_python():
    from opkit_tvm_ffi import library

    for name in ("rms_norm", "swiglu"):
        said = subprocess.run(
            ["readelf", "-d", library.build(name)], capture_output=True, text=True, check=True
        )
        needed = {line.partition("[")[2].rstrip("]") for line in said.stdout.splitlines() if "NEEDED" in line}
        assert "libtvm_ffi.so" in needed
        assert not [one for one in needed if one.startswith(("libtorch", "libc10", "libpython"))]


def test_a_library_runs_where_torch_is_not_imported():
    from opkit_tvm_ffi import library

    code = """
import sys
sys.modules["torch"] = None  # as where it is not installed
import numpy as np, tvm_ffi
swiglu = tvm_ffi.load_module(sys.argv[1]).swiglu
gate, up, y = np.linspace(-2, 2, 5), np.ones(5), np.empty(5)
swiglu(*map(tvm_ffi.from_dlpack, (gate, up, y)))
assert np.allclose(y, gate / (1 + np.exp(-gate))), y
try:
    swiglu(*map(tvm_ffi.from_dlpack, (gate.astype("float16"), up, y)))
except TypeError as error:
    print(error)
print("libtorch" in open("/proc/self/maps").read())
"""
    done = subprocess.run(
        [sys.executable, "-c", code, library.build("swiglu")], capture_output=True, text=True
    )
    assert done.stdout.splitlines() == [
        "the dtype is float16; expected float32, float64 or bfloat16",
        "False",
    ], done


def test_the_library_is_opened_when_a_kernel_is_selected_and_forked_children_live():
    code = """
import os, sys, torch, opkit
from opkit_kernels import swiglu
x = torch.randn(64)
print([k.backend for k in swiglu.kernels if k.source and "tvm-ffi" in k.source], "tvm_ffi" in sys.modules)
with opkit.use_backend("tvm-ffi"):
    print(swiglu.explain(x.half(), x.half()).selected, "opkit_tvm_ffi" in sys.modules)
    expected = swiglu(x, x)
    print("tvm_ffi" in sys.modules, flush=True)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(swiglu(x, x), expected) else 1)
    print("status", os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    assert lines[:1] + lines[2:] == ["['tvm-ffi'] False", "True", "status 0"], done.stdout + done.stderr
    assert lines[1].endswith("False")


def test_several_threads_run_the_kernels_at_once():
    x, weight = torch.randn(200, 256), torch.randn(256)
    expected = rms_norm(x, weight).y
    found = []

    def work():
        with opkit.use_backend("tvm-ffi", strict=True):
            found.extend(torch.equal(rms_norm(x, weight).y, expected) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 200


def test_the_readme_runs():
    text = Path(__file__).parents[1].joinpath("README.md").read_text()
    namespace: dict[str, object] = {}
    with opkit.use_backend():
        for block in re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            exec(block, namespace)
