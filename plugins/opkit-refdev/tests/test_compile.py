"""torch.compile for the device, and a kernel in its language."""

from __future__ import annotations

import pytest
import torch

import opkit

DEVICE = "refdev"


def model(x, w):
    return torch.nn.functional.gelu(x @ w).softmax(-1).sum(0) * 2


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_code_gives_the_same_values_and_gradients(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    for rows in (8, 5):
        w = torch.randn(16, 4, dtype=torch.float64, device=DEVICE)
        results = []
        for function in (model, compiled):
            x = (
                torch.linspace(-1, 1, rows * 16, dtype=torch.float64, device=DEVICE)
                .view(rows, 16)
                .requires_grad_()
            )
            y = function(x, w)
            (grad,) = torch.autograd.grad(y.pow(2).sum(), x)
            assert (y.device, grad.device) == (x.device, x.device)
            results.append((y.detach().cpu(), grad.cpu()))
        torch.testing.assert_close(results[1], results[0])


def test_inductor_runs_its_own_kernels(tmp_path):
    from torch._inductor.utils import run_and_get_code

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: (x * 2 + 1).relu().sum(-1), fullgraph=True)
    result, (code, *_) = run_and_get_code(compiled, torch.ones(4, 5, device=DEVICE))
    assert result.cpu().tolist() == [15] * 4
    assert "cpp_fused" in code
    assert "empty_strided" in code


SOURCE = """
#include <opkit/kernel.h>
void triple(opkit::Tensor x, opkit::Tensor y) {
  for (int64_t i = 0; i < x.numel(); ++i) y.data<float>()[i] = 3 * x.data<float>()[i];
}
"""


def test_a_kernel_in_the_devices_language(tmp_path):
    @opkit.op("refdev_test::triple", shapes="*b -> *b")
    def triple(x: torch.Tensor) -> torch.Tensor:
        return x * 3

    source = tmp_path / "triple.refdev"
    source.write_text(SOURCE)
    triple.register_kernel(DEVICE, opkit.cpp.kernel(source))
    x = torch.arange(4.0, device="refdev:1")
    with opkit.use_backend(DEVICE, strict=True):
        found = triple(x)
    assert found.device == x.device
    assert found.cpu().tolist() == [0, 3, 6, 9]
    assert "refdev" in str(triple.explain(x))
