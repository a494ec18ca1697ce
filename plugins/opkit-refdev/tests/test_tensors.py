"""Tensors on the device: made, copied, viewed, saved, and computed with as on the CPU."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

DEVICE = "refdev"


def test_copies_keep_lazy_conjugates_and_negations():
    x = torch.randn(3, 4, dtype=torch.complex128)
    there = x.to(DEVICE)
    for view in (
        lambda t: t.conj(),
        lambda t: t.conj().imag,
        lambda t: t.mT.conj(),
        lambda t: t.conj()[1:, ::2],
    ):
        expected, found = view(x), view(there)
        assert (found.is_conj(), found.is_neg()) == (expected.is_conj(), expected.is_neg())
        torch.testing.assert_close(found.cpu(), expected)
        torch.testing.assert_close(found.clone().cpu(), expected.clone())
        target = torch.empty_like(expected, device=DEVICE)
        torch.testing.assert_close(target.copy_(found).cpu(), expected)
        torch.testing.assert_close(target.copy_(expected).cpu(), expected.resolve_conj())


@pytest.mark.parametrize("name", ["fft", "ifft", "rfft", "irfft", "hfft", "ihfft"])
def test_fft_forward_and_backward(name):
    function = getattr(torch.fft, name)
    x = torch.randn(2, 8, dtype=torch.float64 if name in ("rfft", "ihfft") else torch.complex128)
    results = []
    for device in ("cpu", DEVICE):
        leaf = x.to(device).requires_grad_()
        y = function(leaf)
        (grad,) = torch.autograd.grad(y.abs().sum(), leaf)
        results.append((y.detach().cpu(), grad.cpu()))
    torch.testing.assert_close(results[1], results[0])


def test_views_share_memory():
    x = torch.zeros(4, 6, device=DEVICE)
    for view in (
        x[1:3, ::2],
        x.t(),
        x.view(24),
        x.unfold(1, 2, 2),
        x.as_strided((2, 2), (6, 1)),
        x.expand(2, 4, 6),
    ):
        assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    x.t()[2].fill_(5)
    assert x.cpu()[:, 2].tolist() == [5] * 4
    assert torch.view_as_real(torch.ones(2, dtype=torch.complex64, device=DEVICE)).shape == (2, 2)


def test_between_devices():
    x = torch.arange(6.0, device="refdev:1").view(2, 3)
    assert (x.to("refdev:0") + 1).device == torch.device("refdev:0")
    with torch.refdev.device(1):
        assert torch.ones(1, device=DEVICE).device.index == 1
        assert torch.refdev.current_device() == 1 == torch.accelerator.current_device_index()
    assert torch.refdev.current_device() == 0
    with pytest.raises(RuntimeError, match="refdev:2 does not exist; expected an index from 0 to 1"):
        torch.ones(1, device="refdev:2")


def test_resizing_keeps_what_fits():
    x = torch.arange(4.0, device=DEVICE)
    x.resize_(8)[4:] = 1
    assert x.cpu().tolist() == [0, 1, 2, 3, 1, 1, 1, 1]
    out = torch.empty(0, device=DEVICE)
    torch.add(x, 1, out=out)
    assert out.cpu().tolist() == [1, 2, 3, 4, 2, 2, 2, 2]


def test_saving_and_loading(tmp_path):
    model = nn.Linear(3, 2).to(DEVICE)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for target in (None, "cpu", "refdev:1"):
        loaded = torch.load(tmp_path / "model.pt", map_location=target)
        assert loaded["weight"].device == torch.device(target or "refdev:0")
        torch.testing.assert_close(loaded["weight"].cpu(), model.weight.detach().cpu())
    buffer = io.BytesIO()
    torch.save(torch.ones(2), buffer)
    buffer.seek(0)
    assert torch.load(buffer, map_location=DEVICE).device.type == DEVICE
    other = copy.deepcopy(model)
    other.weight.data.zero_()
    assert model.weight.abs().sum() > 0
    assert other.weight.device == model.weight.device


def train(device, make, x, steps=3):
    torch.manual_seed(0)
    model = make().double().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        y = model(x.to(device))
        (y[0] if isinstance(y, tuple) else y).pow(2).sum().backward()
        optimizer.step()
    return [p.detach().cpu() for p in model.parameters()]


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)), (5, 4)),
        (
            lambda: nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.BatchNorm2d(4), nn.ReLU()),
            (2, 2, 6, 6),
        ),
        (lambda: nn.ConvTranspose1d(2, 3, 3, stride=2, bias=False), (2, 2, 5)),
        (lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True), (5, 2, 3)),
        (lambda: nn.LSTM(3, 4, bias=False), (5, 2, 3)),
        (lambda: nn.GRU(3, 4, num_layers=2), (5, 2, 3)),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (2, 5, 8)),
    ],
    ids=["mlp", "convolution", "transposed", "lstm", "lstm-without-bias", "gru", "transformer"],
)
def test_training_is_that_of_the_cpu(make, shape):
    x = torch.randn(shape, dtype=torch.float64)
    for found, expected in zip(train(DEVICE, make, x), train("cpu", make, x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_attention():
    q, k, v = torch.randn(3, 2, 4, 8, 16, dtype=torch.float64)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    found = nn.functional.scaled_dot_product_attention(
        q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), is_causal=True
    )
    torch.testing.assert_close(found.cpu(), expected)


def test_a_forked_child_can_use_it(run):
    said = run(
        """
        import os, torch
        x = torch.ones(3, device="refdev")
        child = os.fork()
        if child == 0:
            ok = (x + torch.ones(3, device="refdev")).cpu().tolist() == [2, 2, 2]
            os._exit(0 if ok else 1)
        print(os.waitpid(child, 0)[1])
        """
    )
    assert said == "0\n"
