"""The kernels against the references in float64, and through everything that torch does to an op.

opkit-numba must be installed; `make test` puts it where only these tests see it.
"""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch
from opkit_numba import kernels
from torch.autograd import gradcheck

import opkit
import opkit.testing.plugin
from opkit_kernels import rms_norm, rms_norm_backward, swiglu, swiglu_backward

OPS = {op.name.removeprefix("opkit::"): op for op in (rms_norm, rms_norm_backward, swiglu, swiglu_backward)}
SHAPES = [(1,), (7,), (3, 1), (5, 8), (2, 3, 33), (4, 1000), (300, 64), (0, 5), (2, 0, 3)]
DTYPES = [torch.float32, torch.float64]
LAYOUTS = {
    "contiguous": lambda shape, dtype: torch.randn(shape, dtype=dtype),
    "transposed": lambda shape, dtype: torch.randn(shape[::-1], dtype=dtype).permute(
        *reversed(range(len(shape)))
    ),
    "sliced": lambda shape, dtype: torch.randn((*shape[:-1], 2 * shape[-1] + 1), dtype=dtype)[..., 1::2],
    "expanded": lambda shape, dtype: torch.randn((*shape[:-1], 1), dtype=dtype).expand(shape),
}


class TestPlugin(opkit.testing.plugin.Suite):
    name = "numba"


@pytest.fixture(autouse=True)
def numba_only(request):
    if request.cls is not None:  # the suite prefers backends itself
        yield
        return
    torch.manual_seed(0)
    with opkit.use_backend("numba", strict=True):
        yield


def arguments(name, shape, dtype, make=LAYOUTS["contiguous"]):
    if name.startswith("swiglu"):
        return [make(shape, dtype) for _ in range(3 if name.endswith("backward") else 2)]
    weight = torch.randn(shape[-1:], dtype=dtype)
    return [make(shape, dtype) for _ in range(2 if name.endswith("backward") else 1)] + [weight]


def exact(op, args):
    """What the reference computes in float64."""
    out = op.reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    return [out] if isinstance(out, torch.Tensor) else list(out)


def largest(tensor):
    return tensor.abs().max().item() if tensor.numel() else 0.0


def assert_matches(op, args):
    out = op(*args)
    terms = 0.0  # the largest numbers that cancel in the result
    if op is rms_norm_backward:
        grad, x, weight, *eps = args
        terms = (
            largest(rms_norm.reference(x, weight, *eps).rstd)
            * largest(grad)
            * max(largest(weight), largest(x))
        )
    for actual, expected in zip(
        [out] if isinstance(out, torch.Tensor) else out, exact(op, args), strict=True
    ):
        # float32 against float64: a few roundings of the largest term are lost
        tolerance = 1e-12 if actual.dtype == torch.float64 and args[0].dtype == torch.float64 else 3e-6
        if actual.dtype == torch.bfloat16:
            tolerance = 2**-8
        atol = tolerance * max(largest(expected), terms)
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=tolerance, atol=atol, equal_nan=True
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", OPS)
def test_a_kernel_matches_the_reference(name, dtype, layout):
    for shape in SHAPES:
        assert_matches(OPS[name], arguments(name, shape, dtype, LAYOUTS[layout]))


def test_rows_without_elements_have_rstd_nan_as_the_reference():
    y, rstd = rms_norm(torch.ones(3, 0), torch.ones(0))
    assert y.shape == (3, 0)
    assert rstd.isnan().all()
    x, weight = rms_norm_backward(torch.ones(3, 0), torch.ones(3, 0), torch.ones(0))
    assert (x.shape, weight.shape) == ((3, 0), (0,))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weight_may_have_another_dtype(dtype):
    x, weight = torch.randn(4, 16), torch.randn(16).to(dtype)
    assert_matches(rms_norm, [x, weight])
    assert_matches(rms_norm_backward, [torch.randn(4, 16), x, weight])
    assert rms_norm_backward(x, x, weight).weight.dtype == dtype


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.5])
def test_eps_is_passed_on(eps):
    assert_matches(rms_norm, [torch.randn(3, 8), torch.randn(8), eps])
    assert_matches(rms_norm_backward, [torch.randn(3, 8), torch.randn(3, 8), torch.randn(8), eps])


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
def test_swiglu_at_extreme_gates(dtype):
    gate = torch.tensor([0.0, -0.0, 1e-30, 20, -20, 80, -80, 88.8, -88.8, -100, 1000, -1000], dtype=dtype)
    up = torch.full_like(gate, 2)
    assert_matches(swiglu, [gate, up])
    assert_matches(swiglu_backward, [up, gate, up])
    odd = torch.tensor([float("nan"), float("inf"), float("-inf")], dtype=dtype)
    torch.testing.assert_close(
        swiglu(odd, torch.ones_like(odd)), torch.nn.functional.silu(odd), equal_nan=True
    )
    assert rms_norm(odd[:1], torch.ones(1, dtype=dtype)).y.isnan().all()


def test_swiglu_in_float32_is_exact_to_three_roundings():
    gate = torch.linspace(-87, 88, 200_001)
    expected = torch.nn.functional.silu(gate.double())
    error = (swiglu(gate, torch.ones_like(gate)).double() - expected).abs() / expected.abs().clamp_min(1e-30)
    assert error.max() < 3 * 2**-23


