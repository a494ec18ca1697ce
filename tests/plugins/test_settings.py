"""torch's settings are as they were after a plugin was called."""

from __future__ import annotations

import os

import pytest
import torch

from opkit.plugins.settings import Settings

CHANGES = {
    "torch.set_default_dtype": (lambda: torch.set_default_dtype(torch.float64), torch.get_default_dtype),
    "torch.set_default_device": (lambda: torch.set_default_device("meta"), lambda: torch.ones(1).device),
    "torch.set_grad_enabled": (lambda: torch.set_grad_enabled(False), torch.is_grad_enabled),
    "torch.set_num_threads": (
        lambda: torch.set_num_threads(torch.get_num_threads() + 1),
        torch.get_num_threads,
    ),
    "torch.set_float32_matmul_precision": (
        lambda: torch.set_float32_matmul_precision("medium"),
        torch.get_float32_matmul_precision,
    ),
    "torch.use_deterministic_algorithms": (
        lambda: torch.use_deterministic_algorithms(True, warn_only=True),
        torch.is_deterministic_algorithms_warn_only_enabled,
    ),
    "torch.manual_seed": (
        lambda: torch.manual_seed(torch.initial_seed() + 1),
        lambda: torch.get_rng_state().tolist(),
    ),
    "os.chdir": (lambda: os.chdir("/"), os.getcwd),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_is_put_back_and_named(name):
    change, look = CHANGES[name]
    before = look()
    settings = Settings()
    change()
    assert look() != before
    assert settings.put_back() == [name]
    assert look() == before
    assert settings.put_back() == []


def test_a_declared_setting_stays():
    settings = Settings()
    torch.set_default_dtype(torch.float64)
    assert settings.put_back(["torch.set_default_dtype"]) == ["torch.set_default_dtype"]
    assert torch.get_default_dtype() == torch.float64
    settings.put_back()
    assert torch.get_default_dtype() == torch.float32


def test_a_default_device_that_was_set_before_is_set_again():
    torch.set_default_device("cpu")
    try:
        settings = Settings()
        torch.set_default_device("meta")
        settings.put_back()
        assert torch.ones(1).device.type == "cpu"
    finally:
        torch.set_default_device(None)


def test_random_numbers_go_on_as_if_nobody_had_drawn_any():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    settings = Settings()
    torch.rand(7)
    settings.put_back()
    assert torch.equal(torch.rand(4), expected)


def test_it_works_in_the_middle_of_a_trace():
    from torch._subclasses.fake_tensor import FakeTensorMode

    before = torch.get_rng_state()
    with FakeTensorMode():
        settings = Settings()
        torch.manual_seed(torch.initial_seed() + 1)
        assert settings.put_back() == ["torch.manual_seed"]  # the state is real, whatever tensors are
    assert torch.equal(torch.get_rng_state(), before)


def test_what_cannot_be_put_back_is_said(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    settings = Settings()
    os.chdir("/")
    gone.rmdir()
    (said,) = settings.put_back()
    assert said.startswith("os.chdir (in vain: ")
