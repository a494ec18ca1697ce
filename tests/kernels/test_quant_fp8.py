"""opkit::quant_fp8: scales, and numbers to the bit, for every backend."""

from __future__ import annotations

import pytest
import torch

import opkit
from opkit_kernels import quant_fp8
from tests.kernels.kernel_cases import DTYPES, INTERPRETS, LAYOUTS, layout_name, shape_name

FP8 = torch.float8_e4m3fn
SHAPES = ((0,), (1,), (7,), (0, 5), (3, 0), (3, 1), (2, 3, 65), (1, 300), (4, 128), (5, 257), (2, 5000))


def expected(x, group):
    """Return q in float32 and the scale, by the definition: in double, group by group."""
    wide = x.double()
    if group is None:
        largest = wide.abs().max() if x.numel() else torch.zeros((), dtype=torch.float64)
        scale = (largest / 448).clamp_min(2.0**-126)
        return wide / scale, scale
    n = x.shape[-1]
    each = n if group == -1 else group
    count = 1 if group == -1 else -(-n // group)
    parts = [wide[..., i * each : (i + 1) * each] for i in range(count)]
    scales = [
        (p.abs().amax(-1, keepdim=True) if p.shape[-1] else wide.new_zeros(*x.shape[:-1], 1)) / 448
        for p in parts
    ]
    if not parts:
        return wide, wide.new_zeros(*x.shape[:-1], 0)
    scales = [s.clamp_min(2.0**-126) for s in scales]
    return torch.cat([p / s for p, s in zip(parts, scales)], -1), torch.cat(scales, -1)


@pytest.mark.parametrize("group", [None, -1, 1, 5, 128])
@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
@pytest.mark.parametrize("shape", SHAPES, ids=shape_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quant_fp8_rounds_to_the_nearest(device, dtype, shape, layout, group):
    if INTERPRETS and (len(shape) > 1 and shape[-1] == 5000) and group in (1, 5):
        pytest.skip("thousands of groups")
    x = layout((torch.randn(shape) * 10).to(dtype).to(device))
    q, scale = (out.cpu() for out in quant_fp8(x, group))
    exact, exact_scale = expected(x.cpu(), group)
    assert q.dtype == FP8
    assert q.shape == x.shape
    assert scale.dtype == torch.float32
    assert scale.shape == exact_scale.shape
    torch.testing.assert_close(scale.double(), exact_scale, rtol=2e-7, atol=0)
    # Half a step of 3 bits of mantissa, or of the smallest numbers.
    error = (q.double() - exact).abs()
    assert (error <= torch.maximum(exact.abs() * 2.0**-4, torch.tensor(2.0**-10)) * (1 + 1e-5)).all()
    if dtype != torch.float64:
        reference = quant_fp8.reference(x.cpu(), group)
        assert torch.equal(q.view(torch.uint8), reference.q.view(torch.uint8))
        assert torch.equal(scale, reference.scale)


def test_quant_fp8_rounds_halves_to_even_and_keeps_every_number(device):
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    every = every[every.isfinite()].to(device)
    q, scale = quant_fp8(every)
    assert scale == 1
    assert torch.equal(q.cpu().float(), every.cpu())
    positive = every[every >= 0].sort().values
    halves = torch.cat([(positive[:-1] + positive[1:]) / 2, positive[-1:]])
    q, _ = quant_fp8(halves)
    assert (q.cpu().view(torch.uint8) % 2 == 0).all()


@pytest.mark.parametrize("group", [None, -1, 2])
def test_quant_fp8_of_what_is_not_finite(device, group):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([[1.0, nan], [1.0, -inf], [0.0, 0.0], [-1e-44, 1e-44]], device=device)
    for rows in (x[:1], x[1:2], x[2:3], x[3:]):
        q, scale = (out.cpu() for out in quant_fp8(rows, group))
        reference = quant_fp8.reference(rows.cpu(), group)
        assert torch.equal(scale.nan_to_num(-1), reference.scale.nan_to_num(-1))
        assert torch.equal(q.float().nan_to_num(-1), reference.q.float().nan_to_num(-1))
    q, scale = quant_fp8(x[2:3], group)
    assert (scale == 2.0**-126).all()
    assert (q.float() == 0).all()


@pytest.mark.parametrize("group", [0, -2])
def test_quant_fp8_refuses_other_groups(device, group):
    with pytest.raises(opkit.ArgumentError, match=f"argument group is {group}; expected None"):
        quant_fp8(torch.ones(3, 4, device=device), group)


def test_quant_fp8_refuses_groups_of_a_number(device):
    with pytest.raises(opkit.ArgumentError, match="x has no dimensions"):
        quant_fp8(torch.ones((), device=device), -1)
    assert quant_fp8(torch.ones((), device=device)).q.float() == 448


def test_quant_fp8_has_no_gradient(device):
    x = torch.ones(3, 4, device=device, requires_grad=True)
    _, scale = quant_fp8(x, -1)
    with pytest.raises(opkit.GradientError, match="opkit::quant_fp8: it has no gradient formula"):
        scale.sum().backward()


@pytest.mark.parametrize("group", [None, -1, 3])
def test_quant_fp8_compiles_once_for_all_sizes(group):
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: quant_fp8(x * 2, group), backend=counter, fullgraph=True, dynamic=True)
    for rows, n in ((3, 8), (4, 9), (7, 100)):
        x = torch.randn(rows, n)
        found, wanted = compiled(x), quant_fp8(x * 2, group)
        assert torch.equal(found.q.view(torch.uint8), wanted.q.view(torch.uint8))
        assert torch.equal(found.scale, wanted.scale)
    assert counter.frame_count == 1