def test_kernels_take_tensors_that_numpy_does_not():
    """torch's dispatcher keeps these from kernels; a caller that goes around it may not."""
    negated = torch._neg_view(torch.randn(4, 8))
    assert negated.is_neg()
    up = torch.randn(4, 8, requires_grad=True)
    expected = swiglu.reference(negated, up.detach())
    torch.testing.assert_close(swiglu(negated, up).detach(), expected)
    torch.testing.assert_close(kernels.swiglu(negated, up), expected)


@pytest.mark.parametrize("name", OPS)
def test_one_compilation_serves_all_layouts_of_a_dtype(name):
    for make in LAYOUTS.values():
        args = arguments(name, (3, 8), torch.float32, make)
        OPS[name](
            *args[:-1], torch.randn(args[-1].shape[::-1]).t() if args[-1].dim() == 2 else torch.randn(16)[::2]
        )
    for dtype in DTYPES:
        OPS[name](*arguments(name, (3, 8), dtype))
    assert len(getattr(sys.modules["opkit_numba._compiled"], name).signatures) == len(DTYPES)


# ---------------------------------------------------------------- what torch does to an op


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    args = [a.requires_grad_() for a in arguments(name, (3, 8), torch.float32)]
    torch.library.opcheck(OPS[name].overload, args)


@pytest.mark.parametrize("name", ["rms_norm", "swiglu"])
def test_gradients(name):
    args = [a.requires_grad_() for a in arguments(name, (3, 5), torch.float64)]
    op = OPS[name]
    assert gradcheck(lambda *a: op(*a).y if name == "rms_norm" else op(*a), args)


def test_gradients_run_the_backward_kernel_and_match_the_reference():
    x, weight = torch.randn(6, 32, requires_grad=True), torch.randn(32, requires_grad=True)
    grad = torch.randn(6, 32)
    rms_norm(x, weight).y.backward(grad)
    expected = rms_norm_backward.reference(grad.double(), x.detach().double(), weight.detach().double())
    torch.testing.assert_close(x.grad.double(), expected.x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weight.grad.double(), expected.weight, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_compile_with_gradients():
    x, weight, up = torch.randn(4, 32, requires_grad=True), torch.randn(32), torch.randn(4, 32)

    @torch.compile(fullgraph=True)
    def f(x):
        with opkit.use_backend("numba"):
            return swiglu(rms_norm(x, weight).y + 1, up)

    f(x).sum().backward()
    compiled, x.grad = x.grad, None
    with opkit.use_backend("reference"):
        swiglu(rms_norm(x, weight).y + 1, up).sum().backward()
    torch.testing.assert_close(compiled, x.grad, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- as a plugin


def test_the_plugin_is_found_loaded_and_named():
    (plugin,) = [p for p in opkit.plugins.list() if p.distribution == "opkit-numba"]
    assert (plugin.name, plugin.entry_point, plugin.status) == ("numba", "opkit_numba", "loaded")
    for op in OPS.values():
        (kernel,) = [k for k in op.kernels if k.backend == "numba"]
        assert kernel.source == f"opkit-numba {plugin.version} (plugin numba)"


def test_numba_is_selected_on_request_and_comes_after_native_kernels_otherwise():
    x, weight = torch.ones(2, 4), torch.ones(4)
    assert rms_norm.explain(x, weight).selected == "numba"
    with opkit.use_backend():
        backends = [c.backend for c in rms_norm.explain(x, weight).candidates]
    assert [b for b in backends if b in ("cpp", "numba", "reference")] == ["cpp", "numba", "reference"]


def test_dtypes_that_numpy_lacks_are_left_to_others_with_the_reason():
    x = torch.ones(2, 4, dtype=torch.bfloat16)
    (candidate,) = [c for c in rms_norm.explain(x, x[0]).candidates if c.backend == "numba"]
    assert (candidate.status, candidate.reason) == (
        "rejected",
        "dtype bfloat16 is not among float32, float64",
    )
    with pytest.raises(opkit.NoKernelError, match="numba: dtype bfloat16 is not among float32, float64"):
        rms_norm(x, x[0])
    with opkit.use_backend("numba"):
        assert rms_norm(x, x[0]).y.dtype == torch.bfloat16


def test_numba_is_imported_by_the_first_kernel_that_runs_and_forked_children_live():
    """A child that is forked after the kernels ran can run them too: they start no threads."""
    code = """
import os, sys, torch, opkit
from opkit_kernels import swiglu
x = torch.randn(64)
print([k.backend for k in swiglu.kernels][:2], "opkit_numba" in sys.modules)
with opkit.use_backend("numba"):
    print(swiglu.explain(x.bfloat16(), x.bfloat16()).selected, "opkit_numba" in sys.modules)
    expected = swiglu(x, x)
    print("numba" in sys.modules, flush=True)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(swiglu(x, x), expected) else 1)
    print("status", os.waitpid(child, 0)[1])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    lines = ["['cpp', 'numba'] False", "cpp False", "True", "status 0"]
    assert done.stdout.splitlines() == lines, done.stderr


def test_several_threads_run_the_kernels_at_once():
    x, weight = torch.randn(200, 256), torch.randn(256)
    expected = rms_norm(x, weight).y
    results = []

    def work():
        with opkit.use_backend("numba", strict=True):
            results.extend(torch.equal(rms_norm(x, weight).y, expected) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 200
