"""The kernels and the bridge: shared memory, 64 bits, gradients from JAX's vjp, forked children, and the suite.

opkit-jax must be installed, and JAX.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import opkit_jax
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

import opkit
import opkit.testing.plugin
from opkit_kernels import rms_norm, rms_norm_backward, swiglu, swiglu_backward

jax = pytest.importorskip("jax", reason="jax is not installed: pip install jax")

OPS = {op.name.removeprefix("opkit::"): op for op in (rms_norm, rms_norm_backward, swiglu, swiglu_backward)}


class TestPlugin(opkit.testing.plugin.Suite):
    name = "jax"


@pytest.fixture(autouse=True)
def jax_only(request):
    if request.cls is not None:  # the suite prefers backends itself
        yield
        return
    torch.manual_seed(0)
    with opkit.use_backend("jax", strict=True):
        yield


def arguments(name, shape, dtype):
    count = 1 + name.endswith("backward") + name.startswith("swiglu")
    tensors = [torch.randn(shape).to(dtype) for _ in range(count)]
    return tensors if name.startswith("swiglu") else [*tensors, torch.randn(shape[-1:]).to(dtype)]


def results(out):
    return [out] if isinstance(out, Tensor) else list(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_a_kernel_matches_the_reference_in_float64(name, dtype):
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}[
        dtype
    ]
    for shape in [(7,), (5, 8), (2, 3, 33), (0, 5)]:
        args = arguments(name, shape, dtype)
        exact = OPS[name].reference(*(a.double() for a in args))
        for found, expected in zip(results(OPS[name](*args)), results(exact), strict=True):
            part = max(tolerance, 1e-6) if found.dtype == torch.float32 else tolerance
            torch.testing.assert_close(found.double(), expected.double(), rtol=part, atol=part)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_gradients_are_jax_s_vjp(name):
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


def test_both_sides_look_at_the_same_memory():
    seen = []

    def look(x):
        jax.debug.callback(lambda: None)
        return x * 2

    from opkit_jax import bridge

    x = torch.randn(64, 64)
    assert bridge._array(x).unsafe_buffer_pointer() == x.data_ptr()
    run = opkit_jax.kernel(look)
    given, taken = jax.dlpack.from_dlpack, torch.from_dlpack
    try:
        jax.dlpack.from_dlpack = lambda t: seen.append(t.data_ptr()) or given(t)
        torch.from_dlpack = lambda a: seen.append(a.unsafe_buffer_pointer()) or taken(a)
        y = run(x)
    finally:
        jax.dlpack.from_dlpack, torch.from_dlpack = given, taken
    assert seen == [x.data_ptr(), y.data_ptr()]
    assert torch.equal(y, x * 2)


def test_strides_offsets_and_lazy_bits_are_taken():
    twice = opkit_jax.kernel(lambda x: x * 2)
    x = torch.randn(6, 8, requires_grad=True)
    views = [x.t(), x[:, 1:], x[::2, 3:], x[0, :1].expand(5), x[1:], torch._neg_view(x.detach()), x[0, 0]]
    for view in [*views, torch.zeros(0, 3), torch.randn(3, dtype=torch.complex64).conj()]:
        torch.testing.assert_close(twice(view), view.detach() * 2)


def test_the_arguments_belong_to_the_caller_again_once_it_returns():
    total = opkit_jax.kernel(lambda x: (x @ x).sum())
    x = torch.randn(800, 800)
    expected = (x @ x).sum()
    found = total(x)
    x.zero_()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1.0)


def test_64_bits_stay_and_jax_is_left_as_it_was():
    before = jax.config.jax_enable_x64
    run = opkit_jax.kernel(lambda x, k: (x + 2**-40, k + 2**40))
    x, k = run(torch.ones(2, dtype=torch.float64), torch.zeros(2, dtype=torch.int64))
    assert (x - 1).tolist() == [2**-40] * 2
    assert k.tolist() == [2**40] * 2
    assert jax.config.jax_enable_x64 == before
    assert opkit_jax.kernel(lambda x: x + 1)(torch.ones(2)).dtype == torch.float32


def test_a_float_is_an_argument_and_an_int_is_compiled_in():
    traced = []

    def power(x, by, n, *, negate=False):
        traced.append(n)
        y = (x * by) ** n
        return -y if negate else y

    run = opkit_jax.kernel(power)
    x = torch.tensor([1.0, 2.0])
    assert [run(x, by, 2).tolist() for by in (1.0, 0.5)] == [[1, 4], [0.25, 1]]
    assert traced == [2]
    assert run(x, 1.0, 3).tolist() == [1, 8]
    assert run(x, 1.0, 3, negate=True).tolist() == [-1, -8]
    assert traced == [2, 3, 3]


def test_an_op_of_one_s_own_has_its_kernel_and_its_gradient_from_jax():
    class Polar(NamedTuple):
        radius: Tensor
        angle: Tensor

    @opkit.op("jaxdoc::polar", shapes="*b, *b -> *b, *b")
    def polar(x: Tensor, y: Tensor) -> Polar:
        return Polar(torch.hypot(x, y), torch.atan2(y, x))

    @opkit.op("jaxdoc::polar_backward", shapes="*b, *b, *b, *b -> *b, *b")
    def polar_backward(
        grad_radius: Tensor, grad_angle: Tensor, x: Tensor, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        r = torch.hypot(x, y)
        return (
            grad_radius * x / r - grad_angle * y / r**2,
            grad_radius * y / r + grad_angle * x / r**2,
        )

    def in_jax(x, y):
        return jax.numpy.hypot(x, y), jax.numpy.arctan2(y, x)

    polar.register_autograd(polar_backward, saves=("x", "y"))
    polar.register_kernel("cpu", opkit_jax.kernel(in_jax), backend="jax")
    polar_backward.register_kernel("cpu", opkit_jax.vjp(in_jax, (0, 1), outputs=2), backend="jax")
    args = [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert gradcheck(polar, args)
    with opkit.use_backend():
        assert opkit.testing.check(polar, *(a.detach() for a in args)).ok
        assert opkit.testing.check(polar_backward, *(torch.randn(3) for _ in range(4))).ok


def test_vjp_of_one_argument_gives_one_gradient():
    backward = opkit_jax.vjp(lambda x, n, by: by * x**n)
    found = backward(torch.ones(2), torch.tensor([1.0, 2.0]), 3, 2.0)
    assert found.tolist() == [6, 24]
    (both,) = opkit_jax.vjp(lambda x: x**2, (0,))(torch.ones(1), torch.tensor([4.0]))
    assert both.tolist() == [8]


def test_jax_is_imported_by_the_first_kernel_and_forked_children_go_without():
    """XLA's threads are not in a forked child: a call of JAX there never returns."""
    code = """
import os, sys, torch, opkit
from opkit_kernels import swiglu
x = torch.randn(64)
print("jax" in [k.backend for k in swiglu.kernels], "opkit_jax" in sys.modules)
with opkit.use_backend("jax"):
    expected = swiglu(x, x)
    print(swiglu.explain(x, x).selected, "jax" in sys.modules, flush=True)
    child = os.fork()
    if child == 0:
        same = torch.allclose(swiglu(x, x), expected)
        os._exit(0 if same and swiglu.explain(x, x).selected != "jax" else 1)
    print("status", os.waitpid(child, 0)[1])
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines() == ["True False", "jax True", "status 0"], done.stdout + done.stderr


def test_several_threads_run_the_kernels_at_once():
    x, weight = torch.randn(200, 256), torch.randn(256)
    expected = rms_norm(x, weight).y
    found = []

    def work():
        with opkit.use_backend("jax", strict=True):
            found.extend(torch.allclose(rms_norm(x, weight).y, expected) for _ in range(50))

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
