"""What a report says of the machine, and the wait for the core that runs the ops."""

from __future__ import annotations

import threading

import torch

import opkit
from opkit.bench import machine
from opkit.dispatch import native


def test_a_machine_is_its_processor_its_threads_and_versions():
    found = machine.described("cpu")
    assert found["threads"] == torch.get_num_threads()
    assert found["torch"] == torch.__version__
    assert found["opkit"] == opkit.__version__
    assert found["calls"] in ("native core", "Python")
    assert found["processor"]
    assert set(machine.MUST_AGREE) <= set(found)


def test_no_name_of_a_host_or_user_is_kept():
    assert set(machine.described("cpu")) == {
        "processor", "architecture", "device", "threads", "calls", "torch", "python", "opkit",
    }  # fmt: skip


def test_measuring_waits_until_the_core_is_there(monkeypatch):
    waiting = []
    monkeypatch.setattr(native, "need", lambda: None)
    monkeypatch.setattr(native, "is_off", lambda: False)
    monkeypatch.setattr(native, "when_ready", waiting.append)
    thread = threading.Thread(target=machine.settle)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    waiting[0]()
    thread.join(10)
    assert not thread.is_alive()


def test_measuring_does_not_wait_for_a_core_that_will_not_come(monkeypatch):
    monkeypatch.setattr(native, "need", lambda: None)
    monkeypatch.setattr(native, "is_off", lambda: True)
    monkeypatch.setattr(native, "when_ready", lambda callback: None)
    machine.settle()
