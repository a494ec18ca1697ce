"""opkit::rms_norm_quant: rms_norm and quant_fp8 in one, for every backend."""

from __future__ import annotations

import pytest
import torch

import opkit
from opkit_kernels import rms_norm_quant
from tests.kernels.kernel_cases import DTYPES, LAYOUTS, SHAPES, layout_name, shape_name


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_quant_rounds_to_the_nearest(device, dtype, shape, layout):
    x = layout(torch.randn(shape).to(dtype).to(device))
    weight = layout(torch.randn(shape[-1:]).to(dtype).to(device))
    q, scale, rstd = (out.cpu() for out in rms_norm_quant(x, weight, 1e-5))
    wide = x.cpu().double()
    true_rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    y = wide * true_rstd * weight.cpu().double()
    torch.testing.assert_close(rstd.double(), true_rstd, rtol=1e-6, atol=0, equal_nan=True)
    assert q.shape == x.shape
    assert scale.shape == rstd.shape
    if shape[-1]:
        largest = y.abs().amax(-1, keepdim=True)
        torch.testing.assert_close(scale.double(), (largest / 448).clamp_min(2.0**-126), rtol=2e-6, atol=0)
    exact = y / scale.double()
    error = (q.double() - exact).abs()
    assert (error <= torch.maximum(exact.abs() * 2.0**-4, torch.tensor(2.0**-10)) * (1 + 1e-4)).all()


def test_rms_norm_quant_of_extreme_rows(device):
    x = torch.tensor([[0.0, 0.0], [1.0, float("nan")]], device=device)
    q, scale, rstd = (out.cpu() for out in rms_norm_quant(x, torch.ones(2, device=device)))
    assert q[0].float().tolist() == [0, 0]
    assert scale[0] == 2.0**-126
    assert q[1].float().isnan().all()
    assert scale[1].isnan()
    assert rstd[1].isnan()


def test_rms_norm_quant_takes_a_weight_of_another_dtype(device):
    x, weight = torch.randn(5, 33).to(device), torch.randn(33).to(device)
    one, other = (
        rms_norm_quant(x.bfloat16(), weight.bfloat16().float()),
        rms_norm_quant(x.bfloat16(), weight.bfloat16()),
    )
    assert torch.equal(one.q.view(torch.uint8), other.q.view(torch.uint8))


def test_rms_norm_quant_has_no_gradient(device):
    x = torch.ones(3, 4, device=device, requires_grad=True)
    with pytest.raises(opkit.GradientError, match="opkit::rms_norm_quant: it has no gradient formula"):
        rms_norm_quant(x, x[0].detach()).scale.sum().backward()


def test_rms_norm_quant_refuses_a_weight_of_another_size(device):
    with pytest.raises(opkit.ShapeError, match="weight"):
        rms_norm_quant(torch.ones(3, 4, device=device), torch.ones(5, device=device))
