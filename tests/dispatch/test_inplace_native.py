"""Native kernels that overwrite arguments behind a functional contract."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code

import opkit

pytestmark = [
    pytest.mark.usefixtures("registry"),
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled"),
]

X = torch.linspace(-1, 1, 12).reshape(3, 4)
W = torch.linspace(1, 2, 4)

SOURCE = """#include <opkit/kernel.h>
void scale(opkit::Tensor x, opkit::Tensor w, opkit::Tensor y) {
  float* in = x.data<float>();
  const float* by = w.data<float>();
  float* out = y.data<float>();
  for (int64_t i = 0; i < x.numel(); ++i) {
    out[i] = in[i] * by[i % w.numel()];
    in[i] = %s;
  }
}
"""


@pytest.fixture(autouse=True)
def without_caches():
    with torch.compiler.config.patch(force_disable_caches=True):
        yield


@pytest.fixture(params=["result", "scratch"])
def scale(request):
    """An op whose only kernel leaves the result in x, or garbage."""

    @opkit.op("t::scale", shapes="*b n, n -> *b n")
    def scale(x: Tensor, w: Tensor) -> Tensor:
        raise AssertionError("the kernel takes these calls")

    holds = request.param == "result"
    scale.register_kernel(
        "cpu",
        opkit.cpp.kernel(SOURCE.replace("%s", "out[i]" if holds else "-99")),
        inplace=["x"] if holds else {"x": None},
    )
    scale.overwritten = lambda x: torch.equal(x, X * W) if holds else bool((x == -99).all())
    return scale


def test_plain_call_leaves_the_argument_alone(scale):
    x = X.clone()
    assert scale.explain(x, W).selected == "cpp"
    assert torch.equal(scale(x, W), X * W)
    assert torch.equal(x, X)


def test_maybe_inplace_gives_the_kernel_the_buffer(scale):
    x = X.clone()
    y = scale.maybe_inplace(x, W)
    assert torch.equal(y, X * W)
    assert scale.overwritten(x)


def test_maybe_inplace_keeps_what_is_used_elsewhere(scale):
    x = X.clone()
    assert torch.equal(scale.maybe_inplace(x, x[0]), X * X[0])
    wide = X[0, :1].expand(4)
    assert torch.equal(scale.maybe_inplace(wide, W), X[0, :1] * W)
    assert torch.equal(wide, X[0, :1].expand(4))


def copies(function, *args):
    """Return what a compiled function returns, and how many buffers its body makes."""
    with torch.no_grad():
        result, codes = run_and_get_code(torch.compile(function, fullgraph=True), *args)
    body = codes[0][codes[0].index("def call") :]
    return result, len(re.findall(r"= empty_strided", body))


def test_compiled_graph_copies_what_lives_on_only(scale):
    x = X.clone()
    (y, z), live = copies(lambda x: (scale(t := x.sin(), W), t), x)
    torch.testing.assert_close(y, X.sin() * W, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z, X.sin(), rtol=1e-6, atol=1e-6)
    y, dead = copies(lambda x: scale(x.sin(), W), x)
    torch.testing.assert_close(y, X.sin() * W, rtol=1e-6, atol=1e-6)
    assert dead < live
    y, _ = copies(lambda x: scale(x, W), x)  # x is the caller's
    assert torch.equal(y, X * W)
    assert torch.equal(x, X)
